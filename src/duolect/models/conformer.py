"""The Conformer encoder (arXiv 2005.08100) as the paper's baseline has it (paper.md 1.3): log-mel features in, frames of 40 or 60 ms out.

Legend: B utterances, F feature frames, T frames, D width, H heads, S head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.audio.features import SECONDS_PER_FRAME, log_mel
from duolect.models.encoders import Encoded, Encoder, frame_mask, require_layers


@dataclass(frozen=True)
class ConformerDims:
    """The size of a Conformer.

    kernel: frames that the depthwise convolution sees. subsampling: feature frames (10 ms) in a frame. channels: of the three
    convolutions in front. dropout: chance, one draw per utterance and channel for all its frames; attention_dropout: chance per weight.
    """

    mels: int = 80
    dim: int = 1024
    layers: int = 16
    heads: int = 8
    kernel: int = 32
    ff_factor: int = 4
    subsampling: Literal[4, 6] = 6
    channels: tuple[int, int, int] = (32, 64, 64)
    dropout: float = 0.1
    attention_dropout: float = 0.1

    @classmethod
    def of(cls, *, layers: int, dim: int, **others: Any) -> ConformerDims:
        """The dims of a depth and a width; `others` are fields as they are."""
        return cls(**{"layers": layers, "dim": dim, "heads": heads_of(dim), **others})


def heads_of(dim: int) -> int:
    """How many attention heads a width is cut into: up to 8, of an even size of at least 32."""
    return max(h for h in range(1, 9) if h == 1 or (dim % (2 * h) == 0 and dim // h >= 32))


PRESETS = {
    "tiny": ConformerDims.of(layers=6, dim=128, kernel=15, channels=(16, 32, 32)),
    "small": ConformerDims.of(layers=12, dim=512, kernel=33),
    "base": ConformerDims.of(layers=16, dim=1024),
}
"""2.6, 77 and 406 million parameters. `small` and `base` are those of the paper's LibriSpeech and Loquacious baselines."""


class ConformerEncoder(Encoder):
    """Features through a masked batch-norm, three convolutions and the layers; all that mixes frames is masked, in training too."""

    def __init__(self, dims: ConformerDims) -> None:
        super().__init__()
        if dims.subsampling not in (4, 6) or dims.dim % dims.heads or dims.dim % 2 or dims.layers < 1:
            raise ValueError(
                f"a Conformer of {dims.layers} layers, dim {dims.dim}, {dims.heads} heads, subsampling {dims.subsampling} cannot be built: "
                "dim must be even and a multiple of heads, layers at least 1, subsampling 4 or 6"
            )
        self.dims = dims
        self.dim, self.mels, self.depth, self.max_seconds = dims.dim, dims.mels, dims.layers, math.inf
        self.seconds_per_frame = dims.subsampling * SECONDS_PER_FRAME
        self.norm = MaskedBatchNorm(dims.mels, affine="no")
        self.front = _Front(dims)
        self.dropout = TimeDropout(dims.dropout)
        self.layers = nn.ModuleList(ConformerLayer(dims) for _ in range(dims.layers))

    def features(self, audio: Tensor) -> Tensor:
        return log_mel(audio, mels=self.mels)

    def forward(self, features: Tensor, lengths: Tensor, *, taps: Sequence[int] = (), hidden: Tensor | None = None) -> Encoded:
        require_layers(taps, self.depth)
        x = self.norm(features, frame_mask(lengths, features.shape[1]))
        if hidden is not None:
            x = x.masked_fill(hidden, 0.0)  # the mean, now
        x, lengths = self.front(x, lengths)
        # From here on x has the features' precision, so that autocast rounds what is added to it and never the sum.
        x, mask, tapped = self.dropout(x.to(features.dtype)), frame_mask(lengths, x.shape[1]), {}
        distances = sinusoids(torch.arange(x.shape[1], -x.shape[1], -1, device=x.device), self.dim).to(x.dtype)
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, mask, distances)
            if number in taps:
                tapped[number] = x * mask[..., None]
        return Encoded(x * mask[..., None], lengths, tapped)

    def settings(self) -> dict[str, object]:
        return {"type": "conformer", **asdict(self.dims)}


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """[..., dim] fp32 sines and cosines of positions [...], wavelengths from 2 pi to 10,000 * 2 pi (arXiv 1706.03762)."""
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10_000.0) / dim))
    angles = positions[..., None].float() * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class TimeDropout(nn.Module):
    """Dropout of [B, T, D] whose mask [B, 1, D] all frames of an utterance share."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.chance:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.chance)


class MaskedBatchNorm(nn.Module):
    """Batch-norm of [B, T, D] over the frames where mask [B, T] is true; statistics are fp32."""

    def __init__(self, dim: int, *, affine: Literal["yes", "no"]) -> None:
        super().__init__()
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.weight = nn.Parameter(torch.ones(dim)) if affine == "yes" else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine == "yes" else None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            y, real = x.to(torch.promote_types(x.dtype, torch.float32)), mask[..., None]
            count = mask.sum()
            mean = (y * real).sum((0, 1)) / count
            var = ((y - mean).square() * real).sum((0, 1)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), 0.1)
                self.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(self.running_var.dtype), 0.1)
        scale = torch.rsqrt(var + 1e-5)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift, x, scale).to(x.dtype)


class _Front(nn.Module):
    """Three 3x3 convolutions, the mel axis halved and time divided by `subsampling`, and a linear layer; [B, F, mels] -> [B, T, D]."""

    def __init__(self, dims: ConformerDims) -> None:
        super().__init__()
        self.strides = (1, dims.subsampling // 2, 2)
        sizes = (1, *dims.channels)
        self.convs = nn.ModuleList(nn.Conv2d(sizes[i], sizes[i + 1], 3, stride=(self.strides[i], 1), padding=1) for i in range(3))
        self.linear = nn.Linear(dims.channels[-1] * -(-dims.mels // 2), dims.dim, bias=False)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = (x * frame_mask(lengths, x.shape[1])[..., None])[:, None]
        x = x.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        for i, conv in enumerate(self.convs):
            x, lengths = conv(x), -(-lengths // self.strides[i])
            x = F.relu(F.max_pool2d(x, (1, 2), ceil_mode=True) if i == 0 else x)
            x = x * frame_mask(lengths, x.shape[2])[:, None, :, None]
        return self.linear(x.permute(0, 2, 3, 1).flatten(2)), lengths


class ConformerLayer(nn.Module):
    """Half a feed-forward, self-attention, convolution, half a feed-forward; each pre-norm and residual; a norm at the end."""

    def __init__(self, dims: ConformerDims) -> None:
        super().__init__()
        self.ff1, self.ff2 = _FeedForward(dims), _FeedForward(dims)
        self.attention = RelativeAttention(dims.dim, dims.heads, dropout=dims.attention_dropout)
        self.conv = _Convolution(dims.dim, dims.kernel)
        self.norms = nn.ModuleList(nn.LayerNorm(dims.dim) for _ in range(5))
        self.dropout = TimeDropout(dims.dropout)

    def forward(self, x: Tensor, mask: Tensor, distances: Tensor) -> Tensor:
        x = x + 0.5 * self.dropout(self.ff1(self.norms[0](x)))
        x = x + self.dropout(self.attention(self.norms[1](x), mask, distances))
        x = x + self.dropout(self.conv(self.norms[2](x), mask))
        x = x + 0.5 * self.dropout(self.ff2(self.norms[3](x)))
        return self.norms[4](x)


class _FeedForward(nn.Module):
    """linear, relu squared (arXiv 2109.08668), linear; no bias."""

    def __init__(self, dims: ConformerDims) -> None:
        super().__init__()
        self.up = nn.Linear(dims.dim, dims.ff_factor * dims.dim, bias=False)
        self.down = nn.Linear(dims.ff_factor * dims.dim, dims.dim, bias=False)
        self.dropout = TimeDropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.relu(self.up(x)).square()))


class _Convolution(nn.Module):
    """Gated linear unit, depthwise convolution, batch-norm, swish, linear. The output of padded frames is of no meaning."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.around = ((kernel - 1) // 2, kernel // 2)  # an even kernel looks one frame further ahead
        self.norm = MaskedBatchNorm(dim, affine="yes")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = F.glu(self.gate(x)) * mask[..., None]
        x = self.depthwise(F.pad(x.transpose(1, 2), self.around)).transpose(1, 2)
        return self.out(F.silu(self.norm(x, mask)))


class RelativeAttention(nn.Module):
    """Self-attention that knows distances (Transformer-XL, arXiv 1901.02860): score = ((q_i + u) k_j + (q_i + v) r_(i-j)) / sqrt(S).

    The second term goes into torch's fused attention as its additive mask, which has a gradient on every device.
    """

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.chance = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.distance = nn.Linear(dim, dim, bias=False)
        self.content_bias, self.distance_bias = (nn.Parameter(torch.zeros(heads, 1, dim // heads)) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, distances: Tensor) -> Tensor:
        """[B, T, D] of x [B, T, D], mask [B, T] true at keys that exist, distances [2T, D]: sinusoids of T .. 1-T."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        r = self.distance(distances).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)  # [H, S, 2T]
        by_distance = shifted(torch.matmul(q + self.distance_bias, r)) * q.shape[-1] ** -0.5
        bias = by_distance.masked_fill(~mask[:, None, None], -math.inf).to(v.dtype)
        heard = F.scaled_dot_product_attention(
            (q + self.content_bias).to(v.dtype), k, v, attn_mask=bias, dropout_p=self.chance if self.training else 0.0
        )
        return self.out(heard.transpose(1, 2).flatten(2))


def shifted(scores: Tensor) -> Tensor:
    """[..., T, T] whose (i, j) is scores[..., i, T - (i - j)], for scores [..., T, 2T] by distance T .. 1-T: a view, nothing is copied."""
    frames = scores.shape[-2]
    # Row i begins at i * 2T and its column j lies T - i + j further: T + i * (2T - 1) + j.
    return scores.flatten(-2)[..., frames:].unflatten(-1, (frames, 2 * frames - 1))[..., :frames]
