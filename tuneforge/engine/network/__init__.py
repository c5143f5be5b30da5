"""What the engine trains: the model, what is frozen in it, its optimizer, and the proof."""
