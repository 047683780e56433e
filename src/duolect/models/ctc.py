"""CTC acoustic models: ours (an encoder and one linear layer) and any of Hugging Face's, behind one small abstract class."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.audio.features import SECONDS_PER_FRAME
from duolect.audio.io import SAMPLE_RATE
from duolect.models import ModelError, loading
from duolect.models.copying import CopyingHead
from duolect.models.embedded import resolve
from duolect.models.encoders import Encoded, Encoder, encoder_from_settings, require_layers, stack_frames
from duolect.models.extended import ExtendedEncoder
from duolect.models.hf_encoder import LONGEST, output_lengths, seconds_per_frame, unheard_padding
from duolect.models.spotter import Spotter, SpottingEncoder
from duolect.models.windows import BATCH_SECONDS, Window, Windowing
from duolect.run import write_tensors
from duolect.vocabulary import CharacterVocabulary, TokenizerVocabulary, Vocabulary, load_vocabulary

RANGES = {"stack": (1, 16), "window_seconds": (0.1, 3600.0), "blank_penalty": (0.0, 30.0)}  # of what config.json may say
OURS = ("ctc", "aed", "speech_llm")
"""Kinds of model folders that have a CtcModel in them."""
MIN_SAMPLES = 400  # 25 ms: wav2vec2's convolutions need as much for one frame


@dataclass(frozen=True)
class CtcOutput:
    """log p(label | frame): log_probs [B, T, V] fp32, natural, real in the first lengths [B] frames.

    frames: [B, T, D] what the encoder heard there, where a decoder wants it too.
    """

    log_probs: Tensor
    lengths: Tensor
    frames: Tensor | None = None


class AcousticModel(ABC):
    """Audio to CTC log-probs. What an utterance gets does not depend on what else is in the batch."""

    vocabulary: Vocabulary
    seconds_per_frame: float

    @abstractmethod
    def place(self, device: str) -> None:
        """Moves the encoder; log-probs come back to the CPU all the same."""

    @abstractmethod
    def log_probs_of(self, audios: Sequence[np.ndarray], *, frames: bool = False) -> CtcOutput:
        """The log-probs of samples [N], N >= 1, float32 mono 16 kHz, in the order given; any length, long audio goes through windows.

        frames: with the encoder's frames, if the model is one of ours that stacks none.
        """


@dataclass(frozen=True)
class Heads:
    """What every head says of one encoder pass: the main one, and the auxiliary ones by layer."""

    main: CtcOutput
    aux: Mapping[int, CtcOutput]
    encoded: Encoded


class FolderModel(nn.Module, ABC):
    """A model of ours: what its folder holds, and what of it learns."""

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What config.json must hold to build the model again without weights and vocabularies."""

    @abstractmethod
    def save_vocabularies(self, folder: Path) -> None:
        """Writes the vocabularies of all parts to the folder."""

    def parts(self) -> dict[str, nn.Module]:
        """What learns at rates of its own, beside encoder and heads."""
        return {}

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a state dict by the names they have in a model folder, where the CTC part is a CTC model's."""
        return {name.removeprefix("ctc."): x for name, x in state.items()}

    def weights(self) -> dict[str, Tensor]:
        """The model's own tensors by the names they have in a model folder."""
        return self.named(self.state_dict())

    def save(self, folder: str | Path, *, card: str, state: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float16) -> None:
        """Writes a model folder: the weights, or those of another `state` of the model, in `dtype`; `card` is README.md."""
        save_model(folder, self.settings(), self.named(self.state_dict() if state is None else state), card=card, dtype=dtype)
        self.save_vocabularies(Path(folder))


class CtcModel(FolderModel, AcousticModel):
    """An encoder, optionally frames stacked side by side, and a linear layer to the vocabulary with its blank.

    aux: vocabularies (with blank) of further heads, by the encoder layer (from 1) that they hear. blank_penalty: nats that the main head's
    blank loses in recognition, against words left out; probabilities sum to 1 all the same.
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: Vocabulary,
        *,
        stack: int = 1,
        window_seconds: float = 28.0,
        aux: Mapping[int, Vocabulary] | None = None,
        blank_penalty: float = 0.0,
    ) -> None:
        super().__init__()
        self.blank_penalty = blank_penalty
        self.aux_vocabularies = dict(sorted((aux or {}).items()))
        require_layers(list(self.aux_vocabularies), encoder.depth)
        for v in (vocabulary, *self.aux_vocabularies.values()):
            if v.blank is None:
                raise ModelError(f"vocabulary {v.digest()} has no blank: CTC needs one (SentencePieceVocabulary(..., blank='last'))")
        self.encoder, self.vocabulary, self.stack = encoder, vocabulary, stack
        self.window_seconds = min(window_seconds, encoder.max_seconds)
        self.seconds_per_frame = encoder.seconds_per_frame * stack
        spotter = spotter_of(encoder)
        if spotter is not None and stack != 1:
            raise ModelError(f"stack is {stack}, but what a spotter names belongs to one frame: set stack=1")
        self.head = nn.Linear(encoder.dim * stack, vocabulary.size) if spotter is None else CopyingHead(encoder.dim, vocabulary, spotter)
        self.aux = nn.ModuleDict({str(n): nn.Linear(encoder.dim * stack, v.size) for n, v in self.aux_vocabularies.items()})

    def forward(self, features: Tensor, lengths: Tensor) -> CtcOutput:
        """The main head's log-probs of features [B, F, mels] no longer than the encoder's max_seconds."""
        return self.of_encoded(self.encoder(features, lengths)).main

    def heads(self, features: Tensor, lengths: Tensor, *, hidden: Tensor | None = None) -> Heads:
        """All heads' log-probs, for training; hidden: bool [B, F, mels], what SpecAugment hides."""
        return self.of_encoded(self.encoder(features, lengths, taps=tuple(self.aux_vocabularies), hidden=hidden))

    def of_encoded(self, encoded: Encoded) -> Heads:
        """The log-probs of all heads whose layers were tapped."""
        aux = {n: self._heard(self.aux[str(n)], encoded.taps[n], encoded.lengths) for n in self.aux_vocabularies if n in encoded.taps}
        main = self._heard(self.head, encoded.frames, encoded.lengths)
        if self.blank_penalty and not self.training:
            lost = F.one_hot(torch.tensor(self.vocabulary.blank, device=main.log_probs.device), self.vocabulary.size) * self.blank_penalty
            main = replace(main, log_probs=(main.log_probs - lost).log_softmax(-1))
        return Heads(main, aux, replace(encoded, frames=encoded.frames[..., : self.encoder.dim]))

    def _heard(self, head: nn.Module, frames: Tensor, lengths: Tensor) -> CtcOutput:
        frames, lengths = stack_frames(frames, lengths, self.stack)
        logits = head(frames)
        return CtcOutput(logits if isinstance(head, CopyingHead) else logits.float().log_softmax(-1), lengths)

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a state dict by their names in a model folder; what rests and the encoder's source has anyway is left out."""
        given = _given(self.encoder)
        resting = {name for name, p in self.named_parameters() if given and name.startswith(given) and not p.requires_grad}
        return {name: x for name, x in state.items() if name not in resting}

    def place(self, device: str) -> None:
        self.to(device)

    def log_probs_of(self, audios: Sequence[np.ndarray], *, frames: bool = False) -> CtcOutput:
        def heard(features: Tensor, lengths: Tensor) -> CtcOutput:
            heads = self.of_encoded(self.encoder(features, lengths))
            return replace(heads.main, frames=heads.encoded.frames if frames and self.stack == 1 else None)

        return self.in_windows(audios, self.windowing(), heard)

    @torch.no_grad()
    def in_windows(self, audios: Sequence[np.ndarray], windowing: Windowing, heard: Callable[[Tensor, Tensor], CtcOutput]) -> CtcOutput:
        """What `heard` says of features [B, F, mels] and lengths [B], of samples [N] of any length, in the model's labels."""
        device = self.head.weight.device
        features, labels = [self.encoder.features(torch.as_tensor(audio, device=device)) for audio in audios], self.vocabulary.size

        def run(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            output = heard(features, lengths)
            return output.log_probs if output.frames is None else torch.cat([output.log_probs, output.frames], 2), output.lengths

        found = windowing.over(features, run)
        frames = [x[:, labels:].cpu() for x in found if x.shape[1] > labels]
        output = _padded([x[:, :labels] for x in found], self.vocabulary)
        return replace(output, frames=nn.utils.rnn.pad_sequence(frames, batch_first=True)) if frames else output

    def windowing(self) -> Windowing:
        """How long audio is cut, in feature frames."""
        return Windowing(round(1 / SECONDS_PER_FRAME), round(self.seconds_per_frame / SECONDS_PER_FRAME), self.window_seconds)

    def settings(self) -> dict[str, object]:
        return {
            "type": "ctc",
            "encoder": self.encoder.settings(),
            "stack": self.stack,
            "window_seconds": self.window_seconds,
            "blank_penalty": self.blank_penalty,
            "vocabulary": self.vocabulary.digest(),
            "aux": {str(n): v.digest() for n, v in self.aux_vocabularies.items()},
        }

    def save_vocabularies(self, folder: Path) -> None:
        """Writes the main vocabulary to the folder and those of auxiliary heads, unless they are the same, to aux/<layer>."""
        self.vocabulary.save(folder)
        for n, vocabulary in self.aux_vocabularies.items():
            if _differ(vocabulary, self.vocabulary):
                (folder / "aux" / str(n)).mkdir(parents=True, exist_ok=True)
                vocabulary.save(folder / "aux" / str(n))

    @classmethod
    def load(cls, folder: str | Path, *, head: int | None = None) -> CtcModel:
        """The model that `save` wrote, in fp32 and eval mode. Raises ModelError.

        head: the layer of an auxiliary head that is to be the model's head; the layers above it are left out, and so are other heads.
        """
        place = ctc_source(folder)
        model = cls.of_config(read_config(place), place)
        others = ("decoder.", "adapter.", "cross.", "audio_head.", "llm.")
        load_weights(model.state_dict(), place, ignore=others, given=_given(model.encoder))
        if spotter := spotter_of(model.encoder):
            spotter.merge()
        return model if head is None else model.ending_at(head)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], folder: Path) -> CtcModel:
        """The model of a config.json, in eval mode, weights not set, with the vocabularies of the folder. Raises ModelError."""
        vocabulary, aux = load_vocabulary(folder), {}
        for n in config.get("aux", {}):
            own = folder / "aux" / n
            aux[int(n)] = load_vocabulary(own) if own.is_dir() else vocabulary
        for v, digest in ((vocabulary, config.get("vocabulary")), *((aux[int(n)], digest) for n, digest in config.get("aux", {}).items())):
            if v.digest() != digest:
                raise ModelError(
                    f"{folder}: its vocabulary is {v.digest()}, config.json was saved with {digest}: "
                    "files of two models are mixed, copy the whole folder again"
                )
        encoder = encoder_from_settings(config["encoder"])
        settings = {name: config[name] for name in RANGES if name in config}
        for name, value in settings.items():
            least, most = RANGES[name]
            if not isinstance(value, int | float) or not least <= value <= most:
                raise ModelError(f"{folder}/config.json: {name} is {value!r}, expected a number in {least} .. {most}: copy the file again")
        return cls(encoder, vocabulary, aux=aux, **settings).eval()

    def with_heads(self, aux: Mapping[int, Vocabulary]) -> CtcModel:
        """The model with new auxiliary heads, by the layer they hear, beside those it has; it shares the weights."""
        every = {**self.aux_vocabularies, **aux}
        settings = {"stack": self.stack, "window_seconds": self.window_seconds, "blank_penalty": self.blank_penalty}
        model = CtcModel(self.encoder, self.vocabulary, aux=every, **settings)
        model.head = self.head
        model.aux.update({n: head for n, head in self.aux.items() if int(n) not in aux})
        return model.train(self.training)

    def ending_at(self, layer: int) -> CtcModel:
        """The model whose encoder ends at that layer and whose only head is the auxiliary one there; it shares the weights. ModelError."""
        if layer not in self.aux_vocabularies:
            known = ", ".join(map(str, self.aux_vocabularies)) or "none"
            raise ModelError(f"the model has no auxiliary head at layer {layer}; it has: {known}")
        encoder = encoder_from_settings({**self.encoder.settings(), "layers": layer})
        if encoder.depth != layer:
            raise ModelError(f"a {type(encoder).__name__} cannot end at layer {layer}: take the main head, or tap it with `heads`")
        model = CtcModel(encoder, self.aux_vocabularies[layer], stack=self.stack, window_seconds=self.window_seconds)
        own = {f"head.{name}": x for name, x in self.aux[str(layer)].state_dict().items()}
        names = {name for name, _ in encoder.named_parameters()} | {name for name, _ in encoder.named_buffers()}
        own |= {f"encoder.{name}": x for name, x in self.encoder.state_dict().items() if name in names}
        model.load_state_dict(own, assign=True)
        return model.train(self.training)


def ctc_source(folder: str | Path) -> Path:
    """The folder that has the CTC part of a model of ours: its own, or that of the model its encoder rested on. Raises ModelError."""
    place = folder = Path(folder)
    config = trained = read_config(folder)
    while source := config.get("sources", {}).get("ctc"):
        place = Path(resolve(source))
        config = read_config(place)
    if config.get("vocabulary") != trained.get("vocabulary"):
        raise ModelError(f"{folder}: was trained on {place}, which has other units now: get the CTC model it was trained on")
    return place


def save_model(
    folder: str | Path, config: Mapping[str, object], weights: Mapping[str, Tensor], *, card: str, dtype: torch.dtype = torch.float16
) -> None:
    """Writes config.json, README.md (`card`) and model.safetensors (weights in `dtype`) to a folder, made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "README.md").write_text(card)
    moved = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    write_tensors(folder / "model.safetensors", moved, metadata={"format": "pt"})


def load_weights(weights: Mapping[str, Tensor], folder: Path, *, ignore: tuple[str, ...] = (), given: str = "") -> None:
    """Sets a model's own tensors, by name, to those in a model folder. ModelError where not all fit.

    Stored names that begin with one of `ignore` are left out, own ones that begin with `given` may be missing in the folder.
    """
    path = folder / "model.safetensors"
    try:
        stored = {n: x for n, x in load_file(path).items() if not n.startswith(ignore)}
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path}: does not fit config.json ({' '.join(str(error).split())[:200]}): copy the folder again") from error
    weights = {n: x for n, x in weights.items() if n in stored or not (given and n.startswith(given))}
    odd = sorted(n for n in weights.keys() | stored.keys() if n not in weights or n not in stored or weights[n].shape != stored[n].shape)
    if odd:
        raise ModelError(f"{path}: does not fit config.json ({len(odd)} weights, {', '.join(odd[:3])}, ...): copy the folder again")
    with torch.no_grad():
        for name, x in weights.items():
            x.copy_(stored[name])


def spotter_of(encoder: Encoder) -> Spotter | None:
    """The spotter of an encoder, where it has one."""
    inner = encoder.base if isinstance(encoder, ExtendedEncoder) else encoder
    return inner.spotter if isinstance(inner, SpottingEncoder) else None


def _given(encoder: Encoder) -> str:
    """What the names of weights begin with that an encoder's source has, empty where it has none."""
    if spotter_of(encoder) is None:
        return ""
    return "encoder.base." if isinstance(encoder, ExtendedEncoder) else "encoder."


class HuggingFaceCtc(AcousticModel):
    """Any AutoModelForCTC (wav2vec2, HuBERT, WavLM, Parakeet-CTC, ...) with its own features and tokenizer; blank is its pad index."""

    def __init__(self, model: Any, extractor: Any, vocabulary: Vocabulary) -> None:
        self.model, self.extractor, self.vocabulary, self.window_seconds = model.eval(), extractor, vocabulary, LONGEST
        self.seconds_per_frame = seconds_per_frame(model.config, extractor)

    @cached_property
    def together(self) -> bool:
        """Whether a padded batch gives what its utterances give alone, so that they may be batched."""
        return output_lengths(self.model) is not None and unheard_padding(lambda audios: self._log_probs(audios, masked=True))

    @classmethod
    def load(cls, name: str) -> HuggingFaceCtc:
        """A hub id or local folder. Raises ModelError."""
        from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

        with loading(name, "a CTC model (a folder of ours, or a folder or hub id with a CTC head and a tokenizer)"):
            model = AutoModelForCTC.from_pretrained(name, trust_remote_code=False, dtype=torch.float32)
            extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return cls(model, extractor, _vocabulary_of(model.config, tokenizer))

    def place(self, device: str) -> None:
        self.model.to(device)

    @torch.no_grad()
    def log_probs_of(self, audios: Sequence[np.ndarray], *, frames: bool = False) -> CtcOutput:
        audios = [np.pad(audio, (0, max(0, MIN_SAMPLES - len(audio)))) for audio in audios]
        together = len(audios) > 1 and self.together
        cut = replace(self.windowing(), batch_seconds=BATCH_SECONDS if together else 0.0)

        def encode(batch: list[Window]) -> list[Tensor]:
            return self._log_probs([audios[w.utterance][w.start : w.end] for w in batch], masked=together)

        return _padded(cut.joined([len(audio) for audio in audios], encode), self.vocabulary)

    def windowing(self) -> Windowing:
        """How long audio is cut, in samples."""
        return Windowing(SAMPLE_RATE, round(self.seconds_per_frame * SAMPLE_RATE), self.window_seconds)

    def _log_probs(self, audios: Sequence[np.ndarray], *, masked: bool) -> list[Tensor]:
        """[T, V] per utterance of one batch; masked: with an attention mask even where the extractor would leave it out."""
        options: dict[str, Any] = {"return_attention_mask": True} if masked else {}
        inputs = self.extractor(list(audios), sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt", **options)
        inputs = inputs.to(self.model.device)
        logits = self.model(**inputs).logits[..., : self.vocabulary.size]
        mask, sizes = inputs.get("attention_mask"), output_lengths(self.model)
        lengths = [logits.shape[1]] * len(audios)
        if mask is not None and sizes is not None:
            lengths = sizes(mask.sum(-1)).tolist()
        return [x[:n].float().log_softmax(-1) for x, n in zip(logits, lengths, strict=True)]


def load_acoustic_model(name: str | Path) -> AcousticModel:
    """The CTC model of an embedded name (`duolect-ctc`), a model folder of ours, or a Hugging Face folder or hub id. Raises ModelError.

    `folder#4`: the auxiliary head at layer 4 of a model of ours; `folder#llm`: the one of a speech LLM on its language model's states.
    """
    name, _, head = str(name).partition("#")
    place = resolve(name)
    if head == "llm":
        from duolect.models.speech_llm import AudioHead, SpeechLlm  # which need this file

        return AudioHead(SpeechLlm.load(place))
    if head:
        if not head.isdecimal():
            raise ModelError(f"{name}#{head}: expected the number of a layer behind #, such as {name}#4, or llm")
        return CtcModel.load(place, head=int(head))
    if Path(place).is_dir() and read_config(Path(place)).get("type") in OURS:
        return CtcModel.load(place)
    return HuggingFaceCtc.load(str(place))


def _padded(log_probs: Sequence[Tensor], vocabulary: Vocabulary) -> CtcOutput:
    """[T, V] each to one batch; padded frames are certain blanks, which no search can stumble over."""
    lengths = torch.tensor([len(x) for x in log_probs])
    padded = torch.full((len(log_probs), int(lengths.max()) if len(lengths) else 0, vocabulary.size), -torch.inf)
    assert vocabulary.blank is not None
    padded[..., vocabulary.blank] = 0.0
    for row, x in enumerate(log_probs):
        padded[row, : len(x)] = x.cpu()
    return CtcOutput(padded, lengths)


def read_config(folder: Path, *, kind: str | None = None) -> dict[str, Any]:
    """config.json of a model folder, of a model of that kind. Raises ModelError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing: {folder} is no model folder; name one with config.json and model.safetensors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): copy the model folder again") from error
    if kind not in (None, config.get("type")):
        raise ModelError(f"{folder}: is a model of type {config.get('type')}, expected {kind}: name the folder of one")
    return config


def kind_of(name: str | Path) -> str | None:
    """What kind of model a folder of ours holds; None for anything else."""
    return read_config(Path(name)).get("type") if Path(name, "config.json").is_file() else None


def _differ(one: Vocabulary, other: Vocabulary) -> bool:
    return (one.digest(), one.size, one.blank) != (other.digest(), other.size, other.blank)


def _vocabulary_of(config: Any, tokenizer: Any) -> Vocabulary:
    """wav2vec2-type tokenizers become characters with their `|`, others stay what they are; blank is the pad index of the model."""
    blank = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    if blank is None:
        raise ModelError(f"{config.name_or_path}: has no pad token, which is the blank of a CTC model: set pad_token_id in config.json")
    delimiter = getattr(tokenizer, "word_delimiter_token", None)
    if delimiter is None:
        return TokenizerVocabulary(tokenizer, blank=blank)
    symbols = [str(tokenizer.convert_ids_to_tokens(i)) for i in range(config.vocab_size)]
    symbols = [s if symbols.index(s) == i else f"<{i}>" for i, s in enumerate(symbols)]  # rows beyond the tokenizer all read <unk>
    return CharacterVocabulary(
        symbols,
        delimiter=delimiter,
        blank=symbols[blank],
        bos=tokenizer.bos_token or "<s>",
        eos=tokenizer.eos_token or "</s>",
        unknown=tokenizer.unk_token or "<unk>",
    )
