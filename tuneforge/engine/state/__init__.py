"""What a run leaves behind: its folder, checkpoints, records, and how it comes back."""
