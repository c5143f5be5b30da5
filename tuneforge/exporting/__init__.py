"""Export of a finished run: bundles, formats, the parity check, loading for inference, and reference data.

Names are imported when first used.
"""

from tuneforge.lazy_names import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
