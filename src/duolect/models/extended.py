"""A pre-trained encoder with Conformer layers of our own on top, whose frames alone can be trained while the encoder rests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from duolect.models.conformer import ConformerDims, ConformerLayer, TimeDropout, heads_of, sinusoids
from duolect.models.encoders import Encoded, Encoder, encoder_from_settings, frame_mask, require_layers, stack_frames


@dataclass(frozen=True)
class TopDims:
    """The layers on top; fields as in ConformerDims. stack: so many frames of the encoder below, side by side, are one frame of theirs."""

    dim: int = 256
    layers: int = 4
    kernel: int = 15
    ff_factor: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    stack: int = 1

    def conformer(self) -> ConformerDims:
        return ConformerDims(heads=heads_of(self.dim), **{name: value for name, value in asdict(self).items() if name != "stack"})


class ExtendedEncoder(Encoder):
    """The frames of `base`, normalized and projected, through Conformer layers. Layers are counted through: those of the base first."""

    def __init__(self, base: Encoder, dims: TopDims) -> None:
        super().__init__()
        self.base, self.top_dims = base, dims
        self.dim, self.mels, self.depth = dims.dim, base.mels, base.depth + dims.layers
        self.seconds_per_frame, self.max_seconds, self.aside = base.seconds_per_frame * dims.stack, base.max_seconds, base.aside
        if base.aside and dims.stack != 1:
            raise ValueError(f"stack is {dims.stack}, but what a spotter names belongs to one frame: set stack=1")
        self.top = Top(base.dim, dims)

    def features(self, audio: Tensor) -> Tensor:
        return self.base.features(audio)

    def forward(self, features: Tensor, lengths: Tensor, *, taps: Sequence[int] = (), hidden: Tensor | None = None) -> Encoded:
        require_layers(taps, self.depth, first=1 if self.top_dims.stack == 1 else self.base.depth + 1)  # others have another frame rate
        below = self.base(features, lengths, taps=[n for n in taps if n <= self.base.depth], hidden=hidden)
        return self.top(below, taps=[n - self.base.depth for n in taps if n > self.base.depth], below=self.base.depth)

    def settings(self) -> dict[str, object]:
        return {"type": "extended", "base": self.base.settings(), "top": asdict(self.top_dims)}

    @classmethod
    def of_settings(cls, settings: dict[str, object]) -> ExtendedEncoder:
        """The encoder, weights not set, that `settings()` described."""
        base, top = settings["base"], settings["top"]
        if not isinstance(base, dict) or not isinstance(top, dict):
            raise ValueError("base and top are no objects")
        if unknown := settings.keys() - {"type", "base", "top"}:  # what they change would be missing in what is recognized
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        return cls(encoder_from_settings(base), TopDims(**top))


class Top(nn.Module):
    """Frames stacked, layer norm, linear, Conformer layers: [B, T, width] to [B, ceil(T / stack), dim]; further channels go past them."""

    def __init__(self, width: int, dims: TopDims) -> None:
        super().__init__()
        self.dims, self.width = dims, width
        width *= dims.stack
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, dims.dim), TimeDropout(dims.dropout)
        self.layers = nn.ModuleList(ConformerLayer(dims.conformer()) for _ in range(dims.layers))

    def forward(self, encoded: Encoded, *, taps: Sequence[int] = (), below: int = 0) -> Encoded:
        """The frames behind the last layer; taps: layers of this module, from 1, reported `below` higher beside the taps that are there."""
        require_layers(taps, len(self.layers))
        frames, aside = encoded.frames[..., : self.width], encoded.frames[..., self.width :]
        frames, lengths = stack_frames(frames, encoded.lengths, self.dims.stack)
        x, mask = self.dropout(self.linear(self.norm(frames))), frame_mask(lengths, frames.shape[1])
        distances = sinusoids(torch.arange(x.shape[1], -x.shape[1], -1, device=x.device), self.dims.dim).to(x.dtype)
        tapped = dict(encoded.taps)
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, mask, distances)
            if number in taps:
                tapped[below + number] = x * mask[..., None]
        x = x * mask[..., None]
        return Encoded(torch.cat([x, aside.to(x.dtype)], -1) if aside.shape[-1] else x, lengths, tapped)
