"""transcribe, decode, rescore, compare: audio in, hypotheses out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from duolect.cli.checks import Settings, at_least, corpus_name, pairs, writable
from duolect.cli.options import (
    ModelOptions,
    device_of,
    of_one_folder,
    recognized_in,
    recognizer_for,
    report,
    say_score,
    source_of,
    write_tables,
)

if TYPE_CHECKING:
    from duolect.recognize.files import Format
    from duolect.scorer import Recognized


Fusion = Literal["auto", "delayed", "labelwise", "rescore", "word-end", "shortest"]
DEMO = Path(__file__).parents[1] / "embedded" / "demo"


def transcribe(
    files: Positional[tuple[Path, ...]],
    /,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    decoding: str = "auto",
    fusion: Fusion | None = None,
    format: Literal["txt", "json", "srt", "vtt", "ctm"] = "txt",
    out: Path | None = None,
) -> int:
    """Transcribes audio files and folders; with --out, a file that is there by the same settings is not made again.

    Example: duolect transcribe recordings/ --out texts/ --format srt

    Args:
        files: Audio files, folders of them, or manifests.
        models: Models.
        decoding: A named decoding (see `duolect compare --help`) or a JSON file; auto: labelwise-delayed where the unit LM has the
            acoustic model's units and there is one --lm, else as --fusion auto; with --model its decoder and CTC together.
        fusion: How the models of --am and --lm are joined, in place of --decoding; auto: label-wise where the labels are the same, else
            delayed.
        format: What is written: plain text, or with word times and confidences.
        out: Folder for one file per recording; without it everything goes to standard output.
    """
    from duolect.recognize.files import Transcripts, settings_of, written

    if not files:
        raise ValueError("name at least one audio file, folder or manifest")
    writable("--out", out, folder=True)
    failures: list[str] = []
    sources = [source for path in files if (source := source_of(path, failures))]
    if not (count := sum(len(source.utterances) for source in sources)):
        return report(failures)
    if out is None and count > 1 and format in ("srt", "vtt"):
        raise ValueError(f"{count} recordings in one {format} file would be none: name a folder for a file each with --out")
    recognizer = recognizer_for(models, {"it": _joined(decoding, fusion)}, word_times=format != "txt")
    folder = Transcripts(out, {**settings_of(recognizer, "it"), "format": format}) if out is not None else None
    taken: set[str] = set()
    names = [{u.id: _free(f"{_file_name(u.id)}.{format}", taken) for u in source.utterances} for source in sources]
    if folder and (others := sorted(name for name in taken if folder.is_others(name))):
        raise ValueError(
            f"{out}: {others[0]} is there and not by duolect ({len(others)} such files): name another --out, or move them away"
        )
    lines: list[Recognized] = []
    for source, targets in zip(sources, names, strict=True):
        todo = {u.id: u for u in source.utterances if folder is None or not folder.has(targets[u.id], u.audio)}
        if len(todo) < len(targets):
            print(f"{len(targets) - len(todo)} of {len(targets)} transcripts are in {out} already", file=sys.stderr)
        found: dict[str, Recognized] = {}
        for results in recognizer.recognize(list(todo.values())) if todo else ():
            result = results["it"]
            if format == "json":  # names the recording where paths start here, not in its folder
                result = replace(result, fields={**result.fields, "audio_filepath": str(todo[result.id].audio)})
            found[result.id] = result
            if folder is not None and result.error is None:
                folder.write(targets[result.id], todo[result.id].audio, written(result, format))
        for result in (found[id] for id in todo):
            lines.append(result)
            if folder is None and result.error is None:
                print(_printed(result, format, many=len(files) > 1 or count > 1), end="", flush=True)
    if out is not None:
        print(f"written: {sum(r.error is None for r in lines)} {format} files in {out}", file=sys.stderr)
    return report([*failures, *(f"{r.id}: {r.error}" for r in lines if r.error is not None)], lines)


def _joined(decoding: str, fusion: Fusion | None) -> str:
    """The name of the decoding that --decoding or --fusion ask for."""
    if fusion is not None and decoding != "auto":
        raise ValueError(f"--decoding {decoding} and --fusion {fusion}: name one of the two")
    return decoding if fusion is None else f"--fusion {fusion}"


def _printed(result: Recognized, format: Format, *, many: bool) -> str:
    from duolect.recognize.files import written

    if many and format == "json":  # one object a line, as in a hypotheses file
        return json.dumps(result.to_json(), ensure_ascii=False) + "\n"
    return ("" if format != "txt" or not many else f"{result.id}\t") + written(result, format)


def decode(
    data: Path,
    out: Path,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    decoding: str = "auto",
    fusion: Fusion | None = None,
    set: Settings = (),
    keep: int | None = None,
    limit: int | None = None,
    words: bool = False,
    overwrite: bool = False,
) -> int:
    """Recognizes a corpus into a hypotheses file (JSON lines with n-best lists and every scorer's part); continues a killed run.

    Example: duolect decode --data dev/manifest.jsonl --out ctc.jsonl --decoding ctc --nbest 64

    Args:
        data: Manifest, folder, LibriSpeech tree or audio file.
        out: The hypotheses file.
        models: Models.
        decoding: A named decoding (see `duolect compare --help`) or a JSON file; auto: labelwise-delayed where the unit LM has the
            acoustic model's units and there is one --lm, else as --fusion auto.
        fusion: How the models of --am and --lm are joined, in place of --decoding (see `duolect transcribe --help`).
        set: Changes fields of the decoding: --set beam=16 terms.llm.scale=0.3
        keep: At most so many hypotheses a line.
        limit: Only the first so many utterances.
        words: Also times and confidences of the words.
        overwrite: Replace an output that is there by other settings; one by the same is continued, or finished.
    """
    from duolect.recognize.files import decode_to_files

    at_least(1, keep=keep, limit=limit)
    writable("--out", out, inputs=[data])
    failures: list[str] = []
    source = source_of(data, failures)
    if source is None:
        return report(failures)
    utterances = source.utterances[:limit]
    warn = [u.fields for u in utterances]
    recognizer = recognizer_for(
        models, {"it": _joined(decoding, fusion)}, overrides=pairs(set, such_as="beam=16"), word_times=words, warn=warn
    )
    lines = decode_to_files(recognizer, utterances, {"it": out}, keep=keep, overwrite=overwrite)["it"]
    say_score(lines, data)
    return report([*failures, *(f"{r.id}: {r.error}" for r in lines if r.error is not None)], lines)


def rescore(
    hypotheses: Path,
    out: Path,
    lm: str = "duolect-lm",
    am: str = "",
    name: str = "llm",
    scale: float | None = None,
    scales: Path | None = None,
    prompt: str = "",
    batch: int = 8,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    overwrite: bool = False,
) -> int:
    """Adds a language model's score to every hypothesis of a hypotheses file, ranks anew if scales are given; continues a killed run.

    Example: duolect rescore --hypotheses ctc.jsonl --out llm.jsonl --lm smollm2-135m

    Args:
        hypotheses: A file from `duolect decode`.
        out: The file to write.
        lm: Language model; one in the hypotheses' own labels is recognized by its vocabulary, any other scores the text.
        am: Acoustic model of the hypotheses; asked for only where the language model is an n-gram over its labels.
        name: What the new part is called.
        scale: Its scale, the others' being 1; without --scale and --scales only the part is added, for `duolect tune`.
        scales: A scales file of `duolect tune`: ranks by all its scales.
        prompt: Text read before every transcript.
        batch: Utterances scored at once.
        device: auto, cpu, cuda, ...
        precision: Of the language model.
        overwrite: Replace an output that is there by other settings.
    """
    from duolect.config import digest
    from duolect.recognize.decoding import policy_of
    from duolect.recognize.files import Growing, read_settings, refuse_others
    from duolect.recognize.models import Models
    from duolect.run import progress_bar
    from duolect.search.rescore import labels_for, ranked, rescored

    at_least(1, batch=batch)
    writable("--out", out, inputs=[hypotheses])
    lines = recognized_in(hypotheses)
    parts = {part for line in lines for h in line.nbest for part in h.parts}
    if name in parts:
        raise ValueError(f"{hypotheses}: the hypotheses have a part {name!r} already: choose another --name")
    weights = _weights(name, scale, scales, parts, lines)
    made = read_settings(hypotheses)
    # Other hypotheses in a file of the same name are another run.
    of = digest({"lines": [line.to_json() for line in lines]})
    made["rescored"] = {**made.get("rescored", {}), name: {"lm": lm, "am": am, "prompt": prompt, "precision": precision, "of": of}}
    growing = Growing(out, made | ({"scales": dict(weights)} if weights else {}), overwrite=overwrite)
    refuse_others([growing])
    # Whole batches, because scores depend on what is in a batch by a rounding error.
    there = growing.there
    done = there[: len(there) if len(there) == len(lines) else len(there) // batch * batch]
    if growing.found == out:
        by = "".join(f" ({change})" for change in growing.older)
        print(f"{out}: finished already{by}: nothing to rescore", file=sys.stderr)
        say_score(there, hypotheses)
        return 0
    if done:
        print(f"continuing {growing.part}: {len(done)} of {len(lines)} utterances are done", file=sys.stderr)
    models = Models(device=device_of(device), precision=precision)
    scorer = models.language(lm, prompt=prompt, over=models.acoustic(am).vocabulary if am else None)
    found, begun = [h for line in lines for h in line.nbest], bool(prompt.strip())
    labels = labels_for(scorer.vocabulary, found, policy=policy_of(scorer), begun=begun)
    with growing.adding(done) as add:
        for start in progress_bar(range(len(done), len(lines), batch), unit="batch"):
            part, begin = lines[start : start + batch], perf_counter()
            lists = rescored([line.nbest for line in part], name=name, scorer=scorer, labels=labels)
            share = (perf_counter() - begin) / len(part)
            done += [
                replace(line, nbest=tuple(ranked(found, weights)), seconds=line.seconds + share)
                for line, found in zip(part, lists, strict=True)
            ]
            for line in done[start:]:
                add(line)
    growing.finish(done)
    say_score(done, hypotheses)
    return 0


def _weights(name: str, scale: float | None, file: Path | None, parts: set[str], lines: Sequence[Recognized]) -> Mapping[str, float]:
    """The scales to rank by: of a file, or 1 and that of the new part; none where none was given."""
    from duolect.evaluate.tune import read_scales, same_corpus_warning

    if file is None:
        if scale is not None and len(parts) > 1:
            print(f"ranking with scale 1 for {', '.join(sorted(parts))}; `duolect tune` finds better ones for --scales", file=sys.stderr)
        return {} if scale is None else {**dict.fromkeys(parts, 1.0), name: scale}
    if scale is not None:
        raise ValueError(f"--scale {scale} and --scales {file}: name one of the two")
    tuned = read_scales(file)
    if missing := tuned.scales.keys() - parts - {name}:
        raise ValueError(f"{file}: has a scale for {', '.join(missing)}, the hypotheses only {', '.join(sorted(parts))}: rescore first")
    if warning := same_corpus_warning(tuned, references={line.id: str(line.fields.get("text", "")) for line in lines}):
        print(f"warning: {file.name}: {warning}", file=sys.stderr)
    return tuned.scales


def compare(
    data: Path = DEMO,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    decodings: tuple[str, ...] = (),
    out: Path = Path("out/compare"),
    normalizer: Literal["none", "basic", "whisper-english"] = "whisper-english",
    limit: int | None = None,
    overwrite: bool = False,
) -> int:
    """Several decodings of one corpus side by side: WER with interval, errors by kind, speed; continues a killed run.

    Example: duolect compare --data dev/manifest.jsonl --decodings ctc rescore delayed --limit 50

    Named decodings: ctc-greedy ctc rescore rescore-prior delayed delayed-prior word-end shortest unit-rescore labelwise labelwise-prior
    labelwise-delayed aed-greedy aed aed+ctc-rescore aed+ctc-time aed+ctc-label sllm-greedy sllm sllm+ctc-rescore sllm+ctc-time
    sllm+ctc-label; all of these that fit the models by default. sllm-draft, sllm-length: only if named.

    Args:
        data: Manifest, folder or LibriSpeech tree with transcripts; default: the recordings that come with duolect.
        models: Models.
        decodings: Names or JSON files; the first is what the others are compared with.
        out: Folder for table.md, table.json and one hypotheses file per decoding.
        normalizer: What is done to both texts before words are compared.
        limit: Only the first so many utterances.
        overwrite: Replace hypotheses that are there by other settings; those by the same are not made again.
    """
    from duolect.evaluate.normalize import normalizer as normalizer_of
    from duolect.evaluate.table import rows
    from duolect.evaluate.wer import score_recognized
    from duolect.recognize.files import decode_to_files
    from duolect.recognize.presets import PRESETS

    at_least(1, limit=limit)
    writable("--out", out, folder=True)
    failures: list[str] = []
    source = source_of(data, failures)
    if source is None:
        return report(failures)
    if not (utterances := [u for u in source.utterances if u.text is not None][:limit]):
        raise ValueError(f"{data}: no utterance has a transcript ('text'), so nothing can be compared; `duolect transcribe` needs none")
    models = of_one_folder(models)
    named = decodings or list(PRESETS)
    recognizer = recognizer_for(models, {name: name for name in named}, warn=[u.fields for u in utterances])
    misfits = {} if decodings else recognizer.misfits()
    recognizer = replace(recognizer, decodings={name: d for name, d in recognizer.decodings.items() if name not in misfits})
    titles = {name: PRESETS[name].title if name in PRESETS else name for name in (*recognizer.decodings, *misfits)}
    notes = [f"left out: {titles[name]}: {why}" for name, why in misfits.items()]
    for note in notes:
        recognizer.models.say(note)
    files = _hypotheses_files(out / "hypotheses", list(recognizer.decodings))
    found = decode_to_files(recognizer, utterances, files, overwrite=overwrite)
    rule, corpus = normalizer_of(normalizer), corpus_name(data)
    scores = {titles[name]: score_recognized(lines, normalizer=rule, corpus=corpus) for name, lines in found.items()}
    write_tables(rows(scores), out, device=recognizer.models.device, notes=notes, left_out=misfits)
    print(f"\nwritten: {out / 'table.md'}, {out / 'table.json'}, {out / 'hypotheses'}/", file=sys.stderr)
    return report([*failures, *_failed(found, titles)], [r for lines in found.values() for r in lines])


def _hypotheses_files(folder: Path, decodings: Sequence[str]) -> dict[str, Path]:
    """A file for each decoding, by its name or its file's."""
    taken: set[str] = set()
    stems = {name: _file_name(Path(name).stem if name.endswith(".json") else name) for name in decodings}
    return {name: folder / _free(f"{stem}.jsonl", taken) for name, stem in stems.items()}


def _failed(found: Mapping[str, Sequence[Recognized]], titles: Mapping[str, str]) -> list[str]:
    """A line per utterance and cause; it names the decodings where it is not all of them."""
    which: dict[str, list[str]] = {}
    for name, lines in found.items():
        for r in lines:
            if r.error is not None:
                which.setdefault(f"{r.id}: {r.error}", []).append(titles[name])
    return [cause if len(failed) == len(found) else f"{', '.join(failed)}: {cause}" for cause, failed in which.items()]


def _file_name(id: str) -> str:
    """An id as the name of a file in one folder: ids may hold slashes and dots, which must not lead out of it."""
    return re.sub(r"[^\w.\- ]+", "_", id).lstrip(".") or "_"


def _free(name: str, taken: set[str]) -> str:
    """The file's name, numbered where this run has given it away already."""
    free, number = Path(name), 2
    while str(free) in taken:
        free, number = free.with_stem(f"{Path(name).stem}-{number}"), number + 1
    taken.add(str(free))
    return str(free)
