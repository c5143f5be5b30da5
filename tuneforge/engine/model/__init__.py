"""The model: layer groups, freezing and its check, the optimizer, devices and FSDP. Knows no run."""
