"""What finished runs say: the figures of a run as one page."""
