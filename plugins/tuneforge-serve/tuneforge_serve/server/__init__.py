"""The HTTP server: Open Inference Protocol for programs, `/predict` and a page for people."""
