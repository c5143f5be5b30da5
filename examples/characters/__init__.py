"""Draws characters from fonts and from the strokes of handwritten digits, for `render_characters.py`."""
