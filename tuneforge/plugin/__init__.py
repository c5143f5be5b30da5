"""The plugin API: components, options, strategy steps, commands and the registry. It does not import torch.

Names are imported on first use; they stand in `__init__.pyi`.
"""

from tuneforge.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
