"""Configs: frozen dataclasses as values, and their way to JSON and back with type tags: {"type": "Conformer", "layers": 16, ...}."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

C = TypeVar("C")

_REGISTERED: dict[str, type] = {}
_TAG = "type"


class ConfigError(ValueError):
    """A config does not fit its type; the message names the dotted field, what it got, what was expected and the nearest known name."""


def registered(cls: type[C]) -> type[C]:
    """The class itself, from now on known by its name to `from_json` (decorator). ConfigError if another class has the name."""
    other = _REGISTERED.get(cls.__name__)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"two config classes are called {cls.__name__}: {other.__module__} and {cls.__module__}; rename one")
    _require_value_class(cls, cls.__name__)  # its types are looked at later: they may name classes that are not there yet
    _REGISTERED[cls.__name__] = cls
    return cls


def to_json(config: Any) -> dict[str, Any]:
    """The config as JSON values, type-tagged; equal configs give equal JSON (an int in a float field becomes a float).

    ConfigError where a value does not have its field's type, so a wrong config is found before the run and not in it.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"expected a config (an instance of a frozen dataclass), got {_show(config)}")
    return _encode(config, "")


def from_json(data: Mapping[str, Any], *, where: str = "") -> Any:
    """The config that `to_json` turned into `data`; a field that is left out takes its default.

    A tag may name registered classes and those that field types name. where: put before the dotted names in messages (a file name).
    """
    value = _convert(data, Any, where)
    if not dataclasses.is_dataclass(value):
        raise ConfigError(f"{where or 'config'}: expected an object with a {_TAG!r} tag, got {_show(data)}")
    return value


def diff(a: Any, b: Any) -> list[str]:
    """What changes from a to b, as `field: old -> new` lines in field order; a and b are configs or their JSON."""
    old, new = (
        {name: json.dumps(v, ensure_ascii=False) for name, v in _flat(x if isinstance(x, Mapping) else to_json(x), "")} for x in (a, b)
    )
    changes = {name: (old.get(name, "(absent)"), new.get(name, "(absent)")) for name in {**old, **new}}
    return [f"{name}: {was} -> {now}" for name, (was, now) in changes.items() if was != now]


def digest(config: Any) -> str:
    """Ten hexadecimal digits of a config (or of its JSON), equal for equal configs."""
    data = config if isinstance(config, Mapping) else to_json(config)
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:10]


def with_overrides(config: C, overrides: Mapping[str, Any]) -> C:
    """The config with the named fields replaced: {"train.steps": "3", "model.blocks.0.dim": 64, "scales.llm": "0.3"}.

    Text is read by the field's type: 3, 0.5, true, none, "a,b" or [..] for tuples, {"type": ...} or a class name for a nested config.
    What fields must be together is asked when all are set, so that their order is free.
    """
    for dotted, value in overrides.items():
        if not dotted:
            raise ConfigError("an override needs a dotted field name, got ''")
        config = _replaced(config, type(config), dotted.split("."), value, "", root=config)
    return _made_anew(config, "")


# ---- types -------------------------------------------------------------------------------------------------------------------------


def _fields(cls: type, where: str) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    """Name -> (type, field) of a config class's constructor; ConfigError unless it is a frozen dataclass."""
    _require_value_class(cls, where)
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f) for f in dataclasses.fields(cls) if f.init}


def _require_value_class(cls: type, where: str) -> None:
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise ConfigError(f"{where or cls.__name__}: {cls.__name__} is not a frozen dataclass; configs are values: @dataclass(frozen=True)")
    if any(f.name == _TAG for f in dataclasses.fields(cls)):
        raise ConfigError(f"{cls.__name__}.{_TAG}: the field name {_TAG!r} is reserved for the tag; rename it")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _named(hint: Any) -> str:
    """A type as a reader writes it."""
    if _is_union(hint):
        return " | ".join(_named(x) for x in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(repr(x) for x in get_args(hint))
    if hint is type(None):
        return "None"
    if get_origin(hint) is not None:
        return str(hint).replace("typing.", "").replace("collections.abc.", "")
    return getattr(hint, "__name__", str(hint))


def _show(value: Any) -> str:
    text = repr(value) if not dataclasses.is_dataclass(value) else type(value).__name__
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _wrong(where: str, value: Any, hint: Any, hint_names: Sequence[str] = ()) -> ConfigError:
    near = difflib.get_close_matches(str(value), hint_names, n=1, cutoff=0.5) if isinstance(value, str) else []
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{where or 'config'}: got {_show(value)}, expected {_named(hint)}{guess}")


def _join(where: str, name: str | int) -> str:
    return f"{where}.{name}" if where else str(name)


# ---- values ------------------------------------------------------------------------------------------------------------------------


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The Python value of `value` (JSON or Python already) under the type `hint`; ConfigError if it does not fit."""
    origin = get_origin(hint)
    if hint is Any:
        if isinstance(value, Mapping) and _TAG in value:
            return _build(value, hint, where)
        if isinstance(value, Mapping):
            return {k: _convert(v, Any, _join(where, k)) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return tuple(_convert(v, Any, _join(where, i)) for i, v in enumerate(value))
        return value
    if _is_union(hint):
        return _convert_union(value, hint, where)
    if origin is Literal:
        if not any(type(value) is type(x) and value == x for x in get_args(hint)):
            raise _wrong(where, value, hint, [str(x) for x in get_args(hint)])
        return value
    if origin is tuple:
        return _convert_tuple(value, hint, where)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise _wrong(where, value, hint)
        return {k: _convert(v, get_args(hint)[1], _join(where, k)) for k, v in value.items()}
    if hint in (int, float, str, bool, type(None), Path):
        return _convert_scalar(value, hint, where)
    hint = origin or hint
    if isinstance(value, Mapping):
        return _build(value, hint, where)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _wrong(where, value, hint)


def _convert_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is float:
        if value in ("inf", "-inf"):
            return float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    elif hint is Path:
        if isinstance(value, (str, Path)):
            return Path(value)
    elif type(value) is hint:
        return value
    raise _wrong(where, value, hint)


def _convert_tuple(value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    arguments = get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, value, hint)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ConfigError(f"{where}: got {len(value)} elements, expected {len(arguments)}: {_named(hint)}")
    return tuple(_convert(v, t, _join(where, i)) for i, (v, t) in enumerate(zip(value, arguments, strict=True)))


def _convert_union(value: Any, hint: Any, where: str) -> Any:
    # A field of `float | int` must keep 3 an int: the exact type is tried first. A tag that names an arm decides.
    arms = sorted(get_args(hint), key=lambda t: type(value) is not t)
    if isinstance(value, Mapping):
        arms = [t for t in arms if getattr(t, "__name__", None) == value.get(_TAG)] or arms
    deeper: ConfigError | None = None
    for arm in arms:
        try:
            return _convert(value, arm, where)
        except ConfigError as error:
            # An object with a tag fits at most one arm; what is wrong inside it is the message to show.
            deeper = error if isinstance(value, Mapping) and not _is_scalar(arm) else deeper
    raise deeper or _wrong(where, value, hint)


def _is_scalar(hint: Any) -> bool:
    return hint in (int, float, str, bool, type(None), Path) or get_origin(hint) is Literal


def _build(data: Mapping[str, Any], hint: Any, where: str) -> Any:
    """The dataclass instance that a tagged object describes; `hint` is the class expected, or Any."""
    own = {hint.__name__: hint} if isinstance(hint, type) and dataclasses.is_dataclass(hint) else {}
    name = data.get(_TAG, hint.__name__ if own else None)
    if name is None:
        raise ConfigError(f"{where or 'config'}: the object has no {_TAG!r} tag; it has {sorted(map(str, data))[:8]}")
    cls = {**_REGISTERED, **own}.get(name)
    if cls is None:
        raise _unknown(f"{_join(where, _TAG)}: unknown type {name!r}", name, [*own, *_REGISTERED])
    if hint is not Any and isinstance(hint, type) and hint not in cls.__mro__:
        raise ConfigError(f"{where or 'config'}: got a {name}, expected a {_named(hint)}")
    fields = _fields(cls, where)
    for given in data:
        if given != _TAG and given not in fields:
            raise _unknown(f"{_join(where, given)}: unknown field of {name}", given, list(fields))
    values = {k: _convert(v, fields[k][0], _join(where, k)) for k, v in data.items() if k != _TAG}
    absent = [k for k, (_, f) in fields.items() if k not in values and f.default is f.default_factory is dataclasses.MISSING]
    if absent:
        raise ConfigError(f"{_join(where, absent[0])}: missing; {name} has no default for {', '.join(absent)}")
    return _made(cls, values, where)


def _made(cls: type, values: Mapping[str, Any], where: str) -> Any:
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error
    except (ValueError, TypeError) as error:  # from the class's own __post_init__
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def _unknown(text: str, name: str, known: Iterable[str], places: Mapping[str, str] | None = None) -> ConfigError:
    """places: whole names of what may be meant, by the name itself."""
    places = places or {}
    near = difflib.get_close_matches(name, [*known, *places], n=1, cutoff=0.5)
    hint = f"did you mean {places.get(near[0], near[0])!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return ConfigError(f"{text}; {hint}")


def _encode(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = _fields(type(value), where)
        checked = {k: _convert(getattr(value, k), t, _join(where, k)) for k, (t, _) in fields.items()}
        return {_TAG: type(value).__name__, **{k: _encode(v, _join(where, k)) for k, v in checked.items()}}
    if isinstance(value, tuple):
        return [_encode(v, _join(where, i)) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {k: _encode(v, _join(where, k)) for k, v in value.items()}
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"  # JSON has no infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(f"{where}: got {_show(value)}, no config value; expected numbers, text, None, tuples, mappings, frozen dataclasses")


def _flat(value: Any, where: str) -> Iterable[tuple[str, Any]]:
    items: Iterable[tuple[str | int, Any]]
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in value):
        items = enumerate(value)
    else:
        yield where, value
        return
    for name, inner in items:
        yield from _flat(inner, _join(where, name))


# ---- overrides ---------------------------------------------------------------------------------------------------------------------


def _replaced(value: Any, hint: Any, path: Sequence[str], new: Any, where: str, *, root: Any) -> Any:
    """`value` with the thing at `path` below it replaced."""
    if not path:
        return _parsed(new, hint, where) if isinstance(new, str) else _convert(new, hint, where)
    name, inner = path[0], _join(where, path[0])
    if dataclasses.is_dataclass(value):
        fields = _fields(type(value), where)
        if name not in fields:
            names = [n.removesuffix(f".{_TAG}") for n, _ in _flat(to_json(root), "") if n != _TAG]
            elsewhere = {n.split(".")[-1]: n for n in reversed(names)}  # the right name may stand in the wrong place
            places = elsewhere | {n: _join(where, n) for n in fields}
            raise _unknown(f"{inner}: unknown field of {type(value).__name__}", path[-1], fields, places)
        changed = _replaced(getattr(value, name), fields[name][0], path[1:], new, inner, root=root)
        changing = copy.copy(value)
        object.__setattr__(changing, name, changed)
        return changing
    if isinstance(value, Mapping):
        if len(path) > 1 and name not in value:
            raise _unknown(f"{inner}: no such entry", name, list(value))
        return {**value, name: _replaced(value.get(name), _inside(hint, Mapping, 0), path[1:], new, inner, root=root)}
    if isinstance(value, tuple):
        if not name.isdigit() or int(name) >= len(value):
            raise ConfigError(f"{inner}: got index {name!r}, expected 0 .. {len(value) - 1}")
        i = int(name)
        return (*value[:i], _replaced(value[i], _inside(hint, tuple, i), path[1:], new, inner, root=root), *value[i + 1 :])
    raise ConfigError(f"{inner}: {where} is {_show(value)} and has no fields; set it whole first: {where}='{{\"{_TAG}\": ...}}'")


def _made_anew(value: Any, where: str) -> Any:
    """The value with all constructors called again, the innermost first."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {name: _made_anew(getattr(value, name), _join(where, name)) for name in _fields(type(value), where)}
        return _made(type(value), parts, where)
    if isinstance(value, Mapping):
        return {name: _made_anew(part, _join(where, name)) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_made_anew(part, _join(where, i)) for i, part in enumerate(value))
    return value


def _inside(hint: Any, kind: type, index: int) -> Any:
    """The element type of a tuple or mapping type, also where it is one arm of a union."""
    for arm in get_args(hint) if _is_union(hint) else (hint,):
        origin, arguments = get_origin(arm), get_args(arm)
        if kind is Mapping and origin in (dict, Mapping):
            return arguments[1]
        if kind is tuple and origin is tuple:
            return arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else arguments[index]
    return Any


def _parsed(text: str, hint: Any, where: str) -> Any:
    """The value that text on a command line means for a field of this type."""
    if _is_union(hint):
        for arm in sorted(get_args(hint), key=lambda x: (x is str, x is not type(None))):  # any text is a str
            with contextlib.suppress(ConfigError):
                return _parsed(text, arm, where)
        raise _wrong(where, text, hint)
    if hint in (str, Path):
        return hint(text)
    if get_origin(hint) is tuple and not text.lstrip().startswith("["):
        pieces = [x.strip() for x in text.split(",")] if text.strip() else []
        kinds = [_inside(hint, tuple, min(i, len(get_args(hint)) - 1)) for i in range(len(pieces))]
        parsed = [_parsed(x, kind, _join(where, i)) for i, (x, kind) in enumerate(zip(pieces, kinds, strict=True))]
        return _convert_tuple(parsed, hint, where)
    value: Any = text
    if get_origin(hint) is Literal:
        value = next((x for x in get_args(hint) if str(x).lower() == text.lower()), text)
    elif hint in _WORDS:
        value = _WORDS[hint].get(text.lower(), text)
    elif hint in (int, float):
        with contextlib.suppress(ValueError):
            value = hint(text)
    elif hint is not Any and text.isidentifier() and text in {**_REGISTERED, _named(hint): hint}:
        value = {_TAG: text}
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            if hint is not Any:
                raise _wrong(where, text, hint, list(_REGISTERED)) from None
    return _convert(value, hint, where)


_WORDS: Mapping[type, Mapping[str, Any]] = {
    bool: {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False},
    type(None): {"none": None, "null": None},
}
