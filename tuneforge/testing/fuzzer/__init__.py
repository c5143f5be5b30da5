"""The parts of the fuzzer: random programs, their runs, the relations between them, and planted defects."""
