"""Fixtures that the core's tests have too."""

from shared_fixtures import own_cache, plant, shared_cache, tune

__all__ = ["own_cache", "plant", "shared_cache", "tune"]
