"""An utterance: one piece of audio with what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Utterance:
    """One recording to recognize or to learn from.

    seconds: as declared, None where unknown. text: the reference, None where there is none. fields: the manifest line as it was read, order
    kept; its `id` is always there.
    """

    id: str
    audio: Path
    seconds: float | None
    text: str | None
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something of a source that was left out; where: file:line or file, cause: what is wrong and the next step."""

    where: str
    cause: str

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}"
