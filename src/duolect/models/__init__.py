"""Models: encoders, CTC, AED and language models, as what they compute and as Scorers."""

from typing import Literal

Precision = Literal["float32", "bfloat16", "float16"]


class ModelError(ValueError):
    """A model cannot be loaded or cannot serve as asked; the message is one line: which, why, what to do."""
