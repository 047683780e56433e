"""Models: encoders, CTC, AED and language models, as what they compute and as Scorers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Precision = Literal["float32", "bfloat16", "float16"]


class ModelError(ValueError):
    """A model cannot be loaded or cannot serve as asked; the message is one line: which, why, what to do."""


@contextmanager
def loading(name: str | Path, what: str) -> Iterator[None]:
    """Inside, what transformers raises becomes a ModelError of one line: that `name` does not load as `what`."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: does not load as {what}: {' '.join(str(error).split())[:200]}") from error
