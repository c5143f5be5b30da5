"""Comparison of strategies at equal cost, and the learning rate range test.

Names are imported when first used.
"""

from tuneforge.lazy_names import lazy_names

_NAMES_OF_MODULE = {
    "tuneforge.comparison.lr_range_test": ("lr_find",),
    "tuneforge.comparison.study": ("compare",),
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES_OF_MODULE)
