"""Files of a run: its directory, checkpoints and safetensors, written atomically."""
