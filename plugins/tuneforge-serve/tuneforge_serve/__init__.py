"""Production for models fine-tuned with tuneforge: server, model registry with a gate, feedback and retraining.

Names are imported when first used; `__init__.pyi` names them for type checkers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "GateRules": "tuneforge_serve.registry.gate",
    "ModelRegistry": "tuneforge_serve.registry.model_registry",
    "RequestLog": "tuneforge_serve.feedback.request_log",
    "promote": "tuneforge_serve.registry.promotion",
    "retrain": "tuneforge_serve.feedback.retraining",
    "run_gate": "tuneforge_serve.registry.gate",
    "serve": "tuneforge_serve.server.service",
}

__all__ = [*sorted(_MODULE_OF_NAME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'tuneforge_serve' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)


def __dir__() -> list[str]:
    return __all__
