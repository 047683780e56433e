"""Attention encoder-decoders as Scorers: ours (encoder, CTC heads, decoder) and Whisper.

Their decoders attend to the audio and are otherwise causal language models.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache

from duolect.audio.features import SECONDS_PER_FRAME, whisper_log_mel
from duolect.audio.io import SAMPLE_RATE
from duolect.models import ModelError, Precision, loading
from duolect.models.attention_decoder import AttentionDecoder, DecoderDims, histories
from duolect.models.cache import Trie
from duolect.models.ctc import AcousticModel, CtcModel, CtcOutput, FolderModel, Heads, kind_of, load_weights, read_config
from duolect.models.decoder import DecoderScorer, OutputLayer
from duolect.models.encoders import Encoded, Encoder, frame_mask
from duolect.models.packed import NewNodes, NodeLayer, bytes_per_position, node_cache, packing, run_packed, use_packed_attention
from duolect.models.windows import Windowing
from duolect.vocabulary import SentencePieceVocabulary, TokenizerVocabulary, Vocabulary

WINDOW_SECONDS = 30.0
"""Whisper's encoder was trained on windows of exactly this length; shorter audio is padded to it with silence."""

ENGLISH_ONLY_ROWS = 51864
"""Output rows of the English-only models, which take no language and task label; the multilingual ones have more."""


class AttentionModel(ABC):
    """A decoder that hears: it makes one Scorer per batch of audio. written: how its text looks. takes_context: see `told`."""

    vocabulary: Vocabulary
    takes_context: bool = False
    written: Literal["sentence", "lower"] = "sentence"

    def told(self, words: Sequence[str]) -> AttentionModel:
        """The model with words and phrases that may come, which it reads where it takes context; it shares the weights. ModelError."""
        return self

    @abstractmethod
    def scorer(self, audios: Sequence[np.ndarray], heard: CtcOutput | None = None) -> DecoderScorer:
        """log p(labels | audio) for a batch of samples [N], float32 mono 16 kHz; ModelError where one is longer than the model hears.

        heard: what its encoder made of them already, with frames, by a CTC model that `shares` it.
        """

    def shares(self, model: AcousticModel) -> bool:
        """Whether a CTC model has the same encoder, so that audio need be encoded once for both."""
        return False

    @abstractmethod
    def bytes_of(self, *, seconds: float, labels: int) -> int:
        """Bytes of the keys and values of audio of so many seconds and so many labels, those of a beam's hypotheses together."""

    @abstractmethod
    def internal(self, rows: int) -> DecoderScorer:
        """log p(labels) of the decoder without audio, for `rows` utterances: its internal language model (arXiv 2011.01991)."""


def load_attention_model(
    name: str | Path, *, dtype: Precision = "float32", device: str = "cpu", ctc: CtcModel | None = None
) -> AttentionModel:
    """The encoder-decoder or speech LLM of a model folder of ours, or Whisper of a folder or hub id. Raises ModelError.

    ctc: the CTC part of such a folder, if it was loaded before.
    """
    kind = kind_of(name)
    if kind == "speech_llm":
        from duolect.models.speech_llm import SpeechLlm  # which needs this file

        return SpeechLlm.load(name, dtype=dtype, device=device, ctc=ctc)
    if kind in ("aed", "ctc"):
        return AedModel.load(name, dtype=dtype, device=device, ctc=ctc)
    return WhisperAed.load(name, dtype=dtype, device=device)


class AudioScorer(DecoderScorer):
    """A decoder that attends to the audio of a batch: its keys and values [B, heads, T, size] per layer, which the beam shares."""

    def __init__(
        self, output: OutputLayer, vocabulary: Vocabulary, *, prompt: Sequence[int], heard: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self.output, self.vocabulary, self.prompt, self.heard = output, vocabulary, list(prompt), heard

    def _cache(self, rows: int) -> Cache:
        if rows != (utterances := len(self.heard[0][0])):
            raise ModelError(f"{rows} rows asked for, but the audio of {utterances} utterances was encoded")
        cross = Cache(layers=[NodeLayer() for _ in self.heard])
        for layer, (keys, values) in zip(cross.layers, self.heard, strict=True):
            layer.fill(keys, values)  # pyright: ignore[reportAttributeAccessIssue]
        cache = EncoderDecoderCache(node_cache(len(self.heard)), cross)
        cache.is_updated = dict.fromkeys(range(len(self.heard)), True)
        return cache

    def _prompts(self, rows: int) -> list[list[int]]:
        return [self.prompt] * rows


@dataclass(frozen=True)
class AedOutput:
    """What a training pass gives: the CTC heads, and the decoder's logits [B, L + 1, V] (aux by layer) for targets [B, L + 1]; heard:
    what a CTC head on the decoder's states at the audio says."""

    heads: Heads
    logits: Tensor
    aux: Mapping[int, Tensor]
    targets: Tensor
    heard: CtcOutput | None = None


class AedModel(FolderModel, AttentionModel):
    """An encoder with CTC heads and a decoder over the main head's labels without blank, in one model folder.

    As an acoustic model the folder is its CTC part (`load_acoustic_model`). max_seconds: of audio that the decoder is asked about.
    """

    written = "lower"

    def __init__(self, ctc: CtcModel, dims: DecoderDims, *, max_seconds: float = 30.0) -> None:
        super().__init__()
        if not isinstance(ctc.vocabulary, SentencePieceVocabulary):
            raise ModelError(f"an AED over a {type(ctc.vocabulary).__name__} cannot be built: give its CTC model a SentencePieceVocabulary")
        self.ctc, self.max_seconds = ctc, min(max_seconds, ctc.encoder.max_seconds)
        self.vocabulary = ctc.vocabulary.without_blank()
        self.decoder = AttentionDecoder(dims, labels=self.vocabulary.size, encoder_dim=ctc.encoder.dim)

    def forward(self, features: Tensor, lengths: Tensor, labels: Tensor, sizes: Tensor, *, hidden: Tensor | None = None) -> AedOutput:
        """All outputs for features [B, F, mels] and labels [B, L], of which sizes [B] are real, from one encoder pass."""
        heads = self.ctc.heads(features, lengths, hidden=hidden)
        history, targets = histories(labels, sizes, bos=self.vocabulary.bos, eos=self.vocabulary.eos)
        decoded = self.decoder(history, heads.encoded)
        return AedOutput(heads, decoded.logits, decoded.aux, targets)

    @torch.no_grad()
    def scorer(self, audios: Sequence[np.ndarray], heard: CtcOutput | None = None) -> AedScorer:
        dtype = self.decoder.embedding.weight.dtype
        return AedScorer(self, encoded_whole(self.ctc.encoder, audios, max_seconds=self.max_seconds, dtype=dtype, heard=heard))

    def shares(self, model: AcousticModel) -> bool:
        return model is self.ctc and self.ctc.stack == 1

    def bytes_of(self, *, seconds: float, labels: int) -> int:
        dims, frames = self.decoder.dims, math.ceil(seconds / self.ctc.encoder.seconds_per_frame)
        return 2 * dims.layers * dims.dim * self.decoder.embedding.weight.dtype.itemsize * (frames + 1 + labels)

    @torch.no_grad()
    def internal(self, rows: int) -> AedScorer:
        weight = self.decoder.embedding.weight  # one frame of zeros: attention to any number of equal frames gives the same
        frames = weight.new_zeros(rows, 1, self.ctc.encoder.dim)
        return AedScorer(self, Encoded(frames, torch.ones(rows, dtype=torch.long, device=weight.device)))

    def parts(self) -> dict[str, nn.Module]:
        return {"decoder": self.decoder}

    def save_vocabularies(self, folder: Path) -> None:
        self.ctc.save_vocabularies(folder)  # which are the decoder's too

    def settings(self) -> dict[str, object]:
        return {**self.ctc.settings(), "type": "aed", "decoder": asdict(self.decoder.dims), "max_seconds": self.max_seconds}

    @classmethod
    def load(cls, folder: str | Path, *, dtype: Precision = "float32", device: str = "cpu", ctc: CtcModel | None = None) -> AedModel:
        """The model that `save` wrote, in eval mode; with a `dtype` below fp32 the encoder runs under autocast. Raises ModelError.

        ctc: its CTC part, if that was loaded before.
        """
        folder = Path(folder)
        config = read_config(folder, kind="aed")
        fields = config["decoder"]
        dims = DecoderDims(**{**fields, "aux": tuple(fields["aux"])})
        model = cls(ctc or CtcModel.load(folder), dims, max_seconds=config["max_seconds"])
        own = {name: x for name, x in model.weights().items() if name.startswith("decoder.")}
        load_weights(own, folder, ignore=("encoder.", "head.", "aux."))
        model.decoder.to(getattr(torch, dtype))
        return model.to(device).eval()


def encoded_whole(
    encoder: Encoder,
    audios: Sequence[np.ndarray],
    *,
    max_seconds: float,
    dtype: torch.dtype = torch.float32,
    heard: CtcOutput | None = None,
) -> Encoded:
    """The frames of a batch of samples [N], in `dtype`, on the encoder's device; below fp32 under autocast. ModelError for longer audio.

    heard: as in AttentionModel.scorer.
    """
    _require_length(audios, max_seconds, "the model")
    device = next(encoder.parameters()).device
    if heard is not None and heard.frames is not None:
        return Encoded(heard.frames.to(device, dtype), heard.lengths.to(device))
    features = [encoder.features(torch.as_tensor(audio, device=device)) for audio in audios]

    def run(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            encoded = encoder(features, lengths)
        return encoded.frames.to(dtype), encoded.lengths

    frames = Windowing(round(1 / SECONDS_PER_FRAME), 1, max_seconds + 1).over(features, run)  # batches by length, and nothing to cut
    lengths = torch.tensor([len(x) for x in frames], device=device)
    return Encoded(nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths)


class AedScorer(AudioScorer):
    """The decoder of an AedModel over what its encoder heard."""

    def __init__(self, aed: AedModel, encoded: Encoded) -> None:
        decoder, vocabulary = aed.decoder, aed.vocabulary
        output = OutputLayer(decoder.embedding.weight.detach())
        super().__init__(output, vocabulary, prompt=[vocabulary.bos], heard=decoder.heard(encoded.frames[..., : aed.ctc.encoder.dim]))
        self.decoder, self.real = decoder, frame_mask(encoded.lengths, encoded.frames.shape[1])

    def _hidden(self, trie: Trie, new: NewNodes) -> Tensor:
        assert isinstance(trie.cache, EncoderDecoderCache)
        with packing(new):
            return self.decoder.packed(new, trie.cache, self.real[trie.utterance][:, None, None])


class WhisperAed(AttentionModel):
    """A Whisper model that makes one Scorer per batch of audio.

    Labels with digits and symbols are kept out, so that hypotheses are comparable with a CTC model of spelled-out words.
    """

    def __init__(self, model: WhisperForConditionalGeneration, vocabulary: TokenizerVocabulary) -> None:
        self.model: Any = model.eval()
        use_packed_attention(model)
        self.vocabulary = vocabulary
        self.prompt = _prompt(vocabulary, multilingual=self.model.config.vocab_size > ENGLISH_ONLY_ROWS)
        head: Any = model.get_output_embeddings()
        bias = torch.zeros(vocabulary.size, device=head.weight.device, dtype=head.weight.dtype)
        bias[_silenced(vocabulary)] = -torch.inf
        self.output = OutputLayer(head.weight.detach()[: vocabulary.size], bias)

    @classmethod
    def load(cls, name: str | Path, *, dtype: Precision = "float32", device: str = "cpu") -> WhisperAed:
        """The model of a hub id or a folder of transformers."""
        with loading(name, "a Whisper model"):
            model = WhisperForConditionalGeneration.from_pretrained(str(name), dtype=getattr(torch, dtype), attn_implementation="sdpa")
        return cls(model.to(device), TokenizerVocabulary.load(name))  # type: ignore[arg-type]

    @torch.no_grad()
    def scorer(self, audios: Sequence[np.ndarray], heard: CtcOutput | None = None) -> WhisperScorer:
        _require_length(audios, WINDOW_SECONDS, "Whisper")
        size = int(SAMPLE_RATE * WINDOW_SECONDS)
        weight = self.output.weight
        mels = self.model.config.num_mel_bins
        padded = [torch.nn.functional.pad(torch.from_numpy(a), (0, size - len(a))).to(weight.device) for a in audios]
        features = torch.stack([whisper_log_mel(a, mels=mels) for a in padded]).transpose(1, 2).to(weight.dtype)
        return WhisperScorer(self, self.model.model.encoder(features).last_hidden_state)

    def bytes_of(self, *, seconds: float, labels: int) -> int:
        positions = self.model.config.max_source_positions + len(self.prompt) + labels  # whatever the seconds
        return bytes_per_position(self.model.config, self.output.weight.dtype) * positions

    @torch.no_grad()
    def internal(self, rows: int) -> WhisperScorer:
        return WhisperScorer(self, self.output.weight.new_zeros(rows, 1, self.model.config.d_model))


class WhisperScorer(AudioScorer):
    """Whisper's decoder over the encoder states [B, 1500, width] of a batch."""

    def __init__(self, aed: WhisperAed, encoded: Tensor) -> None:
        def heads(projection: Any, attention: Any) -> Tensor:
            return projection(encoded).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).contiguous()

        attentions = [layer.encoder_attn for layer in aed.model.model.decoder.layers]
        heard = [(heads(a.k_proj, a), heads(a.v_proj, a)) for a in attentions]
        super().__init__(aed.output, aed.vocabulary, prompt=aed.prompt, heard=heard)
        self.aed, self.encoded = aed, encoded

    def _hidden(self, trie: Trie, new: NewNodes) -> Tensor:
        limit = self.aed.model.config.max_target_positions
        if int(new.positions.max()) >= limit:
            raise ModelError(f"a hypothesis outgrew Whisper's {limit} positions: lower max_labels")
        decoder, dtype = self.aed.model.model.decoder, self.output.weight.dtype
        # The encoder's states only say that there is audio: its keys and values are in the cache.
        return run_packed(decoder, new, trie.cache, dtype, input_ids=new.labels[None], encoder_hidden_states=self.encoded)


def _require_length(audios: Sequence[np.ndarray], seconds: float, who: str) -> None:
    longest = max((len(a) for a in audios), default=0) / SAMPLE_RATE
    if longest > seconds:
        raise ModelError(f"{longest:.1f} s of audio are longer than the {seconds:.0f} s that {who} hears at once: split it into segments")


def _prompt(vocabulary: TokenizerVocabulary, *, multilingual: bool) -> list[int]:
    index = vocabulary.tokenizer.convert_tokens_to_ids
    names = ["<|startoftranscript|>", *(["<|en|>", "<|transcribe|>"] if multilingual else []), "<|notimestamps|>"]
    labels = [index(name) for name in names]
    unknown = [name for name, label in zip(names, labels, strict=True) if label is None or vocabulary.piece(label) != name]
    if unknown:
        raise ModelError(f"the tokenizer lacks {', '.join(unknown)}: it is no Whisper tokenizer")
    return labels


def _silenced(vocabulary: TokenizerVocabulary) -> list[int]:
    """Labels that are no speech: all that hold other than letters and punctuation, eos aside."""
    keep = set("'.,?!-")
    silenced = []
    for label in range(vocabulary.size):
        # Byte-level pieces write a space as Ġ and bytes beyond ASCII as other letters beyond ASCII.
        letters = vocabulary.piece(label).removeprefix("Ġ")
        odd = not letters or any(not (c.isascii() and c.isalpha()) and c not in keep for c in letters)
        if odd and label != vocabulary.eos:
            silenced.append(label)
    return silenced
