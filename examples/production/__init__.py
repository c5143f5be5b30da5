"""The domains and the clients of `production_loop.py`."""
