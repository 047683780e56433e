"""Fusion: when a scorer is asked (schedules), in which vocabulary (Retokenized), and the prior that corrects it.

Schedules and adapters are orthogonal, and neither is a branch in a search. Legend: B utterances, K hypotheses each, R rows = B*K.
"""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from duolect.scorer import Scorer
from duolect.vocabulary import Vocabulary, VocabularyError

State = TypeVar("State")
Scores = TypeVar("Scores", Tensor, np.ndarray)
NEG = float("-inf")


class SearchError(ValueError):
    """A search cannot be run as asked; the message says why and what to change."""


@dataclass(frozen=True)
class Pending:
    """What a schedule may look at: the labels each hypothesis has and the scorer has not consumed yet."""

    step: int | Tensor  # frame ([B, 1], time-synchronous) or label (label-synchronous) index
    count: Tensor  # [B, K] labels not yet consumed
    word_ends: Tensor  # [B, K] bool: a word begins inside them, so the one before it is complete
    alive: Tensor  # [B, K] bool


class Schedule(ABC):
    """When a scorer is advanced over the labels that piled up. The end of the search always advances it over the rest.

    `lookahead`: the scorer's log_probs over next labels also enter before pruning, which needs a scorer of the search's vocabulary.
    """

    lookahead: bool = False

    @abstractmethod
    def due(self, pending: Pending) -> Tensor:
        """[B, K] bool: these hypotheses are to be scored now. Depends on nothing outside their utterance."""

    @property
    def period(self) -> int:
        """Steps between those at which it may ask though no label came since the step before; 0 where only labels count."""
        return 0


@dataclass(frozen=True)
class EveryLabel(Schedule):
    """Label-wise fusion; with lookahead its scores decide which labels survive at all, without it they come one step later."""

    lookahead: bool = True

    def __str__(self) -> str:
        return "label-wise" if self.lookahead else "label-wise, one label late"

    def due(self, pending: Pending) -> Tensor:
        return pending.count > 0


@dataclass(frozen=True)
class Every(Schedule):
    """Delayed fusion every `interval` frames, or labels in a label-synchronous search (RWTH's fixed interval; paper.md 2.7)."""

    interval: int

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise SearchError(f"a fusion interval of {self.interval} steps makes no sense: give 1 or more")

    def __str__(self) -> str:
        return f"delayed every {self.interval} frames"

    @property
    def period(self) -> int:
        return self.interval

    def due(self, pending: Pending) -> Tensor:
        return (pending.count > 0) & (pending.step % self.interval == self.interval - 1)


@dataclass(frozen=True)
class AtWordEnd(Schedule):
    """Delayed fusion of a hypothesis as soon as a word of it is complete."""

    def __str__(self) -> str:
        return "delayed to word ends"

    def due(self, pending: Pending) -> Tensor:
        return pending.word_ends


@dataclass(frozen=True)
class ShortestHypothesis(Schedule):
    """Delayed fusion of an utterance's beam once its shortest hypothesis has `labels` new ones (Hori et al., arXiv 2501.09258)."""

    labels: int = 1

    def __str__(self) -> str:
        return f"delayed until the shortest hypothesis has {self.labels} more labels"

    def due(self, pending: Pending) -> Tensor:
        least = torch.where(pending.alive, pending.count, torch.iinfo(torch.long).max).amin(1, keepdim=True)
        return (pending.count > 0) & (least >= self.labels)


@dataclass(frozen=True)
class AtEnd(Schedule):
    """Never before the end: n-best rescoring of the beam."""

    def __str__(self) -> str:
        return "n-best rescoring"

    def due(self, pending: Pending) -> Tensor:
        return torch.zeros_like(pending.alive)


@dataclass(frozen=True, kw_only=True)
class Fused:
    """One term of the log-linear model: scale * log p, asked when the schedule says so."""

    scorer: Scorer[Any]
    scale: float
    when: Schedule = field(default_factory=EveryLabel)


def weighted(scale: float, score: Scores) -> Scores:
    """scale * score, and 0 where the scale is 0 even if the score is -inf."""
    return scale * score if scale else score.clip(0.0, 0.0)


@dataclass(frozen=True)
class TextPolicy:
    """How words are written for a scorer that was trained on other text than the search's vocabulary has.

    case: as the hypothesis has it | lower | upper | sentence (first word capitalized). punctuation `drop` removes all but apostrophes
    inside words; a label that begins with such punctuation begins a word ("two-nine" becomes "two nine"). `end` is appended to the
    finished text ("." for models of written text).
    """

    case: Literal["as_is", "lower", "upper", "sentence"] = "as_is"
    punctuation: Literal["keep", "drop"] = "keep"
    end: str = ""

    def __call__(self, word: str, *, first: bool) -> str:
        """The word as the scorer is to see it; empty where nothing of it is left."""
        if self.punctuation == "drop":
            word = "".join(c for c in word if c.isalnum() or c == "'").strip("'")
        if self.case == "lower":
            return word.lower()
        if self.case == "upper":
            return word.upper()
        return word[:1].upper() + word[1:] if self.case == "sentence" and first else word

    def words(self, text: str) -> list[str]:
        """What a text is written from: its words, parted at punctuation too where that is dropped."""
        return (text.translate(SPACED) if self.punctuation == "drop" else text).split()

    def text(self, text: str) -> str:
        """A whole text as the scorer is to see it."""
        written: list[str] = []
        for word in self.words(text):
            if found := self(word, first=not written):
                written.append(found)
        return " ".join(written) + (self.end if written else "")

    def parts(self, piece: str) -> bool:
        """Whether a word begins with a label of this written form, because it begins with punctuation that is dropped."""
        return self.punctuation == "drop" and piece[:1] in PARTING and not piece.startswith(("##", "<"))


PARTING = frozenset(string.punctuation) - {"'"}
SPACED = str.maketrans(dict.fromkeys(PARTING, " "))

LONGEST_WORD = 40
"""Labels of a word after which it is no longer held back: a decoder that loops without ever ending a word would evade its judge."""


@dataclass(frozen=True)
class Held(Generic[State]):
    """State of a word-wise adapter: the inner state, and per row the labels of the word that is not complete yet."""

    inner: State
    pending: Tensor  # [R, P] labels, the first `count` of a row are real
    count: Tensor  # [R]
    begun: Tensor  # [R] bool: a word has gone to the inner scorer, the next one is not the first


class ByWord(Scorer[Held[State]]):
    """A scorer that hears whole words: labels of an unfinished word are held back, complete ones are converted and passed on.

    Converting word by word makes the result independent of where the calls cut the labels. The score of a label is known late, so there
    is no `log_probs`: the schedule must be one without lookahead. A word of more than LONGEST_WORD labels is passed on in such parts.
    convert: (labels of one word, whether it is the first) -> the inner scorer's labels.
    """

    def __init__(
        self,
        scorer: Scorer[State],
        vocabulary: Vocabulary,
        convert: Callable[[tuple[int, ...], bool], Sequence[int]],
        *,
        end: Sequence[int] = (),
        begun: bool = False,
        starts: Sequence[bool] | None = None,
    ) -> None:
        self.scorer, self.vocabulary, self.convert, self.end, self.begun = scorer, vocabulary, convert, tuple(end), begun
        self._starts = torch.tensor(vocabulary.word_starts if starts is None else starts)
        self._known: dict[tuple[tuple[int, ...], bool], tuple[int, ...]] = {}

    def start(self, rows: int) -> Held[State]:
        return Held(
            self.scorer.start(rows),
            torch.zeros(rows, 0, dtype=torch.long),
            torch.zeros(rows, dtype=torch.long),
            torch.full((rows,), self.begun),
        )

    def log_probs(self, state: Held[State], labels: Tensor | None = None) -> Tensor:
        raise SearchError(
            "a scorer that hears whole words cannot score single labels ahead of pruning: fuse it with EveryLabel(lookahead=False), "
            "Every(n), AtWordEnd(), ShortestHypothesis() or AtEnd()"
        )

    def advance(self, state: Held[State], labels: Tensor, lengths: Tensor) -> tuple[Tensor, Held[State]]:
        device = labels.device
        pending, count = _appended(state.pending, state.count, labels.cpu(), lengths.cpu())
        place = torch.arange(pending.shape[1])[None]
        starts = self._starts[pending] & (place < count[:, None])
        cut = torch.where(starts, place, 0).amax(1) if pending.shape[1] else count  # what lies before the last word start is complete
        cut = cut + (count - cut - 1).clamp(min=0) // LONGEST_WORD * LONGEST_WORD
        score, inner, begun = self._pass_on(state.inner, pending, cut, state.begun, device, flush=False)
        rest = count - cut
        width = int(rest.max()) if len(rest) else 0
        index = (cut[:, None] + torch.arange(width)[None]).clamp(max=max(pending.shape[1] - 1, 0))
        return score, Held(inner, pending.gather(1, index) if width else pending[:, :0], rest, begun)

    def finish(self, state: Held[State]) -> Tensor:
        score, inner, _ = self._pass_on(state.inner, state.pending, state.count, state.begun, None, flush=True)
        rest = self.scorer.finish(inner)
        return score.to(rest.device) + rest

    def select(self, state: Held[State], rows: Tensor) -> Held[State]:
        r = rows.cpu()
        return Held(self.scorer.select(state.inner, rows), state.pending[r], state.count[r], state.begun[r])

    def _pass_on(
        self, inner: State, pending: Tensor, cut: Tensor, begun: Tensor, device: torch.device | None, *, flush: bool
    ) -> tuple[Tensor, State, Tensor]:
        labels, ends, firsts = pending.tolist(), cut.tolist(), (~begun).tolist()
        words = [self._converted(y[:n], first) if n else [] for y, n, first in zip(labels, ends, firsts, strict=True)]
        if flush:
            words = [[*w, *self.end] for w in words]
        lengths = torch.tensor([len(w) for w in words], dtype=torch.long)
        if not len(lengths) or not int(lengths.max()):
            return torch.zeros(len(words), device=device), inner, begun
        padded = torch.tensor([[*w, *[0] * (int(lengths.max()) - len(w))] for w in words])
        score, inner = self.scorer.advance(inner, padded.to(device), lengths.to(device))
        return score, inner, begun | (lengths > 0)

    def _converted(self, labels: list[int], first: bool) -> list[int]:
        """Labels of the words in a row, each converted alone; `first` holds until a word gave something."""
        out: list[int] = []
        begin = 0
        for i in range(1, len(labels) + 1):
            if i == len(labels) or self._starts[labels[i]] or i - begin == LONGEST_WORD:
                key = (tuple(labels[begin:i]), first and not out)
                if key not in self._known:
                    self._known[key] = tuple(self.convert(*key))
                out += self._known[key]
                begin = i
        return out


def Retokenized(scorer: Scorer[State], vocabulary: Vocabulary, *, policy: TextPolicy | None = None, begun: bool = False) -> ByWord[State]:
    """`scorer` as a scorer of hypotheses in another vocabulary: complete words are written out by `policy` and tokenized anew.

    begun: text precedes the hypothesis already (a prompt), so that its first word is written as one that follows.

    Raises VocabularyError where the scorer's tokenizer merges across spaces, because then no word-wise conversion is exact.
    """
    policy = policy or TextPolicy()
    inner = scorer.vocabulary
    if inner.word_joint == "none":
        inner.encode_word("", first=True)  # raises, and says why

    def convert(labels: tuple[int, ...], first: bool) -> Sequence[int]:
        out: list[int] = []
        for word in written_words(labels, vocabulary, policy, first=first):
            out += inner.encode_word(word, first=first and not out)
        return out

    starts, end = parting_starts(vocabulary, policy), inner.encode(policy.end) if policy.end else ()
    return ByWord(scorer, vocabulary, convert, end=end, begun=begun, starts=starts)


def written_words(labels: Sequence[int], vocabulary: Vocabulary, policy: TextPolicy, *, first: bool) -> list[str]:
    """The words of some labels as a policy has them written, those aside of which nothing is left."""
    out: list[str] = []
    for word in policy.words(vocabulary.decode(labels)):
        if written := policy(word, first=first and not out):
            out.append(written)
    return out


def parting_starts(vocabulary: Vocabulary, policy: TextPolicy) -> list[bool]:
    """Which labels begin a word, those with punctuation in front among them where the policy drops it."""
    return [start or policy.parts(vocabulary.piece(label)) for label, start in enumerate(vocabulary.word_starts)]


def held_to_words(scorer: Scorer[State]) -> ByWord[State]:
    """`scorer` fed in whole words of its own vocabulary, so that it stays in step with a Retokenized one that it corrects."""
    return ByWord(scorer, scorer.vocabulary, lambda labels, first: labels)


class LabelPrior(Scorer[int]):
    """A unigram over labels, whatever the history: the internal language model that a fused LM is corrected by (negative scale).

    log_prior: [V] natural log, finite (an unsmoothed count would turn into an infinite bonus). eos scores 0. paper.md 1.11.
    """

    def __init__(self, log_prior: Tensor, vocabulary: Vocabulary) -> None:
        if log_prior.shape != (vocabulary.size,):
            raise VocabularyError(
                f"the prior has {tuple(log_prior.shape)} entries, the vocabulary {vocabulary.size} labels: estimate it anew"
            )
        spoken = torch.ones(vocabulary.size, dtype=torch.bool)
        spoken[[x for x in (vocabulary.blank, vocabulary.eos) if x is not None]] = False
        if not bool(log_prior[spoken].isfinite().all()):
            raise SearchError("the prior gives a label probability 0, so its negative scale would reward that label without end: smooth it")
        self.vocabulary = vocabulary
        self.table = torch.where(spoken.to(log_prior.device), log_prior.float(), 0.0)

    def start(self, rows: int) -> int:
        return rows

    def log_probs(self, state: int, labels: Tensor | None = None) -> Tensor:
        return self.table.expand(state, -1) if labels is None else self.table[labels.to(self.table.device)]

    def advance(self, state: int, labels: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
        labels, lengths = labels.to(self.table.device), lengths.to(self.table.device)
        real = torch.arange(labels.shape[1], device=labels.device)[None] < lengths[:, None]
        return torch.where(real, self.table[labels], 0.0).sum(1), state

    def finish(self, state: int) -> Tensor:
        return self.table.new_zeros(state)

    def select(self, state: int, rows: Tensor) -> int:
        return len(rows)


def _appended(pending: Tensor, count: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `pending` with rows of `labels` behind them, padded with 0."""
    total = count + lengths
    width = int(total.max()) if len(total) else 0
    out = torch.zeros(len(total), width, dtype=torch.long)
    for values, size, offset in ((pending, count, torch.zeros_like(count)), (labels, lengths, count)):
        real = torch.arange(values.shape[1])[None] < size[:, None]
        row, column = real.nonzero(as_tuple=True)
        out[row, column + offset[row]] = values[row, column]
    return out, total
