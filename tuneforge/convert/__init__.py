"""Conversion of weight files of torch.save to safetensors, in a sandbox that executes nothing in them."""
