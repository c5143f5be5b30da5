"""What hooks are given while a run goes on: the run, its state, its batches, its forward pass and its process group."""
