"""The first example: handwritten digits among other characters, and the network that reads them."""
