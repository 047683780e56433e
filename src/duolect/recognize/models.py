"""Models by name, each loaded once."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from torch import Tensor
from transformers import PretrainedConfig

from duolect.models import ModelError, Precision
from duolect.models.aed import AttentionModel, load_attention_model
from duolect.models.ctc import OURS, AcousticModel, CtcModel, ctc_source, kind_of, load_acoustic_model
from duolect.models.embedded import MODELS, SHIPPED_MODELS, resolve
from duolect.models.lm import HFCausalLM, language_vocabulary
from duolect.models.ngram import NGRAM_FILES, load_ngram
from duolect.models.priors import PRIORS_FILE, read_prior
from duolect.vocabulary import Vocabulary

T = TypeVar("T")
KINDS = {
    "acoustic": ("a CTC acoustic model", "duolect-ctc"),
    "language": ("a causal language model", "duolect-lm, smollm2-135m, duolect-unit-lm"),
    "attention": ("an attention encoder-decoder or speech LLM", "whisper-base, whisper-tiny.en"),
}
"""What models are asked for as: in words, and the embedded ones."""
HUB_SECONDS = 5.0
"""A hub that does not answer by then is taken for unreachable; its client would try again for minutes."""


@dataclass
class Models:
    """Acoustic and language models by name (embedded, hub id, folder), loaded when first asked for and kept."""

    device: str = "cpu"
    precision: Precision = "float32"
    say: Callable[[str], None] = field(default=lambda text: print(text, file=sys.stderr, flush=True))
    _loaded: dict[tuple[str, ...], Any] = field(default_factory=dict)
    _parts: dict[Path, CtcModel] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)

    def acoustic(self, name: str) -> AcousticModel:
        """The CTC model of that name."""

        def load() -> AcousticModel:
            place = place_of(name, "acoustic")
            if kind_of(place) in OURS:
                return self._ctc(place)
            model = load_acoustic_model(place)
            model.place(self.device)
            return model

        return self._once(("acoustic", name), load)

    def _ctc(self, place: str) -> CtcModel:
        """The CTC part of a model folder of ours, one for all models that have the same."""
        source = ctc_source(place).resolve()
        if source not in self._parts:
            model = CtcModel.load(place)
            model.place(self.device)
            self._parts[source] = model
        return self._parts[source]

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

        def load() -> AttentionModel:
            place = place_of(name, "attention")
            ctc = self._ctc(place) if kind_of(place) in OURS else None
            return load_attention_model(place, dtype=self.precision, device=self.device, ctc=ctc)

        return self._once(("attention", name), load)

    def loaded(self, name: str) -> Any:
        """The language or attention model of that name if it is here already, else None."""
        return next((model for key, model in self._loaded.items() if key[0] in ("language", "attention") and key[1] == name), None)

    def vocabulary(self, name: str) -> Vocabulary:
        """The vocabulary of a language model or decoder, for which none is loaded that is not already."""
        if (model := self.loaded(name)) is not None:
            return model.vocabulary
        return self._once(("vocabulary", name), lambda: language_vocabulary(place_of(name, "language")))

    def prior(self, acoustic: str, kind: str, *, of: str = "") -> Tensor:
        """[V] log-prior of the labels of an acoustic model, or (kind `llm`) of the language model `of`, as `duolect prior` stored it in the
        acoustic model's folder; `uniform` needs no file."""
        vocabulary = self.vocabulary(of) if kind == "llm" else self.acoustic(acoustic).vocabulary
        if kind == "uniform":
            return torch.full((vocabulary.size,), -math.log(vocabulary.size))
        folder = Path(resolve(acoustic.partition("#")[0]))  # of the acoustic model `folder#4`
        return self._once(("prior", acoustic, kind, of), lambda: read_prior(folder, kind, vocabulary))

    def scales_folder(self, acoustic: str) -> Path | None:
        """Where an acoustic model keeps the scales that were tuned for it; None for a model that is not in a folder."""
        folder = Path(resolve(acoustic)) / "scales"
        return folder if folder.is_dir() else None

    def say_once(self, what: str, text: str) -> None:
        """Says a text about `what`, if nothing was said about it yet."""
        if what not in self._said:
            self._said.add(what)
            self.say(text)

    def _once(self, key: tuple[str, ...], load: Callable[[], T]) -> T:
        if key not in self._loaded:
            self.say(
                f"reading {key[2]} prior of {key[1]}" if key[0] == "prior" else f"loading {key[0]}{' model' * (key[0] in KINDS)} {key[1]}"
            )
            try:
                self._loaded[key] = load()
            except (ValueError, RuntimeError, OSError):
                raise
            except Exception as error:  # of the hub's HTTP client, whichever it is, or of a model that transformers does not know
                cause = " ".join(str(error).split())[:200]
                raise ModelError(f"{key[1]}: cannot be loaded ({type(error).__name__}: {cause}): try again, or name a folder") from error
        return self._loaded[key]


def state_of(name: str) -> str:
    """A model's name or, for a file or folder, its path and when its weights and config were last written: other weights, another state."""
    place = Path(name.partition("#")[0])
    files = [x for x in (place, *place.glob("*")) if x.is_file() and x.name != PRIORS_FILE]
    if not files or name in SHIPPED_MODELS or name in MODELS:
        return name
    return f"{place.resolve()} {max(x.stat().st_mtime_ns for x in files)}"


def free_memory(device: str) -> int:
    """Bytes of memory that can still be had there: the GPU's, or the machine's without swapping; sys.maxsize where it cannot be known."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else sys.maxsize


def place_of(name: str, kind: str) -> str:
    """The folder or hub id of a model of a kind (see KINDS), pulled if need be. Raises ModelError for what is none or out of reach."""
    name, mark, head = name.partition("#")  # of the acoustic model `folder#4`
    named = [*SHIPPED_MODELS, *MODELS]
    if name.endswith(NGRAM_FILES):
        return name  # whoever cannot use one says so
    if name not in named and not Path(name).exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            near = difflib.get_close_matches(name, named, n=1)
            guess = f"did you mean {near[0]}?" if near else "name one of them"
            raise ModelError(f"{name}: is no embedded model ({', '.join(named)}), no folder, no hub id (owner/name): {guess}")
        _require_hub(name)
    if (Path(name) / "recipe.json").is_file() and (Path(name) / "model").is_dir():
        raise ModelError(f"{name}: is the folder of a training run: name {Path(name) / 'model'}")
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
    return "language" if config.get("type") == "language" or "ForCausalLM" in heads or "LMHead" in heads else None


def _require_hub(name: str) -> None:
    """Raises ModelError unless the hub, or its cache on this machine, has a model."""
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except Exception as error:  # of the hub, or of whichever HTTP client it uses
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            cause = " ".join(str(error).split())[:120]
            raise ModelError(f"{name}: no folder here, and the hub does not give it ({cause}): check name and network") from error
        huggingface_hub.constants.HF_HUB_OFFLINE = True  # what is cached then loads at once
