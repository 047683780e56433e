"""Naive twins: brute force over all alignments, and language model scores computed from scratch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duolect.models.lm import HFCausalLM
from duolect.vocabulary import Vocabulary


def collapsed(path: Sequence[int], blank: int) -> tuple[int, ...]:
    """The labels of a CTC path."""
    return tuple(x for i, x in enumerate(path) if x != blank and (i == 0 or path[i - 1] != x))


def all_alignments(log_probs: Tensor, blank: int, *, combine: str = "sum") -> dict[tuple[int, ...], float]:
    """log p of every label sequence of log_probs [T, V], by enumerating all V^T paths."""
    table: dict[tuple[int, ...], list[float]] = {}
    rows = log_probs.double().tolist()
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(rows)):
        table.setdefault(collapsed(path, blank), []).append(sum(row[x] for row, x in zip(rows, path, strict=True)))
    merge: Callable[[list[float]], float] = max if combine == "max" else lambda s: max(s) + math.log(sum(math.exp(x - max(s)) for x in s))
    return {labels: merge(scores) for labels, scores in table.items()}


@torch.inference_mode()
def lm_from_scratch(lm: HFCausalLM, labels: Sequence[int], *, end: bool = True) -> float:
    """log p(labels [eos]) by one full forward of the model, its softmax over the vocabulary's rows."""
    history = [lm.vocabulary.bos, *labels]
    targets = [*labels, lm.vocabulary.eos] if end else list(labels)
    logits = lm.model(input_ids=torch.tensor([history])).logits[0, : len(targets), : lm.vocabulary.size]
    return float(logits.float().log_softmax(-1)[torch.arange(len(targets)), torch.tensor(targets)].sum()) if targets else 0.0


def random_log_probs(groups: int, frames: int, vocabulary: Vocabulary, *, seed: int, peak: float = 2.0) -> Tensor:
    """[B, T, V] random CTC log-probs that never emit eos (a CTC model does not)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(groups, frames, vocabulary.size, generator=generator) * peak
    for label in {vocabulary.eos, vocabulary.bos} - {vocabulary.blank}:
        logits[..., label] = -float("inf")
    return logits.log_softmax(-1)
