"""Speech encoders: log-mel features in, frames out, and never a result that depends on the padding of the batch."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.audio.features import whisper_log_mel
from duolect.models import ModelError


@dataclass(frozen=True)
class Encoded:
    """What an encoder heard: frames [B, T, D], zero beyond lengths [B].

    taps: layer number, from 1, to [B, T, D]: what `frames` would be if the encoder ended with that layer (its final norm included).
    """

    frames: Tensor
    lengths: Tensor
    taps: Mapping[int, Tensor] = field(default_factory=dict)


class Encoder(nn.Module, ABC):
    """Features to frames. A padded batch gives what each utterance gives alone; `depth` is the number of layers.

    aside: so many channels behind the `dim` of a frame are for a CTC head alone.
    """

    dim: int
    aside: int = 0
    mels: int
    depth: int
    seconds_per_frame: float
    max_seconds: float

    @abstractmethod
    def features(self, audio: Tensor) -> Tensor:
        """[F, mels] what this encoder hears, of samples [N] at 16 kHz: one feature frame per 10 ms, F = ceil(N / 160)."""

    @abstractmethod
    def forward(self, features: Tensor, lengths: Tensor, *, taps: Sequence[int] = (), hidden: Tensor | None = None) -> Encoded:
        """Frames of features [B, F, mels], of which the first lengths[b] >= 1 are real in utterance b.

        taps: layers whose output is wanted too. hidden: bool [B, F, mels], features that SpecAugment sets to their mean.
        """

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What config.json must hold to build the encoder again without its weights."""


def frame_mask(lengths: Tensor, frames: int) -> Tensor:
    """Bool [B, frames], true where a frame is real."""
    return torch.arange(frames, device=lengths.device)[None] < lengths[:, None]


@dataclass(frozen=True)
class WhisperDims:
    """The size of a Whisper encoder."""

    mels: int = 80
    dim: int = 512
    layers: int = 6
    heads: int = 8
    positions: int = 1500


class WhisperEncoder(Encoder):
    """Whisper's encoder (arXiv 2212.04356) without its padding to 30 s.

    Parameters carry the names of Hugging Face's WhisperEncoder. What Whisper gets from padding is replaced by masks: features and the first
    convolution's output are zero beyond the length, padded frames are no keys of the attention.
    """

    def __init__(self, dims: WhisperDims) -> None:
        super().__init__()
        self.dims = dims
        self.dim, self.mels, self.depth, self.max_seconds = dims.dim, dims.mels, dims.layers, dims.positions * 0.02
        self.seconds_per_frame = 0.02
        self.conv1 = nn.Conv1d(dims.mels, dims.dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dims.dim, dims.dim, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(dims.positions, dims.dim)
        self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList(_Layer(dims.dim, dims.heads) for _ in range(dims.layers))
        self.layer_norm = nn.LayerNorm(dims.dim)

    def features(self, audio: Tensor) -> Tensor:
        return whisper_log_mel(audio, mels=self.mels)

    def forward(self, features: Tensor, lengths: Tensor, *, taps: Sequence[int] = (), hidden: Tensor | None = None) -> Encoded:
        require_layers(taps, self.depth, first=1)
        x = features * frame_mask(lengths, features.shape[1])[..., None]
        if hidden is not None:
            mean = x.sum((1, 2), keepdim=True) / (lengths[:, None, None] * self.mels)
            x = torch.where(hidden & frame_mask(lengths, x.shape[1])[..., None], mean.to(x.dtype), x)
        x = F.gelu(self.conv1(x.transpose(1, 2))) * frame_mask(lengths, features.shape[1])[:, None]
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        lengths = (lengths + 1) // 2
        if x.shape[1] > self.dims.positions:
            raise ValueError(f"{x.shape[1] * 0.02:.1f} s of audio > the encoder's {self.max_seconds:.0f} s: cut it into windows")
        x = x + self.embed_positions.weight[: x.shape[1]]
        mask, tapped = frame_mask(lengths, x.shape[1]), {}
        for i, layer in enumerate(self.layers):
            x = layer(x, mask[:, None, None])
            if i + 1 in taps:
                tapped[i + 1] = self.layer_norm(x) * mask[..., None]
        return Encoded(tapped[self.depth] if self.depth in tapped else self.layer_norm(x) * mask[..., None], lengths, tapped)

    def settings(self) -> dict[str, object]:
        return {"type": "whisper", **asdict(self.dims)}

    @classmethod
    def from_whisper(cls, folder: str | Path) -> WhisperEncoder:
        """The encoder of a Hugging Face Whisper folder (config.json, model.safetensors)."""
        config = json.loads((Path(folder) / "config.json").read_text())
        dims = WhisperDims(
            config["num_mel_bins"],
            config["d_model"],
            config["encoder_layers"],
            config["encoder_attention_heads"],
            config["max_source_positions"],
        )
        encoder, prefix = cls(dims), "model.encoder."
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            names = list(file.keys())
            weights = {name.removeprefix(prefix): file.get_tensor(name).float() for name in names if name.startswith(prefix)}
        encoder.load_state_dict(weights)
        return encoder


def encoder_from_settings(settings: Mapping[str, object]) -> Encoder:
    """The encoder, weights not set, that `settings()` described. Raises ModelError where this version has no such one."""
    try:
        return _described(settings)
    except ModelError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(
            f"config.json describes an encoder that this version of duolect does not have ({error}): train or fetch it anew"
        ) from error


def _described(settings: Mapping[str, object]) -> Encoder:
    from duolect.models.conformer import ConformerDims, ConformerEncoder  # these stand on this file
    from duolect.models.extended import ExtendedEncoder
    from duolect.models.hf_encoder import HuggingFaceEncoder
    from duolect.models.spotter import SpottingEncoder

    if settings.get("type") == "spotting":
        return SpottingEncoder.of_settings(settings)
    if settings.get("type") == "huggingface":
        return HuggingFaceEncoder.of_settings(dict(settings))
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in settings.items() if name != "type"}
    kind = settings.get("type")
    if kind == "whisper":
        return WhisperEncoder(WhisperDims(**fields))  # pyright: ignore[reportArgumentType]
    if kind == "conformer":
        return ConformerEncoder(ConformerDims(**fields))  # pyright: ignore[reportArgumentType]
    if kind == "extended":
        return ExtendedEncoder.of_settings(fields)
    raise ValueError(f"encoder type {kind!r} is unknown; known: whisper, spotting, conformer, extended, huggingface")


def require_layers(taps: Sequence[int], depth: int, *, first: int = 1) -> None:
    """Raises ValueError unless every tap is a layer number in first .. depth."""
    for layer in taps:
        if not first <= layer <= depth:
            raise ValueError(f"layer {layer} is to be tapped, but only {first} .. {depth} can be: of another rate, or none")


def stack_frames(frames: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """([B, ceil(T / count), count * D], lengths): `count` frames side by side, zeros for those beyond the length."""
    if count == 1:
        return frames, lengths
    frames = frames * frame_mask(lengths, frames.shape[1])[..., None]
    frames = F.pad(frames, (0, 0, 0, -frames.shape[1] % count))
    return frames.reshape(frames.shape[0], -1, count * frames.shape[2]), (lengths + count - 1) // count


class _Layer(nn.Module):
    """One pre-norm Transformer layer of Whisper."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Attention(nn.Module):
    """Whisper's attention, to the frames themselves or to others; mask (broadcast to [B, H, T, K]) is true at keys that are seen."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)

    def projected(self, x: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x [B, T, D], keys and values of `others` [B, K, D] (x itself): [B, H, T or K, S] each."""
        heard = x if others is None else others
        q, k, v = self.q_proj(x), self.k_proj(heard), self.v_proj(heard)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor, others: Tensor | None = None) -> Tensor:
        q, k, v = self.projected(x, others)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
