"""A served model, tested from outside."""
