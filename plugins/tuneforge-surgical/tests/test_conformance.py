"""The kit that tuneforge has for every strategy: rows 1 to 13 of the known defects of fine-tuning tools.

Rows 9 and 10, which compile and start processes, with `TUNEFORGE_SLOW_CHECKS=1`.
"""

import os

import pytest
from tuneforge_surgical import AutoRGN, Surgical

from tuneforge.testing import strategy_checks

STRATEGIES = [Surgical, Surgical(block=1, epochs=1, head_epochs=1), AutoRGN]


@pytest.mark.parametrize("check", strategy_checks(*STRATEGIES), ids=str)
def test_conforms(check):
    check()


@pytest.mark.skipif(not os.environ.get("TUNEFORGE_SLOW_CHECKS"), reason="takes minutes")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("check", strategy_checks(Surgical, AutoRGN, slow=True), ids=str)
def test_conforms_when_compiled_and_on_two_ranks(check):
    check()
