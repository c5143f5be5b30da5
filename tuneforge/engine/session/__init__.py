"""A whole run: `Engine`, resume, the run's log, the dry run, and loading a finished run."""
