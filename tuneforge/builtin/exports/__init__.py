"""Forms that a tuned model leaves its run in."""
