"""Comparison of strategies at equal cost, and the learning rate range test.

Names are imported when first used.
"""

from tuneforge.lazy_names import lazy_names

_NAMES_OF_MODULE = {
    "tuneforge.comparison.lr_range_test": ("lr_find",),
    "tuneforge.comparison.paired_tests": (
        "paired_t_test",
        "PairedTest",
    ),
    "tuneforge.comparison.study": ("compare",),
    "tuneforge.engine.loop.metric_set": (
        "resolve_monitor",
        "scalar_metrics",
    ),
    "tuneforge.engine.session.messages": ("format_metrics",),
}

__getattr__, __dir__, __all__ = lazy_names(__name__, _NAMES_OF_MODULE)
