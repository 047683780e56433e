"""KenLM n-grams as Scorers: over words, or over the labels of an acoustic model."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from duolect.models import ModelError
from duolect.scorer import Scorer
from duolect.vocabulary import Vocabulary, VocabularyError

NGRAM_FILES = (".arpa", ".arpa.gz", ".bin", ".klm")
"""What the files of KenLM end in: ARPA text, or binary."""
MARKED = ("▁", "Ġ", "|", "##")
"""How labels begin that no word does."""
COMMON = ("the", "and", "a", "i", "in", "is", "no", "me", "de", "la", "und", "der", "que", "on")
KEPT = 2**24
"""Log-probs of next labels that are remembered."""

States = tuple[Any, ...]
"""KenLM's state of each row; none is ever changed."""


class WordVocabulary(Vocabulary):
    """Words as labels, numbered as they come: KenLM does not list those it knows, and any word has a probability."""

    blank, bos, eos = None, 0, 1
    word_joint: Literal["dummy"] = "dummy"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, kind: str, digest: str) -> None:
        self.kind, self._digest = kind, digest
        self._words, self._index = ["<s>", "</s>"], {"<s>": 0, "</s>": 1}

    @property
    def size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self._words)

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self._index:
                self._index[word] = len(self._words)
                self._words.append(word)
        return [self._index[word] for word in text.split()]

    def encode_word(self, word: str, *, first: bool) -> list[int]:
        return self.encode(word)

    def decode(self, labels: Sequence[int]) -> str:
        return " ".join(self._words[x] for x in labels if x > 1)

    def piece(self, label: int) -> str:
        return self._words[label]

    def starts_word(self, label: int) -> bool:
        return True

    def described(self) -> str:
        return self.kind

    def save(self, folder: Path) -> None:
        raise VocabularyError("the words of an n-gram are in its own file: copy that")


class NgramScorer(Scorer[States]):
    """log p(labels) by a KenLM n-gram, which reads each label as the vocabulary writes it (`piece`).

    A label that the model does not have is its <unk>, at a further cost of `oov` nats. Over all labels the probabilities are as
    KenLM gives them: what lies outside the vocabulary keeps its share, and every unknown label has all of <unk>'s. `prompt` is text
    before every history. `writing`: case and punctuation of the words that it knows, as in a TextPolicy.
    """

    def __init__(
        self, model: Any, vocabulary: Vocabulary, *, prompt: str = "", oov: float = 0.0, writing: dict[str, Any] | None = None
    ) -> None:
        kenlm: Any = import_module("kenlm")
        self.model, self.vocabulary, self.oov, self.writing = model, vocabulary, oov, writing or {}
        self._new, self._known = kenlm.State, dict[Any, Tensor]()
        begin = kenlm.State()
        model.BeginSentenceWrite(begin)
        case = self.writing.get("case", "as_is")
        words = " ".join(re.findall(r"[\w']+", prompt if case == "as_is" else getattr(prompt, case)()))
        _, self._begin = self._scored(begin, vocabulary.encode(words))

    def start(self, rows: int) -> States:
        return (self._begin,) * rows

    def log_probs(self, state: States, labels: Tensor | None = None) -> Tensor:
        if isinstance(self.vocabulary, WordVocabulary):
            raise VocabularyError("an n-gram over words cannot score single labels: wrap it in Retokenized(...), without lookahead")
        found = torch.stack([self._next(s) for s in state]) if state else torch.zeros(0, self.vocabulary.size)
        return found if labels is None else found.gather(1, labels.cpu())

    def advance(self, state: States, labels: Tensor, lengths: Tensor) -> tuple[Tensor, States]:
        rows = zip(state, labels.tolist(), lengths.tolist(), strict=True)
        scored = [self._scored(s, chunk[:n]) for s, chunk, n in rows]
        return torch.tensor([score for score, _ in scored]), tuple(s for _, s in scored)

    def finish(self, state: States) -> Tensor:
        return torch.tensor([self._scored(s, [self.vocabulary.eos])[0] for s in state])

    def select(self, state: States, rows: Tensor) -> States:
        return tuple(state[i] for i in rows.tolist())

    def _scored(self, state: Any, labels: Sequence[int]) -> tuple[float, Any]:
        total = 0.0
        for label in labels:
            word, after = "</s>" if label == self.vocabulary.eos else self.vocabulary.piece(label), self._new()
            total += self.model.BaseScore(state, word, after) * math.log(10) - self.oov * (word not in self.model)
            state = after
        return total, state

    def _next(self, state: Any) -> Tensor:
        """[V] log p(next label | state); blank and bos, which are never next, are impossible."""
        if state not in self._known:
            if len(self._known) * self.vocabulary.size > KEPT:
                self._known.clear()
            found = torch.tensor([self._scored(state, [label])[0] for label in range(self.vocabulary.size)])
            found[[x for x in (self.vocabulary.blank, self.vocabulary.bos) if x is not None and x != self.vocabulary.eos]] = -math.inf
            self._known[state] = found
        return self._known[state]


def reads(scorer: Scorer[Any], text: str) -> bool:
    """Whether the scorer knows all of a text; what it does not know costs as <unk> does, or nothing."""
    labels = scorer.vocabulary.encode(text)
    if isinstance(scorer, NgramScorer):
        return all(scorer.vocabulary.piece(x) in scorer.model for x in labels)
    return scorer.vocabulary.decode(labels).split() == text.split()


def load_ngram(path: str | Path, *, over: Vocabulary | None = None, prompt: str = "", oov: float = 0.0) -> NgramScorer:
    """The scorer of an ARPA or binary file: over the labels of `over` where the file has those, else over words. Raises ModelError."""
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}): name an n-gram ({', '.join(NGRAM_FILES)})") from error
    try:
        kenlm: Any = import_module("kenlm")
    except ImportError as error:
        raise ModelError(
            f"{path}: n-grams need KenLM, which is not installed: pip install kenlm (its build needs cmake and g++)"
        ) from error
    config = kenlm.Config()
    config.show_progress, config.arpa_complain = False, kenlm.ARPALoadComplain.NONE
    try:
        model = kenlm.Model(str(path), config)
    except (OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())[-160:]
        raise ModelError(f"{path}: is no n-gram that KenLM reads, expected ARPA (.arpa, .arpa.gz) or its binary (... {cause})") from error
    marked = [p for p in map(over.piece, range(over.size)) if p.startswith(MARKED)] if over is not None else []
    if over is not None and sum(p in model for p in marked) * 10 > len(marked):
        return NgramScorer(model, over, prompt=prompt, oov=oov)
    if over is None and any(p in model for p in ("▁", "▁a", "▁s", "Ġa", "Ġs", "|")):
        raise ModelError(f"{path}: is an n-gram over the labels of an acoustic model: name that one with --am")
    writing = _writing(model, over)
    words = WordVocabulary(f"{model.order}-gram{' in upper case' * (writing['case'] == 'upper')}", f"words of {path}")
    return NgramScorer(model, words, prompt=prompt, oov=oov, writing=writing)


def _writing(model: Any, over: Vocabulary | None) -> dict[str, Any]:
    """Case and punctuation of the words in which texts over the vocabulary `over` (None: any) are to be read."""
    spelled = [text.strip() for text in over.label_texts] if over is not None else []
    words = {text.lower() for text in (*COMMON, *spelled)}
    lower, upper, titled = (sum(w in model for w in x) for x in (words, map(str.upper, words), (w.title() for w in words if len(w) > 1)))
    cased = over is None or len({c.isupper() for text in spelled for c in text if c.upper() != c.lower()}) > 1
    case = "as_is" if cased and titled and lower else "upper" if upper > lower else "lower"
    marks = over is None or any(c in string.punctuation and c != "'" for text in spelled for c in text)
    return {"case": case, "punctuation": "drop" if marks else "keep"}
