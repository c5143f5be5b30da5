"""Fixtures that the core's tests have too."""

from shared_fixtures import own_cache, plant, tune

__all__ = ["own_cache", "plant", "tune"]
