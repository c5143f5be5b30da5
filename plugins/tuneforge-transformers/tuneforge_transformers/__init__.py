"""Components of tuneforge: models of the transformers library, text datasets, and LoRA through peft."""

from tuneforge_transformers.classifier import Transformers
from tuneforge_transformers.lora import LoRA
from tuneforge_transformers.text import TextInputs
from tuneforge_transformers.text_data import TextData

__all__ = ["LoRA", "TextData", "TextInputs", "Transformers"]
