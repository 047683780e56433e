"""Speech LLMs: a causal language model that reads the frames of a speech encoder (paper.md 1.8), with the encoder's CTC heads beside it.

Three interfaces, one class. `prefix`: adapted frames stand before the text as if they were embeddings, and go through every layer.
`merged`: they are keys and values of every layer's attention and go through none; audio and text share one softmax. `cross`: gated
attention layers to the frames are added in front of the layers (Flamingo, arXiv 2204.14198).

Legend: B utterances, L text positions, T audio positions, W width, H heads, S head size, P new nodes of a call.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from duolect.audio.features import SECONDS_PER_FRAME
from duolect.config import from_json, registered, to_json
from duolect.models import ModelError, Precision
from duolect.models.adapters import Adapter, AdapterDims
from duolect.models.aed import AedModel, AedOutput, AttentionModel, encoded_whole
from duolect.models.attention_decoder import histories
from duolect.models.cache import Trie
from duolect.models.cross_attention import CrossAttention, Heard
from duolect.models.ctc import AcousticModel, CtcModel, CtcOutput, FolderModel, Heads, load_weights, read_config
from duolect.models.decoder import DecoderScorer
from duolect.models.embedded import resolve
from duolect.models.encoders import frame_mask
from duolect.models.finetuned import let_learn
from duolect.models.lm import HFCausalLM, load_language_model, longest_history, output_layer, require_positions
from duolect.models.lora import Lora, add_lora, merge_lora, merged_state
from duolect.models.merged import keys_values, layers_of, require_known_keys
from duolect.models.packed import NewNodes, bytes_per_position, node_cache, packing, run_packed
from duolect.models.rehead import Initial, label_embeddings, rehead, tied_name
from duolect.vocabulary import SentencePieceVocabulary, Vocabulary, load_vocabulary

CONTEXT = "{context}"
Contexts = Sequence[Sequence[str]]
"""Words that may come, by utterance."""


@registered
@dataclass(frozen=True)
class SpeechLlmDims:
    """How the language model hears and what of it learns.

    before, after: prompts around the audio; `{context}` in them stands for words that may come, with commas (training draws them from the
    transcripts). begin: the text, of one label, that a transcript begins with in place of the model's bos, which some models look across
    as little as across the end of a document. bidirectional: audio positions see each other in both directions
    (prefix only). encoder: whether the CTC model learns, with low-rank paths in its encoder, or rests. learns: of the language model:
    `all`, low-rank paths (`lora`) or `nothing` but what was added to it; embeddings: whether its embeddings may learn. units: its own
    labels, or those of the CTC head with new embeddings (see rehead). pretrained: false for random weights. recompute: activations are
    computed again in the backward pass, for memory. audio_head: a CTC head, of the CTC model's labels, on the language model's states at
    the audio (prefix, and an adapter of evenly spaced positions): a loss in training, an acoustic model by the name `folder#llm`.
    """

    attention: Literal["prefix", "merged", "cross"] = "prefix"
    adapter: AdapterDims = field(default_factory=AdapterDims)
    before: str = ""
    after: str = ""
    begin: str = ""
    bidirectional: bool = False
    encoder: Literal["learn", "lora", "rest"] = "learn"
    encoder_lora: Lora = field(default_factory=Lora)
    learns: Literal["all", "lora", "nothing"] = "lora"
    lora: Lora = field(default_factory=Lora)
    embeddings: Literal["learn", "rest"] = "rest"
    units: Literal["own", "ctc"] = "own"
    initial: Initial = "pieces"
    pretrained: bool = True
    recompute: bool = False
    audio_head: bool = False

    def __post_init__(self) -> None:
        for place in re.findall(r"\{\w+\}", self.before + self.after):
            if place != CONTEXT:
                raise ValueError(f"a prompt has the place {place}, which nothing fills: the only one known is {CONTEXT}")
        if self.audio_head and (self.attention != "prefix" or self.adapter.kind not in ("concat", "conv")):
            raise ValueError(
                f"audio_head wants attention=prefix and an adapter of kind concat or conv, whose positions are evenly spaced; found "
                f"attention={self.attention}, kind {self.adapter.kind}"
            )
        if self.bidirectional and self.attention != "prefix":
            raise ValueError(f"bidirectional audio is of attention=prefix; in {self.attention} audio positions do not attend at all")
        if self.recompute and self.attention == "merged":
            raise ValueError("recompute does not go with attention=merged, whose audio keys are in the cache: set recompute=false")


class SpeechLlm(FolderModel, AttentionModel):
    """A CTC model's encoder, an adapter and a causal language model of transformers.

    vocabulary: of the language model as it came. sources: names of the models that `ctc` and `llm` came from and that a folder need not
    hold: of those, only what learned is saved. As an acoustic model the folder is its CTC part, as a language model the same without
    audio. Its text is lower case.
    """

    written = "lower"

    def __init__(
        self,
        ctc: CtcModel,
        llm: PreTrainedModel,
        vocabulary: Vocabulary,
        dims: SpeechLlmDims,
        *,
        sources: Mapping[str, str] | None = None,
        max_seconds: float = 30.0,
    ) -> None:
        super().__init__()
        assert ctc.vocabulary.blank is not None
        if (kind := dims.adapter.kind) in ("ctc", "words") and ctc.stack > 1:
            raise ModelError(f"an adapter of kind {kind} hears labels frame by frame, the CTC head stacks {ctc.stack}: set kind=concat")
        self.dims, self.ctc, self.max_seconds = dims, ctc, min(max_seconds, ctc.encoder.max_seconds)
        self.sources = {part: name for part, name in (sources or {}).items() if part != "ctc" or dims.encoder == "rest"}
        self.llm = llm
        matrix = self.embeddings.weight.detach()
        spread, labels = float(matrix[: vocabulary.size].std()), None
        if dims.adapter.labels:
            labels = label_embeddings(matrix, vocabulary, ctc.vocabulary)
        if dims.units == "ctc" and vocabulary.digest() != ctc.vocabulary.digest():
            if not isinstance(own := ctc.vocabulary, SentencePieceVocabulary):
                raise ModelError(f"units=ctc: the CTC head's labels are a {type(own).__name__}, expected SentencePiece: set units=own")
            own = own.without_blank()
            rehead(llm, vocabulary, own, initial=dims.initial)
            vocabulary = own
        self.vocabulary, self.longest = vocabulary, longest_history(llm)
        HFCausalLM(llm, vocabulary)  # refuses a model that cannot be scored through a trie
        _let_learn(ctc, llm, dims)
        width = matrix.shape[1]
        named = (ctc.vocabulary, vocabulary)
        self.adapter = Adapter(dims.adapter, width=ctc.encoder.dim, out=width, vocabularies=named, spread=spread, embeddings=labels)
        heads = int(llm.config.get_text_config(decoder=True).num_attention_heads)
        count = len(self.layers) if dims.attention == "cross" else 0
        self.cross = nn.ModuleList(CrossAttention(width, heads, i) for i in range(count))
        for number in range(count):
            self.layers[number].register_forward_pre_hook(self.cross[number].before, with_kwargs=True)  # type: ignore[arg-type]
        self.audio_head = nn.ModuleList([nn.Linear(width, ctc.vocabulary.size)] if dims.audio_head else [])
        if dims.attention == "merged":
            require_known_keys(llm)
        if dims.recompute:
            llm.gradient_checkpointing_enable({"use_reentrant": False})
        begin = vocabulary.encode(dims.begin) if dims.begin else [vocabulary.bos]
        if len(begin) != 1:
            raise ModelError(f"begin={dims.begin!r} is {len(begin)} labels of the language model, expected one (nothing: its bos)")
        self.begin = begin[0]
        self.prompts, self.takes_context = self.prompts_with(()), CONTEXT in dims.before + dims.after

    def prompts_with(self, words: Sequence[str]) -> list[list[int]]:
        """The labels of the prompts before and after the audio, with words that may come where they have a place for them."""
        texts = (x.replace(CONTEXT, ", ".join(words).lower()) for x in (self.dims.before, self.dims.after))
        return [self.vocabulary.encode(text) if text.strip() else [] for text in texts]

    def told(self, words: Sequence[str]) -> SpeechLlm:
        model = copy.copy(self)
        model.prompts = self.prompts_with(words)
        count, most = sum(map(len, model.prompts)), self.longest
        if words and count > most // 2:  # audio and text want as much
            raise ModelError(
                f"--context: {len(words)} words and phrases make a prompt of {count} positions, and the language model attends to {most}: "
                f"give it at most some {len(words) * (most // 2) // count}"
            )
        return model

    def train(self, mode: bool = True) -> SpeechLlm:
        super().train(mode)
        if self.dims.encoder == "rest":  # its dropout and its batch-norms rest too
            self.ctc.eval()
        return self

    @property
    def decoder(self) -> Any:
        """The language model without its output layer."""
        return self.llm.base_model

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The language model's layers, as the families of transformers name them."""
        return layers_of(self.llm)

    @property
    def embeddings(self) -> nn.Embedding:
        """The language model's input embeddings."""
        return self.llm.get_input_embeddings()  # pyright: ignore[reportReturnType]

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        labels: Tensor,
        sizes: Tensor,
        *,
        hidden: Tensor | None = None,
        context: Contexts = (),
    ) -> AedOutput:
        """All outputs for features [B, F, mels] and labels [B, L], of which sizes [B] are real, from one encoder pass; context: words for
        the prompts of each utterance, () for the model's own."""
        return self.of_heads(self.ctc.heads(features, lengths, hidden=hidden), labels, sizes, context=context)

    def of_heads(self, heads: Heads, labels: Tensor, sizes: Tensor, *, context: Contexts = ()) -> AedOutput:
        """The same behind an encoder pass that was made before."""
        audio, lengths = self.adapter(heads.encoded, heads.main, self.embeddings)
        history, targets = histories(labels, sizes, bos=self.begin, eos=self.vocabulary.eos)
        sounds, decoded = self._states(audio.to(self.embeddings.weight.dtype), lengths, history, context)
        heard = self._heard(sounds, lengths) if self.audio_head else None
        return AedOutput(heads, output_layer(self.llm, self.vocabulary)(decoded), {}, targets, heard)

    def hidden(self, audio: Tensor, lengths: Tensor, history: Tensor) -> Tensor:
        """[B, L, W] last hidden states behind histories [B, L] that begin with bos, after prompts and audio [B, T, W], lengths [B]."""
        return self._states(audio, lengths, history, ())[1]

    def audio_ctc(self, heads: Heads) -> CtcOutput:
        """What the CTC head on the language model's states says of an encoder pass."""
        audio, lengths = self.adapter(heads.encoded, heads.main, self.embeddings)
        none = torch.zeros(len(audio), 0, dtype=torch.long, device=audio.device)
        return self._heard(self._states(audio.to(self.embeddings.weight.dtype), lengths, none, ())[0], lengths)

    def _heard(self, states: Tensor, lengths: Tensor) -> CtcOutput:
        (head,) = self.audio_head
        return CtcOutput(head(states.float()).float().log_softmax(-1), lengths)

    def _states(self, audio: Tensor, lengths: Tensor, history: Tensor, context: Contexts) -> tuple[Tensor, Tensor]:
        """Last hidden states ([B, T, W] at the audio, of no meaning but in prefix; [B, L, W] behind each label of the histories)."""
        prompts = [self.prompts_with(words) for words in context] or [self.prompts] * len(audio)
        ids = [[torch.tensor(x, dtype=torch.long, device=audio.device) for x in prompt] for prompt in prompts]
        among = lengths if self.dims.attention == "prefix" else torch.zeros_like(lengths)  # audio positions among the text's
        parts = [
            torch.cat([self.embeddings(before), sound[: int(n)], self.embeddings(after), text])
            for (before, after), sound, n, text in zip(ids, audio, among, self.embeddings(history), strict=True)
        ]
        joined = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        begin, behind = lengths.new_tensor([[len(x) for x in prompt] for prompt in prompts]).unbind(1)
        places, options = torch.arange(joined.shape[1], device=audio.device)[None], dict[str, Any]()
        later = (places >= begin[:, None]).long()  # than where audio begins
        if self.dims.attention == "cross":
            options["heard"] = Heard(self.heard(audio), frame_mask(lengths, audio.shape[1])[:, None, None])
        elif self.dims.attention == "merged":
            cache, options["position_ids"] = DynamicCache(), places + later * lengths[:, None]
            sounds = torch.arange(audio.shape[1], device=audio.device)[None]
            for number, (key, value) in enumerate(keys_values(self.llm, audio, begin[:, None] + sounds)):
                cache.update(key, value, number)
            seen = (later > 0)[..., None] & frame_mask(lengths, audio.shape[1])[:, None]
            causal = (places <= places.T).expand(len(audio), -1, -1)
            options |= {"attention_mask": _additive(torch.cat([seen, causal], 2), joined.dtype), "past_key_values": cache}
        elif self.dims.bidirectional:
            inside = later.bool() & (places < (begin + lengths)[:, None])
            options["attention_mask"] = _additive((places <= places.T) | (inside[:, :, None] & inside[:, None]), joined.dtype)
        require_positions(int(options.get("position_ids", places).max()) + 1, self.longest)
        out = self.decoder(inputs_embeds=joined, use_cache=self.dims.attention == "merged", **options).last_hidden_state
        return _stretch(out, begin, audio.shape[1]), _stretch(out, begin + among + behind, history.shape[1])

    def heard(self, audio: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of audio [B, T, W] for the added layers, where there are any."""
        return [cross.heard(audio) for cross in self.cross]  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def scorer(self, audios: Sequence[np.ndarray], heard: CtcOutput | None = None) -> SpeechLlmScorer:
        encoded = encoded_whole(self.ctc.encoder, audios, max_seconds=self.max_seconds, heard=heard)
        if heard is None or heard.frames is None:
            heads = self.ctc.of_encoded(encoded)
            encoded, heard = heads.encoded, heads.main
        else:
            heard = replace(heard, log_probs=heard.log_probs.to(encoded.frames.device))
        audio, lengths = self.adapter(encoded, heard, self.embeddings)
        return SpeechLlmScorer(self, audio.to(self.embeddings.weight.dtype), lengths)

    def shares(self, model: AcousticModel) -> bool:
        return model is self.ctc and self.ctc.stack == 1

    def bytes_of(self, *, seconds: float, labels: int) -> int:
        dtype, text = self.embeddings.weight.dtype, sum(len(x) for x in self.prompts) + 1 + labels
        audio = self.adapter.positions(math.ceil(seconds / self.ctc.encoder.seconds_per_frame))
        each = bytes_per_position(self.llm.config, dtype)
        if self.dims.attention != "cross":
            return each * (audio + text)
        return each * text + 2 * len(self.cross) * self.embeddings.embedding_dim * dtype.itemsize * audio

    @torch.no_grad()
    def internal(self, rows: int) -> SpeechLlmScorer:
        weight = self.embeddings.weight  # the prompts, and no position of audio between them
        return SpeechLlmScorer(self, weight.new_zeros(rows, 0, weight.shape[1]), torch.zeros(rows, dtype=torch.long, device=weight.device))

    def parts(self) -> dict[str, nn.Module]:
        return {"adapter": nn.ModuleList([self.adapter, self.cross, self.audio_head]), "llm": self.llm}

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a state dict by their names in a model folder: the CTC part is a CTC model's, what a source has anyway is left out."""
        learned = {name for name, p in self.named_parameters() if p.requires_grad}
        kept = {name: x for name, x in state.items() if name.split(".")[0] not in self.sources or name in learned}
        kept.pop(tied_name(self, self.llm) or "", None)
        ctc = {name.removeprefix("ctc."): x for name, x in kept.items() if name.startswith("ctc.")}
        return {**merged_state(self.ctc, ctc), **{n: x for n, x in kept.items() if not n.startswith("ctc.")}}

    def settings(self) -> dict[str, object]:
        return {
            **self.ctc.settings(),
            "type": "speech_llm",
            "dims": to_json(self.dims),
            # Without the place on the machine it came from.
            "llm": {name: value for name, value in self.llm.config.to_dict().items() if name != "_name_or_path"},
            "sources": self.sources,
            "language": self.vocabulary.digest(),
            "max_seconds": self.max_seconds,
        }

    def save_vocabularies(self, folder: Path) -> None:
        """Writes the CTC part's vocabularies to the folder, the language model's to its folder llm unless a source has it."""
        self.ctc.save_vocabularies(folder)
        if "llm" not in self.sources:
            (folder / "llm").mkdir(parents=True, exist_ok=True)
            self.vocabulary.save(folder / "llm")

    @classmethod
    def load(cls, folder: str | Path, *, dtype: Precision = "float32", device: str = "cpu", ctc: CtcModel | None = None) -> SpeechLlm:
        """The model that `save` wrote, low-rank paths merged, in eval mode; ctc: its CTC part, if that was loaded before. ModelError."""
        folder = Path(folder)
        config = read_config(folder, kind="speech_llm")
        dims, sources = from_json(config["dims"], where=f"{folder}/config.json"), config["sources"]
        assert isinstance(dims, SpeechLlmDims)
        if "llm" in sources:
            llm, vocabulary = load_language_model(resolve(sources["llm"]))
        else:
            settings = dict(config["llm"])
            llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
            vocabulary = load_vocabulary(folder / "llm")
        # What learned in the encoder was merged into it when it was saved.
        dims = replace(dims, encoder="rest", recompute=False)
        model = cls(ctc or CtcModel.load(folder), llm, vocabulary, dims, sources=sources, max_seconds=config["max_seconds"])
        if model.vocabulary.digest() != config["language"]:
            raise ModelError(
                f"{folder}: was trained on {sources.get('llm', 'llm/')} of vocabulary {config['language']}, found "
                f"{model.vocabulary.digest()}: that model has changed since, get the one it was trained on"
            )
        load_weights(model.weights(), folder)
        merge_lora(model.llm)
        model.dims, model.sources = replace(model.dims, learns="all"), {}  # saved again, it is whole
        for part in (model.llm, model.cross):
            part.to(getattr(torch, dtype))
        return model.to(device).eval()


class AudioHead(AcousticModel):
    """The CTC head on the language model's states at the audio, as an acoustic model: text has no part in it. ModelError without one."""

    def __init__(self, model: SpeechLlm) -> None:
        if not model.audio_head:
            raise ModelError("the speech LLM has no CTC head on its language model: train one with llm.dims.audio_head=true")
        self.model, self.vocabulary = model, model.ctc.vocabulary
        self.seconds_per_frame = model.ctc.encoder.seconds_per_frame * model.dims.adapter.factor

    def place(self, device: str) -> None:
        self.model.to(device)

    def log_probs_of(self, audios: Sequence[np.ndarray], *, frames: bool = False) -> CtcOutput:
        each, longest = round(self.seconds_per_frame / SECONDS_PER_FRAME), min(self.model.ctc.window_seconds, self.model.max_seconds)
        return self.model.ctc.in_windows(
            audios,
            replace(self.model.ctc.windowing(), per_frame=each, seconds=longest),
            lambda x, n: self.model.audio_ctc(self.model.ctc.heads(x, n)),
        )


Trainable = CtcModel | AedModel | SpeechLlm
"""What the recipes train."""


class SpeechLlmScorer(DecoderScorer):
    """A speech LLM over the adapted audio [B, T, W], lengths [B], of a batch.

    Audio positions are nodes of the trie, with labels beyond the vocabulary, so that the beam shares them as it shares any prefix.
    """

    def __init__(self, model: SpeechLlm, audio: Tensor, lengths: Tensor) -> None:
        self.model, self.audio, self.lengths, self.vocabulary = model, audio, lengths, model.vocabulary
        self.output = output_layer(model.llm, model.vocabulary)
        self.heard = model.heard(audio) if audio.shape[1] else []
        self.mask = frame_mask(lengths, audio.shape[1])[:, None, None]

    def _cache(self, rows: int) -> Cache:
        if rows != len(self.audio):
            raise ModelError(f"{rows} rows asked for, but the audio of {len(self.audio)} utterances was encoded")
        return node_cache(int(self.model.llm.config.get_text_config(decoder=True).num_hidden_layers))

    def _prompts(self, rows: int) -> list[list[int]]:
        before, after = self.model.prompts
        spans = [0] * rows if self.model.dims.attention == "cross" else self.lengths.tolist()
        base = self.vocabulary.size
        return [[*before, *range(base, base + n), *after, self.model.begin] for n in spans]

    def _hidden(self, trie: Trie, new: NewNodes) -> Tensor:
        require_positions(int(new.positions.max()) + 1, self.model.longest)
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
        return run_packed(self.model.decoder, new, trie.cache, embedded.dtype, inputs_embeds=embedded[None], **options)

    def _merged(self, trie: Trie, new: NewNodes, embedded: Tensor, sounds: Tensor) -> Tensor:
        """Audio nodes leave keys and values only; the others go through the model."""
        hidden = torch.zeros_like(embedded)
        heard = _some(new, sounds)
        with packing(heard):
            for number, (key, value) in enumerate(keys_values(self.model.llm, embedded[sounds][None], heard.positions[None])):
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


def _stretch(x: Tensor, begin: Tensor, count: int) -> Tensor:
    """[B, count, W] of x [B, S, W] from begin [B] on; beyond its end the last one repeats."""
    place = (begin[:, None] + torch.arange(count, device=x.device)).clamp(max=x.shape[1] - 1)
    return x[torch.arange(len(x), device=x.device)[:, None], place]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, L, S] additive mask of a boolean one [B, L, S]."""
    return torch.where(seen[:, None], 0.0, torch.finfo(dtype).min).to(dtype)


def _let_learn(ctc: CtcModel, llm: PreTrainedModel, dims: SpeechLlmDims) -> None:
    """Sets what of the encoder and of the language model has gradients; what rested before (frozen layers) goes on resting."""
    if dims.encoder == "rest":
        ctc.requires_grad_(False)
    elif dims.encoder == "lora":
        add_lora(ctc.encoder, dims.encoder_lora)
    # New matrices know nothing yet, whatever else rests.
    let_learn(llm, dims.learns, dims.lora, embeddings=dims.embeddings == "learn" or dims.units == "ctc")
