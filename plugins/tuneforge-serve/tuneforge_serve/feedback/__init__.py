"""What production says comes back: kept answers, labels, drift, and the next tuning."""
