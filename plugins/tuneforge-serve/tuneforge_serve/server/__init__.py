"""The HTTP server: the Open Inference Protocol, `/predict` for raw inputs, feedback, monitoring and pages."""
