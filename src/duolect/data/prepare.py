"""A corpus in shards: tar files of re-encoded audio and a manifest that says where in them each utterance lies.

Each shard is a function of its part of the sources and of the settings, and there or not: <out>/audio-00012.tar with its index
audio-00012.json, both renamed when they are whole. So a killed run continues, and ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import tarfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import accumulate, islice, takewhile
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Literal, TypeVar

from duolect.audio.codec import FORMATS, Codec, encode_audio, is_encoded
from duolect.audio.io import SAMPLE_RATE, AudioError, AudioWarning, read_audio
from duolect.data.corpora import Part, Record, open_corpus
from duolect.data.filter import DataError, Skipped, require_share, write_lines
from duolect.data.sources import MANIFEST
from duolect.run import alone, write_json

Item = TypeVar("Item")
Made = TypeVar("Made")
PLAN, SKIPPED, SUMS = "plan.json", "skipped.jsonl", "SHA256SUMS"
TAR_BYTES = 1024  # of each utterance: its header, and what fills the last block
SPARE = 1.02  # times the estimate must fit
SAMPLED_PARTS = 64  # whose durations stand for all in the estimate
ENOUGH_TO_JUDGE = 200  # utterances, of which too many failed ones stop it before the end


class PrepareError(ValueError):
    """A corpus cannot be prepared there, or not as asked; one line with the next step."""


@dataclass(frozen=True)
class Shard:
    """What is known of a finished shard."""

    name: str
    made: Literal["now", "before"]
    utterances: int
    seconds: float
    bytes: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Plan:
    """All shards of a corpus to be; unlisted: what of the sources is no utterance; seconds: of audio, an estimate."""

    out: Path
    codec: Codec
    parts: tuple[Part, ...]
    unlisted: tuple[Skipped, ...]
    seconds: float

    @property
    def utterances(self) -> int:
        return sum(part.count for part in self.parts)

    def gigabytes(self, codec: Codec) -> float:
        """What it takes in a codec, about."""
        return self.seconds / 3600 * FORMATS[codec].megabytes_per_hour / 1e3 + self.utterances * TAR_BYTES / 1e9


def plan(
    sources: Sequence[str], out: Path, *, codec: Codec = "ogg", limit: int | None = None, hours: float | None = None, size: int = 500
) -> Plan:
    """The shards of sources (see `open_corpus`) in a folder that is from now on theirs; limit, hours: how much from the beginning.

    size: utterances per shard. Raises SourceError, or PrepareError where the folder holds others, or there is no room.
    """
    corpora = [open_corpus(source, size=size) for source in sources]
    parts = [part for found, _ in corpora for part in found]
    if hours is not None:
        sums = accumulate(x for part in parts for x in part.durations())
        limit = min(limit or 1 << 62, 1 + sum(1 for _ in takewhile(lambda seconds: seconds < hours * 3600, sums)))
    if limit is not None:
        before = accumulate((part.count for part in parts), initial=0)
        parts = [part.first(min(part.count, limit - n)) for part, n in zip(parts, before, strict=False) if n < limit]
    if not parts:
        raise PrepareError(f"{', '.join(sources)}: nothing to prepare: check the sources, --limit and --hours")
    sampled = parts[:: -(-len(parts) // SAMPLED_PARTS)]
    seconds = sum(sum(part.durations()) for part in sampled) * sum(p.count for p in parts) / sum(p.count for p in sampled)
    unlisted = tuple(Skipped(x.where, "", "not listed", x.cause) for _, problems in corpora for x in problems)
    found = Plan(out, codec, tuple(parts), unlisted, seconds)
    digest = hashlib.sha256(json.dumps([part.identity() for part in parts], ensure_ascii=False).encode()).hexdigest()
    _require_room(found)
    claim(out, {"codec": codec, "size": size, "utterances": found.utterances, "sources_sha256": digest})
    return found


def prepare(
    plan: Plan, *, workers: int = 1, max_share_lost: float = 0.05, done: Callable[[Shard], object] = lambda shard: None
) -> tuple[Skipped, ...]:
    """Makes the shards that are not there yet, manifest and checksums; what had to be left out. `done` hears of each shard, in order.

    Raises DataError where more than that share is lost, PrepareError where it cannot go on; the same call then continues.
    """
    with alone(plan.out):
        for part in plan.out.glob("*.part"):  # of a killed run
            part.unlink(missing_ok=True)
        lost: list[Skipped] = []
        seen = 0
        try:
            tasks: list[Task] = [(plan.out, f"audio-{n:05}", part, plan.codec) for n, part in enumerate(plan.parts)]
            for shard in in_order(_shard, tasks, workers=workers):
                lost += shard.skipped
                seen += shard.utterances + len(shard.skipped)
                done(shard)
                if seen >= ENOUGH_TO_JUDGE:
                    _require_few(plan, lost, seen, max_share_lost)
            lost += plan.unlisted
            _require_few(plan, lost, seen + len(plan.unlisted), max_share_lost)
            return _finish(plan, lost)
        except OSError as error:
            raise PrepareError(f"{plan.out}: cannot be written ({error}); when that is mended, the same command continues") from error


def check(out: Path) -> list[str]:
    """What differs from the checksums of a prepared corpus: a line for each file that is missing or changed."""
    if not (out / SUMS).is_file():
        begun = "is not finished: the same `duolect prepare` continues it" if (out / PLAN).is_file() else "is no prepared corpus"
        raise PrepareError(f"{out}: {begun} (it has no {SUMS})")
    wrong = []
    for line in (out / SUMS).read_text("utf-8").splitlines():
        wanted, _, name = line.partition("  ")
        got = _sha256(out / name) if (out / name).is_file() else "nothing"
        if got != wanted:
            wrong.append(
                f"{out / name}: has SHA-256 {got[:12]}, expected {wanted[:12]}: remove it, and the same `duolect prepare` makes it again"
            )
    return wrong


def shown(gigabytes: float) -> str:
    """A size for people."""
    return f"{gigabytes:,.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:,.1f} MB"


def _require_few(plan: Plan, lost: Sequence[Skipped], seen: int, most: float) -> None:
    try:
        mend = "mend the sources, or accept a larger share with --max-failed"
        require_share(lost, of=seen, most=most, listed=plan.out / SKIPPED, mend=mend)
    except DataError:
        write_lines(plan.out / SKIPPED, map(asdict, lost))
        raise


def claim(out: Path, wanted: dict[str, Any]) -> None:
    """Notes in the folder what decides its contents. Raises PrepareError where others are there, or it cannot be written."""
    file = out / PLAN
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(path.suffix != ".part" for path in out.iterdir()):
            raise PrepareError(f"{out}: is not empty and has no {PLAN}: name a new folder, or an empty one")
        if not file.exists():
            write_json(file, wanted)
    except OSError as error:
        raise PrepareError(f"{out}: cannot be written ({error.strerror or error}): name another folder") from error
    found = _read(file)
    if changed := [f"{key} {found.get(key)} != {value}" for key, value in wanted.items() if found.get(key) != value]:
        raise PrepareError(f"{out}: holds other sources or settings ({'; '.join(changed)}): use the same again, or another folder")


def _require_room(plan: Plan) -> None:
    place = next(folder for folder in (plan.out, *plan.out.absolute().parents) if folder.is_dir())
    there = sum(file.stat().st_size for file in plan.out.glob("audio-*")) / 1e9
    room = shutil.disk_usage(place).free / 1e9 + there
    needed = plan.gigabytes(plan.codec)
    if needed * SPARE > room:
        others = [f"--codec {codec} ({shown(plan.gigabytes(codec))})" for codec in FORMATS if plan.gigabytes(codec) * SPARE < room]
        raise PrepareError(
            f"{plan.out}: {plan.seconds / 3600:,.1f} h as {plan.codec} take about {shown(needed)} "
            f"({FORMATS[plan.codec].megabytes_per_hour:g} MB per hour), {shown(there)} of it are there and {shown(room - there)} are free: "
            f"make room, or choose {', '.join([*others, f'--hours {plan.seconds / 3600 * room / needed / SPARE:.1f}'])}, or another folder"
        )


Task = tuple[Path, str, Part, Codec]


def in_order(make: Callable[[Item], Made], items: Sequence[Item], *, workers: int) -> Generator[Made]:
    """What `make` gives of each item, in order; made in parallel, a few ahead. Raises PrepareError where a process was killed."""
    if workers == 1:
        yield from map(make, items)
        return
    # spawn: forking a process in which a library has threads can hang
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_worker)
    waiting, rest = deque(pool.submit(make, item) for item in items[: 2 * workers]), iter(items[2 * workers :])
    try:
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(make, item) for item in islice(rest, 1))
    except BrokenProcessPool as error:
        raise PrepareError("a worker process was killed, perhaps for memory: the same command continues; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _worker() -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    parent = parent_process()  # a worker whose parent was killed outright would wait for work for ever
    threading.Thread(target=lambda: parent and (parent.join(), os._exit(1)), daemon=True).start()


def _shard(task: Task) -> Shard:
    """The shard of a part, from its index if it is there already."""
    out, name = task[:2]
    index = out / f"{name}.json"
    made = "before" if index.is_file() and (out / f"{name}.tar").is_file() else "now"
    if made == "now":
        _write(*task)
    found = _read(index)
    return Shard(name, made, len(found["lines"]), found["seconds"], found["bytes"], tuple(Skipped(**x) for x in found["skipped"]))


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise PrepareError(f"{file}: is damaged ({error}): remove it, and the same command makes it again") from error


def _write(out: Path, name: str, part: Part, codec: Codec) -> None:
    lines: list[dict[str, Any]] = []
    skipped: list[Skipped] = []
    temporary = out / f"{name}.tar.{os.getpid()}.part"  # a worker that outlives its killed parent for a moment writes another one
    with open(temporary, "wb") as file:
        for n, record in enumerate(part.records()):
            fields, id = dict(record.fields), str(record.fields["id"])
            try:
                audio, seconds = _encoded(record, codec)
            except AudioError as error:
                skipped.append(Skipped(id, record.where, "corrupt", str(error)))
                continue
            if not (fields["text"] or "").strip():
                skipped.append(Skipped(id, record.where, "no text", "has no transcript"))
                continue
            member = tarfile.TarInfo(f"{n:05}-{re.sub(r'[^A-Za-z0-9_-]', '_', id)[:60]}{FORMATS[codec].suffix}")
            member.size = len(audio)
            file.write(member.tobuf(tarfile.USTAR_FORMAT))
            place = {"audio_filepath": f"{name}.tar", "audio_bytes": [file.tell(), len(audio)], "duration": round(seconds, 4)}
            file.write(audio + bytes(-len(audio) % tarfile.BLOCKSIZE))
            lines.append({"id": id, **place, **{key: value for key, value in fields.items() if key not in ("id", "duration")}})
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.flush()
        os.fsync(file.fileno())
    index = {"sha256": _sha256(temporary), "bytes": temporary.stat().st_size, "seconds": sum(line["duration"] for line in lines)}
    temporary.replace(out / f"{name}.tar")
    write_json(out / f"{name}.json", {**index, "lines": lines, "skipped": [asdict(x) for x in skipped]})


def _encoded(record: Record, codec: Codec) -> tuple[bytes, float]:
    """(the audio file to store, seconds). Raises AudioError."""
    if isinstance(record.audio, AudioError):
        raise record.audio
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AudioWarning)
        samples = read_audio(record.audio, name=f"{record.where}, {record.fields['id']}")
    kept = is_encoded(record.audio, codec=codec)
    return record.audio if kept else encode_audio(samples, codec=codec), len(samples) / SAMPLE_RATE


def _finish(plan: Plan, lost: list[Skipped]) -> tuple[Skipped, ...]:
    """Writes manifest, list of what was skipped and, at last, the checksums, which say that the corpus is whole."""
    ids: set[str] = set()
    sums: dict[str, str] = {}

    def lines() -> Iterator[dict[str, Any]]:
        for n in range(len(plan.parts)):
            index = plan.out / f"audio-{n:05}.json"
            found = _read(index)
            sums[f"audio-{n:05}.tar"], sums[index.name] = found["sha256"], _sha256(index)
            for line in found["lines"]:
                if line["id"] in ids:
                    lost.append(Skipped(line["id"], line["audio_filepath"], "id twice", "another utterance before it has this id"))
                else:
                    ids.add(line["id"])
                    yield line

    write_lines(plan.out / MANIFEST, lines())
    write_lines(plan.out / SKIPPED, map(asdict, lost))
    sums |= {name: _sha256(plan.out / name) for name in (MANIFEST, SKIPPED)}
    temporary = plan.out / f"{SUMS}.part"
    temporary.write_text("".join(f"{value}  {name}\n" for name, value in sums.items()), "utf-8")
    temporary.replace(plan.out / SUMS)
    return tuple(lost)


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()
