"""Speculative decoding with a given transcript as draft: a decoder checks many labels in one pass instead of finding them one by one.

The draft is what a CTC model heard (the idea: arXiv 2603.11243); it may have been made in any vocabulary. Legend: B utterances, S labels of
a chunk, V labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duolect.scorer import Hypothesis, Scorer
from duolect.search.fusion import NEG, SearchError
from duolect.vocabulary import Vocabulary


@dataclass(frozen=True)
class Draft:
    """How drafts are used.

    chunk: labels checked in one pass at most; behind a disagreement fewer. slack: a draft's label is also taken where its log-probability
    is at most so much below the best label's and the entropy of the next label is at least `entropy` nats; 0 is lossless: greedy search,
    only faster.
    """

    chunk: int = 16
    slack: float = 0.0
    entropy: float = 0.0

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.slack < 0:
            raise SearchError(f"a draft of chunk {self.chunk} and slack {self.slack:g}: expected chunk >= 1 and slack >= 0")


@dataclass(frozen=True)
class Drafted:
    """nbest: one hypothesis per utterance, with the part `name`; passes: how often the decoder was asked; accepted: draft labels taken."""

    nbest: list[list[Hypothesis]]
    passes: int
    accepted: int


@torch.no_grad()
def greedy_with_drafts(
    scorer: Scorer[Any], drafts: Sequence[str], *, max_labels: int | Tensor, name: str = "llm", settings: Draft | None = None
) -> Drafted:
    """What label_beam_search with beam 1 gives, with draft texts (spelled as the scorer's vocabulary spells) checked chunk by chunk.

    In each pass every utterance still open proposes labels, the longest prefix that the scorer agrees with is taken, and the scorer's own
    next label after it; behind a disagreement the rest of the draft is found by aligning it with what was written.
    """
    settings, vocabulary = settings or Draft(), scorer.vocabulary
    limits = torch.as_tensor(max_labels).expand(len(drafts)).tolist()
    rows = [_Row(draft, limit, settings.chunk) for draft, limit in zip(drafts, limits, strict=True)]
    state, active, passes = scorer.start(len(drafts)), rows, 0
    while active:
        chunks = [[*row.pending, *row.proposed(vocabulary)] for row in active]
        ahead, seen = _seen(scorer, state, chunks, settings)
        behind = torch.tensor([row.take(chunk, x) for row, chunk, x in zip(active, chunks, seen, strict=True)])
        passes += 1
        going = torch.tensor([not row.ended for row in active])
        width = max(map(len, chunks)) + 1
        state = scorer.select(ahead, (torch.arange(len(active)) * width + behind)[going])
        active = [row for row in active if not row.ended]
    nbest = [[Hypothesis(tuple(r.labels), vocabulary.decode(r.labels), {name: r.score})] for r in rows]
    return Drafted(nbest, passes, sum(r.accepted for r in rows))


@dataclass(frozen=True)
class _Seen:
    """What the scorer says behind 0, 1, ... labels of a chunk: the best next label and its log p, whether the chunk's next label may be
    taken and its log p, log p of eos."""

    best: list[int]
    scores: list[float]
    fine: list[bool]
    drafted: list[float]
    ends: list[float]


def _seen(scorer: Scorer[Any], state: Any, chunks: Sequence[Sequence[int]], settings: Draft) -> tuple[Any, list[_Seen]]:
    """(the states behind 0, 1, ... labels of each chunk, chunk by chunk in rows of equal number; what is seen there)."""
    vocabulary, width = scorer.vocabulary, max(map(len, chunks)) + 1
    labels = torch.tensor([[*chunk, *[vocabulary.eos] * (width - len(chunk))] for chunk in chunks])
    lengths = torch.minimum(torch.arange(width)[None], torch.tensor([len(chunk) for chunk in chunks])[:, None]).flatten()
    spread = torch.arange(len(chunks)).repeat_interleave(width)
    # One call for all prefixes of all chunks: a scorer that keeps histories computes each label once.
    _, ahead = scorer.advance(scorer.select(state, spread), labels[spread][:, : width - 1], lengths)
    log_probs = scorer.log_probs(ahead).view(len(chunks), width, -1)
    log_probs[..., [x for x in (vocabulary.blank, vocabulary.bos) if x is not None and x != vocabulary.eos]] = NEG
    best = log_probs.max(2)
    drafted = log_probs.gather(2, labels[..., None].to(log_probs.device))[..., 0]
    fine = labels.to(log_probs.device) == best.indices
    if settings.slack > 0:
        entropy = torch.special.entr(log_probs.exp()).sum(2)
        fine |= (drafted >= best.values - settings.slack) & (entropy >= settings.entropy) & (drafted > NEG)
    parts = (best.indices, best.values, fine, drafted, log_probs[..., vocabulary.eos])
    return ahead, [_Seen(*x) for x in zip(*(x.tolist() for x in parts), strict=True)]


class _Row:
    """One utterance on its way: labels decided, of which the last may not have been consumed by the scorer's state yet (pending)."""

    def __init__(self, draft: str, limit: int, chunk: int) -> None:
        self.draft, self.limit, self.chunk, self.reach = draft, limit, chunk, chunk
        self.labels: list[int] = []
        self.pending: list[int] = []
        self.score, self.accepted, self.ended = 0.0, 0, False

    def proposed(self, vocabulary: Vocabulary) -> list[int]:
        """The next labels by the draft, as many as the one before gives hope for and no more than the limit leaves."""
        rest = remainder(vocabulary.decode(self.labels), self.draft) if self.labels else self.draft
        if rest and self.labels and vocabulary.word_joint == "dummy":  # such a tokenizer begins a word wherever a text begins
            rest = rest[1:] if rest[0] == " " else rest.partition(" ")[2]
        return vocabulary.encode(rest)[: min(self.reach, self.limit - len(self.labels))] if rest else []

    def take(self, chunk: Sequence[int], seen: _Seen) -> int:
        """Decides labels up to the first disagreement and the scorer's own next one; how many labels of the chunk the state is to have."""
        place = len(self.pending)
        while place < len(chunk) and seen.fine[place]:
            self.labels.append(chunk[place])
            self.score += seen.drafted[place]
            self.accepted += 1
            place += 1
        # What is checked in vain costs as much as what is taken: a poor draft is asked for little at a time.
        self.reach = min(self.chunk, 2 * (place - len(self.pending)) + 2)
        full = len(self.labels) >= self.limit
        self.ended = full or bool(seen.ends[place] >= seen.scores[place])
        self.score += seen.ends[place] if self.ended else seen.scores[place]
        self.pending = [] if self.ended else [seen.best[place]]
        self.labels += self.pending
        return place


def remainder(written: str, draft: str) -> str:
    """What of a draft comes after a written text: words are aligned by edit distance, the last one may still be growing."""
    words, spoken = written.split(" "), draft.split()
    last = words.pop()
    costs = list(range(len(spoken) + 1))  # of the words written so far against each number of the draft's
    for word in words:
        diagonal, costs[0] = costs[0], costs[0] + 1
        for n, other in enumerate(spoken, start=1):
            best = min(costs[n] + 1, costs[n - 1] + 1, diagonal + (word != other))
            diagonal, costs[n] = costs[n], best
    place = max(n for n, cost in enumerate(costs) if cost == min(costs))
    near = [n for n in (place, place + 1, place - 1) if 0 <= n < len(spoken) and spoken[n].startswith(last)]
    place = near[0] if near else place
    if place >= len(spoken):
        return ""
    # A word that is not the draft's is taken to stand for it, and to be as long.
    return "".join([spoken[place][len(last) :], *(f" {word}" for word in spoken[place + 1 :])])
