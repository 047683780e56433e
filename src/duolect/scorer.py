"""The contract between models and search: a Scorer gives log p(labels) increment by increment; a Hypothesis keeps the parts apart."""

from __future__ import annotations

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from duolect.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

State = TypeVar("State")


class Scorer(ABC, Generic[State]):
    """log p(labels | whatever the scorer was made for), for R rows at once.

    A State is a value: nothing a caller holds is changed by a later call, and rows of it may be gathered in any order, dropped or
    doubled with `select`. Log-probabilities are natural, fp32, on the scorer's device; impossible is -inf, never NaN. Index tensors may
    come from any device.
    Row r of `start(rows)` belongs to utterance r; rows keep their utterance through `select`.
    """

    vocabulary: Vocabulary
    reward: float = 0.0  # the most that one phrase may win; 0 where labels only cost, as log-probabilities do

    @abstractmethod
    def start(self, rows: int) -> State:
        """The state before the first label, one row per utterance; a prompt or an audio prefix is already part of it."""

    @abstractmethod
    def log_probs(self, state: State, labels: Tensor | None = None) -> Tensor:
        """[R, V] log p(next label | history), eos included; with `labels` [R, C] only those, normalized over all V nevertheless."""

    @abstractmethod
    def advance(self, state: State, labels: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """([R] log p(labels | history), state behind them) for labels [R, S], of which the first lengths[r] >= 0 are real in row r.

        Row r is scored 0 and stays as it was where lengths[r] == 0, so that a caller never has to take a state apart to advance some
        of its rows. Splitting a chunk over several calls gives the same sum.
        """

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """[R] log p(eos | history), plus the score of whatever the scorer still held back."""

    def bound(self, state: State) -> Tensor | None:
        """[R, V] at least what each label will score, or None where nothing is known of it: for pruning, never part of a score."""
        return None

    @abstractmethod
    def select(self, state: State, rows: Tensor) -> State:
        """The state whose row i is row rows[i] (int64 [N]) of this one."""


@dataclass(frozen=True)
class Hypothesis:
    """One transcript with the log-probability each scorer gave it.

    parts: natural log, unscaled: {"ctc": -3.1, "llm": -8.2, "prior": -9.0}.
    """

    labels: tuple[int, ...]
    text: str
    parts: Mapping[str, float]

    def score(self, scales: Mapping[str, float]) -> float:
        """The log-linear score sum_i scale_i * part_i; a part without a scale counts nothing. KeyError for a scale without a part."""
        return sum(scale * self.parts[name] for name, scale in scales.items())


@dataclass(frozen=True)
class Recognized:
    """One line of a hypotheses file: a manifest line plus what was recognized, best hypothesis first.

    fields: the manifest line as it was read (id, audio_filepath, duration, text, ...). seconds: compute time. error: why there is no
    transcript, else None.
    """

    fields: Mapping[str, Any]
    nbest: Sequence[Hypothesis]
    seconds: float = 0.0
    error: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return str(self.fields["id"])

    @property
    def text(self) -> str:
        """The best transcript, raw; empty where recognition failed."""
        return self.nbest[0].text if self.nbest else ""

    def to_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {**self.fields, **self.extra, "pred_text": self.text, "time": round(self.seconds, 4)}
        line["nbest"] = [
            {"text": h.text, "labels": list(h.labels), "parts": {k: round(v, 5) for k, v in h.parts.items()}} for h in self.nbest
        ]
        if self.error is not None:
            line["error"] = self.error
        return line

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Recognized:
        """The line of such JSON values, and of other systems' lines. Raises KeyError or TypeError, with what was expected."""
        own = ("pred_text", "time", "nbest", "error")
        for name in ("pred_text", "error"):
            if not isinstance(line.get(name), str | None):
                raise TypeError(f"{name} is {line[name]!r}, expected a text")
        nbest = [Hypothesis(tuple(h.get("labels", ())), h["text"], dict(h.get("parts", {}))) for h in line.get("nbest", ())]
        if any(not isinstance(h.text, str) for h in nbest):
            raise TypeError("a text of nbest is none")
        if not nbest and line.get("pred_text") is not None and line.get("error") is None:
            nbest = [Hypothesis((), line["pred_text"], {})]
        return cls({k: v for k, v in line.items() if k not in own}, nbest, float(line.get("time", 0.0)), line.get("error"))


class HypothesesError(ValueError):
    """A hypotheses file cannot be read; the message names file and line."""


def read_hypotheses(path: str | Path, *, torn: Callable[[str], None] = lambda where: None) -> Iterator[Recognized]:
    """The lines of a hypotheses JSONL file in file order; a torn last line (a killed run) is left out, and `torn` told where."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
                if "id" not in fields:
                    fields["id"] = fields.get("audio_filepath", f"line_{number}")
                yield Recognized.from_json(fields)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if not line.endswith(b"\n"):
                    return torn(f"{path}:{number}")
                raise HypothesesError(
                    f"{path}:{number}: not a hypotheses line ({type(error).__name__}: {error}); expected JSON with id, text, nbest"
                ) from error


def write_hypotheses(path: str | Path, recognized: Sequence[Recognized]) -> None:
    """Writes a hypotheses JSONL file whole, by way of a temporary file, so that a killed write leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as out:
        for line in recognized:
            out.write(json.dumps(line.to_json(), ensure_ascii=False) + "\n")
    temporary.replace(path)
