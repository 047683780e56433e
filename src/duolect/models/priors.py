"""Label priors: unigrams over an acoustic model's labels or a language model's, kept with the acoustic model (paper.md 1.11)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from duolect.data.pieces import PiecesError, SubwordSampler
from duolect.models.ctc import CtcOutput
from duolect.run import write_tensors
from duolect.vocabulary import SentencePieceVocabulary, TokenizerVocabulary, Vocabulary

PRIORS_FILE = "priors.safetensors"
DROPOUT = 0.1
"""Of merges, where byte pairs are sampled (paper.md 1.11)."""
MOST_DRAWS = 64
"""Segmentations drawn of a word that occurs so often or oftener; each then counts for several."""

Words = Mapping[tuple[str, bool], int]
"""How often (a word, whether it begins a text) occurs."""
Segment = Callable[[str, bool], Sequence[int]]
"""Labels of (a word, whether it begins a text), drawn anew at each call."""


class PriorError(ValueError):
    """A prior is missing, or is not of this vocabulary."""


def softmax_prior(outputs: Iterable[CtcOutput], vocabulary: Vocabulary) -> Tensor:
    """[V] log of the mean CTC softmax over all real frames, blank taken out and the rest renormalized.

    A share of 1e-4 is uniform, so that labels the model never emits (unk, bos) do not become an unbounded bonus.
    """
    total = torch.zeros(vocabulary.size, dtype=torch.float64)
    for output in outputs:
        real = torch.arange(output.log_probs.shape[1], device=output.lengths.device)[None] < output.lengths[:, None]
        total += output.log_probs.double().exp()[real].sum(0).cpu()
    return smoothed(total, vocabulary, uniform=1e-4)


def text_priors(words: Words, vocabulary: Vocabulary, *, alpha: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """[V] log of the label counts of words, a tenth uniform: `counts`, and `sampled` (see sampler) where the vocabulary can sample."""
    draw = sampler(vocabulary, alpha=alpha, seed=seed)
    priors = {"counts": smoothed(label_counts(words, vocabulary), vocabulary, uniform=0.1)}
    return priors if draw is None else {**priors, "sampled": smoothed(label_counts(words, vocabulary, draw), vocabulary, uniform=0.1)}


def count_words(texts: Iterable[str]) -> Counter[tuple[str, bool]]:
    """How often each word begins a text, and how often it follows: all that label counts need, however long the texts."""
    found = Counter[tuple[str, bool]]()
    for text in texts:
        found.update((word, place == 0) for place, word in enumerate(text.split()))
    return found


def label_counts(words: Words, vocabulary: Vocabulary, draw: Segment | None = None) -> Tensor:
    """[V] fp64 how often each label stands in the words, as a search hears them one by one; with `draw`, in segmentations drawn."""
    total = np.zeros(vocabulary.size)
    for (word, first), count in words.items():
        draws = 1 if draw is None else min(count, MOST_DRAWS)
        for _ in range(draws):
            for label in vocabulary.encode_word(word, first=first) if draw is None else draw(word, first):
                total[label] += count / draws
    return torch.from_numpy(total)


def sampler(vocabulary: Vocabulary, *, alpha: float = 1.0, seed: int = 0) -> Segment | None:
    """Segmentations by SentencePiece's unigrams to the power of alpha, or by byte pairs of which a tenth is dropped; None for neither."""
    random = np.random.default_rng(seed)
    if isinstance(vocabulary, SentencePieceVocabulary):
        try:
            pieces = SubwordSampler(vocabulary, alpha=alpha)
            pieces.sample("a", random)
        except (PiecesError, RuntimeError):  # pieces that cross words; SentencePiece models of another type
            return None
        return lambda word, first: pieces.sample(word, random)
    backend = getattr(vocabulary.tokenizer, "backend_tokenizer", None) if isinstance(vocabulary, TokenizerVocabulary) else None
    if backend is None or type(backend.model).__name__ != "BPE":
        return None
    return BpeDropout(vocabulary, dropout=DROPOUT, random=random)


class BpeDropout:
    """Labels of words by byte pairs, each merge left out with a probability (Provilkov et al., arXiv 1910.13267).

    tokenizers can do that too, but its random numbers cannot be seeded, and the tokenizer would have to be changed for it.
    """

    def __init__(self, vocabulary: Vocabulary, *, dropout: float, random: np.random.Generator) -> None:
        assert isinstance(vocabulary, TokenizerVocabulary)
        self.vocabulary, self.dropout, self.random = vocabulary, dropout, random
        self._index: dict[str, int] = vocabulary.tokenizer.get_vocab()
        merges = json.loads(vocabulary.tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        self._rank = {tuple(pair.split(" ") if isinstance(pair, str) else pair): rank for rank, pair in enumerate(merges)}

    def __call__(self, word: str, first: bool) -> list[int]:
        labels = self.vocabulary.encode_word(word, first=first)
        pieces = [self.vocabulary.piece(label) for label in labels]
        symbols = list("".join(pieces))
        if any(p.startswith("<") and p.endswith(">") for p in pieces) or not self._index.keys() >= set(symbols):
            return labels  # bytes or special labels, which no merge leads to
        while True:
            ranks = [(self._rank.get(pair), i) for i, pair in enumerate(pairwise(symbols))]
            known = [(rank, i) for rank, i in ranks if rank is not None]
            kept = [x for x, at in zip(known, self.random.random(len(known)), strict=True) if at >= self.dropout]
            if not kept:
                return [self._index[symbol] for symbol in symbols]
            _, i = min(kept)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def spoken(vocabulary: Vocabulary) -> Tensor:
    """[V] bool: the labels a prior is over, which are all but blank and eos."""
    mask = torch.ones(vocabulary.size, dtype=torch.bool)
    mask[[x for x in (vocabulary.blank, vocabulary.eos) if x is not None]] = False
    return mask


def smoothed(total: Tensor, vocabulary: Vocabulary, *, uniform: float) -> Tensor:
    """[V] natural log of counts [V] made to sum to 1 over spoken labels, a share of it uniform; 0 for blank and eos."""
    mask = spoken(vocabulary)
    share = torch.where(mask, total, 0.0)
    even = mask.double() / mask.sum()
    share = share / share.sum() if share.sum() > 0 else even
    return torch.where(mask, (1 - uniform) * share + uniform * even, 1.0).log().float()


def write_priors(folder: Path, vocabulary: Vocabulary, priors: Mapping[str, Tensor], *, source: str) -> None:
    """Adds priors [V] by kind to a folder's file, whose others stay. source: what they were estimated from, for people."""
    path, tensors, notes = folder / PRIORS_FILE, dict[str, Tensor](), dict[str, str]()
    if path.is_file():
        with safe_open(path, "pt") as stored:
            tensors, notes = {key: stored.get_tensor(key) for key in stored.keys()}, dict(stored.metadata() or {})  # noqa: SIM118
    tensors |= {f"{vocabulary.digest()}/{kind}": prior for kind, prior in priors.items()}
    notes |= {f"{vocabulary.digest()}/{kind}": source for kind in priors}
    write_tensors(path, tensors, metadata=notes)


def read_prior(folder: Path, kind: str, vocabulary: Vocabulary) -> Tensor:
    """[V] the prior called `kind` over a vocabulary in a model folder. Raises PriorError."""
    path, digest = folder / PRIORS_FILE, vocabulary.digest()
    remedy = f"`duolect prior --am {folder} --data <manifest>{' --lm <model>' * (kind == 'llm')}`"
    if not path.is_file():
        raise PriorError(f"{path} is missing: estimate priors with {remedy}, or decode without one")
    with safe_open(path, "pt") as stored:
        keys = list(stored.keys())
        if f"{digest}/{kind}" not in keys:
            has = ", ".join(key.partition("/")[2] for key in keys if key.startswith(digest)) or f"vocabularies {', '.join(keys)}"
            raise PriorError(f"{path} has no prior {kind!r} of vocabulary {digest}; it has {has}: estimate it with {remedy}")
        return stored.get_tensor(f"{digest}/{kind}")
