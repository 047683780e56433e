"""Making CTC log-probs smaller before a search: runs of sure frames into one, and labels that an utterance cannot contain away.

Both change scores slightly (paper.md 2.3, 2.4); off, the search is exact. Legend: B utterances, T frames, V labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from duolect.search.fusion import NEG, SearchError
from duolect.vocabulary import Vocabulary


def soft_collapse(log_probs: Tensor, lengths: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """(log_probs [B, T', V], lengths [B]): frames that repeat the label of the one before, both this probable, merged into it; blanks too.

    A merged frame has the greatest log-prob per label, normalized again. threshold > 1 changes nothing.
    """
    batch, frames, labels = log_probs.shape
    if not frames:
        return log_probs, lengths
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
    merged = log_probs.new_full((batch, most, labels), NEG).scatter_reduce(1, index, source, "amax")
    return merged.log_softmax(-1), new_lengths


def prune_labels(log_probs: Tensor, lengths: Tensor, *, keep: int, vocabulary: Vocabulary) -> Tensor:
    """[B, T, V] log-probs in which each utterance keeps its `keep` likeliest labels and blank, normalized again; the rest is -inf.

    A label's rank is the greatest of its log-probs over the utterance's frames (paper.md 2.3). keep >= V changes nothing.
    """
    if keep < 1:
        raise SearchError(f"keeping {keep} labels leaves nothing to recognize: give 1 or more")
    if keep >= vocabulary.size:
        return log_probs
    past = (torch.arange(log_probs.shape[1], device=lengths.device)[None] >= lengths[:, None])[..., None]
    rank = log_probs.masked_fill(past, NEG).amax(1)
    assert vocabulary.blank is not None
    rank[:, vocabulary.blank] = torch.inf
    kept = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(min(keep + 1, vocabulary.size), dim=1).indices, True)
    return log_probs.masked_fill(~kept[:, None], NEG).log_softmax(-1)
