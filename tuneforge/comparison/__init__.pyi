"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge.comparison.lr_range_test import lr_find as lr_find
from tuneforge.comparison.study import compare as compare

__all__: list[str]
