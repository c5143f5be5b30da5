"""Check image data before training: unusable files, duplicates and near-duplicates, class issues, label issues."""
