"""Samples: splits, the epoch sampler, the batch loader and its worker processes. Knows no run."""
