"""Training that begins with another model's weights: whatever fits is taken, from any checkpoint of ours."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from duolect.models import ModelError
from duolect.models.ctc import CtcModel, read_config
from duolect.models.encoders import encoder_from_settings
from duolect.models.speech_llm import SpeechLlm, Trainable

BY_LABEL = re.compile(r"decoder\.(embedding|aux\.\d+\.1)\.")
"""Weights whose rows are labels of the main vocabulary, the CTC heads aside."""

PART = re.compile(r"(\w+\.layers\.\d+|aux\.\d+|decoder\.aux\.\d+|\w+(\.\w+)?)\.\w+")
"""What a report sums weights up by."""


@dataclass(frozen=True)
class WarmStart:
    """What a warm start did, by weight: taken, in the source but not taken and why, in the model and left as it was."""

    loaded: tuple[str, ...]
    skipped: Mapping[str, str]
    new: tuple[str, ...]

    def __str__(self) -> str:
        """Three lines for people."""
        reasons = [f"{_parts(n for n, r in self.skipped.items() if r == why)}: {why}" for why in dict.fromkeys(self.skipped.values())]
        return (
            f"loaded ({len(self.loaded)}): {_parts(self.loaded)}\n"
            f"skipped ({len(self.skipped)}): {'; '.join(reasons) or 'nothing'}\n"
            f"new ({len(self.new)}): {_parts(self.new)}"
        )


@torch.no_grad()
def warm_start(model: Trainable, source: str | Path | Mapping[str, Tensor]) -> WarmStart:
    """Sets the model's weights to those of the same name and shape in a model folder, a safetensors file or a state, and reports.

    A CTC head is known by the layer it hears and by its vocabulary, so the main head of 16 layers becomes the auxiliary one at layer 16 of
    18. In a folder the vocabularies' digests say whether rows mean the same labels; a bare state is trusted where shapes agree. Layers that
    the source lacks stay as they are. ModelError where nothing fits.
    """
    if isinstance(model, SpeechLlm) and model.dims.encoder == "lora":
        raise ModelError("a warm start of an encoder with low-rank paths: name the encoder's model itself, --set encoder.model=<folder>")
    config, state = _read(source)
    own, ctc = model.weights(), model if isinstance(model, CtcModel) else model.ctc
    mine, theirs = _described(model.settings(), own), _described(config, state)
    renamed = _heads(theirs, mine)
    loaded, skipped = [], {}
    for name, x in state.items():
        prefix = next((p for p in theirs.heads if name.startswith(p)), None)
        target = name if prefix is None else renamed.get(prefix, "no.") + name.removeprefix(prefix)
        if name.startswith("encoder.") and None not in (theirs.encoder, mine.encoder) and theirs.encoder != mine.encoder:
            skipped[name] = f"of a {theirs.encoder} encoder, the model's is a {mine.encoder}"
        elif BY_LABEL.match(name) and theirs.vocabulary not in (None, ctc.vocabulary.digest()):
            skipped[name] = f"rows are labels of vocabulary {theirs.vocabulary}, the model's is {ctc.vocabulary.digest()}"
        elif prefix is not None and prefix not in renamed:
            layer, vocabulary = theirs.heads[prefix]
            skipped[name] = f"the model has no head at layer {layer} with vocabulary {vocabulary or 'unknown'}"
        elif target not in own:
            skipped[name] = "the model has no such weight"
        elif own[target].shape != x.shape:
            skipped[name] = f"shape {list(x.shape)}, expected {list(own[target].shape)}"
        else:
            own[target].copy_(x)
            loaded.append(target)
    if not loaded:
        why = ", ".join(f"{reason} ({n})" for reason, n in Counter(skipped.values()).most_common(2))
        raise ModelError(f"{_name(source)}: nothing of it fits the model: {why or 'it is empty'}: name a checkpoint of a similar model")
    return WarmStart(tuple(loaded), skipped, tuple(name for name in own if name not in set(loaded)))


@dataclass(frozen=True)
class _Described:
    """What is known of a checkpoint; heads: name prefix to (layer, vocabulary digest). None: not known."""

    encoder: str | None
    vocabulary: str | None
    heads: Mapping[str, tuple[int, str | None]]


def _read(source: str | Path | Mapping[str, Tensor]) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    config: Mapping[str, Any] = {}
    if isinstance(source, Mapping):
        state = source
    else:
        path = Path(source)
        if path.is_dir():
            config, path = read_config(path), path / "model.safetensors"
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}): name a model folder of ours") from error
    return config, {name.removeprefix("ctc."): x for name, x in state.items()}


def _described(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> _Described:
    encoder, aux = config.get("encoder", {}), config.get("aux", {})
    if encoder:
        with torch.device("meta"):
            depth = encoder_from_settings(encoder).depth
    else:
        depth = 1 + max((int(m[1]) for name in state if (m := re.match(r"encoder\.layers\.(\d+)\.", name))), default=-1)
    layers = {f"aux.{m[1]}.": int(m[1]) for name in state if (m := re.match(r"aux\.(\d+)\.", name))}
    heads = {"head.": (depth, config.get("vocabulary"))} | {p: (n, aux.get(str(n))) for p, n in layers.items()}
    return _Described(encoder.get("type"), config.get("vocabulary"), heads)


def _heads(theirs: _Described, mine: _Described) -> dict[str, str]:
    """Which head becomes which: same layer, same vocabulary as far as known; the one of the same name first."""
    renamed: dict[str, str] = {}
    for prefix, (layer, vocabulary) in theirs.heads.items():
        fits = [p for p, (n, v) in mine.heads.items() if n == layer and (vocabulary in (v, None)) and p not in renamed.values()]
        if fits:
            renamed[prefix] = prefix if prefix in fits else fits[0]
    return renamed


def _parts(names: Iterable[str]) -> str:
    counts = Counter(m[1] if (m := PART.match(name)) else name for name in names)
    return ", ".join(counts) or "nothing"


def _name(source: str | Path | Mapping[str, Tensor]) -> str:
    return "the state" if isinstance(source, Mapping) else str(source)
