"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge.comparison.lr_range_test import lr_find as lr_find
from tuneforge.comparison.paired_tests import PairedTest as PairedTest
from tuneforge.comparison.paired_tests import paired_t_test as paired_t_test
from tuneforge.comparison.study import compare as compare
from tuneforge.engine.loop.metric_set import resolve_monitor as resolve_monitor
from tuneforge.engine.loop.metric_set import scalar_metrics as scalar_metrics
from tuneforge.engine.session.messages import format_metrics as format_metrics

__all__: list[str]
