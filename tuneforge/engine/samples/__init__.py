"""What the engine reads: the splits, their order, batches, workers and given objects."""
