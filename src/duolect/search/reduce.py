"""Making CTC log-probs smaller before a search: runs of sure frames into one, and labels that an utterance cannot contain away.

Both change scores slightly (paper.md 2.3, 2.4); off, the search is exact. Legend: B utterances, T frames, V labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duolect.search.fusion import SearchError
from duolect.vocabulary import Vocabulary

NEG = float("-inf")


@dataclass(frozen=True)
class Reduced:
    """Fewer frames or labels: log_probs [B, T', V], lengths [B], and for each frame of before the frame it went into."""

    log_probs: Tensor
    lengths: Tensor
    frame: Tensor  # [B, T] index of the new frame


def soft_collapse(
    log_probs: Tensor, lengths: Tensor, *, threshold: float, reduce: Literal["max_renorm", "logmeanexp"] = "max_renorm"
) -> Reduced:
    """Frames that repeat the label of the one before, both with probability >= threshold, merged into it; blank runs too.

    `max_renorm`: greatest log-prob per label, normalized again; `logmeanexp`: mean probability. threshold > 1 changes nothing.
    """
    batch, frames, labels = log_probs.shape
    if not frames:
        return Reduced(log_probs, lengths, torch.zeros(batch, 0, dtype=torch.long, device=log_probs.device))
    best, label = log_probs.max(2)
    sure = best.exp() >= threshold
    drop = torch.zeros_like(sure)
    drop[:, 1:] = (label[:, 1:] == label[:, :-1]) & sure[:, 1:] & sure[:, :-1]
    real = torch.arange(frames, device=lengths.device)[None] < lengths[:, None]
    kept = ~drop & real
    # Frames behind the end go where the last real one goes, with nothing to add there.
    frame = (kept.cumsum(1) - 1).clamp(min=0)
    new_lengths = kept.sum(1)
    most = max(int(new_lengths.max()), 1)
    index = frame[..., None].expand(-1, -1, labels)
    source = log_probs.masked_fill(~real[..., None], NEG)
    if reduce == "max_renorm":
        merged = log_probs.new_full((batch, most, labels), NEG).scatter_reduce(1, index, source, "amax")
        merged = merged.log_softmax(-1)
    else:
        count = torch.zeros(batch, most, device=log_probs.device).scatter_add(1, frame, real.float())
        merged = log_probs.new_zeros(batch, most, labels).scatter_add(1, index, source.exp())
        merged = (merged / count.clamp(min=1)[..., None]).log()
    return Reduced(merged[:, :most], new_lengths, frame)


def prune_labels(
    log_probs: Tensor, lengths: Tensor, *, keep: int, vocabulary: Vocabulary, reduce: Literal["mean", "max"] = "max"
) -> Tensor:
    """[B, T, V] log-probs in which each utterance keeps its `keep` likeliest labels and blank, normalized again; the rest is -inf.

    A label's rank is the mean or the greatest of its log-probs over the utterance's frames (paper.md 2.3). keep >= V changes nothing.
    """
    if keep < 1:
        raise SearchError(f"keeping {keep} labels leaves nothing to recognize: give 1 or more")
    if keep >= vocabulary.size:
        return log_probs
    past = (torch.arange(log_probs.shape[1], device=lengths.device)[None] >= lengths[:, None])[..., None]
    if reduce == "max":
        rank = log_probs.masked_fill(past, NEG).amax(1)
    else:
        rank = log_probs.clamp(min=-1e4).masked_fill(past, 0.0).sum(1) / lengths.clamp(min=1)[:, None]
    assert vocabulary.blank is not None
    rank[:, vocabulary.blank] = torch.inf
    kept = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(min(keep + 1, vocabulary.size), dim=1).indices, True)
    return log_probs.masked_fill(~kept[:, None], NEG).log_softmax(-1)
