"""The OpenAPI document of the server: `openapi.json` with the names of the served models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import tuneforge_serve

_FEEDBACK_PATHS = ("/feedback", "/review", "/review/next", "/monitoring")


def build_document(model_names: Sequence[str], *, feedback: bool) -> dict[str, Any]:
    """Return the OpenAPI document.

    Args:
        model_names: The names of the served models.
        feedback: Whether the server logs requests and accepts labels.
    """
    document: dict[str, Any] = json.loads(files("tuneforge_serve.server").joinpath("openapi.json").read_text("utf-8"))
    document["info"]["version"] = tuneforge_serve.__version__
    document["info"]["description"] = f"Models: {', '.join(model_names) or 'none is loaded'}."
    if model_names:
        document["components"]["schemas"]["ModelName"]["enum"] = list(model_names)
    if not feedback:
        document["paths"] = {path: each for path, each in document["paths"].items() if path not in _FEEDBACK_PATHS}
    return document
