"""The demonstration data sets `digits` and `glyphs`: real handwritten digits among other characters."""
