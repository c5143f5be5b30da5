"""Training and evaluation: what one step of a strategy does."""
