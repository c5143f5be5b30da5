"""The engine, resume, the records of a run, the dry run, and loading of finished runs."""
