"""Checks that several components share for the values of their options."""

from tuneforge.plugin import Check

FRACTION = Check("greater than 0 and less than 1", lambda value: bool(0 < value < 1))
FRACTION_OR_ZERO = Check(
    "at least 0 and less than 1", lambda value: bool(0 <= value < 1), {"minimum": 0, "exclusiveMaximum": 1}
)
RARE_CLASSES_HELP = (
    "What to do about a class with too few samples for every split: raise an error, train on all of them, or drop it."
)
POSITIVE_NUMBERS = Check("numbers greater than 0", lambda values: all(value > 0 for value in values))
POSITIVE_STDS = Check("numbers greater than 0", lambda values: bool(values) and min(values) > 0)
DELIMITER = Check("one character", lambda text: len(text) == 1, {"minLength": 1, "maxLength": 1})
