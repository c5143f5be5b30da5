"""How folders and lists of images are read: which files are images, what is hidden, what splits are called."""

from __future__ import annotations

IMAGE_EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
     ".avif", ".heic", ".heif")
)  # fmt: skip
"""Extensions of images. The check of files says which formats are not supported, rather than leaving such files out."""

SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"))
"""Folders that systems and archives leave behind; they count as hidden."""

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Splits by the name of a folder or the value of a column."""
