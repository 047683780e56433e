"""Adapters: encoder frames become what a language model reads in place of text embeddings.

Legend: B utterances, T frames, T' positions of the language model, D encoder width, W width of the language model, V CTC labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.config import registered
from duolect.models.ctc import CtcOutput
from duolect.models.encoders import Encoded, frame_mask, stack_frames
from duolect.vocabulary import Vocabulary


@registered
@dataclass(frozen=True)
class AdapterDims:
    """How many frames become one position, and how.

    concat: `factor` frames side by side, one linear layer (SLAM-ASR, arXiv 2402.08846; paper.md 1.8: 2). conv: a convolution of that
    stride over twice as many frames. ctc: the mean of the neighbouring frames whose likeliest CTC label is the same, blank frames left
    out (Gaido et al., arXiv 2102.01578).
    words: the CTC head's greedy transcript in the language model's labels, each one's embedding and a linear layer of the mean of its
    frames added; a word's frames are shared evenly among its labels.
    labels (ctc and words): the mean CTC posterior of those frames, blank aside, times a matrix of label embeddings is added, which begins
    as the language model's own embeddings of the labels' text. It says what else may have been said; among words it begins at nought.
    """

    kind: Literal["concat", "conv", "ctc", "words"] = "concat"
    factor: int = 2
    labels: bool = False

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"an adapter of factor {self.factor} makes no sense: give 1 or more")
        if self.labels and self.kind not in ("ctc", "words"):
            raise ValueError(f"an adapter of kind {self.kind} has no labels to embed: set kind=ctc, kind=words or labels=false")


class Adapter(nn.Module):
    """[B, T, D] frames to [B, T', W]; what an utterance gets does not depend on the padding.

    vocabularies: the CTC head's and the language model's. spread: of the language model's embeddings, which the output has at first.
    embeddings: [V, W], see AdapterDims.labels.
    """

    def __init__(
        self,
        dims: AdapterDims,
        *,
        width: int,
        out: int,
        vocabularies: tuple[Vocabulary, Vocabulary],
        spread: float,
        embeddings: Tensor | None,
    ) -> None:
        super().__init__()
        ctc, self.language = vocabularies
        assert ctc.blank is not None
        self.dims, self.heard, self.blank = dims, ctc, ctc.blank
        self.norm = nn.LayerNorm(width)
        reach = {"concat": dims.factor, "conv": 2 * dims.factor}.get(dims.kind, 1)
        self.linear = nn.Linear(width * reach, out)
        # Where text is added, it is all there is at first: the language model can read it, and a random layer would blur it.
        text = dims.kind == "words" or embeddings is not None
        nn.init.normal_(self.linear.weight, std=0.0 if text else spread / (width * reach) ** 0.5)
        nn.init.zeros_(self.linear.bias)
        self.labels = None if embeddings is None else nn.Embedding.from_pretrained(embeddings.clone(), freeze=False)
        self.gate = nn.Parameter(torch.zeros(out)) if dims.kind == "words" and self.labels is not None else None

    def forward(self, encoded: Encoded, ctc: CtcOutput, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(positions [B, T', W], zero beyond their lengths, lengths [B] >= 1) of an encoder's frames and its CTC output at frame rate.

        embed: [..., W] the language model's embeddings of labels.
        """
        encoded = replace(encoded, frames=self.norm(encoded.frames) * frame_mask(encoded.lengths, encoded.frames.shape[1])[..., None])
        if self.dims.kind == "ctc":
            out, lengths = self._compressed(encoded, ctc)
        elif self.dims.kind == "words":
            segment, labels, lengths = self._written(encoded, ctc)
            # Where nothing was heard, the one position is the mean of all frames alone.
            out = self.linear(means(encoded.frames, segment, labels.shape[1]))
            out = out + embed(labels.clamp(min=0)).to(out.dtype) * (labels >= 0)[..., None]
            if self.gate is not None:
                out = out + self.gate * self._likely(ctc, segment, labels.shape[1]).to(out.dtype)
        elif self.dims.kind == "conv":
            out, lengths = self._convolved(encoded)
        else:
            frames, lengths = stack_frames(encoded.frames, encoded.lengths, self.dims.factor)
            out = self.linear(frames)
        return out * frame_mask(lengths, out.shape[1])[..., None], lengths

    def positions(self, frames: int) -> int:
        """How many positions so many frames become; where CTC labels decide, it is as many as the frames at most."""
        return -(-frames // self.dims.factor) if self.dims.kind in ("concat", "conv") else frames

    def middles(self, encoded: Encoded, ctc: CtcOutput) -> list[float]:
        """When each position of a batch's first utterance is heard, in frames from the begin: the middle of its frames.

        A word with more labels than frames leaves positions without: they are heard with the one before.
        """
        if self.dims.kind in ("concat", "conv"):
            return [(i + 0.5) * self.dims.factor for i in range(self.positions(int(encoded.lengths[0])))]
        if self.dims.kind == "words":
            segment, _, lengths = self._written(encoded, ctc)
        else:
            segment, lengths = segments(ctc.log_probs.argmax(2), encoded.lengths, blank=self.blank)
        found: list[float] = []
        for i in range(int(lengths[0])):
            own = (segment[0] == i).nonzero()[:, 0].tolist()
            found.append((own[0] + own[-1] + 1) / 2 if own else found[-1])
        return found

    def _convolved(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """A convolution of kernel 2 * factor and stride factor, zeros on both sides, as one matrix product of unfolded frames."""
        factor = self.dims.factor
        lengths = (encoded.lengths + factor - 1) // factor
        left, short = factor // 2, int(lengths.max()) * factor - encoded.frames.shape[1]
        padded = F.pad(encoded.frames, (0, 0, left, max(0, short) + 2 * factor - left))
        return self.linear(padded.unfold(1, 2 * factor, factor)[:, : int(lengths.max())].flatten(2)), lengths

    def _compressed(self, encoded: Encoded, ctc: CtcOutput) -> tuple[Tensor, Tensor]:
        segment, lengths = segments(ctc.log_probs.argmax(2), encoded.lengths, blank=self.blank)
        out = self.linear(means(encoded.frames, segment, int(lengths.max())))
        if self.labels is not None:
            out = out + self._likely(ctc, segment, int(lengths.max())).to(out.dtype)
        return out, lengths

    def _likely(self, ctc: CtcOutput, segment: Tensor, count: int) -> Tensor:
        """[B, count, W] embeddings of the labels, by the mean posterior of each segment's frames, blank aside."""
        assert self.labels is not None
        spoken = torch.arange(ctc.log_probs.shape[2], device=segment.device) != self.blank
        posterior = means((ctc.log_probs.exp() * spoken).to(self.labels.weight.dtype), segment, count)
        return posterior / posterior.sum(2, keepdim=True).clamp(min=1e-6) @ self.labels.weight

    def _written(self, encoded: Encoded, ctc: CtcOutput) -> tuple[Tensor, Tensor, Tensor]:
        """([B, T] which position a frame belongs to, [B, T'] the language model's label of each position, -1 for none in both; [B])."""
        segment = torch.full(ctc.log_probs.shape[:2], -1, dtype=torch.long)
        best, rows = ctc.log_probs.argmax(2).cpu(), list[list[int]]()
        for row, length in zip(best, encoded.lengths.tolist(), strict=True):
            labels: list[int] = []
            for begin, end, heard in words_of(row[:length].tolist(), self.heard):
                text = self.heard.decode(heard)
                own = self.language.encode_word(text, first=not labels) if text else []
                places = torch.arange(begin, end) - begin
                segment[len(rows), begin:end] = len(labels) + places * len(own) // (end - begin) if own else -1
                labels += own
            if not labels:
                segment[len(rows), :length] = 0
            rows.append(labels or [-1])
        sizes, device = torch.tensor([len(x) for x in rows]), encoded.frames.device
        padded = nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows], batch_first=True, padding_value=-1)
        return segment.to(device), padded.to(device), sizes.to(device)


def words_of(best: Sequence[int], vocabulary: Vocabulary) -> list[tuple[int, int, list[int]]]:
    """(first frame, frame behind the last, labels) of each word of a greedy path, one label per frame."""
    assert vocabulary.blank is not None
    found: list[tuple[int, int, list[int]]] = []
    for frame, (before, label) in enumerate(pairwise([vocabulary.blank, *best])):
        if label == vocabulary.blank:
            continue
        begin, _, labels = found[-1] if found else (frame, frame, [])
        new = label != before
        if found and (not new or not vocabulary.word_starts[label]):
            found[-1] = begin, frame + 1, [*labels, label] if new else labels
        else:
            found.append((frame, frame + 1, [label]))
    return found


def segments(labels: Tensor, lengths: Tensor, *, blank: int) -> tuple[Tensor, Tensor]:
    """([B, T] number of the run of equal labels that a frame belongs to, -1 for blank frames and padding; [B] how many runs, >= 1).

    Where all is blank, the whole utterance is one run.
    """
    real = frame_mask(lengths, labels.shape[1])
    spoken = (labels != blank) & real
    spoken = spoken | (real & ~spoken.any(1, keepdim=True))
    first = spoken.clone()
    first[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    number = first.cumsum(1) - 1
    return torch.where(spoken, number, -1), first.sum(1)


def means(frames: Tensor, segment: Tensor, count: int) -> Tensor:
    """[B, count, D] mean of the frames [B, T, D] of each segment [B, T] (-1: of none)."""
    index = torch.where(segment < 0, count, segment)
    sums = frames.new_zeros(len(frames), count + 1, frames.shape[2]).scatter_add(1, index[..., None].expand_as(frames), frames)
    sizes = frames.new_zeros(len(frames), count + 1).scatter_add(1, index, torch.ones_like(index, dtype=frames.dtype))
    return sums[:, :count] / sizes[:, :count, None].clamp(min=1)
