"""Strategies of tuneforge: surgical fine-tuning and Auto-RGN (Lee et al. 2023, arXiv 2210.11466)."""

from tuneforge_surgical.auto_rgn import AutoRGN
from tuneforge_surgical.surgical import Surgical

__all__ = ["AutoRGN", "Surgical"]
