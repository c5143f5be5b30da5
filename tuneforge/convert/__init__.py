"""Foreign weight files, made into safetensors in a sandbox that executes nothing of them."""
