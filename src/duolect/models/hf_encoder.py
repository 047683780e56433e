"""Speech encoders of transformers (wav2vec2, HuBERT, WavLM, Parakeet, ...) under the contract of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCTC

from duolect.audio.features import HOP
from duolect.audio.io import SAMPLE_RATE
from duolect.models import loading
from duolect.models.encoders import Encoded, Encoder, frame_mask, require_layers

LONGEST = 40.0  # seconds: more than the utterances of the usual corpora last


class HuggingFaceEncoder(Encoder):
    """The encoder of a model of transformers.

    A model that hears samples gets them as its features, 10 ms in each, so that audio is heard to the next full 10 ms. Where the padding of
    a batch would change what an utterance gets (found by trying), utterances run one by one.
    """

    def __init__(self, model: Any, extractor: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.extractor = model, dict(extractor)
        config = model.config
        self.waves = "input_values" in _extractor(self.extractor).model_input_names
        self.dim, self.depth, self.max_seconds = int(config.hidden_size), int(config.num_hidden_layers), LONGEST
        self.mels = HOP if self.waves else int(self.extractor["feature_size"])
        self.seconds_per_frame = seconds_per_frame(config, _extractor(self.extractor))

    @classmethod
    def load(cls, name: str | Path) -> HuggingFaceEncoder:
        """The encoder of a hub id or folder of transformers; of a CTC model, without its head. Raises ModelError."""
        with loading(name, "a speech encoder"):
            config = AutoConfig.from_pretrained(str(name))
            extractor = AutoFeatureExtractor.from_pretrained(str(name)).to_dict()
            kind = AutoModelForCTC if any("ForCTC" in x for x in config.architectures or ()) else AutoModel
            model = kind.from_pretrained(str(name), dtype=torch.float32)
        return cls(_encoder_of(model), extractor)

    def features(self, audio: Tensor) -> Tensor:
        if not self.waves:
            found = _extractor(self.extractor)(audio.cpu().numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"][0]
            return found[: -(-len(audio) // HOP)].to(audio.device)
        if self.extractor.get("do_normalize"):
            audio = (audio - audio.mean()) / (audio.var(unbiased=False) + 1e-7).sqrt()
        return F.pad(audio, (0, -len(audio) % HOP)).view(-1, HOP)

    def forward(self, features: Tensor, lengths: Tensor, *, taps: Sequence[int] = (), hidden: Tensor | None = None) -> Encoded:
        require_layers(taps, self.depth)
        if hidden is not None:
            features = features.masked_fill(hidden, 0.0)
        if len(features) > 1 and not self.together:
            parts = [self._run(features[b : b + 1, : int(n)], lengths[b : b + 1], taps) for b, n in enumerate(lengths)]
            frames = nn.utils.rnn.pad_sequence([x.frames[0] for x in parts], batch_first=True)
            tapped = {n: nn.utils.rnn.pad_sequence([x.taps[n][0] for x in parts], batch_first=True) for n in taps}
            return Encoded(frames, torch.cat([x.lengths for x in parts]), tapped)
        return self._run(features, lengths, taps)

    def _run(self, features: Tensor, lengths: Tensor, taps: Sequence[int]) -> Encoded:
        mask = frame_mask(lengths, features.shape[1])
        heard = features.masked_fill(~mask[..., None], 0.0)
        if self.waves:
            heard, mask = heard.flatten(1), mask.repeat_interleave(HOP, 1)
        out = self.model(heard, attention_mask=mask.long(), output_hidden_states=bool(taps))
        frames = out.last_hidden_state
        count = lengths * HOP if self.waves else lengths
        if len(lengths) > 1 and (sizes_of := output_lengths(self.model)) is not None:
            sizes = sizes_of(count).long().to(frames.device)
        else:
            sizes = torch.full_like(lengths, frames.shape[1])
        real = frame_mask(sizes, frames.shape[1])[..., None]
        tapped = {n: (frames if n == self.depth else out.hidden_states[n]) * real for n in taps}
        return Encoded(frames * real, sizes, tapped)

    @cached_property
    def together(self) -> bool:
        """Whether a padded batch gives what its utterances give alone."""
        device, was = next(self.parameters()).device, self.training

        def run(sounds: Sequence[np.ndarray]) -> list[Tensor]:
            features = [self.features(torch.from_numpy(x).to(device)) for x in sounds]
            lengths = torch.tensor([len(x) for x in features], device=device)
            out = self._run(nn.utils.rnn.pad_sequence(features, batch_first=True), lengths, ())
            return [x[:n] for x, n in zip(out.frames, out.lengths.tolist(), strict=True)]

        self.eval()
        found = output_lengths(self.model) is not None and unheard_padding(run)
        self.train(was)
        return found

    def settings(self) -> dict[str, object]:
        return {"type": "huggingface", "config": self.model.config.to_dict(), "extractor": self.extractor}

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> HuggingFaceEncoder:
        """The encoder, weights not set, that `settings()` described."""
        config = dict(settings["config"])
        model = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        return cls(_encoder_of(model), settings["extractor"])


def _encoder_of(model: Any) -> Any:
    """What of a model gives frames; a CTC model's encoder without its head."""
    inner = model.base_model
    return model.encoder if inner is model and hasattr(model, "ctc_head") else inner


def _extractor(settings: dict[str, Any]) -> Any:
    import transformers

    fields = {name: x for name, x in settings.items() if name not in ("feature_extractor_type", "processor_class")}
    return getattr(transformers, settings["feature_extractor_type"])(**fields)


def output_lengths(model: Any) -> Callable[[Tensor], Tensor] | None:
    """Input lengths to frames, where the architecture says; both names are transformers' own."""
    return getattr(model, "_get_feat_extract_output_lengths", None) or getattr(model, "_get_subsampling_output_length", None)


@torch.no_grad()
def unheard_padding(run: Callable[[Sequence[np.ndarray]], Sequence[Tensor]]) -> bool:
    """Whether `run` gives utterances [N] of a padded batch what it gives each alone, found by trying.

    It depends on the architecture: wav2vec2 with group norm normalizes over time, conformers' convolutions look into the padding.
    """
    random = np.random.default_rng(0)
    sounds = [random.normal(0, 0.1, n).astype(np.float32) for n in (16_000, 6_160)]
    pairs = zip((run([x])[0] for x in sounds), run(sounds), strict=True)
    return all(x.shape == y.shape and bool((x - y).abs().max() < 1e-3) for x, y in pairs)


def seconds_per_frame(config: Any, extractor: Any) -> float:
    """Of a model of transformers."""
    strides = getattr(config, "conv_stride", None)
    if strides is not None and extractor.model_input_names[0] == "input_values":
        return float(np.prod(strides)) / SAMPLE_RATE
    encoder = getattr(config, "encoder_config", config)
    return getattr(extractor, "hop_length", 160) * getattr(encoder, "subsampling_factor", 4) / SAMPLE_RATE
