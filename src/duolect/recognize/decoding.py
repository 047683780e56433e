"""Decodings as configs: which search, which terms, when each is asked. Everything a result depends on besides the audio and the models."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from duolect.config import registered
from duolect.models.ctc import CtcOutput
from duolect.models.lm import HFCausalLM
from duolect.recognize.models import Models
from duolect.scorer import Hypothesis, Scorer
from duolect.search.context import ContextScorer
from duolect.search.ctc import ctc_beam_search, ctc_greedy
from duolect.search.draft import Draft, greedy_with_drafts
from duolect.search.fusion import (
    AtEnd,
    AtWordEnd,
    Every,
    EveryLabel,
    Fused,
    LabelPrior,
    Retokenized,
    Schedule,
    SearchError,
    ShortestHypothesis,
    TextPolicy,
    held_to_words,
)
from duolect.search.label import label_beam_search
from duolect.search.prefix import CtcPrefix
from duolect.search.reduce import prune_labels, soft_collapse
from duolect.search.spelled import Spelled
from duolect.vocabulary import Vocabulary

for _schedule in (AtEnd, AtWordEnd, Draft, Every, EveryLabel, ShortestHypothesis, TextPolicy):
    registered(_schedule)


def of_other_words(nbest: Sequence[Hypothesis]) -> list[Hypothesis]:
    """The first hypothesis of each text: a decoder has many ways to cut a word into labels."""
    first: dict[tuple[str, ...], Hypothesis] = {}
    for hypothesis in nbest:
        first.setdefault(tuple(hypothesis.text.split()), hypothesis)
    return list(first.values())


S = TypeVar("S", bound=Scorer[Any])


@dataclass
class Batch:
    """What the terms of a decoding may look at: audio [N] float32 16 kHz per utterance, the CTC model's output, and models by name.

    What several decodings need (an AED's encoding) is computed once; `borrowed` sums the seconds that a decoding was spared that way, so
    that each can be charged for all it needs.
    """

    audios: Sequence[np.ndarray]
    output: CtcOutput
    vocabulary: Vocabulary
    acoustic: str
    models: Models
    seconds_per_frame: float
    borrowed: float = 0.0
    _shared: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def most_labels(self, per_second: float) -> Tensor:
        """[B] how many labels an output may have by the length of its audio."""
        return most_labels(self.output.lengths * self.seconds_per_frame, per_second)

    def shared(self, name: str, make: Callable[[], S]) -> S:
        """The scorer of that name, made when first asked for."""
        if name in self._shared:
            scorer, seconds = self._shared[name]
            self.borrowed += seconds
            return scorer
        begin = time.perf_counter()
        scorer = make()
        self._shared[name] = scorer, time.perf_counter() - begin
        return scorer


def most_labels(seconds: Tensor, per_second: float = 10.0) -> Tensor:
    """How many labels a text may have by the seconds of its audio."""
    return ((seconds * per_second).long() + 10).clamp(max=400)


WRITTEN = {
    "keep": TextPolicy(),
    "sentence": TextPolicy(case="sentence", end="."),
    "lower": TextPolicy(case="lower", punctuation="drop"),
    "upper": TextPolicy(case="upper", punctuation="drop"),
}
"""How words are written for a model by the looks of its text."""


def policy_of(scorer: Any) -> TextPolicy:
    """How words are written for a scorer or model by what it says itself: `written` (see WRITTEN) or `writing` (an n-gram)."""
    return WRITTEN.get(getattr(scorer, "written", "")) or TextPolicy(**getattr(scorer, "writing", {}))


@lru_cache(maxsize=8)
def foreign(vocabulary: Vocabulary, policy: TextPolicy) -> Tensor | None:
    """[V] bool: the labels with signs that are never in text of this writing; None where all may be."""
    if policy.punctuation != "drop" or policy.case not in ("lower", "upper"):
        return None
    texts = [vocabulary.decode([label]) for label in range(vocabulary.size)]
    cased = (x.upper() if policy.case == "upper" else x.lower() for x in texts)
    return torch.tensor([x != y or any(not (c.isalnum() or c in " '") for c in x) for x, y in zip(texts, cased, strict=True)])


def reduced(output: CtcOutput, vocabulary: Vocabulary, *, collapse: float | None, keep_labels: int | None) -> CtcOutput:
    """The CTC model's output with fewer labels and frames, where that is asked for (paper.md 2.3, 2.4)."""
    log_probs, lengths = output.log_probs, output.lengths
    if keep_labels is not None:
        log_probs = prune_labels(log_probs, lengths, keep=keep_labels, vocabulary=vocabulary)
    if collapse is not None:
        log_probs, lengths = soft_collapse(log_probs, lengths, threshold=collapse)
    return CtcOutput(log_probs, lengths)


def _require(config: object, **least: float) -> None:
    """SearchError, before any model is loaded, where a field is set to less than makes sense."""
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and not value >= lowest:
            raise SearchError(f"{name}={value:g} makes no sense: give {lowest:g} or more")


class Term(ABC):
    """One scorer of the log-linear model, as a config. otherwise: replaces a `when` that looks ahead, where it hears other labels."""

    scale: float
    when: Schedule
    otherwise: Schedule | None = None
    policy: TextPolicy | None  # how words are written for it where it hears another vocabulary
    hears_ctc: ClassVar[bool] = False  # whether it reads the CTC model's output

    @property
    def begun(self) -> bool:
        """Whether text precedes the hypotheses."""
        return False

    @abstractmethod
    def load(self, models: Models, acoustic: str) -> None:
        """Loads what the term needs, so that a wrong name is said before any work is done."""

    @abstractmethod
    def native(self, batch: Batch) -> Scorer[Any]:
        """The scorer in its own vocabulary."""

    def bytes_of(self, models: Models, acoustic: str, *, seconds: float, labels: int) -> int:
        """Bytes of the keys and values it holds of an utterance, as AttentionModel.bytes_of."""
        return 0

    def shares_encoder(self, models: Models, acoustic: str) -> bool:
        """Whether it reads the frames of the acoustic model's encoder."""
        return False

    def spelling(self, batch: Batch) -> TextPolicy:
        """How words are written for it."""
        return self.policy or TextPolicy()

    def asked(self, *, same: bool) -> Schedule:
        """When it is asked in a search over its own labels, or others."""
        return self.when if same or self.otherwise is None or not self.when.lookahead else self.otherwise

    def fused(self, batch: Batch, vocabulary: Vocabulary) -> Fused:
        """The term as a search over `vocabulary` takes it: wrapped in Retokenized where its own is another."""
        scorer = self.native(batch)
        same = scorer.vocabulary.digest() == vocabulary.digest()
        if not same:
            scorer = Retokenized(scorer, vocabulary, policy=self.spelling(batch), begun=self.begun)
        return Fused(scorer=scorer, scale=self.scale, when=self.asked(same=same))


@registered
@dataclass(frozen=True)
class Language(Term):
    """A language model, causal or n-gram. `prompt` stands before every text and is not scored.

    policy: None for what the model says itself. oov: what a word costs an n-gram beyond its <unk>.
    """

    model: str
    scale: float = 0.5
    when: Schedule = field(default_factory=EveryLabel)
    prompt: str = ""
    policy: TextPolicy | None = None
    otherwise: Schedule | None = None
    oov: float = 0.0

    @property
    def begun(self) -> bool:
        return bool(self.prompt.strip())

    def spelling(self, batch: Batch) -> TextPolicy:
        return self.policy or policy_of(self.native(batch))

    def load(self, models: Models, acoustic: str) -> None:
        self._scorer(models, models.acoustic(acoustic).vocabulary)

    def native(self, batch: Batch) -> Scorer[Any]:
        return self._scorer(batch.models, batch.vocabulary)

    def bytes_of(self, models: Models, acoustic: str, *, seconds: float, labels: int) -> int:
        scorer = self._scorer(models, models.acoustic(acoustic).vocabulary)
        return scorer.bytes_of(labels=labels) if isinstance(scorer, HFCausalLM) else 0

    def _scorer(self, models: Models, heard: Vocabulary) -> Scorer[Any]:
        return models.language(self.model, prompt=self.prompt, over=heard, oov=self.oov)

    def bridge(self, models: Models, acoustic: str) -> str:
        """How it is fused over the labels of an acoustic model, for people. Raises SearchError where it cannot be."""
        heard = models.acoustic(acoustic).vocabulary
        read = self._scorer(models, heard).vocabulary
        same = read.digest() == heard.digest()
        when, how = self.asked(same=same), "the labels" if same else f"words ({read.described()})"
        if not same and when.lookahead:
            raise SearchError(
                f"{self.model} cannot be fused label-wise: its labels ({read.described()}) are not those of {acoustic} "
                f"({heard.described()}): name a language model that has them with --unit-lm, or use --fusion delayed, word-end, shortest "
                "or rescore"
            )
        if not same and read.word_joint == "none":
            raise SearchError(
                f"{self.model} cannot be fused: its tokenizer ({read.described()}) merges across spaces, so that words have no labels of "
                f"their own: decode with --decoding ctc, then `duolect rescore --lm {self.model}`"
            )
        return f"fusion: {when}; {self.model} reads {how} of {acoustic} ({heard.described()})"


@registered
@dataclass(frozen=True)
class Attention(Term):
    """A model that hears the audio itself: an attention encoder-decoder, a speech LLM. policy: None for the spelling it was trained on.

    context: words and phrases that may come, for a model that reads them in its prompt.
    """

    model: str
    scale: float = 1.0
    when: Schedule = field(default_factory=EveryLabel)
    policy: TextPolicy | None = None
    context: tuple[str, ...] = ()

    def spelling(self, batch: Batch) -> TextPolicy:
        return self.policy or WRITTEN[batch.models.attention(self.model).written]

    def load(self, models: Models, acoustic: str) -> None:
        models.attention(self.model).told(self.context)

    def bytes_of(self, models: Models, acoustic: str, *, seconds: float, labels: int) -> int:
        return models.attention(self.model).told(self.context).bytes_of(seconds=seconds, labels=labels)

    def native(self, batch: Batch) -> Scorer[Any]:
        aed = batch.models.attention(self.model).told(self.context)
        heard = batch.output if self.shares_encoder(batch.models, batch.acoustic) and batch.output.frames is not None else None
        return batch.shared(f"{self.model} {self.context}", lambda: aed.scorer(batch.audios, heard))

    def shares_encoder(self, models: Models, acoustic: str) -> bool:
        return models.attention(self.model).shares(models.acoustic(acoustic))


@registered
@dataclass(frozen=True)
class Ctc(Term):
    """The CTC model's prefix probabilities, for label-synchronous search.

    model: another CTC model than the decoding's own; `folder#4` is the auxiliary head of a model at its layer 4. collapse, keep_labels: as
    in TimeSynchronous.
    """

    hears_ctc: ClassVar[bool] = True
    scale: float = 1.0
    when: Schedule = field(default_factory=EveryLabel)
    policy: TextPolicy = field(default_factory=lambda: WRITTEN["lower"])
    otherwise: Schedule | None = field(default_factory=lambda: EveryLabel(lookahead=False))  # it reads what others propose
    model: str = ""
    collapse: float | None = None
    keep_labels: int | None = None

    def __post_init__(self) -> None:
        _require(self, collapse=0.0, keep_labels=1)

    def load(self, models: Models, acoustic: str) -> None:
        models.acoustic(self.model or acoustic)

    def native(self, batch: Batch) -> CtcPrefix:
        if not self.model:
            return self._prefix(batch.output, batch.vocabulary)
        model = batch.models.acoustic(self.model)
        return batch.shared(f"ctc {self.model}", lambda: self._prefix(model.log_probs_of(batch.audios), model.vocabulary))

    def fused(self, batch: Batch, vocabulary: Vocabulary) -> Fused:
        scorer = self.native(batch)
        if scorer.vocabulary.digest() == vocabulary.digest():
            return super().fused(batch, vocabulary)
        return Fused(scorer=Spelled(scorer, vocabulary, policy=self.spelling(batch)), scale=self.scale, when=self.asked(same=False))

    def _prefix(self, output: CtcOutput, vocabulary: Vocabulary) -> CtcPrefix:
        output = reduced(output, vocabulary, collapse=self.collapse, keep_labels=self.keep_labels)
        return CtcPrefix(output.log_probs, output.lengths, vocabulary=vocabulary)


@registered
@dataclass(frozen=True)
class Prior(Term):
    """A label prior; `words`: held back in step with a language model that hears whole words.

    kind: of the acoustic model's labels as `duolect prior` stored it (softmax, counts, sampled), `uniform`, which makes of a negative scale
    a bonus for each label: a length term, or `llm`: of the labels of the language model or decoder `of`, for which words are written by
    `policy` (None: as for that model, which it corrects), the first one as one that follows where `prompted`. With the schedule of the term
    that it corrects it is delayed like that.
    """

    kind: str = "softmax"
    scale: float = -0.2
    when: Schedule = field(default_factory=EveryLabel)
    words: bool = False
    policy: TextPolicy | None = None
    of: str = ""
    prompted: bool = False

    @property
    def begun(self) -> bool:
        return self.prompted

    def spelling(self, batch: Batch) -> TextPolicy:
        return self.policy or policy_of(batch.models.loaded(self.of))

    def load(self, models: Models, acoustic: str) -> None:
        if (self.kind == "llm") != bool(self.of):
            raise SearchError(f"a prior of kind {self.kind} with of={self.of!r}: kind llm, and no other, names a language model in `of`")
        models.prior(acoustic, self.kind, of=self.of)

    def native(self, batch: Batch) -> Scorer[Any]:
        vocabulary = batch.models.vocabulary(self.of) if self.of else batch.vocabulary
        prior = LabelPrior(batch.models.prior(batch.acoustic, self.kind, of=self.of), vocabulary)
        return held_to_words(prior) if self.words and vocabulary.digest() == batch.vocabulary.digest() else prior


@registered
@dataclass(frozen=True)
class Internal(Attention):
    """The language model inside a model that hears: its decoder without audio, subtracted where a better one is fused (2011.01991)."""

    scale: float = -0.2

    def shares_encoder(self, models: Models, acoustic: str) -> bool:
        return False

    def native(self, batch: Batch) -> Scorer[Any]:
        aed = batch.models.attention(self.model)
        return batch.shared(f"internal {self.model}", lambda: aed.internal(len(batch.audios)))


@lru_cache(maxsize=8)
def _context(phrases: tuple[tuple[str, float], ...], vocabulary: Vocabulary) -> ContextScorer:
    return ContextScorer(dict(phrases), vocabulary)


@registered
@dataclass(frozen=True)
class Context(Term):
    """Phrases that are expected, each with its weight in nats a letter."""

    phrases: Mapping[str, float]
    scale: float = 1.0
    when: Schedule = field(default_factory=EveryLabel)
    policy: TextPolicy | None = None

    def load(self, models: Models, acoustic: str) -> None:
        if never := _context(tuple(self.phrases.items()), models.acoustic(acoustic).vocabulary).unwritable:
            models.say_once(
                f"letters {acoustic} {never}", f"warning: {acoustic} never writes some letters of these phrases: {', '.join(never)}"
            )

    def native(self, batch: Batch) -> Scorer[Any]:
        return self.fused(batch, batch.vocabulary).scorer

    def fused(self, batch: Batch, vocabulary: Vocabulary) -> Fused:
        return Fused(scorer=_context(tuple(self.phrases.items()), vocabulary), scale=self.scale, when=self.when)


class Decoding(ABC):
    """A way to recognize a batch. terms: what is scored beside the CTC model's own score, by name."""

    terms: Mapping[str, Term]
    beam: int

    def bytes_of(self, models: Models, acoustic: str, *, seconds: float) -> int:
        """Bytes of keys and values that its terms hold of an utterance, at most or nearly so."""
        labels = self.beam * int(most_labels(torch.tensor(seconds)))
        return sum(term.bytes_of(models, acoustic, seconds=seconds, labels=labels) for term in self.terms.values())

    @property
    def hears_ctc(self) -> bool:
        """Whether it needs the CTC model's output, whose computation then counts as its own."""
        return True

    def shares_encoder(self, models: Models, acoustic: str) -> bool:
        """Whether a term of it does, so that the encoder's time is its own, too."""
        return any(term.shares_encoder(models, acoustic) for term in self.terms.values())

    @abstractmethod
    def run(self, batch: Batch) -> list[list[Hypothesis]]:
        """The n-best list of each utterance, best first."""

    def scales(self) -> Mapping[str, float]:
        """The scale of every part, as in `Hypothesis.score`."""
        return {"ctc": 1.0, **{name: term.scale for name, term in self.terms.items()}}

    def explained(self, models: Models, acoustic: str) -> list[str]:
        """How it joins language models with the acoustic one and by which prior, a line each. SearchError where it cannot."""
        return []


@registered
@dataclass(frozen=True)
class Greedy(Decoding):
    """The best label of each CTC frame, collapsed."""

    terms: ClassVar[Mapping[str, Term]] = {}
    beam: ClassVar[int] = 1

    def run(self, batch: Batch) -> list[list[Hypothesis]]:
        return ctc_greedy(batch.output.log_probs, batch.output.lengths, vocabulary=batch.vocabulary)


@registered
@dataclass(frozen=True)
class TimeSynchronous(Decoding):
    """CTC beam search over frames with any terms (one asked AtEnd only: n-best rescoring).

    collapse: probability above which equal neighbouring frames are merged (paper: 0.8), None for never. keep_labels: how many labels an
    utterance may use, None for all. label_floor, beam_floor: labels of a frame and hypotheses so far in log p below the best are dropped,
    None for never (5 and 10 are usual). All make it faster and are no longer exact.
    """

    beam: int = 8
    terms: Mapping[str, Term] = field(default_factory=dict)
    recombine: Literal["sum", "max"] = "sum"
    collapse: float | None = None
    keep_labels: int | None = None
    label_floor: float | None = None
    beam_floor: float | None = None

    def __post_init__(self) -> None:
        _require(self, beam=1, collapse=0.0, keep_labels=1, label_floor=0.0, beam_floor=0.0)

    def run(self, batch: Batch) -> list[list[Hypothesis]]:
        output = reduced(batch.output, batch.vocabulary, collapse=self.collapse, keep_labels=self.keep_labels)
        fused = {name: term.fused(batch, batch.vocabulary) for name, term in self.terms.items()}
        return ctc_beam_search(
            output.log_probs,
            output.lengths,
            vocabulary=batch.vocabulary,
            beam=self.beam,
            fused=fused,
            recombine=self.recombine,
            label_floor=self.label_floor,
            beam_floor=self.beam_floor,
        )

    def explained(self, models: Models, acoustic: str) -> list[str]:
        bridges = [t.bridge(models, acoustic) for t in self.terms.values() if isinstance(t, Language)]
        priors = [f"prior: {t.kind} of {acoustic}, scale {t.scale:g}" for t in self.terms.values() if isinstance(t, Prior)]
        none = ["prior: none (`duolect prior` estimates one, --decoding delayed-prior and labelwise-prior use it)"]
        return [*bridges, *(priors or none)] if bridges else []


@registered
@dataclass(frozen=True)
class LabelSynchronous(Decoding):
    """Label-by-label beam search in the vocabulary of the first term. Greedy is beam 1.

    length_exponent normalizes by length (AED or speech LLM alone; off with CTC). labels_per_second bounds the output by the audio;
    ends `apart` (with CTC): every hypothesis may end at every step, in a list beside the beam, judged by all terms in full.
    repeats: a hypothesis that says the same so many times in a row is made to end. proposals: so many times `beam` hypotheses are
    proposed where terms in other vocabularies choose among them. as_learned (with CTC): a model that learned from text in lower case
    without punctuation says nothing else.
    """

    terms: Mapping[str, Term]
    beam: int = 4
    length_exponent: float = 0.0
    labels_per_second: float = 10.0
    ends: Literal["beam", "apart"] = "beam"
    repeats: int | None = None
    proposals: int = 2
    as_learned: bool = True

    def __post_init__(self) -> None:
        _require(self, beam=1, labels_per_second=0.1, repeats=2, proposals=1)
        if not self.terms:
            raise SearchError("a label-synchronous decoding without terms has none to propose labels: give it an Attention term first")

    @property
    def hears_ctc(self) -> bool:
        return any(term.hears_ctc for term in self.terms.values())

    def run(self, batch: Batch) -> list[list[Hypothesis]]:
        (lead, term), *others = self.terms.items()
        first = term.native(batch)
        fused = {lead: Fused(scorer=first, scale=term.scale, when=term.when)}
        fused |= {name: other.fused(batch, first.vocabulary) for name, other in others}
        found = label_beam_search(
            fused,
            len(batch.audios),
            beam=self.beam,
            max_labels=batch.most_labels(self.labels_per_second),
            length_exponent=self.length_exponent,
            ends=self.ends,
            repeats=self.repeats,
            proposals=self.proposals,
            never=foreign(first.vocabulary, term.spelling(batch)) if others and self.as_learned else None,
        )
        return [of_other_words(nbest) for nbest in found]

    def scales(self) -> Mapping[str, float]:
        return {name: term.scale for name, term in self.terms.items()}


@registered
@dataclass(frozen=True)
class Speculative(Decoding):
    """Greedy search of one model that hears, checked against the CTC model's greedy transcript as a draft. Same result, fewer passes;
    with `draft.slack` > 0 the CTC model's labels win where they are nearly as good."""

    beam: ClassVar[int] = 1
    terms: Mapping[str, Term]
    draft: Draft = field(default_factory=Draft)
    labels_per_second: float = 10.0

    def __post_init__(self) -> None:
        _require(self, labels_per_second=0.1)
        if len(self.terms) != 1:
            raise SearchError(f"speculative decoding has {len(self.terms)} terms ({', '.join(self.terms)}): give it the one that decodes")

    def run(self, batch: Batch) -> list[list[Hypothesis]]:
        ((name, term),) = self.terms.items()
        heard, spelled = ctc_greedy(batch.output.log_probs, batch.output.lengths, vocabulary=batch.vocabulary), term.spelling(batch)
        drafts = [spelled.text(nbest[0].text if nbest else "") for nbest in heard]
        limit = batch.most_labels(self.labels_per_second)
        return greedy_with_drafts(term.native(batch), drafts, max_labels=limit, name=name, settings=self.draft).nbest

    def scales(self) -> Mapping[str, float]:
        return dict.fromkeys(self.terms, 1.0)
