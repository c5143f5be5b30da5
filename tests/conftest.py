"""Fixtures of the core's tests; plugins take the same ones from `shared_fixtures`."""

from shared_fixtures import own_cache, plant, shared_cache, tune

__all__ = ["own_cache", "plant", "shared_cache", "tune"]
