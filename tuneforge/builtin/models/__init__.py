"""Built-in models and adapters of a model's head, input channels and dropout."""
