"""CTC acoustic models: ours (an encoder and one linear layer) and any of Hugging Face's, behind one small abstract class."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duolect.audio.features import SECONDS_PER_FRAME, whisper_log_mel
from duolect.audio.io import SAMPLE_RATE
from duolect.models import ModelError
from duolect.models.embedded import resolve
from duolect.models.encoders import Encoder, encoder_from_settings, stack_frames
from duolect.vocabulary import CharacterVocabulary, TokenizerVocabulary, Vocabulary, load_vocabulary

OVERLAP_SECONDS = 4.0  # of adjacent windows: half of it is context that is thrown away at each inner edge
BATCH_SECONDS = 120.0  # of padded audio that is encoded at once
MIN_SAMPLES = 400  # 25 ms: wav2vec2's convolutions need as much for one frame


@dataclass(frozen=True)
class CtcOutput:
    """log p(label | frame): log_probs [B, T, V] fp32, natural, real in the first lengths [B] frames."""

    log_probs: Tensor
    lengths: Tensor


class AcousticModel(ABC):
    """Audio to CTC log-probs. What an utterance gets does not depend on what else is in the batch."""

    vocabulary: Vocabulary
    seconds_per_frame: float

    @abstractmethod
    def place(self, device: str) -> None:
        """Moves the encoder; log-probs come back to the CPU all the same."""

    @abstractmethod
    def log_probs_of(self, audios: Sequence[np.ndarray]) -> CtcOutput:
        """The log-probs of samples [N], N >= 1, float32 mono 16 kHz, in the order given; any length, long audio goes through windows."""


class CtcModel(nn.Module, AcousticModel):
    """An encoder, optionally frames stacked side by side, and a linear layer to the vocabulary with its blank."""

    def __init__(self, encoder: Encoder, vocabulary: Vocabulary, *, stack: int = 1, window_seconds: float = 28.0) -> None:
        super().__init__()
        if vocabulary.blank is None:
            raise ModelError(f"vocabulary {vocabulary.digest()} has no blank: CTC needs one (SentencePieceVocabulary(..., blank='last'))")
        self.encoder, self.vocabulary, self.stack = encoder, vocabulary, stack
        self.window_seconds = min(window_seconds, encoder.max_seconds)
        self.seconds_per_frame = encoder.seconds_per_frame * stack
        self.head = nn.Linear(encoder.dim * stack, vocabulary.size)

    def forward(self, features: Tensor, lengths: Tensor) -> CtcOutput:
        """The log-probs of features [B, F, mels] no longer than the encoder's max_seconds."""
        encoded = self.encoder(features, lengths)
        frames, lengths = stack_frames(encoded.frames, encoded.lengths, self.stack)
        return CtcOutput(self.head(frames).float().log_softmax(-1), lengths)

    def place(self, device: str) -> None:
        self.to(device)

    @torch.no_grad()
    def log_probs_of(self, audios: Sequence[np.ndarray]) -> CtcOutput:
        device = self.head.weight.device
        features = [whisper_log_mel(torch.as_tensor(audio, device=device), mels=self.encoder.mels) for audio in audios]
        per_frame = round(self.seconds_per_frame / SECONDS_PER_FRAME)
        windows = [w for i, x in enumerate(features) for w in self._windows(i, len(x), per_frame)]
        found: dict[_Window, Tensor] = {}
        for batch in _batches(windows, int(BATCH_SECONDS / SECONDS_PER_FRAME)):
            parts = [features[w.utterance][w.start : w.end] for w in batch]
            sizes = torch.tensor([len(part) for part in parts], device=device)
            output = self(nn.utils.rnn.pad_sequence(parts, batch_first=True), sizes)
            for row, window in enumerate(batch):
                first, last = (edge // per_frame for edge in (window.keep_from - window.start, window.keep_to - window.start))
                end = int(output.lengths[row]) if window.keep_to == window.end else last
                found[window] = output.log_probs[row, first:end]
        joined = [torch.cat([found[w] for w in windows if w.utterance == i]) for i in range(len(audios))]
        return _padded(joined, self.vocabulary)

    def _windows(self, utterance: int, frames: int, per_frame: int) -> Iterator[_Window]:
        """Windows over feature frames, equally long, at multiples of an output frame; what they keep covers everything once."""
        longest, overlap = (int(s / SECONDS_PER_FRAME) // (2 * per_frame) * (2 * per_frame) for s in (self.window_seconds, OVERLAP_SECONDS))
        if frames <= longest:
            yield _Window(utterance, 0, frames, 0, frames)
            return
        count = -(-(frames - overlap) // (longest - overlap))
        steps = -(-(frames - longest) // per_frame)  # the last window starts so many output frames in, and ends with the audio
        starts = [round(i * steps / (count - 1)) * per_frame for i in range(count)]
        edges = [0, *((b + a + longest) // 2 // per_frame * per_frame for a, b in pairwise(starts)), frames]
        for start, (first, last) in zip(starts, pairwise(edges), strict=True):
            yield _Window(utterance, start, min(start + longest, frames), first, last)

    def save(self, folder: str | Path, *, card: str, dtype: torch.dtype = torch.float16) -> None:
        """Writes a model folder; the weights in `dtype`, the vocabulary beside them, `card` as README.md."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "type": "ctc",
            "encoder": self.encoder.settings(),
            "stack": self.stack,
            "window_seconds": self.window_seconds,
            "vocabulary": self.vocabulary.digest(),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "README.md").write_text(card)
        self.vocabulary.save(folder)
        weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors.part", metadata={"format": "pt"})
        (folder / "model.safetensors.part").replace(folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> CtcModel:
        """The model that `save` wrote, in fp32 and eval mode. Raises ModelError."""
        folder = Path(folder)
        config = _config(folder)
        vocabulary = load_vocabulary(folder)
        if vocabulary.digest() != config.get("vocabulary"):
            raise ModelError(
                f"{folder}: its vocabulary is {vocabulary.digest()}, config.json was saved with {config.get('vocabulary')}: "
                "files of two models are mixed, copy the whole folder again"
            )
        model = cls(encoder_from_settings(config["encoder"]), vocabulary, stack=config["stack"], window_seconds=config["window_seconds"])
        try:
            model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            cause = " ".join(str(error).split())[:200]
            raise ModelError(f"{folder}/model.safetensors: does not fit config.json ({cause}): copy the folder again") from error
        return model.eval()


class HuggingFaceCtc(AcousticModel):
    """Any AutoModelForCTC (wav2vec2, HuBERT, WavLM, Parakeet-CTC, ...) with its own features and tokenizer; blank is its pad index."""

    def __init__(self, model: Any, extractor: Any, vocabulary: Vocabulary) -> None:
        self.model, self.extractor, self.vocabulary = model.eval(), extractor, vocabulary
        self.seconds_per_frame = _seconds_per_frame(model.config, extractor)

    @cached_property
    def together(self) -> bool:
        """Whether a padded batch gives what its utterances give alone, found by trying.

        It depends on the architecture (wav2vec2 with group norm normalizes over time, conformers' convolutions look into the padding) and
        decides whether utterances may be batched.
        """
        if _output_lengths(self.model) is None:
            return False
        random = np.random.default_rng(0)
        audios = {i: random.standard_normal(n).astype(np.float32) * 0.1 for i, n in enumerate((16_000, 6_160))}
        alone = {i: self._log_probs({i: audio}, masked=True)[i] for i, audio in audios.items()}
        batched = self._log_probs(audios, masked=True)
        return all(x.shape == batched[i].shape and bool((x - batched[i]).abs().max() < 1e-3) for i, x in alone.items())

    @classmethod
    def load(cls, name: str) -> HuggingFaceCtc:
        """A hub id or local folder. Raises ModelError."""
        from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer

        try:
            model = AutoModelForCTC.from_pretrained(name, trust_remote_code=False, dtype=torch.float32)
            extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{name}: is no CTC model that can be loaded ({' '.join(str(error).split())[:200]}): "
                "name a model folder, a hub id with a CTC head and a tokenizer, or an embedded model"
            ) from error
        return cls(model, extractor, _vocabulary_of(model.config, tokenizer))

    def place(self, device: str) -> None:
        self.model.to(device)

    @torch.no_grad()
    def log_probs_of(self, audios: Sequence[np.ndarray]) -> CtcOutput:
        audios = [np.pad(audio, (0, max(0, MIN_SAMPLES - len(audio)))) for audio in audios]
        found: dict[int, Tensor] = {}
        windows = [_Window(i, 0, len(audio), 0, len(audio)) for i, audio in enumerate(audios)]
        together = len(audios) > 1 and self.together
        for batch in _batches(windows, int(BATCH_SECONDS * SAMPLE_RATE) if together else 1):
            found |= self._log_probs({w.utterance: audios[w.utterance] for w in batch}, masked=together)
        return _padded([found[i] for i in range(len(audios))], self.vocabulary)

    def _log_probs(self, audios: dict[int, np.ndarray], *, masked: bool) -> dict[int, Tensor]:
        """[T, V] per utterance of one batch; masked: with an attention mask even where the extractor would leave it out."""
        options: dict[str, Any] = {"return_attention_mask": True} if masked else {}
        inputs = self.extractor(list(audios.values()), sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt", **options)
        inputs = inputs.to(self.model.device)
        logits = self.model(**inputs).logits[..., : self.vocabulary.size]
        mask, output_lengths = inputs.get("attention_mask"), _output_lengths(self.model)
        lengths = [logits.shape[1]] * len(audios)
        if mask is not None and output_lengths is not None:
            lengths = output_lengths(mask.sum(-1)).tolist()
        return {i: logits[row, : lengths[row]].float().log_softmax(-1) for row, i in enumerate(audios)}


def _output_lengths(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Input lengths to frames, where the architecture says; both names are transformers' own."""
    return getattr(model, "_get_feat_extract_output_lengths", None) or getattr(model, "_get_subsampling_output_length", None)


def load_acoustic_model(name: str | Path) -> AcousticModel:
    """The CTC model of an embedded name (`duolect-ctc`), a model folder of ours, or a Hugging Face folder or hub id. Raises ModelError."""
    place = resolve(str(name))
    if Path(place).is_dir():
        config = _config(Path(place))
        if config.get("type") == "ctc":
            return CtcModel.load(place)
    return HuggingFaceCtc.load(str(place))


@dataclass(frozen=True)
class _Window:
    """A piece [start, end) of an utterance, of whose frames those of [keep_from, keep_to) count."""

    utterance: int
    start: int
    end: int
    keep_from: int
    keep_to: int


def _batches(windows: Sequence[_Window], room: int) -> Iterator[list[_Window]]:
    """Windows of like length together, at most `room` padded units in a batch, one at least."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda w: w.start - w.end):
        if batch and (len(batch) + 1) * (batch[0].end - batch[0].start) > room:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _padded(log_probs: Sequence[Tensor], vocabulary: Vocabulary) -> CtcOutput:
    """[T, V] each to one batch; padded frames are certain blanks, which no search can stumble over."""
    lengths = torch.tensor([len(x) for x in log_probs])
    padded = torch.full((len(log_probs), int(lengths.max()) if len(lengths) else 0, vocabulary.size), -torch.inf)
    assert vocabulary.blank is not None
    padded[..., vocabulary.blank] = 0.0
    for row, x in enumerate(log_probs):
        padded[row, : len(x)] = x.cpu()
    return CtcOutput(padded, lengths)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing: {folder} is no model folder; name one with config.json and model.safetensors") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}): copy the model folder again") from error


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


def _seconds_per_frame(config: Any, extractor: Any) -> float:
    strides = getattr(config, "conv_stride", None)
    if strides is not None and extractor.model_input_names[0] == "input_values":
        return float(np.prod(strides)) / SAMPLE_RATE
    encoder = getattr(config, "encoder_config", config)
    return getattr(extractor, "hop_length", 160) * getattr(encoder, "subsampling_factor", 4) / SAMPLE_RATE
