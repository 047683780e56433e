"""Whisper's decoder without histories: asked at every frame which word begins there, all frames at once.

A decoder knows how words are written; a small CTC model on top of an encoder has to learn it anew. With cross-attention cut to a window
around a frame and no label behind the prompt, the pre-trained decoder names the word in the window, untrained (docs/RESULTS.md). A
`CopyingHead` makes CTC of it.

Legend: B utterances, T frames of the encoder, N frames here, K words that can be named, M named in a frame, D width, H heads, S head size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.config import from_json, registered, to_json
from duolect.models import ModelError
from duolect.models.embedded import resolve
from duolect.models.encoders import Attention, Encoded, Encoder, WhisperEncoder, frame_mask, require_layers, stack_frames
from duolect.models.lora import Lora, add_lora, merge_lora

PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"
LETTERS = frozenset(" 'abcdefghijklmnopqrstuvwxyz")
NAMED = 32  # likeliest words of a frame that are told
BYTE = 256  # numbers of words are told in two channels: half precision holds integers up to 256


@registered
@dataclass(frozen=True)
class SpotterDims:
    """The size of a spotter. step: frames of the encoder from one of its own to the next; back, ahead: frames of the encoder that are
    seen before the own one, and from it on. lora: low-rank paths learn and the rest of it rests; None: all of it learns."""

    dim: int = 512
    layers: int = 6
    heads: int = 8
    prompt: int = 4
    step: int = 2
    back: int = 2
    ahead: int = 16
    lora: Lora | None = None


class Spotter(nn.Module):
    """Encoder frames [B, T, D] to [B, ceil(T / step), D + 3 M]: the decoder's states, each of its own window, and what it names.

    Parameters carry the names of Hugging Face's WhisperDecoder; `start` holds the embedded prompt with its positions. texts: K words
    that can be named, the end of the text (nothing) first; words: [K, D] their embeddings, which are never stored.
    """

    def __init__(self, dims: SpotterDims) -> None:
        super().__init__()
        if dims.back < 0 or dims.ahead < 1 or dims.step < 1:
            raise ValueError(f"a spotter of step {dims.step} with a window of {dims.back} frames back and {dims.ahead} ahead sees nothing")
        self.dims, self.texts = dims, ("",)
        self.words: Tensor
        self.register_buffer("words", torch.zeros(1, dims.dim), persistent=False)
        self.start = nn.Parameter(torch.zeros(dims.prompt, dims.dim))
        self.layers = nn.ModuleList(_Layer(dims.dim, dims.heads) for _ in range(dims.layers))
        self.layer_norm = nn.LayerNorm(dims.dim)
        if dims.lora is not None:
            add_lora(self, dims.lora)

    def forward(self, encoded: Encoded) -> Tensor:
        """Of no meaning where no frame is real. The prompt but its last label hears the whole utterance, for all frames."""
        frames, d = encoded.frames, self.dims
        count = -(-frames.shape[1] // d.step)
        real = frame_mask(encoded.lengths, frames.shape[1])
        own = torch.arange(count, device=frames.device)[:, None] * d.step
        distance = torch.arange(frames.shape[1], device=frames.device)[None] - own  # [N, T]
        near = (distance >= -d.back) & (distance < d.ahead)
        beyond = own[None] >= encoded.lengths[:, None, None]  # frames of padding look at everything: a softmax needs something
        seen = torch.cat([real.new_ones(d.prompt - 1, frames.shape[1]), near])[None]
        seen = (seen | F.pad(beyond, (0, 0, d.prompt - 1, 0))) & real[:, None]
        x = self.start.to(frames.dtype)
        x = torch.cat([x[:-1], x[-1:].expand(count, -1)]).expand(len(frames), -1, -1)
        for layer in self.layers:
            x = layer(x, frames, seen[:, None], prompt=d.prompt - 1)
        states = self.layer_norm(x[:, d.prompt - 1 :])
        # Their variance is 100, that of the encoder's frames 2.
        return torch.cat([F.layer_norm(states, (d.dim,)), self.named(states)], -1)

    def named(self, states: Tensor) -> Tensor:
        """[B, N, 3 M] of states [B, N, D]: chances of the likeliest words, and their numbers in two bytes each."""
        logits = F.linear(states, self.words).float()
        best, words = logits.topk(min(NAMED, len(self.words)))
        chances = (best - logits.logsumexp(-1, keepdim=True)).exp()
        told = torch.cat([chances, words // BYTE, words % BYTE], -1)
        return told.to(states.dtype)

    def merge(self) -> None:
        """Makes low-rank paths part of the weights beside them: it computes the same, and all of it may learn."""
        merge_lora(self)
        self.requires_grad_(True)
        self.dims = replace(self.dims, lora=None)

    @classmethod
    def from_whisper(cls, folder: str | Path, *, step: int = 2, back: int = 2, ahead: int = 16, lora: Lora | None = None) -> Spotter:
        """The decoder of a Hugging Face Whisper folder with its tokenizer, asked in English. Raises ModelError."""
        from tokenizers import Tokenizer

        folder, prefix = Path(folder), "model.decoder."
        config = json.loads((folder / "config.json").read_text())
        pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
        labels = [label for piece in PROMPT if (label := pieces.token_to_id(piece)) is not None]
        if len(labels) < 2:
            raise ModelError(f"{folder}: its tokenizer knows none of {' '.join(PROMPT)}: name a Whisper model")
        if not config.get("is_multilingual", config["vocab_size"] > 51864):
            labels = [labels[0], labels[-1]]  # English-only models are asked for neither language nor task
        dims = SpotterDims(config["d_model"], config["decoder_layers"], config["decoder_attention_heads"], len(labels), step, back, ahead)
        spotter = cls(dims)
        with safe_open(folder / "model.safetensors", "pt") as file:
            weights = {name: file.get_tensor(prefix + name).float() for name in spotter.state_dict() if name != "start"}
            embeddings, positions = (file.get_tensor(f"{prefix}embed_{x}.weight").float() for x in ("tokens", "positions"))
        weights["start"] = embeddings[labels] + positions[: len(labels)]
        spotter.load_state_dict(weights)
        texts = {
            label: pieces.decode([label]).lower() for label in range(min(pieces.get_vocab_size(with_added_tokens=False), len(embeddings)))
        }
        words = {label: text for label, text in texts.items() if set(text) <= LETTERS and text.strip()}
        spotter.words, spotter.texts = embeddings[[pieces.token_to_id(END), *words]], ("", *words.values())
        if lora is not None:
            spotter.dims = replace(dims, lora=lora)
            add_lora(spotter, lora)
        return spotter


class SpottingEncoder(Encoder):
    """Whisper's encoder and its decoder as spotter: `step` frames of the one side by side, the other's state behind, and what it names.

    source: the Whisper model that both come from, by name or folder: what rests of them need not be stored.
    """

    def __init__(self, base: WhisperEncoder, spotter: Spotter, *, source: str) -> None:
        super().__init__()
        self.base, self.spotter, self.source = base, spotter, source
        step = spotter.dims.step
        self.dim, self.mels, self.depth, self.max_seconds = base.dim * step + spotter.dims.dim, base.mels, base.depth, base.max_seconds
        self.seconds_per_frame, self.aside = base.seconds_per_frame * step, 3 * min(NAMED, len(spotter.words))

    def features(self, audio: Tensor) -> Tensor:
        return self.base.features(audio)

    def forward(self, features: Tensor, lengths: Tensor, *, taps: Sequence[int] = (), hidden: Tensor | None = None) -> Encoded:
        require_layers(taps, 0)  # they have another frame rate
        encoded = self.base(features, lengths, hidden=hidden)
        frames, lengths = stack_frames(encoded.frames, encoded.lengths, self.spotter.dims.step)
        frames = torch.cat([frames, self.spotter(encoded)], -1)
        return Encoded(frames * frame_mask(lengths, frames.shape[1])[..., None], lengths)

    def settings(self) -> dict[str, object]:
        return {"type": "spotting", "source": self.source, "spotter": to_json(self.spotter.dims)}

    @classmethod
    def of_settings(cls, settings: Mapping[str, object]) -> SpottingEncoder:
        """The encoder that `settings()` described, with the weights of its source."""
        dims = from_json(settings["spotter"])  # pyright: ignore[reportArgumentType]
        assert isinstance(dims, SpotterDims)
        return cls.from_whisper(str(settings["source"]), step=dims.step, back=dims.back, ahead=dims.ahead, lora=dims.lora)

    @classmethod
    def from_whisper(cls, source: str, **spotter: Any) -> SpottingEncoder:
        """Both parts of a Whisper model, by name or folder; `spotter`: as in Spotter.from_whisper. Raises EmbeddedError and ModelError."""
        place = resolve(source)
        return cls(WhisperEncoder.from_whisper(place), Spotter.from_whisper(place, **spotter), source=source)


class _Layer(nn.Module):
    """One pre-norm layer of Whisper's decoder."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.self_attn, self.encoder_attn = Attention(dim, heads), Attention(dim, heads)
        self.self_attn_layer_norm, self.encoder_attn_layer_norm, self.final_layer_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, frames: Tensor, seen: Tensor, *, prompt: int) -> Tensor:
        """x [B, prompt + N, D]; every frame sees the prompt and itself. seen: bool [B, 1, prompt + N, T]."""
        x = x + self._beside_prompt(self.self_attn_layer_norm(x), prompt)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), seen, frames)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))

    def _beside_prompt(self, x: Tensor, prompt: int) -> Tensor:
        attention = self.self_attn
        q, k, v = attention.projected(x)  # [B, H, prompt + N, S]
        causal = torch.ones(prompt, prompt, dtype=torch.bool, device=x.device).tril()
        first = F.scaled_dot_product_attention(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], attn_mask=causal)
        rest, own = q[:, :, prompt:] / math.sqrt(q.shape[-1]), v[:, :, prompt:]
        scores = torch.cat([rest @ k[:, :, :prompt].mT, (rest * k[:, :, prompt:]).sum(-1, keepdim=True)], -1)  # [B, H, N, prompt + 1]
        weights = scores.float().softmax(-1).to(v.dtype)
        heard = weights[..., :-1] @ v[:, :, :prompt] + weights[..., -1:] * own
        return attention.out_proj(torch.cat([first.to(heard.dtype), heard], 2).transpose(1, 2).flatten(2))
