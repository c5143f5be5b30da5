"""Components of tuneforge: classification networks of timm, and weights that installed packages bring."""

from tuneforge_timm.classifier import Timm
from tuneforge_timm.packaged_weights import PackagedWeights

__all__ = ["PackagedWeights", "Timm"]
