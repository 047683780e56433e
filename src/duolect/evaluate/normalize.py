"""Text normalizers: what is done to reference and hypothesis alike before words are compared."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal, get_args

NormalizerName = Literal["none", "basic", "whisper-english"]

_PACKAGE = "whisper-normalizer"
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})


class NormalizerError(ValueError):
    """There is no such normalizer, or its package is missing."""


@dataclass(frozen=True)
class Normalizer:
    """A function from text to words separated by single spaces, with the name and version that go into a WER's signature."""

    name: str
    version: str
    function: Callable[[str], str] = field(repr=False, compare=False)

    def __call__(self, text: str) -> str:
        return " ".join(self.function(text).split())

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@functools.cache
def normalizer(name: NormalizerName) -> Normalizer:
    """The normalizer of that name; NormalizerError if it is unknown or its package is not installed.

    none: white space folded, nothing else. basic: also lower case, and punctuation (apostrophes and hyphens inside words aside) removed;
    any language. whisper-english: Whisper's (arXiv 2212.04356, appendix C): also fillers, contractions, numbers, British spelling. The Open
    ASR Leaderboard has its own fork of that one, which differs: results of one are not results of the other.
    """
    if name == "none":
        return Normalizer("none", "1", lambda text: text)
    if name == "basic":
        return Normalizer("basic", "1", _basic)
    if name == "whisper-english":
        try:
            from whisper_normalizer.english import EnglishTextNormalizer
        except ImportError as error:
            raise NormalizerError(f"normalizer whisper-english needs the package {_PACKAGE}: pip install {_PACKAGE}==0.1.15") from error
        return Normalizer("whisper-english", metadata.version(_PACKAGE), EnglishTextNormalizer())
    raise NormalizerError(f"normalizer {name!r} is unknown; known: {', '.join(get_args(NormalizerName))}")


def _basic(text: str) -> str:
    text = unicodedata.normalize("NFC", text).lower().translate(_APOSTROPHES)
    kept = []
    for i, c in enumerate(text):
        if c in "'-":
            inside = 0 < i < len(text) - 1 and text[i - 1].isalnum() and text[i + 1].isalnum()
            kept.append(c if inside else "" if c == "'" else " ")
        else:
            kept.append(" " if unicodedata.category(c)[0] in "PSZC" else c)
    return "".join(kept)
