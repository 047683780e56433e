"""Corpora laid out as they are published, prepared, killed at every point, damaged, refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import soundfile

from duolect.audio.codec import encode_audio, is_encoded
from duolect.data import corpora
from duolect.data import prepare as preparation
from duolect.data.corpora import domain_of, open_corpus
from duolect.data.filter import DataError
from duolect.data.prepare import PrepareError, check, plan, prepare
from duolect.data.sources import SourceError, open_source
from duolect.data.utterance import load_audio, stored_bytes
from duolect.run import RunError, alone
from tests.hub import hub


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def tone(pitch: float, seconds: float = 0.3, rate: int = 16000) -> np.ndarray:
    return (0.2 * np.sin(2 * np.pi * pitch * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, *, rate: int = 16000, form: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form)
    return file.getvalue()


def librispeech(root: Path) -> Path:
    """Two subsets as openslr.org/12 has them: <subset>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac and one .trans.txt."""
    for subset, speaker, chapter in (("dev-clean", 84, 121), ("dev-clean", 1272, 7), ("dev-other", 116, 288)):
        folder = root / "LibriSpeech" / subset / str(speaker) / str(chapter)
        folder.mkdir(parents=True)
        lines = []
        for n in range(3):
            id = f"{speaker}-{chapter}-{n:04}"
            (folder / f"{id}.flac").write_bytes(encoded(tone(200 + 10 * n + speaker % 50)))
            lines.append(f"{id} MISTER QUILTER'S NUMBER {('ONE', 'TWO', 'THREE')[n]}\n")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return root / "LibriSpeech"


IDS = {
    "20180502-0900-PLENARY-5-en_20180502-12:13:08_6": "voxpopuli",
    "common_voice_en_18309021": "commonvoice",
    "4515-11057-0083": "librispeech",
    "YsSMNQfwgm8-00123-00001234-00002345.wav": "yodas",
    "gov_DOT_uscourts_DOT_19-161/gov_DOT_uscourts_DOT_19-161_DOT_mp3_00002.flac": "peoples_speech",
    "100_sea_fairies_0812_librivox_64kb_mp3_01_baum_sea_fairies_64kb_0": "libriheavy",
}
SCHEMA = pa.schema(
    {
        "ID": pa.string(),
        "duration": pa.float32(),
        "wav": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "spk_id": pa.string(),
        "sex": pa.string(),
        "text": pa.string(),
    }
)


def loquacious_rows(count: int = 6, *, first: int = 0) -> list[dict[str, Any]]:
    rows = []
    for n, id in list(enumerate(IDS))[:count]:
        wav = {"bytes": encoded(tone(300 + 20 * n + first), form="WAV"), "path": id}
        speaker = {"spk_id": f"s{n}", "sex": "male"} if n < 3 else {"spk_id": None, "sex": None}
        rows.append(
            {"ID": id if not first else f"common_voice_en_{first + n}", "duration": 0.3, "wav": wav, "text": "IT'S THE WORDS", **speaker}
        )
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], *, schema: pa.Schema = SCHEMA, group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path


CARD = """---
configs:
- config_name: small
  data_files:
  - split: train
    path: "small/train*"
  - split: dev
    path: "dev/dev*"
---
"""


def loquacious(root: Path) -> Path:
    """A clone of speechbrain/LoquaciousSet with two files of training data and one of dev."""
    write_parquet(root / "small" / "train-00000-of-00002.parquet", loquacious_rows())
    write_parquet(root / "small" / "train-00001-of-00002.parquet", loquacious_rows(3, first=1000))
    write_parquet(root / "dev" / "dev-00000-of-00001.parquet", loquacious_rows(2, first=5000))
    (root / "README.md").write_text(CARD)
    return root


def run(sources: Sequence[str | Path], out: Path, **options: Any) -> tuple[preparation.Skipped, ...]:
    planned = {name: options.pop(name) for name in ("codec", "limit", "hours", "size") if name in options}
    return prepare(plan([str(x) for x in sources], out, **planned), **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def skipped_of(out: Path) -> list[tuple[str, str]]:
    return [(x["id"], x["reason"]) for x in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())]


@pytest.mark.parametrize("codec", ["ogg", "opus", "flac"])
def test_librispeech(tmp_path: Path, codec: Any) -> None:
    tree, out = librispeech(tmp_path), tmp_path / "out"
    assert run([tree / "dev-clean", tree / "dev-other"], out, codec=codec, size=4) == ()
    assert [line["id"] for line in lines_of(out)][::3] == ["1272-7-0000", "84-121-0000", "116-288-0000"]
    source = open_source(out)
    assert len(source.utterances) == 9 and source.problems == ()
    original = {u.id: u for u in open_source(tree).utterances}
    for utterance in source.utterances:
        samples, before = load_audio(utterance), load_audio(original[utterance.id])
        assert utterance.seconds == len(samples) / 16000 == 0.3 and np.corrcoef(samples, before)[0, 1] > 0.98
        assert utterance.text == original[utterance.id].text and utterance.text and utterance.text.startswith("mister quilter's")
        assert utterance.fields["speaker"] == utterance.id.split("-")[0]
        assert is_encoded(stored_bytes(utterance), codec=codec)
    assert sorted(path.name for path in out.glob("*.tar")) == ["audio-00000.tar", "audio-00001.tar", "audio-00002.tar"]
    for path in out.glob("*.tar"):  # any tool reads them
        with tarfile.open(path) as tar:
            spans = [line["audio_bytes"] for line in lines_of(out) if line["audio_filepath"] == path.name]
            assert [[member.offset_data, member.size] for member in tar.getmembers()] == spans
    assert check(out) == [] and not list(out.glob("*.part"))


def test_loquacious_in_all_the_ways_it_is_named(tmp_path: Path) -> None:
    clone = loquacious(tmp_path / "LoquaciousSet")
    outs = []
    for n, source in enumerate(([clone / "small"], [f"{clone}:small/train"], sorted((clone / "small").glob("*.parquet")))):
        outs.append(tmp_path / f"out{n}")
        assert run(source, outs[-1], size=3) == ()
    first, *others = (contents(out) for out in outs)
    assert all(other == first for other in others)
    lines = lines_of(outs[0])
    assert {line["id"]: line.get("domain") for line in lines[:6]} == IDS
    assert lines[0] == {
        "id": next(iter(IDS)),
        "audio_filepath": "audio-00000.tar",
        "audio_bytes": [512, len(stored_bytes(open_source(outs[0]).utterances[0]))],
        "duration": 0.3,
        "text": "it's the words",
        "speaker": "s0",
        "sex": "male",
        "domain": "voxpopuli",
    }
    assert "speaker" not in lines[5] and len(lines) == 9
    assert len(list(outs[0].glob("*.tar"))) == 3  # a file's row groups of 2 in parts of at least 3: 4 + 2, 3
    run([f"{clone}:small/dev"], tmp_path / "dev")
    assert [line["id"] for line in lines_of(tmp_path / "dev")] == ["common_voice_en_5000", "common_voice_en_5001"]


def test_unknown_ids_have_no_domain() -> None:
    assert domain_of("something else") is None


def test_texts_of_other_sources_stay_as_they_are(tmp_path: Path) -> None:
    for folder, texts in (("cased", ("Hello.", "NASA")), ("capitals", ("HELLO", "IT'S"))):
        for n, text in enumerate(texts):
            path = tmp_path / folder / f"{folder}{n}.wav"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded(tone(300, rate=8000), rate=8000, form="WAV"))
            path.with_suffix(".txt").write_text(text)
    run([tmp_path / "cased", tmp_path / "capitals"], tmp_path / "out")
    assert [line["text"] for line in lines_of(tmp_path / "out")] == ["Hello.", "NASA", "hello", "it's"]
    assert {len(load_audio(u)) for u in open_source(tmp_path / "out").utterances} == {4800}  # 16 kHz


def test_what_is_in_the_codec_already_is_not_encoded_again(tmp_path: Path) -> None:
    data = encode_audio(tone(300), codec="ogg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.ogg").write_bytes(data)
    (tmp_path / "in" / "a.txt").write_text("words")
    run([tmp_path / "in"], tmp_path / "out")
    run([tmp_path / "out"], tmp_path / "again")  # what was prepared is a source too
    assert stored_bytes(open_source(tmp_path / "again").utterances[0]) == data


@pytest.mark.parametrize(
    ("options", "count"), [({"limit": 5}, 5), ({"limit": 99}, 9), ({"hours": 2.0 / 3600}, 7), ({"hours": 1, "limit": 2}, 2)]
)
def test_only_a_part(tmp_path: Path, options: dict[str, Any], count: int) -> None:
    tree, clone = librispeech(tmp_path), loquacious(tmp_path / "LoquaciousSet")
    for n, source in enumerate((tree, clone / "small")):
        run([source], tmp_path / f"out{n}", size=2, **options)
        assert len(lines_of(tmp_path / f"out{n}")) == count


def in_a_child(work: Callable[[], object]) -> int:
    """Runs it in a forked process; its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(event: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs it in a child that kills itself with SIGKILL before its event-th encoding, fsync or rename."""

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            nonlocal event
            if event == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            event -= 1
            return function(*args, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(preparation, "encode_audio", counted(encode_audio))
        return in_a_child(work)


def test_killed_at_any_point_it_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, folder = loquacious_rows(5), tmp_path / "small"
    rows[1]["wav"]["bytes"] = b"RIFFnonsense"
    write_parquet(folder / "train-00000-of-00002.parquet", rows[:3], group=1)
    write_parquet(folder / "train-00001-of-00002.parquet", rows[3:])

    def work(out: Path) -> Callable[[], object]:
        return lambda: run([folder], out, size=2, codec="flac", max_share_lost=0.5)

    work(tmp_path / "whole")()
    whole = contents(tmp_path / "whole")
    event, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        out = tmp_path / f"killed{event}"
        status = killed_at(event, work(out), monkeypatch)
        if event % 5 == 0 and status:  # killed again while it continues
            assert killed_at(3, work(out), monkeypatch) in (0, -signal.SIGKILL)
        if status:
            assert contents(out) != whole
            with pytest.raises(PrepareError, match=r"is not finished|is no prepared"):
                check(out)
            work(out)()
        assert contents(out) == whole, f"killed at event {event}"
        shutil.rmtree(out)
        event += 1
    assert event == 24 and [reason for _, reason in skipped_of(tmp_path / "whole")] == ["corrupt"]


def test_workers_change_nothing(tmp_path: Path) -> None:
    tree = librispeech(tmp_path)
    heard: list[str] = []
    run([tree], tmp_path / "one", size=2)
    run([tree], tmp_path / "two", size=2, workers=2, done=lambda shard: heard.append(shard.name))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert heard == [f"audio-{n:05}" for n in range(5)]


@pytest.mark.parametrize("name", ["audio-00001.tar", "audio-00001.json", "manifest.jsonl", "skipped.jsonl"])
def test_a_flipped_bit_and_a_missing_file_are_found_and_mended(tmp_path: Path, name: str) -> None:
    tree, out = librispeech(tmp_path), tmp_path / "out"
    next(tree.rglob("*.flac")).write_bytes(b"")  # so that there is one skipped
    run([tree], out, size=4, max_share_lost=0.5)
    before = contents(out)
    data = bytearray(before[name])
    data[len(data) // 2] ^= 1
    for damaged in (bytes(data), before[name][:-1], None):
        (out / name).unlink() if damaged is None else (out / name).write_bytes(damaged)
        (wrong,) = check(out)
        assert wrong.startswith(f"{out / name}: has SHA-256 ") and "remove it" in wrong
        (out / name).unlink(missing_ok=True)
        run([tree], out, size=4, max_share_lost=0.5)
        assert contents(out) == before and check(out) == []


def test_what_fails_is_listed_with_reasons(tmp_path: Path) -> None:
    tree, out = librispeech(tmp_path), tmp_path / "out"
    folder = tree / "dev-clean" / "84" / "121"
    good = (folder / "84-121-0000.flac").read_bytes()
    (folder / "84-121-0000.flac").write_bytes(b"fLaC" + bytes(100))
    (folder / "84-121-0001.flac").write_bytes(good[: len(good) // 2])
    (folder / "84-121-0002.flac").unlink()
    manifest = tmp_path / "more" / "manifest.jsonl"
    manifest.parent.mkdir()
    (manifest.parent / "a.flac").write_bytes(good)
    more = [
        {"id": "x", "text": " "},
        {"id": "y"},
        {"id": "z", "text": "words"},
        {"id": "1272-7-0000", "text": "twice"},
        {"id": "x", "text": "again"},
    ]
    manifest.write_text("".join(json.dumps({"audio_filepath": "a.flac", **line}) + "\n" for line in more))
    lost = run([tree, manifest], out, max_share_lost=0.6)
    found = skipped_of(out)
    assert [reason for _, reason in found] == ["corrupt", "corrupt", "no text", "no text", "not listed", "not listed", "id twice"]
    assert [x.reason for x in lost] == [reason for _, reason in found]
    assert [id for id, _ in found if "/" not in id] == ["84-121-0000", "84-121-0001", "x", "y", "1272-7-0000"]
    assert len(lines_of(out)) == len(open_source(out).utterances) == 7 and check(out) == []
    with pytest.raises(
        DataError, match=r"6 of 14 utterances cannot be used \(corrupt: 2, no text: 2, not listed: 2\).* more than 30%"
    ) as caught:
        run([tree, manifest], tmp_path / "strict", max_share_lost=0.3)
    assert "\n" not in str(caught.value) and not (tmp_path / "strict" / "manifest.jsonl").exists()
    assert len(skipped_of(tmp_path / "strict")) == 6  # to see what to mend
    run([tree, manifest], tmp_path / "strict", max_share_lost=0.6)
    assert contents(tmp_path / "strict") == contents(out)


def test_too_many_failures_stop_it_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "ENOUGH_TO_JUDGE", 4)
    tree = librispeech(tmp_path)
    for path in (tree / "dev-clean").rglob("*.flac"):
        path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="that is all of them: mend the sources"):
        run([tree], tmp_path / "out", size=2)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_other_sources_or_settings_are_refused(tmp_path: Path) -> None:
    tree, out = librispeech(tmp_path), tmp_path / "out"
    run([tree], out)
    before = contents(out)
    for sources, options, said in (
        ([tree], {"codec": "flac"}, "codec ogg != flac"),
        ([tree], {"size": 3}, "size 500 != 3"),
        ([tree], {"limit": 3}, "utterances 9 != 3"),
        ([tree / "dev-other"], {}, "sources_sha256"),
        ([tree / "dev-other", tree / "dev-clean"], {}, "sources_sha256"),
    ):
        with pytest.raises(PrepareError, match=said):
            run(sources, out, **options)
    transcript = next(tree.rglob("*.trans.txt"))
    transcript.write_text(transcript.read_text().replace("ONE", "OTHER"))
    with pytest.raises(PrepareError, match="holds other sources or settings"):
        run([tree], out)
    assert contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("all my work")
    with pytest.raises(PrepareError, match="is not empty"):
        run([tree], tmp_path / "full")
    (out / "plan.json").write_text("{")
    with pytest.raises(PrepareError, match="is damaged"):
        run([tree], out)


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, out = librispeech(tmp_path), tmp_path / "new" / "out"
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 24_000))
    with pytest.raises(PrepareError) as caught:
        run([tree], out, codec="flac")
    message = str(caught.value)
    assert "as flac take about 0.1 MB (85 MB per hour), 0.0 MB of it are there and 0.0 MB are free: make room" in message
    assert "--codec opus (0.0 MB), --hours 0.0, or another folder" in message and not out.exists()
    run([tree], out, codec="opus")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tree = librispeech(tmp_path)
    (tmp_path / "file").write_text("no folder")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PrepareError, match="cannot be written"):
            run([tree], out)


def test_a_disk_that_fills_up_is_said_and_it_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, out = librispeech(tmp_path), tmp_path / "out"
    run([tree], tmp_path / "whole", size=4)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "encode_audio", full)
        with pytest.raises(PrepareError, match=r"No space left on device.*; when that is mended, the same command continues"):
            run([tree], out, size=4)
    run([tree], out, size=4)
    assert contents(out) == contents(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    tree, out = librispeech(tmp_path), tmp_path / "out"
    planned = plan([str(tree)], out)
    with alone(out), pytest.raises(RunError, match="another process is at work in it"):
        prepare(planned)
    prepare(planned)


@pytest.mark.parametrize("schema", ["no wav", "wav as text", "no duration"])
def test_parquet_of_other_corpora(tmp_path: Path, schema: str) -> None:
    fields = {field.name: field.type for field in SCHEMA}
    if schema == "wav as text":
        fields["wav"] = pa.string()
    else:
        fields.pop(schema.split()[1])
    path = write_parquet(tmp_path / "a.parquet", [], schema=pa.schema(fields))
    with pytest.raises(SourceError, match=r"a\.parquet: has the columns ID \(string\),.*: expected ID, duration, wav"):
        open_corpus(str(path), size=10)


def test_parquet_that_is_damaged_or_mixed(tmp_path: Path) -> None:
    clone = loquacious(tmp_path / "LoquaciousSet")
    path = clone / "small" / "train-00000-of-00002.parquet"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-100])
    with pytest.raises(SourceError, match="cannot be read as parquet"):
        run([clone / "small"], tmp_path / "out")
    data[10:2000] = bytes(1990)  # pages, while the footer is whole
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"cannot be read .*: fetch it again; the same command continues"):
        run([clone / "small"], tmp_path / "out2")
    shutil.copy(clone / "dev" / "dev-00000-of-00001.parquet", clone / "small")
    with pytest.raises(SourceError, match="holds files of dev, train"):
        open_corpus(str(clone / "small"), size=10)
    with pytest.raises(SourceError, match="has parquet files in its folders only"):
        open_corpus(str(clone), size=10)


def test_a_remote_file_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", loquacious_rows())
    memory = fsspec.filesystem("memory")
    memory.pipe("/small/train-00000-of-00001.parquet", path.read_bytes())
    (part,), _ = corpora._parquet_parts("memory://small/train-00000-of-00001.parquet", size=10), None
    opened, failures = fsspec.open, [OSError("reset by peer"), OSError("503")]

    def flaky(url: str, mode: str) -> Any:
        if failures:
            raise failures.pop()
        return opened(url, mode)

    waited: list[float] = []
    monkeypatch.setattr(fsspec, "open", flaky)
    monkeypatch.setattr(corpora.time, "sleep", waited.append)
    assert [record.fields["id"] for record in part.records()] == list(IDS) and waited == [5.0, 30.0]
    failures += [OSError("gone")] * 9
    with pytest.raises(SourceError, match=r"cannot be read \(gone\)"):
        list(part.records())


@pytest.mark.slow
def test_loquacious_comes_from_the_hub_as_from_a_clone_of_it(tmp_path: Path) -> None:
    """By the real clients, over HTTP, from a hub on this machine."""
    clone = loquacious(tmp_path / "datasets" / "speechbrain" / "LoquaciousSet")
    command = [sys.executable, "-m", "duolect", "prepare", "--workers", "2", "--out"]
    with hub(tmp_path) as address:
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        for name in ("small/train", "small/test"):
            done = subprocess.run(
                [*command, str(tmp_path / "hub"), f"speechbrain/LoquaciousSet:{name}"], env=environment, capture_output=True, text=True
            )
            assert done.returncode == (0 if name == "small/train" else 2), done.stderr
    assert "has no such split: it has train, dev" in done.stderr
    run([f"{clone}:small/train"], tmp_path / "local")
    assert len(lines_of(tmp_path / "hub")) == 9 and lines_of(tmp_path / "hub") == lines_of(tmp_path / "local")
    audio = {name: data for name, data in contents(tmp_path / "hub").items() if name.endswith(".tar")}
    assert audio and audio.items() <= contents(tmp_path / "local").items()


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = loquacious(tmp_path / "LoquaciousSet")
    with pytest.raises(SourceError, match="has no such split: it has train, dev"):
        open_corpus(f"{clone}:small/test", size=10)
    with pytest.raises(SourceError, match="cannot be reached on the hub"):
        open_corpus(f"{clone}:gigantic/train", size=10)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for half a minute
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"cannot be reached on the hub .*: check name and network, or fetch the parquet files") as caught:
        open_corpus("nobody/nothing:small/train", size=10)
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match="no such file or folder"):
        open_corpus(str(tmp_path / "nowhere"), size=10)
    (tmp_path / "a.wav").write_bytes(encoded(tone(200)))
    with pytest.raises(PrepareError, match="nothing to prepare"):
        run([write_parquet(tmp_path / "none.parquet", [])], tmp_path / "out")
