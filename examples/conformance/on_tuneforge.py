"""tuneforge: the checks of its conformance kit, on the strategy that does what the case asks for."""

from case import Fails

import tuneforge as tf

STRATEGY = "freeze-then-unfreeze"


class Tuneforge:
    """Each row is one check of the kit, or several."""

    name = "tuneforge"

    def version(self) -> str:
        """Of the package."""
        return tf.__version__

    def row(self, number: int) -> None:
        """Run the checks whose docstring names the row."""
        from tuneforge.testing import strategy_checks

        checks = [*strategy_checks(STRATEGY), *strategy_checks(STRATEGY, slow=True)]
        for each in checks:
            if (each.check.__doc__ or "").startswith((f"Row {number}:", f"Row {number},")):
                try:
                    each()
                except AssertionError as error:
                    raise Fails(str(error)) from error


def peers() -> list[Tuneforge]:
    """What is installed, where it has the kit."""
    try:
        import tuneforge.testing  # noqa: F401
    except ImportError:
        return []
    return [Tuneforge()]
