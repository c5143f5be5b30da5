"""Images: from folders, lists and torchvision, checked, decoded in batches, augmented."""
