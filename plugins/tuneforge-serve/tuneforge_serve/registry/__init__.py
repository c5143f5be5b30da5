"""The model registry: numbered versions, the gate that decides about a new champion, and an event log."""
