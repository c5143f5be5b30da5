"""What `production_loop.py` is made of: worlds that change, and clients of a server."""
