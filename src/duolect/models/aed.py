"""Attention encoder-decoders as Scorers: Whisper, whose decoder attends to the audio and is otherwise a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache

from duolect.audio.features import whisper_log_mel
from duolect.audio.io import SAMPLE_RATE
from duolect.models import ModelError
from duolect.models.cache import Trie
from duolect.models.decoder import DecoderScorer, OutputLayer
from duolect.models.packed import NewNodes, NodeLayer, node_cache, packing, use_packed_attention
from duolect.vocabulary import TokenizerVocabulary

WINDOW_SECONDS = 30.0
"""Whisper's encoder was trained on windows of exactly this length; shorter audio is padded to it with silence."""


ENGLISH_ONLY_ROWS = 51864
"""Output rows of the English-only models, which take no language and task label; the multilingual ones have more."""


class WhisperAed:
    """A Whisper model that makes one Scorer per batch of audio.

    spelling: `words` keeps labels with digits and symbols out, so that hypotheses are comparable with a CTC model of spelled-out words.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        vocabulary: TokenizerVocabulary,
        *,
        spelling: Literal["any", "words"] = "words",
        language: str = "en",
    ) -> None:
        self.model: Any = model.eval()
        use_packed_attention(model)
        self.vocabulary = vocabulary
        self.prompt = _prompt(vocabulary, language if self.model.config.vocab_size > ENGLISH_ONLY_ROWS else None)
        head: Any = model.get_output_embeddings()
        bias = torch.zeros(vocabulary.size, device=head.weight.device, dtype=head.weight.dtype)
        bias[_silenced(vocabulary, spelling)] = -torch.inf
        self.output = OutputLayer(head.weight.detach()[: vocabulary.size], bias)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "cpu",
        spelling: Literal["any", "words"] = "words",
        language: str = "en",
    ) -> WhisperAed:
        """The model of a hub id or a folder of transformers."""
        try:
            model = WhisperForConditionalGeneration.from_pretrained(str(name), dtype=getattr(torch, dtype), attn_implementation="sdpa")
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{name} does not load as a Whisper model: {str(error).strip().splitlines()[0]}") from error
        return cls(model.to(device), TokenizerVocabulary.load(name), spelling=spelling, language=language)  # type: ignore[arg-type]

    @torch.no_grad()
    def scorer(self, audios: Sequence[np.ndarray]) -> WhisperScorer:
        """log p(text labels | audio) for a batch; audio is float32 mono 16 kHz, 30 s at most (ModelError otherwise)."""
        longest = max((len(a) for a in audios), default=0) / SAMPLE_RATE
        if longest > WINDOW_SECONDS:
            raise ModelError(
                f"{longest:.1f} s of audio are longer than the {WINDOW_SECONDS:.0f} s that Whisper hears at once: split it into segments"
            )
        size = int(SAMPLE_RATE * WINDOW_SECONDS)
        weight = self.output.weight
        mels = self.model.config.num_mel_bins
        padded = [torch.nn.functional.pad(torch.from_numpy(a), (0, size - len(a))).to(weight.device) for a in audios]
        features = torch.stack([whisper_log_mel(a, mels=mels) for a in padded]).transpose(1, 2).to(weight.dtype)
        return WhisperScorer(self, self.model.model.encoder(features).last_hidden_state)


class WhisperScorer(DecoderScorer):
    """Whisper's decoder over the encoder states [B, 1500, width] of a batch; the beam shares their keys and values."""

    def __init__(self, aed: WhisperAed, encoded: Tensor) -> None:
        self.aed, self.encoded = aed, encoded
        self.output, self.vocabulary = aed.output, aed.vocabulary

    def _begin(self, rows: int) -> Trie:
        if rows != len(self.encoded):
            raise ModelError(f"{rows} rows asked for, but the audio of {len(self.encoded)} utterances was encoded")
        weight = self.output.weight
        cross = Cache(layers=[self._heard(layer.encoder_attn) for layer in self.aed.model.model.decoder.layers])
        cache = EncoderDecoderCache(node_cache(len(cross.layers)), cross)
        cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        return Trie.empty(rows, width=weight.shape[1], cache=cache, device=weight.device, dtype=weight.dtype)

    def _heard(self, attention: Any) -> NodeLayer:
        """The audio's keys and values in one layer, [B, heads, 1500, head size]."""
        layer = NodeLayer()
        keys, values = (
            f(self.encoded).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for f in (attention.k_proj, attention.v_proj)
        )
        layer.fill(keys.contiguous(), values.contiguous())
        return layer

    def _prompt(self) -> list[int]:
        return self.aed.prompt

    def _hidden(self, trie: Trie, new: NewNodes) -> Tensor:
        limit = self.aed.model.config.max_target_positions
        if int(new.positions.max()) >= limit:
            raise ModelError(f"a hypothesis outgrew Whisper's {limit} positions: lower max_labels")
        with packing(new):
            out = self.aed.model.model.decoder(
                input_ids=new.labels[None],
                attention_mask=new.mask(self.output.weight.dtype),
                encoder_hidden_states=self.encoded,  # only says that there is audio: its keys and values are in the cache
                past_key_values=trie.cache,
                position_ids=new.positions[None],
                use_cache=True,
            )
        return out.last_hidden_state[0]


def _prompt(vocabulary: TokenizerVocabulary, language: str | None) -> list[int]:
    index = vocabulary.tokenizer.convert_tokens_to_ids
    names = ["<|startoftranscript|>", *([f"<|{language}|>", "<|transcribe|>"] if language else []), "<|notimestamps|>"]
    labels = [index(name) for name in names]
    unknown = [name for name, label in zip(names, labels, strict=True) if label is None or vocabulary.piece(label) != name]
    if unknown:
        raise ModelError(f"the tokenizer lacks {', '.join(unknown)}: not a Whisper tokenizer, or not a language it knows")
    return labels


def _silenced(vocabulary: TokenizerVocabulary, spelling: str) -> list[int]:
    """Labels that are no speech: all special ones but eos, and with spelling `words` all that hold other than letters and punctuation."""
    keep = set("'.,?!-")
    silenced = []
    for label in range(vocabulary.size):
        piece = vocabulary.piece(label)
        # Byte-level pieces write a space as Ġ and bytes beyond ASCII as other letters beyond ASCII.
        letters = piece.removeprefix("Ġ")
        odd = not letters or any(not (c.isascii() and c.isalpha()) and c not in keep for c in letters)
        if label != vocabulary.eos and (piece.startswith("<|") or (spelling == "words" and odd)):
            silenced.append(label)
    return silenced
