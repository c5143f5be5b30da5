"""A run, from its configuration to its folder. It knows neither images nor classes."""
