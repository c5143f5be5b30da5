"""What hooks are given while a run goes on: the run, its process group and its budget."""
