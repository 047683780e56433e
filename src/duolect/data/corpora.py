"""Corpora as they are published, cut into parts that can be prepared independently: local sources, and parquet files here or on the hub."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from duolect.audio.io import AudioError
from duolect.data.sources import SourceError, open_source
from duolect.data.utterance import Problem, Utterance, stored_bytes

HUB = re.compile(r"(?P<place>.+):(?P<config>[\w.-]+)/(?P<split>\w+)")
COLUMNS = ("ID", "duration", "wav", "spk_id", "sex", "text")  # of speechbrain/LoquaciousSet; wav is a struct with bytes
DOMAINS: Mapping[str, re.Pattern[str]] = {  # of Loquacious, by utterance id
    "voxpopuli": re.compile(r"PLENARY"),
    "commonvoice": re.compile(r"^common_voice"),
    "librispeech": re.compile(r"^[0-9-]+$"),
    "yodas": re.compile(r"\.wav$"),
    "peoples_speech": re.compile(r"\.flac$"),
    "libriheavy": re.compile(r"^[0-9]+_.*_[0-9]+$"),
}
PATIENCE = (5.0, 30.0, 120.0)  # seconds until a remote file is asked for again


@dataclass(frozen=True)
class Record:
    """An utterance to be stored: what its manifest line is to say (id, text, ...), and its audio file, or why there is none."""

    fields: Mapping[str, Any]
    where: str
    audio: bytes | AudioError


class Part(ABC):
    """Consecutive utterances that make one shard: a value that travels to another process."""

    count: int

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """The utterances, in order."""

    @abstractmethod
    def durations(self) -> list[float]:
        """Seconds of each utterance, as published."""

    @abstractmethod
    def first(self, count: int) -> Part:
        """The part's first `count` utterances."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """What tells it from other parts, as JSON."""


@dataclass(frozen=True)
class FilePart(Part):
    """Utterances of a local source; upper: whether its texts are all in capitals, and become lower case."""

    utterances: tuple[Utterance, ...]
    upper: bool

    @property
    def count(self) -> int:
        return len(self.utterances)

    def records(self) -> Iterator[Record]:
        for u in self.utterances:
            known = {k: v for k, v in u.fields.items() if k not in ("id", "audio_filepath", "audio_bytes", "duration", "offset", "text")}
            try:
                audio = stored_bytes(u)
            except AudioError as error:
                audio = error
            yield Record({"id": u.id, "text": u.text.lower() if u.text and self.upper else u.text, **known}, str(u.audio), audio)

    def durations(self) -> list[float]:
        return [u.seconds or 0.0 for u in self.utterances]

    def first(self, count: int) -> Part:
        return replace(self, utterances=self.utterances[:count])

    def identity(self) -> list[Any]:
        return [[u.id, u.text, u.seconds, u.fields.get("audio_filepath"), u.span] for u in self.utterances]


@dataclass(frozen=True)
class ParquetPart(Part):
    """The first `count` rows of row groups [begin, end) of a file laid out as Loquacious, whose texts become lower case."""

    url: str
    begin: int
    end: int
    count: int

    def records(self) -> Iterator[Record]:
        return self._read(COLUMNS, together=16)

    def durations(self) -> list[float]:
        return [record.fields.get("duration", 0.0) for record in self._read(("ID", "duration"), together=4096)]

    def first(self, count: int) -> Part:
        return replace(self, count=count)

    def identity(self) -> list[Any]:
        return [Path(self.url).name, self.begin, self.end, self.count]

    def _read(self, columns: Sequence[str], *, together: int) -> Iterator[Record]:
        """Records with some of the columns; a remote file that fails is asked for again, from where it was."""
        done, patience = 0, iter(PATIENCE if "://" in self.url else ())
        while done < self.count:
            try:
                for record in islice(self._rows(columns, together), done, self.count):
                    yield record
                    done += 1
            except (OSError, RuntimeError, ValueError) as error:  # pyarrow's, fsspec's and the hub's
                if (wait := next(patience, None)) is None:
                    raise SourceError(
                        f"{self.url}: cannot be read ({_short(error)}): fetch it again; the same command continues"
                    ) from error
                time.sleep(wait)

    def _rows(self, columns: Sequence[str], together: int) -> Iterator[Record]:
        import fsspec
        import pyarrow.parquet as parquet

        with fsspec.open(self.url, "rb") as file:
            table = parquet.ParquetFile(file)
            there = [name for name in columns if name in table.schema_arrow.names]
            for batch in table.iter_batches(together, row_groups=list(range(self.begin, self.end)), columns=there, use_threads=False):
                yield from map(self._record, batch.to_pylist())

    def _record(self, row: Mapping[str, Any]) -> Record:
        id, audio = str(row["ID"]), (row.get("wav") or {}).get("bytes")
        known = {"speaker": row.get("spk_id"), "sex": row.get("sex"), "domain": domain_of(id), "duration": row.get("duration")}
        fields = {"id": id, "text": (row.get("text") or "").lower(), **{k: v for k, v in known.items() if v not in (None, "", "None")}}
        return Record(fields, self.url, audio or AudioError(f"{self.url}, {id}: has no audio bytes: fetch the file again"))


def domain_of(id: str) -> str | None:
    """The corpus that an utterance of Loquacious comes from, None where its id does not say."""
    return next((name for name, pattern in DOMAINS.items() if pattern.search(id)), None)


def open_corpus(source: str, *, size: int) -> tuple[list[Part], Sequence[Problem]]:
    """A source's utterances in parts of about `size`, and what of it cannot be listed.

    A LibriSpeech tree, manifest, folder or file; parquet files as Loquacious has them, or a folder of them; or of such files on the hub, or
    in a clone of it, `<id or folder>:<config>/<split>`. Raises SourceError.
    """
    path, named = Path(source), HUB.fullmatch(source)
    files = [source] if path.suffix == ".parquet" and path.is_file() else sorted(map(str, path.glob("*.parquet")))
    if not path.exists() and named:
        files = _files_of(**named.groupdict())
    if files:
        if len(splits := {found[1] for file in files if (found := re.search(r"(train|dev|test)-[0-9]+-of-[0-9]+\.parquet$", file))}) > 1:
            raise SourceError(f"{source}: holds files of {', '.join(sorted(splits))}: put each into a folder of its own")
        with ThreadPoolExecutor(16) as pool:  # the hub has thousands of files
            return [part for parts in pool.map(partial(_parquet_parts, size=size), files) for part in parts], ()
    if path.is_dir() and next(path.rglob("*.parquet"), None):
        raise SourceError(f"{source}: has parquet files in its folders only: name one of these, or {source}:<config>/<split>")
    found = open_source(source)
    upper = not any(c.islower() for u in found.utterances for c in u.text or "")
    return [FilePart(found.utterances[i : i + size], upper) for i in range(0, len(found.utterances), size)], found.problems


def _parquet_parts(url: str, *, size: int) -> list[Part]:
    """Parts of whole row groups, so that each is read once. Raises SourceError unless the file is laid out as Loquacious."""
    try:
        import fsspec
        import pyarrow.parquet as parquet

        with fsspec.open(url, "rb") as file:
            table = parquet.ParquetFile(file)
            schema, groups = table.schema_arrow, range(table.num_row_groups)
            rows = [table.metadata.row_group(group).num_rows for group in groups]
    except ImportError as error:
        raise SourceError(f"{url}: parquet files need pyarrow: pip install 'duolect[data]'") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{url}: cannot be read as parquet ({_short(error)}): fetch it again") from error
    if not {"ID", "duration", "wav", "text"} <= set(schema.names) or "bytes: binary" not in str(schema.field("wav").type):
        has = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise SourceError(f"{url}: has the columns {has}: expected {', '.join(COLUMNS)} as in Loquacious, wav with bytes")
    parts: list[Part] = []
    begin = 0
    for group in groups:
        count = sum(rows[begin : group + 1])
        if count >= size or (count and group == groups[-1]):
            parts.append(ParquetPart(url, begin, group + 1, count))
            begin = group + 1
    return parts


def _files_of(place: str, config: str, split: str) -> list[str]:
    """The parquet files of a split, in order, as the dataset's card names them. Raises SourceError, also where there is no hub."""
    where = f"{place}:{config}/{split}"
    try:
        import datasets

        files = datasets.load_dataset_builder(place, config).config.data_files or {}
    except ImportError as error:
        raise SourceError(f"{where}: no such file, and the hub is read with datasets: pip install 'duolect[data]'") from error
    except Exception as error:  # its own, the hub's, and those of whichever network library is beneath
        raise SourceError(
            f"{where}: is no file, and cannot be reached on the hub ({type(error).__name__}: {_short(error)}): check name and network, "
            "or fetch the parquet files another way and name their folder"
        ) from error
    if split not in files:
        raise SourceError(f"{where}: has no such split: it has {', '.join(map(str, files)) or 'no data files'}")
    return [str(file) for file in files[split]]


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
