"""The feature cache: where the frozen backbone ends, how its features are extracted, and where they are stored."""
