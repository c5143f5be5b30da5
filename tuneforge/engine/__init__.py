"""The engine, from the bottom of the stack to its top: storage, data, model, context, feature_cache, loop, session."""
