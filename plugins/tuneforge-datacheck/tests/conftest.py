"""Fixtures shared with the tests of the core."""

from shared_fixtures import own_cache, plant, shared_cache, tune

__all__ = ["own_cache", "plant", "shared_cache", "tune"]
