"""Built-in data sets: images, tables and arrays, the demonstration digits, and retraining data."""
