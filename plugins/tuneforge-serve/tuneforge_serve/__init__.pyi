"""Public names for type checkers; `__init__.py` imports them when first used."""

from tuneforge_serve.feedback.request_log import RequestLog as RequestLog
from tuneforge_serve.feedback.retraining import retrain as retrain
from tuneforge_serve.registry.gate import GateRules as GateRules
from tuneforge_serve.registry.gate import run_gate as run_gate
from tuneforge_serve.registry.model_registry import ModelRegistry as ModelRegistry
from tuneforge_serve.registry.promotion import promote as promote
from tuneforge_serve.server.service import serve as serve

__all__: list[str]
__version__: str
