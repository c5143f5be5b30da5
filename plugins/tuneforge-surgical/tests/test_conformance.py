"""The checks of `tuneforge.testing` for the known issues of strategies.

Those that compile or start processes run only with `TUNEFORGE_SLOW_CHECKS=1`.
"""

import os

import pytest
from tuneforge_surgical import AutoRGN, Surgical

from tuneforge.testing import strategy_checks

STRATEGIES = [Surgical, Surgical(block=1, epochs=1, head_epochs=1), AutoRGN]


@pytest.mark.parametrize("check", strategy_checks(*STRATEGIES), ids=str)
def test_strategy_passes_the_check(check):
    check()


@pytest.mark.skipif(not os.environ.get("TUNEFORGE_SLOW_CHECKS"), reason="takes minutes")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns
@pytest.mark.parametrize("check", strategy_checks(Surgical, AutoRGN, slow=True), ids=str)
def test_strategy_passes_the_slow_check(check):
    check()
