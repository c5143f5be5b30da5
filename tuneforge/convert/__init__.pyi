"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge.convert.weights import ConvertedWeights as ConvertedWeights
from tuneforge.convert.weights import convert_weights as convert_weights

__all__: list[str]
