"""A model that leaves the run folder: written, proved to answer as before, read again."""
