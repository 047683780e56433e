"""An utterance: one piece of audio with what is known about it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duolect.audio.io import AudioError, read_audio


@dataclass(frozen=True, slots=True)  # there may be millions
class Utterance:
    """One recording to recognize or to learn from.

    seconds: as declared, None where unknown. text: the reference, None where there is none. fields: the manifest line as it was read, order
    kept; its `id` is always there. span: where in the file the recording lies (offset, size in bytes); None: it is all of the file.
    """

    id: str
    audio: Path
    seconds: float | None
    text: str | None
    fields: Mapping[str, Any]
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Problem:
    """Something of a source that was left out; where: file:line or file, cause: what is wrong and the next step."""

    where: str
    cause: str

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}"


def load_audio(utterance: Utterance) -> np.ndarray:
    """The samples [N] of an utterance as `read_audio` gives them, wherever it lies. Raises AudioError, also where a shard was cut off."""
    if utterance.span is None:
        return read_audio(utterance.audio)
    return read_audio(stored_bytes(utterance), name=f"{utterance.audio}, {utterance.id}")


def stored_bytes(utterance: Utterance) -> bytes:
    """The bytes of an utterance's audio file, encoded as it is stored. Raises AudioError."""
    try:
        with open(utterance.audio, "rb") as file:
            there = os.fstat(file.fileno()).st_size
            offset, size = utterance.span or (0, there)
            if offset + size > there:
                raise AudioError(
                    f"{utterance.audio}: has {there} bytes, and {utterance.id} is said to lie at {offset} .. {offset + size}: it is cut "
                    "off or another file; fetch it again, or see what `duolect prepare --check` says of its folder"
                )
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise AudioError(f"{utterance.audio}: cannot be read ({error.strerror or error}): check its path and permissions") from error
