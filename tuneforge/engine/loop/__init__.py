"""Training, evaluation and the other steps of a strategy."""
