"""Tabular data sources: arrays, tensors, torch datasets, CSV files."""
