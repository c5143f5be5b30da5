"""The verbs of the command line: serve, promote, models, test-endpoint and retrain."""
