"""Adapters: encoder frames become what a language model reads in place of text embeddings.

Legend: B utterances, T frames, T' positions of the language model, D encoder width, W width of the language model, V CTC labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.config import registered
from duolect.models.ctc import CtcOutput
from duolect.models.encoders import Encoded, frame_mask, stack_frames


@registered
@dataclass(frozen=True)
class AdapterDims:
    """How many frames become one position, and how.

    concat: `factor` frames side by side, one linear layer (SLAM-ASR, arXiv 2402.08846; paper.md 1.8: 2). conv: a convolution of that
    stride over twice as many frames. ctc: the mean of the neighbouring frames whose likeliest CTC label is the same, blank frames left
    out (Gaido et al., arXiv 2102.01578). labels (ctc only): the mean CTC posterior of those frames, blank aside, times a matrix of label
    embeddings is added, which begins as the language model's own embeddings of the labels' text.
    """

    kind: Literal["concat", "conv", "ctc"] = "concat"
    factor: int = 2
    labels: bool = False

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"an adapter of factor {self.factor} makes no sense: give 1 or more")
        if self.labels and self.kind != "ctc":
            raise ValueError(f"an adapter of kind {self.kind} has no labels to embed: set kind=ctc or labels=false")


class Adapter(nn.Module):
    """[B, T, D] frames to [B, T', W]; what an utterance gets does not depend on the padding.

    blank: of the CTC labels. spread: standard deviation of the language model's embeddings, which the output has at first.
    embeddings: [V, W], see AdapterDims.labels.
    """

    def __init__(self, dims: AdapterDims, *, width: int, out: int, blank: int, spread: float, embeddings: Tensor | None) -> None:
        super().__init__()
        self.dims, self.blank = dims, blank
        self.norm = nn.LayerNorm(width)
        reach = {"concat": dims.factor, "conv": 2 * dims.factor, "ctc": 1}[dims.kind]
        self.linear = nn.Linear(width * reach, out)
        nn.init.normal_(self.linear.weight, std=spread / (width * reach) ** 0.5)
        nn.init.zeros_(self.linear.bias)
        self.labels = None if embeddings is None else nn.Embedding.from_pretrained(embeddings.clone(), freeze=False)

    def forward(self, encoded: Encoded, ctc: CtcOutput) -> tuple[Tensor, Tensor]:
        """(positions [B, T', W], zero beyond their lengths, lengths [B] >= 1) of an encoder's frames and its CTC output at frame rate."""
        encoded = replace(encoded, frames=self.norm(encoded.frames) * frame_mask(encoded.lengths, encoded.frames.shape[1])[..., None])
        if self.dims.kind == "ctc":
            out, lengths = self._compressed(encoded, ctc)
        elif self.dims.kind == "conv":
            out, lengths = self._convolved(encoded)
        else:
            frames, lengths = stack_frames(encoded.frames, encoded.lengths, self.dims.factor)
            out = self.linear(frames)
        return out * frame_mask(lengths, out.shape[1])[..., None], lengths

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
            spoken = torch.arange(ctc.log_probs.shape[2], device=out.device) != self.blank
            posterior = means((ctc.log_probs.exp() * spoken).to(out.dtype), segment, int(lengths.max()))
            out = out + posterior / posterior.sum(2, keepdim=True).clamp(min=1e-6) @ self.labels.weight
        return out, lengths


def segments(labels: Tensor, lengths: Tensor, *, blank: int) -> tuple[Tensor, Tensor]:
    """([B, T] number of the run of equal labels that a frame belongs to, -1 for blank frames and padding; [B] how many runs, >= 1).

    Where all is blank, the whole utterance is one run.
    """
    real = frame_mask(lengths, labels.shape[1])
    spoken = (labels != blank) & real
    spoken = spoken | (real & ~spoken.any(1, keepdim=True))
    first = spoken.clone()
    first[:, 1:] &= (labels[:, 1:] != labels[:, :-1]) | ~spoken[:, :-1]
    number = first.cumsum(1) - 1
    return torch.where(spoken, number, -1), first.sum(1)


def means(frames: Tensor, segment: Tensor, count: int) -> Tensor:
    """[B, count, D] mean of the frames [B, T, D] of each segment [B, T] (-1: of none)."""
    index = torch.where(segment < 0, count, segment)
    sums = frames.new_zeros(len(frames), count + 1, frames.shape[2]).scatter_add(1, index[..., None].expand_as(frames), frames)
    sizes = frames.new_zeros(len(frames), count + 1).scatter_add(1, index, torch.ones_like(index, dtype=frames.dtype))
    return sums[:, :count] / sizes[:, :count, None].clamp(min=1)
