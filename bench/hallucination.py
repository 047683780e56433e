"""Words that nobody said: what each decoding writes over silence, noise and tones, and its WER where speech stands in long pauses.

Not a benchmark of speed: a table of words written per minute where nothing was said, and of WER where speech stands in silence.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import soundfile

from duolect.audio.augment import noise
from duolect.audio.io import SAMPLE_RATE
from duolect.data.sources import open_source
from duolect.data.utterance import load_audio
from duolect.evaluate.normalize import normalizer
from duolect.evaluate.wer import score_recognized
from duolect.recognize.models import Models
from duolect.recognize.presets import PRESETS, Ingredients, decoding_of
from duolect.recognize.recognizer import Recognizer

DEMO = Path(__file__).parents[1] / "src" / "duolect" / "embedded" / "demo" / "manifest.jsonl"
SECONDS = (0.05, 2.0, 8.0, 25.0)
"""Of the recordings in which nothing is said."""


def nothing(kind: str, seconds: float, seed: int) -> np.ndarray:
    """Samples [N] without speech: silence, noise of some colour, three tones that come and go."""
    random, count = np.random.default_rng(seed), int(seconds * SAMPLE_RATE)
    if kind == "silence":
        return np.zeros(count, np.float32)
    if kind == "noise":
        x = noise(count, random)
    else:
        t = np.arange(count) / SAMPLE_RATE
        x = sum(np.sin(2 * np.pi * f * t) * (np.sin(2 * np.pi * f / 400 * t) > 0) for f in random.uniform(150, 900, 3))
    return (0.1 * x / (np.std(x) + 1e-9)).astype(np.float32)


def written(folder: Path, data: Path, limit: int) -> dict[str, Path]:
    """Manifests by kind of recording: without speech, and of speech behind, before and around silence, and one after the other."""
    manifests: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("silence", "noise", "tones", "speech", "speech in silence", "long")}

    def add(kind: str, audio: np.ndarray, text: str) -> None:
        path = folder / f"{kind}-{len(manifests[kind])}.wav"
        soundfile.write(path, audio, SAMPLE_RATE)
        manifests[kind].append({"id": path.stem, "audio_filepath": path.name, "duration": len(audio) / SAMPLE_RATE, "text": text})

    for kind in ("silence", "noise", "tones"):
        for i, seconds in enumerate(SECONDS):
            add(kind, nothing(kind, seconds, i), "")
    spoken = [(load_audio(u), str(u.text)) for u in open_source(data).utterances[:limit]]
    for i, (audio, text) in enumerate(spoken):
        pause = np.random.default_rng(i).normal(0, 1e-3, 6 * SAMPLE_RATE).astype(np.float32)
        add("speech", audio, text)
        add(
            "speech in silence",
            np.concatenate([pause, audio, pause] if i % 3 == 0 else [pause, audio] if i % 3 == 1 else [audio, pause]),
            text,
        )
    add("long", np.concatenate([audio for audio, _ in spoken]), " ".join(text for _, text in spoken))
    paths = {}
    for kind, lines in manifests.items():
        paths[kind] = folder / f"{kind}.jsonl"
        paths[kind].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def main() -> None:
    """Prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speech-llm", default="", help="folder of a speech LLM; its decodings are left out without one")
    parser.add_argument("--am", default="duolect-ctc")
    parser.add_argument("--aed", default="whisper-base")
    parser.add_argument("--data", type=harness.existing, default=DEMO, help="speech with transcripts")
    parser.add_argument("--limit", type=int, default=12, help="recordings of it")
    parser.add_argument("--decodings", nargs="+", help="named decodings; else those alone and joint with CTC")
    args = parser.parse_args()
    harness.use_threads(1)
    names = args.decodings or [
        *("ctc-greedy", "aed-greedy", "aed", "aed+ctc-label"),
        *(("sllm-greedy", "sllm", "sllm-length", "sllm+ctc-label") if args.speech_llm else ()),
    ]
    ingredients = Ingredients(aed=args.aed, speech_llm=args.speech_llm)
    recognizer = Recognizer(Models(), args.am, {name: decoding_of(name, ingredients) for name in names})
    rows: dict[str, dict[str, Any]] = {name: {"decoding": PRESETS[name].title} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for kind, manifest in written(Path(folder), args.data, args.limit).items():
            utterances = open_source(manifest).utterances
            found = list(recognizer.recognize(utterances))
            minutes = sum(u.seconds or 0.0 for u in utterances) / 60
            for name, row in rows.items():
                lines = [line[name] for line in found]
                if kind in ("silence", "noise", "tones"):
                    row[f"{kind}: words/min"] = sum(len(line.text.split()) for line in lines) / minutes
                else:
                    score = score_recognized(lines, normalizer=normalizer("whisper-english"), corpus=kind)
                    row[f"{kind}: WER %"], row[f"{kind}: I"] = score.errors.rate, score.errors.insertions
    harness.print_table(list(rows.values()), title="words written where nothing is said, and WER around silence and over minutes")
    harness.save("hallucination", list(rows.values()), settings=vars(args), notes=[], quick=False)


if __name__ == "__main__":
    main()
