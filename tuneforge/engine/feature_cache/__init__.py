"""The feature cache: where a frozen backbone is cut, how features are extracted, and where they are stored."""
