"""Training that begins with another model's weights: whatever fits is taken, from any model folder of ours."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from duolect.models import ModelError
from duolect.models.ctc import read_config
from duolect.models.encoders import encoder_from_settings
from duolect.models.speech_llm import SpeechLlm, Trainable

BY_LABEL = re.compile(r"decoder\.(embedding|aux\.\d+\.1)\.")
"""Weights whose rows are labels of the main vocabulary, the CTC heads aside."""

LEAST = 0.05
"""Share of a source's weights, those of a language model aside, below which a warm start is a mistake."""

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
def warm_start(model: Trainable, folder: str | Path) -> WarmStart:
    """Sets the model's weights to those of the same name, shape and meaning in a model folder of ours, and reports.

    A CTC head is known by the layer it hears and by its vocabulary, so the main head of 16 layers becomes the auxiliary one at layer 16 of
    18. Layers that the source lacks stay as they are. ModelError where (nearly) nothing fits.
    """
    if isinstance(model, SpeechLlm) and model.dims.encoder == "lora":
        raise ModelError("a warm start of an encoder with low-rank paths: name the encoder's model itself, --set encoder.model=<folder>")
    theirs, own = read_config(Path(folder)), model.weights()
    mine: dict[str, Any] = {**model.settings()}
    try:
        state = load_file(Path(folder) / "model.safetensors")
        heads, targets = _heads(theirs), _heads(mine)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be read ({' '.join(str(error).split())[:200]}): name a model folder of ours") from error
    kind, other = (x["encoder"]["type"] for x in (theirs, mine))
    renamed: dict[str, str] = {}
    for prefix, head in heads.items():
        fits = [p for p in (prefix, *targets) if targets.get(p) == head and p not in renamed.values()]  # the one of the same name first
        if fits:
            renamed[prefix] = fits[0]
    loaded, skipped = [], {}
    for name, x in state.items():
        prefix = next((p for p in heads if name.startswith(p)), None)
        target = name if prefix is None else renamed.get(prefix, "no.") + name.removeprefix(prefix)
        if name.startswith("encoder.") and kind != other:
            skipped[name] = f"of a {kind} encoder, the model's is a {other}"
        elif BY_LABEL.match(name) and theirs["vocabulary"] != mine["vocabulary"]:
            skipped[name] = f"rows are labels of vocabulary {theirs['vocabulary']}, the model's is {mine['vocabulary']}"
        elif prefix is not None and prefix not in renamed:
            skipped[name] = "the model has no head at layer {} with vocabulary {}".format(*heads[prefix])
        elif target not in own:
            skipped[name] = "the model has no such weight"
        elif own[target].shape != x.shape:
            skipped[name] = f"shape {list(x.shape)}, expected {list(own[target].shape)}"
        else:
            own[target].copy_(x)
            loaded.append(target)
    if sum(own[name].numel() for name in loaded) <= LEAST * sum(x.numel() for name, x in state.items() if not name.startswith("llm.")):
        why = ", ".join(f"{reason} ({n})" for reason, n in Counter(skipped.values()).most_common(2))
        raise ModelError(f"{folder}: nearly nothing of it fits the model: {why or 'it is empty'}: name a checkpoint of a similar model")
    return WarmStart(tuple(loaded), skipped, tuple(name for name in own if name not in set(loaded)))


def _heads(settings: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The layer that each CTC head of a model with these settings hears, and its vocabulary's digest, by the prefix of its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that weights of a source are not copied
        depth = encoder_from_settings(settings["encoder"]).depth
    return {"head.": (depth, settings["vocabulary"])} | {f"aux.{n}.": (int(n), v) for n, v in settings.get("aux", {}).items()}


def _parts(names: Iterable[str]) -> str:
    counts = Counter(m[1] if (m := PART.match(name)) else name for name in names)
    return ", ".join(counts) or "nothing"
