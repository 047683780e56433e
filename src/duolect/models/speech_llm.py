"""Speech LLMs: a causal language model that reads the frames of a speech encoder (paper.md 1.8), with the encoder's CTC heads beside it.

Three interfaces, one class. `prefix`: adapted frames stand before the text as if they were embeddings, and go through every layer.
`merged`: they are keys and values of every layer's attention and go through none; audio and text share one softmax. `cross`: gated
attention layers to the frames are added in front of the layers (Flamingo, arXiv 2204.14198).

Legend: B utterances, L text positions, T audio positions, W width, H heads, S head size, P new nodes of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from duolect.config import registered
from duolect.models import ModelError
from duolect.models.adapters import Adapter, AdapterDims
from duolect.models.aed import AedOutput, AttentionModel, encoded_whole
from duolect.models.attention_decoder import histories
from duolect.models.cache import Trie
from duolect.models.ctc import CtcModel, Heads
from duolect.models.decoder import DecoderScorer
from duolect.models.encoders import frame_mask
from duolect.models.lm import output_layer
from duolect.models.lora import Lora, add_lora
from duolect.models.packed import NewNodes, attend_packed, node_cache, packing, use_packed_attention
from duolect.models.rehead import Initial, label_embeddings, rehead
from duolect.vocabulary import SentencePieceVocabulary, Vocabulary


@registered
@dataclass(frozen=True)
class SpeechLlmDims:
    """How the language model hears and what of it learns.

    before, after: prompts around the audio. bidirectional: audio positions see each other in both directions (prefix only). learns: of the
    language model: `all`, low-rank paths (`lora`) or `nothing` but what was added to it; embeddings: whether its embeddings may learn.
    units: its own labels, or those of the CTC head with new embeddings (rehead, initial). pretrained: false for random weights.
    recompute: activations are computed again in the backward pass, for memory.
    """

    attention: Literal["prefix", "merged", "cross"] = "prefix"
    adapter: AdapterDims = field(default_factory=AdapterDims)
    before: str = ""
    after: str = ""
    bidirectional: bool = False
    learns: Literal["all", "lora", "nothing"] = "lora"
    lora: Lora = field(default_factory=Lora)
    embeddings: Literal["learn", "rest"] = "rest"
    units: Literal["own", "ctc"] = "own"
    initial: Initial = "pieces"
    pretrained: bool = True
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.bidirectional and self.attention != "prefix":
            raise ValueError(f"bidirectional audio is of attention=prefix; in {self.attention} audio positions do not attend at all")
        if self.recompute and self.attention == "merged":
            raise ValueError("recompute does not go with attention=merged, whose audio keys are in the cache: set recompute=false")


class SpeechLlm(nn.Module, AttentionModel):
    """A CTC model's encoder, an adapter and a causal language model of transformers.

    vocabulary: of the language model as it came. As an acoustic model the folder is its CTC part, without audio it is a language model.
    The text it learns and gives is lower case.
    """

    written = "lower"

    def __init__(
        self, ctc: CtcModel, llm: PreTrainedModel, vocabulary: Vocabulary, dims: SpeechLlmDims, *, max_seconds: float = 30.0
    ) -> None:
        super().__init__()
        assert ctc.vocabulary.blank is not None
        self.dims, self.ctc, self.max_seconds = dims, ctc, min(max_seconds, ctc.encoder.max_seconds)
        self.llm = llm
        matrix = self.embeddings.weight.detach()
        spread, labels = float(matrix[: vocabulary.size].std()), None
        if dims.adapter.labels:
            labels = label_embeddings(matrix, vocabulary, ctc.vocabulary)
        if dims.units == "ctc":
            if not isinstance(own := ctc.vocabulary, SentencePieceVocabulary):
                raise ModelError(f"units=ctc: the CTC head's labels are a {type(own).__name__}, expected SentencePiece: set units=own")
            own = own.without_blank()
            rehead(llm, vocabulary, own, initial=dims.initial)
            vocabulary = own
        self.vocabulary = vocabulary
        _let_learn(llm, dims)
        use_packed_attention(llm)
        width = matrix.shape[1]
        self.adapter = Adapter(dims.adapter, width=ctc.encoder.dim, out=width, blank=ctc.vocabulary.blank, spread=spread, embeddings=labels)
        heads = int(llm.config.get_text_config(decoder=True).num_attention_heads)
        count = len(self.layers) if dims.attention == "cross" else 0
        self.cross = nn.ModuleList(CrossAttention(width, heads, i) for i in range(count))
        for number in range(count):
            self.layers[number].register_forward_pre_hook(self.cross[number].before, with_kwargs=True)  # type: ignore[arg-type]
        if dims.recompute:
            llm.gradient_checkpointing_enable({"use_reentrant": False})
        self.prompts = [vocabulary.encode(text) if text.strip() else [] for text in (dims.before, dims.after)]

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return self.llm.base_model

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The language model's layers, as the families of transformers name them."""
        found = getattr(self.decoder, "layers", None) or getattr(self.decoder, "h", None)
        if found is None:
            raise ModelError(f"{type(self.llm).__name__} has no list of layers that is known here: use attention=prefix")
        return found

    @property
    def embeddings(self) -> nn.Embedding:
        """The language model's input embeddings."""
        return self.llm.get_input_embeddings()  # pyright: ignore[reportReturnType]

    def forward(self, features: Tensor, lengths: Tensor, labels: Tensor, sizes: Tensor, *, hidden: Tensor | None = None) -> AedOutput:
        """All outputs for features [B, F, mels] and labels [B, L], of which sizes [B] are real, from one encoder pass."""
        return self.of_heads(self.ctc.heads(features, lengths, hidden=hidden), labels, sizes)

    def of_heads(self, heads: Heads, labels: Tensor, sizes: Tensor) -> AedOutput:
        """The same behind an encoder pass that was made before."""
        audio, lengths = self.adapter(heads.encoded, heads.main)
        history, targets = histories(labels, sizes, bos=self.vocabulary.bos, eos=self.vocabulary.eos)
        decoded = self.hidden(audio.to(self.embeddings.weight.dtype), lengths, history)
        return AedOutput(heads, output_layer(self.llm, self.vocabulary)(decoded), {}, targets)

    def hidden(self, audio: Tensor, lengths: Tensor, history: Tensor) -> Tensor:
        """[B, L, W] last hidden states behind histories [B, L] that begin with bos, after prompts and audio [B, T, W], lengths [B]."""
        (before, after), rows = (self._prompt(x, len(audio)) for x in self.prompts), len(audio)
        if self.dims.attention == "prefix":
            text = torch.cat([after, self.embeddings(history)], 1)
            parts = [torch.cat([before[b], audio[b, : int(n)], text[b]]) for b, n in enumerate(lengths)]
            first = before.shape[1] + lengths + after.shape[1]
            joined = nn.utils.rnn.pad_sequence(parts, batch_first=True)
            mask = self._both_ways(lengths, joined.shape[1]) if self.dims.bidirectional else None
            out = self.decoder(inputs_embeds=joined, attention_mask=mask, use_cache=False).last_hidden_state
            place = first[:, None] + torch.arange(history.shape[1], device=history.device)
            return out[torch.arange(rows, device=out.device)[:, None], place]
        text = torch.cat([before, after, self.embeddings(history)], 1)
        behind = before.shape[1] + after.shape[1]
        if self.dims.attention == "cross":
            heard = Heard(self.heard(audio), frame_mask(lengths, audio.shape[1])[:, None, None])
            return self.decoder(inputs_embeds=text, use_cache=False, heard=heard).last_hidden_state[:, behind:]
        places = torch.arange(text.shape[1], device=text.device)[None]
        seen = (places >= before.shape[1])[..., None] & frame_mask(lengths, audio.shape[1])[:, None]
        causal = (places <= places.T).expand(rows, -1, -1)
        cache = DynamicCache()
        heard = before.shape[1] + torch.arange(audio.shape[1], device=text.device)[None]
        for number, (key, value) in enumerate(self.keys_values(audio, heard)):
            cache.update(key, value, number)
        out = self.decoder(
            inputs_embeds=text,
            attention_mask=_additive(torch.cat([seen, causal], 2), text.dtype),
            position_ids=places + torch.where(places >= before.shape[1], lengths[:, None], 0),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state[:, behind:]

    def heard(self, audio: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of audio [B, T, W] for the added layers, where there are any."""
        return [cross.heard(audio) for cross in self.cross]  # pyright: ignore[reportCallIssue]

    def _prompt(self, labels: Sequence[int], rows: int) -> Tensor:
        index = torch.tensor(labels, dtype=torch.long, device=self.embeddings.weight.device)
        return self.embeddings(index)[None].expand(rows, -1, -1)

    def _both_ways(self, lengths: Tensor, size: int) -> Tensor:
        """[B, 1, S, S] additive mask: causal, and audio sees all audio."""
        place, begin = torch.arange(size, device=lengths.device), len(self.prompts[0])
        audio = (place >= begin) & (place < begin + lengths[:, None])
        return _additive((place[:, None] >= place) | (audio[:, :, None] & audio[:, None]), self.embeddings.weight.dtype)

    def keys_values(self, audio: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, T, S] of audio [B, T, W] at positions [1, T], layer by layer, by the layers' own norms and projections."""
        turn = getattr(self.decoder, "rotary_emb", None)
        angles = None if turn is None else turn(audio, position_ids=positions)
        for layer in self.layers:
            key, value = _key_value(layer, audio)
            if angles is not None:
                cos, sin = (x[:, None] for x in angles)
                a, b = key.chunk(2, -1)
                key = key * cos + torch.cat([-b, a], -1) * sin
            yield key, value

    @torch.no_grad()
    def scorer(self, audios: Sequence[np.ndarray]) -> SpeechLlmScorer:
        encoded = encoded_whole(self.ctc.encoder, audios, max_seconds=self.max_seconds)
        audio, lengths = self.adapter(encoded, self.ctc.of_encoded(encoded).main)
        return SpeechLlmScorer(self, audio.to(self.embeddings.weight.dtype), lengths)


class CrossAttention(nn.Module):
    """Multi-head attention of hidden states to audio, added through a gate that is shut at first, so that the model starts as it was."""

    def __init__(self, width: int, heads: int, number: int) -> None:
        super().__init__()
        self.heads, self.number = heads, number
        self.norm, self.query, self.out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.key_value, self.gate = nn.Linear(width, 2 * width), nn.Parameter(torch.zeros(1))

    def heard(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, S] of audio [B, T, W]."""
        key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.key_value(audio).chunk(2, -1))
        return key, value

    def before(self, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer of the language model is called with instead; without audio, the model is what it was."""
        heard: Heard | None = options.pop("heard", None)
        if heard is None:
            return arguments, options
        x = arguments[0]
        query = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = heard.keys_values[self.number]
        if heard.new is None:
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=heard.mask)
        else:
            y = attend_packed(heard.new, query, key, value, heard.mask)
        return (x + self.gate.tanh() * self.out(y.transpose(1, 2).flatten(2)), *arguments[1:]), options


@dataclass(frozen=True)
class Heard:
    """What added layers attend to: keys and values [B, H, T, S] by layer, mask [B, 1, 1, T] of real ones; new: where the call is packed."""

    keys_values: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor
    new: NewNodes | None = None


class SpeechLlmScorer(DecoderScorer):
    """A speech LLM over the adapted audio [B, T, W], lengths [B], of a batch.

    Audio positions are nodes of the trie, with labels beyond the vocabulary, so that the beam shares them as it shares any prefix.
    """

    def __init__(self, model: SpeechLlm, audio: Tensor, lengths: Tensor) -> None:
        self.model, self.audio, self.lengths, self.vocabulary = model, audio, lengths, model.vocabulary
        self.output = output_layer(model.llm, model.vocabulary)
        self.heard = model.heard(audio)
        self.mask = frame_mask(lengths, audio.shape[1])[:, None, None]

    def _begin(self, rows: int) -> Trie:
        if rows != len(self.audio):
            raise ModelError(f"{rows} rows asked for, but the audio of {len(self.audio)} utterances was encoded")
        weight = self.output.weight
        cache = node_cache(len(self.model.layers))
        return Trie.empty(rows, width=weight.shape[1], cache=cache, device=weight.device, dtype=weight.dtype)

    def _prompts(self, rows: int) -> list[list[int]]:
        before, after = self.model.prompts
        spans = [0] * rows if self.model.dims.attention == "cross" else self.lengths.tolist()
        base = self.vocabulary.size
        return [[*before, *range(base, base + n), *after, self.vocabulary.bos] for n in spans]

    def _hidden(self, trie: Trie, new: NewNodes) -> Tensor:
        dims, place = self.model.dims, new.labels - self.vocabulary.size
        sounds = place >= 0
        embedded = self.model.embeddings(new.labels.masked_fill(sounds, self.vocabulary.bos))
        if bool(sounds.any()):
            audio = self.audio[trie.utterance[new.group], place.clamp(min=0)]
            embedded = torch.where(sounds[:, None], audio, embedded)
            if dims.attention == "merged":
                return self._merged(trie, new, embedded, sounds)
            if dims.bidirectional:
                new = _both_ways(new, sounds)
        return self._run(trie, new, embedded)

    def _run(self, trie: Trie, new: NewNodes, embedded: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self.heard:
            # Groups are utterances in order until some of them are done and dropped.
            every = len(trie.utterance) == len(self.audio)
            heard = self.heard if every else [(k[trie.utterance], v[trie.utterance]) for k, v in self.heard]
            options["heard"] = Heard(heard, self.mask[trie.utterance], new)
        with packing(new):
            out = self.model.decoder(
                inputs_embeds=embedded[None],
                attention_mask=new.mask(embedded.dtype),
                position_ids=new.positions[None],
                past_key_values=trie.cache,
                use_cache=True,
                **options,
            )
        return out.last_hidden_state[0]

    def _merged(self, trie: Trie, new: NewNodes, embedded: Tensor, sounds: Tensor) -> Tensor:
        """Audio nodes leave keys and values only; the others go through the model."""
        hidden = torch.zeros_like(embedded)
        heard = _some(new, sounds)
        with packing(heard):
            for number, (key, value) in enumerate(self.model.keys_values(embedded[sounds][None], heard.positions[None])):
                trie.cache.update(key, value, number)
        hidden[~sounds] = self._run(trie, _some(new, ~sounds), embedded[~sounds])
        return hidden


def _some(new: NewNodes, rows: Tensor) -> NewNodes:
    """The new nodes of some rows [P] alone; all of them keep their places in the layout."""
    return replace(
        new, labels=new.labels[rows], positions=new.positions[rows], group=new.group[rows], slot=new.slot[rows], rank=new.rank[rows]
    )


def _both_ways(new: NewNodes, sounds: Tensor) -> NewNodes:
    """The same nodes, audio seeing all audio of its utterance."""
    g, slot = new.group[sounds], new.slot[sounds]
    heard = torch.zeros(new.visible.shape[0], new.visible.shape[2], dtype=torch.bool, device=slot.device)
    heard[g, slot] = True
    visible = new.visible.clone()
    visible[g, new.rank[sounds]] |= heard[g]
    return replace(new, visible=visible)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, S] additive mask of a boolean one [B, L, S]."""
    return torch.where(seen[:, None], 0.0, torch.finfo(dtype).min).to(dtype)


def _key_value(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, S] that a layer would compute of its input x [B, T, W], before any rotation."""
    if (attention := getattr(layer, "self_attn", None)) is not None and hasattr(attention, "k_proj"):
        normed, size = layer.input_layernorm(x), attention.head_dim
        key, value = (proj(normed).unflatten(-1, (-1, size)) for proj in (attention.k_proj, attention.v_proj))
        norm = getattr(attention, "k_norm", None)
        key = key if norm is None else norm(key)
    elif (attention := getattr(layer, "attn", None)) is not None and hasattr(attention, "c_attn"):
        normed = layer.ln_1(x)
        _, key, value = (part.unflatten(-1, (attention.num_heads, -1)) for part in attention.c_attn(normed).chunk(3, -1))
    else:
        raise ModelError(f"{type(layer).__name__} has no key and value projections that are known here: use attention=prefix")
    return key.transpose(1, 2), value.transpose(1, 2)


def _let_learn(llm: PreTrainedModel, dims: SpeechLlmDims) -> None:
    """Sets what of the language model has gradients."""
    embeddings: Any = llm.get_input_embeddings()
    head: Any = llm.get_output_embeddings()
    if dims.learns == "lora":
        add_lora(llm, dims.lora)
    else:
        llm.requires_grad_(dims.learns == "all")
    # New matrices know nothing yet, whatever else rests.
    learn = dims.embeddings == "learn" or dims.units == "ctc"
    for module in (embeddings, head):
        module.weight.requires_grad_(learn)
