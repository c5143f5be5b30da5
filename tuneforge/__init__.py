"""Fine-tune PyTorch models with strategies, verified freezing, exact resume and plugins.

Public names are imported when first used, so that `import tuneforge` imports no torch; they stand in `__init__.pyi`.
"""

from tuneforge.lazy_names import lazy_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
__all__ += ["__version__"]
