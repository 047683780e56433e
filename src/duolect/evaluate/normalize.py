"""Text normalizers: what is done to reference and hypothesis alike before words are compared."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from typing import Literal, get_args

NormalizerName = Literal["none", "basic", "whisper-english"]

_KEPT = 200_000  # words and phrases remembered
_LETTERS = re.compile(r"[a-z]+('[a-z]+)?")
_ACROSS = re.compile(r"'[sd] (been|gone|done|gotta|got)\b")  # contractions that another word decides about
_OTHER, _NUMERIC = "!", "#"
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "`": "'"})


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
    """The normalizer of that name.

    none: white space folded, nothing else. basic: also lower case, and punctuation (apostrophes and hyphens inside words aside) removed;
    any language. whisper-english: Whisper's (arXiv 2212.04356, appendix C): also fillers, contractions, numbers, British spelling. The Open
    ASR Leaderboard has its own fork of that one, which differs: results of one are not results of the other.
    """
    if name == "none":
        return Normalizer("none", "1", lambda text: text)
    if name == "basic":
        return Normalizer("basic", "1", _basic)
    if name == "whisper-english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return Normalizer("whisper-english", metadata.version("whisper-normalizer"), _ByPhrase(EnglishTextNormalizer()))
    raise ValueError(f"normalizer {name!r} is unknown; known: {', '.join(get_args(NormalizerName))}")


class _ByPhrase:
    """Whisper's normalizer with the same results in a twentieth of the time, for the thousands of hypotheses that share their words.

    In a text of letters it changes each word by itself, but for numbers, of which it makes one out of several: so words, and runs of words
    that may have to do with a number, are normalized once and kept. Other texts go to it whole.
    """

    def __init__(self, whole: Callable[[str], str]) -> None:
        self.whole, self.numeric = whole, frozenset(whole.standardize_numbers.words)  # type: ignore[attr-defined]
        self.word, self.run = functools.lru_cache(_KEPT)(self._word), functools.lru_cache(_KEPT)(whole)

    def __call__(self, text: str) -> str:
        words = text.lower().split()
        found = [self.word(word) for word in words]
        if _OTHER in found or ("'" in text and _ACROSS.search(" ".join(words))):
            return self.whole(text)
        if _NUMERIC not in found:
            return " ".join(found)
        out: list[str] = []
        for numeric, run in groupby(zip(words, found, strict=True), key=lambda pair: pair[1] == _NUMERIC):
            before, after = zip(*run, strict=True)
            out += (self.run(" ".join(before)),) if numeric else after
        return " ".join(out)

    def _word(self, word: str) -> str:
        """The word normalized; marked as numeric where it may be a part of a number, or lets the words around it meet."""
        if not _LETTERS.fullmatch(word) or word == "half":  # "and a half" is read across words
            return _OTHER
        found = " ".join(self.whole(word).split())
        return _NUMERIC if not found or self.numeric & {word, *found.split()} or not re.fullmatch("[a-z ]+", found) else found


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
