"""What a plugin is and how it is found. Nothing here imports torch."""
