"""duolect: speech recognition by an acoustic model and a language model, joined in every way the field knows."""

__version__ = "0.1.0"
