"""Where a speech LLM looks: its attention weights at each position that predicts a label, over prompt, audio and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from duolect.models import ModelError
from duolect.models.aed import encoded_whole
from duolect.models.cross_attention import CrossAttention, Heard
from duolect.models.speech_llm import SpeechLlm


@dataclass(frozen=True)
class Key:
    """A position that is looked at. seconds: of audio, its middle."""

    kind: Literal["prompt", "audio", "text"]
    name: str
    seconds: float = float("nan")


@dataclass(frozen=True)
class AttentionMaps:
    """Weights [H heads, Q queries, K keys] by layer, rows sum to 1; predicted: the label behind each query, by name, and <end>."""

    weights: tuple[np.ndarray, ...]
    predicted: tuple[str, ...]
    keys: tuple[Key, ...]

    def within(self, start: float, end: float) -> range:
        """The audio keys of a stretch of seconds, or the one nearest to its middle."""
        seconds = np.array([key.seconds for key in self.keys])
        inside = np.flatnonzero((start <= seconds) & (seconds <= end))
        nearest = int(np.nanargmin(abs(seconds - (start + end) / 2)))
        return range(int(inside[0]), int(inside[-1]) + 1) if len(inside) else range(nearest, nearest + 1)

    def mass(self, where: np.ndarray) -> np.ndarray:
        """[layers, H] share of the attention on the keys that where [K] or [Q, K] marks, mean over the queries that have any (none: 0)."""
        marked = np.broadcast_to(where, self.weights[0].shape[1:])
        return np.stack([(w * marked).sum((1, 2)) for w in self.weights]) / max(1, marked.any(1).sum())

    def audio_mass(self, *, skip: int = 0) -> np.ndarray:
        """[layers, H] share of the attention on audio, without the first `skip` keys.

        On the very first key causal models rest what attention they have to spare; without a prompt it is audio.
        """
        return self.mass(np.array([key.kind == "audio" and i >= skip for i, key in enumerate(self.keys)]))


@torch.no_grad()
def attention_maps(model: SpeechLlm, *, audio: np.ndarray, labels: Sequence[int]) -> AttentionMaps:
    """The maps of samples [N], float32 mono 16 kHz, and a transcript's labels; cross: of the added layers, over audio. ModelError."""
    heads, piece = model.ctc.of_encoded(encoded_whole(model.ctc.encoder, [audio], max_seconds=model.max_seconds)), model.vocabulary.piece
    sound, lengths = model.adapter(heads.encoded, heads.main, model.embeddings)
    history = torch.tensor([[model.begin, *labels]], device=sound.device)
    with _watched(model) as found:
        model.hidden(sound.to(model.embeddings.weight.dtype), lengths, history)
    if len(found) != len(model.layers):
        raise ModelError(f"{type(model.llm).__name__} gives the attention weights of {len(found)} layers, expected {len(model.layers)}")
    times = np.array(model.adapter.middles(heads.encoded, heads.main)) * model.ctc.encoder.seconds_per_frame
    keys = heard = [Key("audio", f"{t:.2f} s", float(t)) for t in times]
    order = np.arange(found[0].shape[-1])
    if model.dims.attention != "cross":
        before, after = ([Key("prompt", piece(y)) for y in prompt] for prompt in model.prompts)
        keys = [*before, *heard, *after, Key("text", "<begin>"), *(Key("text", piece(y)) for y in labels)]
        if model.dims.attention == "merged":  # audio was put into the cache before all text
            order[: len(before) + len(heard)] = np.roll(order[: len(before) + len(heard)], len(before))
    weights = tuple(w[0, :, -history.shape[1] :].float().cpu().numpy()[:, :, order] for w in found)
    return AttentionMaps(weights, (*map(piece, labels), "<end>"), tuple(keys))


@contextmanager
def _watched(model: SpeechLlm) -> Iterator[list[Tensor]]:
    """A list that a forward of the language model inside fills with weights [1, H, L, K] by layer."""
    found: list[Tensor] = []
    with ExitStack() as undo:
        if model.dims.attention == "cross":
            for layer, cross in zip(model.layers, model.cross, strict=True):
                hook = partial(_added, cross, found)  # pyright: ignore[reportArgumentType]
                undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
        else:
            undo.callback(model.llm.set_attn_implementation, str(model.llm.config._attn_implementation))
            model.llm.set_attn_implementation("eager")  # no other one has its weights at hand
            asked = model.decoder.register_forward_pre_hook(lambda _, a, k: (a, {**k, "output_attentions": True}), with_kwargs=True)
            undo.callback(asked.remove)
            undo.callback(model.decoder.register_forward_hook(lambda _, a, out: found.extend(out.attentions or ())).remove)
        yield found


def _added(cross: CrossAttention, found: list[Tensor], layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Notes softmax(q k / sqrt(S)) of an added layer, from what the layer behind it is called with."""
    heard: Heard = options["heard"]
    query = cross.query(cross.norm(arguments[0])).unflatten(-1, (cross.heads, -1)).transpose(1, 2)
    logits = query @ heard.keys_values[cross.number][0].transpose(2, 3) / query.shape[-1] ** 0.5
    found.append(logits.masked_fill(~heard.mask, -torch.inf).softmax(-1))
