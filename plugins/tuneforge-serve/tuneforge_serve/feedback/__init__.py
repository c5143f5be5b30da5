"""Feedback from production: the request log, labels, monitoring, and retraining."""
