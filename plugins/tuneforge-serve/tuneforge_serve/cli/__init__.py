"""Verbs of the command line: serve, promote, models, test-endpoint, retrain."""
