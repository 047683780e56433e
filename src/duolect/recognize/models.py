"""Models by name, each loaded once."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import huggingface_hub
import torch
from torch import Tensor
from transformers import PretrainedConfig

from duolect.models import ModelError
from duolect.models.aed import AttentionModel, load_attention_model
from duolect.models.ctc import AcousticModel, CtcOutput, load_acoustic_model
from duolect.models.embedded import MODELS, SHIPPED_MODELS, resolve
from duolect.models.lm import HFCausalLM
from duolect.models.ngram import NGRAM_FILES, load_ngram
from duolect.vocabulary import Vocabulary

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "float16"]
PRIORS_FILE = "priors.json"
KINDS = {
    "acoustic": ("a CTC acoustic model", "duolect-ctc"),
    "language": ("a causal language model", "smollm2-135m, duolect-unit-lm"),
    "attention": ("an attention encoder-decoder or speech LLM", "whisper-base, whisper-tiny.en"),
}
"""What models are asked for as: in words, and the embedded ones."""
HUB_SECONDS = 5.0
"""A hub that does not answer by then is taken for unreachable; its client would try again for minutes."""


class PriorError(ValueError):
    """A prior is missing, or is not of this vocabulary."""


@dataclass
class Models:
    """Acoustic and language models by name (embedded, hub id, folder), loaded when first asked for and kept."""

    device: str = "cpu"
    precision: Precision = "float32"
    say: Callable[[str], None] = field(default=lambda text: print(text, file=sys.stderr, flush=True))
    _loaded: dict[tuple[str, ...], Any] = field(default_factory=dict)

    def acoustic(self, name: str) -> AcousticModel:
        """The CTC model of that name."""

        def load() -> AcousticModel:
            model = load_acoustic_model(place_of(name, "acoustic"))
            model.place(self.device)
            return model

        return self._once(("acoustic", name), load)

    def language(self, name: str, *, prompt: str = "", over: Vocabulary | None = None, oov: float = 0.0) -> Any:
        """The language model of that name, with a prompt before every text: an HFCausalLM, or an NgramScorer for a file of KenLM, which may
        be one over the labels of `over`."""
        if name.endswith(NGRAM_FILES):
            key = ("language", name, prompt, over.digest() if over else "", str(oov))
            return self._once(key, lambda: load_ngram(name, over=over, prompt=prompt, oov=oov))
        options: dict[str, Any] = {"dtype": self.precision, "device": self.device, "prompt": prompt}
        return self._once(("language", name, prompt), lambda: HFCausalLM.load(place_of(name, "language"), **options))

    def attention(self, name: str) -> AttentionModel:
        """The attention encoder-decoder or speech LLM of that name."""
        options: dict[str, Any] = {"dtype": self.precision, "device": self.device}
        return self._once(("attention", name), lambda: load_attention_model(place_of(name, "attention"), **options))

    def prior(self, acoustic: str, kind: str) -> Tensor:
        """[V] log-prior of the labels of an acoustic model, as `duolect prior` stored it in the model's folder; `uniform` needs no file."""
        if kind == "uniform":
            size = self.acoustic(acoustic).vocabulary.size
            return torch.full((size,), -math.log(size))
        return self._once(("prior", acoustic, kind), lambda: read_prior(Path(resolve(acoustic)), kind, self.acoustic(acoustic).vocabulary))

    def scales_folder(self, acoustic: str) -> Path | None:
        """Where an acoustic model keeps the scales that were tuned for it; None for a model that is not in a folder."""
        folder = Path(resolve(acoustic)) / "scales"
        return folder if folder.is_dir() else None

    def _once(self, key: tuple[str, ...], load: Callable[[], T]) -> T:
        if key not in self._loaded:
            self.say(f"loading {key[0]} model {key[1]}" if key[0] != "prior" else f"reading {key[2]} prior of {key[1]}")
            self._loaded[key] = load()
        return self._loaded[key]


def place_of(name: str, kind: str) -> str:
    """The folder or hub id of a model of a kind (see KINDS), pulled if need be. Raises ModelError for what is none or out of reach."""
    name, mark, head = name.partition("#")  # of the acoustic model `folder#4`
    named = [*SHIPPED_MODELS, *MODELS]
    if name not in named and not Path(name).exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            near = difflib.get_close_matches(name, named, n=1)
            guess = f"did you mean {near[0]}?" if near else "name one of them"
            raise ModelError(f"{name}: is no embedded model ({', '.join(named)}), no folder, no hub id (owner/name): {guess}")
        _require_hub(name)
    what, embedded = KINDS[kind]
    found = next((k for k, (_, names) in KINDS.items() if name in names.split(", ")), None) or _kind(resolve(name))
    if found not in (kind, None):
        raise ModelError(f"{name}: is {KINDS[found][0]}, expected {what}: name {embedded}, or a folder or hub id of one")
    return resolve(name) + mark + head


def _kind(place: str) -> str | None:
    """What a folder's or hub id's config.json says the model is; None where it says nothing of use, and loading will tell."""
    try:
        config, _ = PretrainedConfig.get_config_dict(place)
    except (OSError, ValueError):
        return None
    heads = " ".join(config.get("architectures") or ())
    if config.get("type") == "ctc" or "ForCTC" in heads:
        return "acoustic"
    if config.get("is_encoder_decoder") or config.get("model_type") == "whisper":
        return "attention"
    return "language" if "ForCausalLM" in heads or "LMHead" in heads else None


def _require_hub(name: str) -> None:
    """Raises ModelError unless the hub, or its cache on this machine, has a model."""
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except Exception as error:  # of the hub, or of whichever HTTP client it uses
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            cause = " ".join(str(error).split())[:120]
            raise ModelError(f"{name}: no folder here, and the hub does not give it ({cause}): check name and network") from error
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # what is cached then loads at once


def read_prior(folder: Path, kind: str, vocabulary: Vocabulary) -> Tensor:
    """[V] the prior called `kind` in a model folder's priors.json. Raises PriorError."""
    path = folder / PRIORS_FILE
    if not path.is_file():
        raise PriorError(f"{path} is missing: estimate priors with `duolect prior --am {folder} --data <manifest>`, or decode without one")
    stored = json.loads(path.read_text())
    if stored.get("vocabulary") != vocabulary.digest():
        raise PriorError(f"{path} is of vocabulary {stored.get('vocabulary')}, the model has {vocabulary.digest()}: estimate it anew")
    if kind not in stored["priors"]:
        raise PriorError(f"{path} has no prior {kind!r}; it has {', '.join(stored['priors'])}")
    return torch.tensor(stored["priors"][kind])


def softmax_prior(outputs: Sequence[CtcOutput], vocabulary: Vocabulary, *, smoothing: float = 1e-4) -> Tensor:
    """[V] log of the mean CTC softmax over all frames, blank taken out and the rest renormalized (paper.md 1.11).

    A `smoothing` share is uniform, so that labels the model never emits (unk, bos) do not become an unbounded bonus.
    """
    total = torch.zeros(vocabulary.size, dtype=torch.float64)
    for output in outputs:
        real = torch.arange(output.log_probs.shape[1])[None] < output.lengths[:, None]
        total += output.log_probs.double().exp()[real].sum(0)
    return _normalized(total, vocabulary, smoothing)


def count_prior(texts: Sequence[str], vocabulary: Vocabulary, *, smoothing: float = 0.1) -> Tensor:
    """[V] log of the label counts of transcripts, a `smoothing` share uniform (paper.md 1.11)."""
    total = torch.zeros(vocabulary.size, dtype=torch.float64)
    for text in texts:
        labels = torch.tensor(vocabulary.encode(text), dtype=torch.long)
        total.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
    return _normalized(total, vocabulary, smoothing)


def _normalized(total: Tensor, vocabulary: Vocabulary, smoothing: float) -> Tensor:
    spoken = torch.ones(vocabulary.size, dtype=torch.bool)
    spoken[[x for x in (vocabulary.blank, vocabulary.eos) if x is not None]] = False
    share = torch.where(spoken, total, 0.0)
    share = share / share.sum().clamp(min=1e-30)
    uniform = spoken.double() / spoken.sum()
    return torch.where(spoken, (1 - smoothing) * share + smoothing * uniform, 1.0).log().float()
