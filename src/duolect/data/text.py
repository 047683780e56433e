"""Texts to learn from and to score: a sentence a line, or the transcripts of a manifest, of any size; written texts as they are said."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from duolect.data.filter import Case, with_case

_BLOCK = 1 << 24
_NOTE = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_SAID = str.maketrans({"’": "'", "&": " and ", "%": " percent "})
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", *_TEENS)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SIZES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
_FEWEST = 3  # words that a text must have to be found within another


class TextError(ValueError):
    """A text cannot be read; the message names file, line and the next step."""


class TextLines(Sequence[str]):
    """The sentences of a text file (one a line) or the texts of a manifest (.jsonl, or a folder with manifest.jsonl), blank ones left out.

    Only where the lines begin is in memory, 16 bytes a line, so a file may be larger than it. case: what is made of each text; white
    space becomes single spaces. Raises TextError.
    """

    def __init__(self, source: str | Path, *, case: Case = "keep") -> None:
        source = Path(source)
        self.path = source / "manifest.jsonl" if source.is_dir() else source
        self.case: Case = case
        self.is_manifest = self.path.suffix in (".jsonl", ".json")
        try:
            self._starts, self._ends = _lines(self.path)
        except OSError as error:
            raise TextError(f"{self.path}: cannot be read ({error.strerror or error}): name a text file or a manifest") from error
        except UnicodeDecodeError as error:
            raise TextError(f"{self.path}: is not UTF-8 ({error.reason}): unpack it, or save it as UTF-8") from error
        if self.is_manifest:  # a torn line is found now and not in the middle of a training
            kept = [i for i in range(len(self._starts)) if self.fields(i).get("text", "").split()]
            self._starts, self._ends = self._starts[kept], self._ends[kept]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return with_case(" ".join(self.fields(index)["text"].split()), self.case)

    def fields(self, index: int) -> dict[str, Any]:
        """The manifest's line, or {"text": the line}."""
        with open(self.path, "rb") as file:
            file.seek(start := int(self._starts[index]))
            line = file.read(int(self._ends[index]) - start).decode("utf-8-sig")
        if not self.is_manifest:
            return {"text": line}
        try:
            found: dict[str, Any] = json.loads(line)
            if not isinstance(text := found.get("text") or "", str):
                raise TypeError(f"its text is {text!r}, expected a string")
            return {**found, "text": text}
        except (ValueError, AttributeError, TypeError) as error:
            raise TextError(f"{self.path}: {line[:60]!r} is no line of a manifest ({error}): correct or remove it") from None

    @property
    def sizes(self) -> np.ndarray:
        """[N] int64 bytes of each line."""
        return self._ends - self._starts


def _lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(where each line that is not blank begins, where it ends), in bytes; every byte is checked to be UTF-8."""
    check = codecs.getincrementaldecoder("utf-8")()
    ends: list[np.ndarray] = []
    full: list[np.ndarray] = []  # whether anything but white space lies between two ends
    begin, solid = 0, False
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            check.decode(block)
            data = np.frombuffer(block, np.uint8)
            at = np.flatnonzero(data == 10)
            count = np.add.reduceat(data > 32, np.concatenate([[0], at])) if len(data) else np.zeros(1)
            count[0] += solid
            ends.append(at + begin)
            full.append(count[:-1] > 0)
            begin, solid = begin + len(block), bool(count[-1])
    check.decode(b"", final=True)
    end = np.concatenate([*ends, np.array([begin] if solid else [], np.int64)]).astype(np.int64)
    keep = np.concatenate([*full, np.array([True] if solid else [], bool)]).astype(bool)
    start = np.concatenate([[0], end[:-1] + 1]).astype(np.int64)[: len(end)]
    return start[keep], end[keep]


def as_said(text: str) -> str:
    """A written English text as a recognizer writes it: lower case, numbers in words, without punctuation and notes in brackets."""
    text = _NUMBER.sub(lambda found: f" {_in_words(found[0])} ", _NOTE.sub(" ", text).translate(_SAID))
    words = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()
    return " ".join(filter(None, (word.strip("'") for word in words)))


def _in_words(number: str) -> str:
    whole, _, part = number.partition(".")
    # A number that begins with 0, or is as long as those of telephones, is read digit by digit.
    spelled = (len(whole) > 6 and "," not in whole) or (whole[0] == "0" and whole != "0")
    said = [_ONES[int(c)] for c in whole if c != ","] if spelled else [_cardinal(int(whole.replace(",", "")))]
    return " ".join([*said, *(["point", *(_ONES[int(c)] for c in part)] if part else [])])


def _cardinal(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f" {_ONES[number % 10]}" if number % 10 else "")
    size, name = next((size, name) for size, name in _SIZES if number >= size)
    return f"{_cardinal(number // size)} {name}" + (f" {_cardinal(number % size)}" if number % size else "")


class HeldOut:
    """Texts that must not be learned from. run: words in a row that make a text too near to one of them."""

    def __init__(self, texts: Iterable[str], *, run: int = 5) -> None:
        self.run, self.texts = run, {tuple(text.split()) for text in texts}
        self.runs = {n: {x for words in self.texts for x in _runs(words, n)} for n in range(_FEWEST, run + 1)}
        self.short = {n: {words for words in self.texts if len(words) == n} for n in range(_FEWEST, run)}

    def has(self, text: str) -> bool:
        """Whether the text is one of them."""
        return tuple(text.split()) in self.texts

    def near(self, text: str) -> bool:
        """Whether the text shares `run` words in a row with one of them, or all of the shorter of both, if that has three or more."""
        words = tuple(text.split())
        length = min(self.run, len(words))
        shared = any(x in self.runs.get(length, ()) for x in _runs(words, length))
        return shared or any(x in short for n, short in self.short.items() for x in _runs(words, n))


def _runs(words: Sequence[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
