from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from duolect.config import ConfigError, diff, digest, from_json, registered, to_json, with_overrides


class Encoder:
    """What encoder configs are."""


@registered
@dataclass(frozen=True)
class TinyConformer(Encoder):
    layers: int = 2
    dropout: float = 0.0


@registered
@dataclass(frozen=True)
class TinyWhisper(Encoder):
    folder: Path = Path("models/whisper")
    frozen: bool = True


@dataclass(frozen=True)
class Optimizer:
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Literal["cosine", "linear"] = "cosine"
    peak: float | None = None


@registered
@dataclass(frozen=True)
class TinyRecipe:
    encoder: Encoder
    steps: int
    optimizer: Optimizer = Optimizer()
    blocks: tuple[TinyConformer | TinyWhisper, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    note: str | int | None = None
    options: Any = None


RECIPE = TinyRecipe(TinyConformer(layers=3), steps=10, blocks=(TinyWhisper(), TinyConformer()), scales={"llm": 0.5}, options=("a", 1))


def test_there_and_back():
    data = json.loads(json.dumps(to_json(RECIPE)))
    assert data["type"] == "TinyRecipe"
    assert data["encoder"] == {"type": "TinyConformer", "layers": 3, "dropout": 0.0}
    assert data["optimizer"]["betas"] == [0.9, 0.98]
    assert from_json(data) == RECIPE
    assert to_json(from_json(data)) == to_json(RECIPE)


def test_defaults_may_be_left_out_and_a_field_type_makes_its_class_known():
    optimizer = {"type": "Optimizer", "peak": 1}
    recipe = from_json({"type": "TinyRecipe", "encoder": {"type": "TinyWhisper"}, "steps": 1, "optimizer": optimizer})
    assert recipe == TinyRecipe(TinyWhisper(), 1, Optimizer(peak=1.0))
    with pytest.raises(ConfigError, match="unknown type 'Optimizer'"):
        from_json({"type": "Optimizer"})


def test_infinity_survives():
    data = to_json(replace(RECIPE, optimizer=Optimizer(peak=math.inf)))
    assert data["optimizer"]["peak"] == "inf"
    assert from_json(data).optimizer.peak == math.inf


@registered
@dataclass(frozen=True)
class Positive:
    value: int

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ValueError(f"value must be positive, got {self.value}")


VALID = {"type": "TinyRecipe", "encoder": {"type": "TinyConformer"}, "steps": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "x"}, r"^steps: got 'x' \(str\), expected int$"),
        ({"steps": True}, r"^steps: got True \(bool\), expected int$"),
        ({"steps": 1.0}, r"^steps: got 1.0 \(float\), expected int$"),
        ({"step": 1}, r"^step: unknown field of TinyRecipe; did you mean 'steps'\?$"),
        ({"encoder": {"type": "TinyConformr"}}, r"^encoder.type: unknown type 'TinyConformr'; did you mean 'TinyConformer'\?$"),
        ({"encoder": {"type": "Positive", "value": 1}}, r"^encoder: got a Positive, expected a Encoder$"),
        ({"encoder": {"layers": 2}}, r"^encoder: the object has no 'type' tag; it has \['layers'\]$"),
        ({"encoder": {"type": "TinyConformer", "layer": 2}}, r"^encoder.layer: unknown field of TinyConformer; did you mean 'layers'\?$"),
        ({"encoder": 3}, r"^encoder: got 3 \(int\), expected Encoder$"),
        ({"optimizer": {"schedule": "cosin"}}, r"^optimizer.schedule: got 'cosin' .* 'cosine' \| 'linear'; did you mean 'cosine'\?$"),
        ({"optimizer": {"betas": [0.9]}}, r"^optimizer.betas: got 1 elements, expected 2: tuple\[float, float\]$"),
        ({"optimizer": {"betas": [0.9, "b"]}}, r"^optimizer.betas.1: got 'b' \(str\), expected float$"),
        ({"optimizer": {"peak": "high"}}, r"^optimizer.peak: got 'high' \(str\), expected float \| None$"),
        ({"optimizer": {"peak": float("nan")}}, r"^optimizer.peak: got nan"),
        ({"blocks": [{"type": "TinyWhisper", "frozen": 1}]}, r"^blocks.0.frozen: got 1 \(int\), expected bool$"),
        ({"blocks": {"type": "TinyWhisper"}}, r"^blocks: got .* expected tuple\["),
        ({"scales": {"llm": None}}, r"^scales.llm: got None \(NoneType\), expected float$"),
    ],
)
def test_errors_name_the_field(change, message):
    with pytest.raises(ConfigError, match=message):
        from_json({**VALID, **change})


def test_more_errors():
    with pytest.raises(ConfigError, match=r"^run/recipe.json.steps: missing; TinyRecipe has no default for steps$"):
        from_json({"type": "TinyRecipe", "encoder": {"type": "TinyWhisper"}}, where="run/recipe.json")
    with pytest.raises(ConfigError, match=r"steps: got 1\.5"):
        to_json(replace(RECIPE, steps=1.5))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a config"):
        to_json(3)


def test_configs_are_values():
    @dataclass
    class Loose:
        a: int = 1

    with pytest.raises(ConfigError, match="Loose is not a frozen dataclass"):
        to_json(Loose())

    with pytest.raises(ConfigError, match=r"^a: got \[1\] \(list\), no config value"):
        to_json(Listed([1]))
    with pytest.raises(ConfigError, match="'type' is reserved"):
        registered(Tagged)
    with pytest.raises(ConfigError, match="two config classes are called TinyWhisper"):
        registered(dataclass(frozen=True)(type("TinyWhisper", (), {"__module__": "elsewhere"})))


@dataclass(frozen=True)
class Listed:
    a: list[int]


@dataclass(frozen=True)
class Tagged:
    type: str = ""


def test_a_class_may_check_itself():
    with pytest.raises(ConfigError, match=r"^Positive: value must be positive, got 0$"):
        from_json({"type": "Positive", "value": 0})
    with pytest.raises(ConfigError, match="value must be positive, got -1"):
        with_overrides(Positive(1), {"value": "-1"})


@registered
@dataclass(frozen=True)
class Range:
    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError(f"low must be under high, got {self.low} and {self.high}")


@dataclass(frozen=True)
class HasRange:
    inner: Range = Range()


@pytest.mark.parametrize("overrides", [{"inner.low": "7", "inner.high": "9"}, {"inner.high": "-1", "inner.low": "-3"}])
def test_the_order_of_overrides_is_free(overrides):
    """Each of them alone would make no range."""
    assert with_overrides(HasRange(), overrides) == with_overrides(HasRange(), dict(reversed(overrides.items())))
    with pytest.raises(ConfigError, match=r"^inner: low must be under high, got 7 and 1$"):
        with_overrides(HasRange(), {"inner.low": "7"})


def test_digest_and_diff():
    assert digest(RECIPE) == digest(replace(RECIPE, scales={"llm": 0.5})) == digest(to_json(RECIPE))
    assert digest(Optimizer(peak=1)) == digest(Optimizer(peak=1.0))
    changed = replace(RECIPE, encoder=TinyWhisper(), steps=20, scales={"llm": 0.5, "prior": -0.2})
    assert digest(changed) != digest(RECIPE)
    assert diff(RECIPE, RECIPE) == []
    assert diff(RECIPE, changed) == [
        'encoder.type: "TinyConformer" -> "TinyWhisper"',
        "encoder.layers: 3 -> (absent)",
        "encoder.dropout: 0.0 -> (absent)",
        "steps: 10 -> 20",
        'encoder.folder: (absent) -> "models/whisper"',
        "encoder.frozen: (absent) -> true",
        "scales.prior: (absent) -> -0.2",
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("steps", "1_000", 1000),
        ("encoder.layers", "7", 7),
        ("encoder.dropout", "1e-1", 0.1),
        ("optimizer.schedule", "linear", "linear"),
        ("optimizer.peak", "none", None),
        ("optimizer.peak", "3", 3.0),
        ("optimizer.betas", "0.5, 0.6", (0.5, 0.6)),
        ("optimizer.betas", "[0.5, 0.6]", (0.5, 0.6)),
        ("blocks.0.frozen", "no", False),
        ("blocks.0.folder", "x/y", Path("x/y")),
        ("blocks.1", '{"type": "TinyWhisper"}', TinyWhisper()),
        ("blocks", "", ()),
        ("encoder", "TinyWhisper", TinyWhisper()),
        ("scales.llm", "0.25", 0.25),
        ("scales.prior", "-1", -1.0),
        ("note", "12", 12),
        ("note", "twelve", "twelve"),
        ("options", "[1, 2]", (1, 2)),
        ("steps", 5, 5),
    ],
)
def test_overrides(name, text, expected):
    changed: Any = with_overrides(RECIPE, {name: text})
    for step in name.split("."):
        if isinstance(changed, tuple):
            changed = changed[int(step)]
        else:
            changed = changed[step] if isinstance(changed, Mapping) else getattr(changed, step)
    assert changed == expected
    assert type(changed) is type(expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("step", "1", r"^step: unknown field of TinyRecipe; did you mean 'steps'\?"),
        ("layers", "1", r"^layers: unknown field of TinyRecipe; did you mean 'encoder.layers'\?"),
        ("foo", "1", r"^foo: unknown field of TinyRecipe; known: encoder, steps, [^;]*$"),
        ("encoder.foo", "1", r"^encoder.foo: unknown field of TinyConformer; known: layers, dropout$"),
        ("optimiser.peak", "1", r"^optimiser: unknown field of TinyRecipe; did you mean 'optimizer.peak'\?"),
        ("encoder.layrs", "1", r"^encoder.layrs: unknown field of TinyConformer; did you mean 'encoder.layers'\?"),
        ("steps", "many", r"^steps: got 'many' \(str\), expected int"),
        ("steps.x", "1", r"^steps.x: steps is 10 \(int\) and has no fields"),
        ("blocks.2.layers", "1", r"^blocks.2: got index '2', expected 0 .. 1"),
        ("blocks.0.frozen", "maybe", r"^blocks.0.frozen: got 'maybe' \(str\), expected bool"),
        ("optimizer.peak", "high", r"^optimizer.peak: got 'high' \(str\), expected float \| None"),
        ("encoder", "TinyWisper", r"^encoder: got 'TinyWisper' \(str\), expected Encoder; did you mean 'TinyWhisper'\?"),
        ("", "1", "needs a dotted field name"),
    ],
)
def test_wrong_overrides(name, text, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(RECIPE, {name: text})
