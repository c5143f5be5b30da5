"""Conversion of weight files of torch.save to safetensors, in a sandbox that executes nothing in them.

Names are imported when first used.
"""

from tuneforge.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
