"""Test a running server: send a split to it and compare the metrics of its predictions with the offline report."""
