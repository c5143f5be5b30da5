import click
import pytest

from tuneforge.plugin.parameter_types import FiniteFloatRange


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "2", "x"])
def test_a_number_that_is_nan_or_out_of_bounds_is_refused(value):
    with pytest.raises(click.BadParameter):
        FiniteFloatRange(0, 1).convert(value, None, None)


def test_a_number_within_bounds_is_returned():
    assert FiniteFloatRange(0, 1).convert("0.25", None, None) == 0.25
