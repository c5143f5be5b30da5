"""Rows: arrays, tensors, data sets given in Python, CSV files."""
