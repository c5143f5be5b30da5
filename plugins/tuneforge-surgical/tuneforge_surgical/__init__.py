"""Surgical fine-tuning and Auto-RGN, after Lee et al. 2023 (arXiv 2210.11466), as strategies of tuneforge."""

from tuneforge_surgical.auto_rgn import AutoRGN
from tuneforge_surgical.surgical import Surgical

__all__ = ["AutoRGN", "Surgical"]
