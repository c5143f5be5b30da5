"""Comparison of strategies at equal cost, and the learning rate range test.

Names are imported when first used.
"""

from tuneforge.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
