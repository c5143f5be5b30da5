"""The frozen prefix: where it ends, what it gave, and where that is kept."""
