"""transcribe, decode, rescore, compare: audio in, hypotheses out."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from duolect.data.sources import Source
    from duolect.recognize.presets import Ingredients
    from duolect.recognize.recognizer import Recognizer


DEMO = Path(__file__).parents[1] / "embedded" / "demo"


@dataclass(frozen=True)
class ModelOptions:
    """Which models, on what."""

    am: str = "duolect-ctc"
    """CTC acoustic model: an embedded name, a model folder, a hub id."""
    lm: str = "smollm2-135m"
    """Language model: an embedded name, a folder, a .gguf file, a hub id; any tokenizer."""
    unit_lm: str = "duolect-unit-lm"
    """Language model in the acoustic model's own labels, for label-wise fusion."""
    aed: str = "whisper-base"
    """Attention encoder-decoder (Whisper)."""
    scales: Path | None = None
    """A folder of scales files as `duolect tune` writes them (llm.json, unit.json, ...); default: the acoustic model's own."""
    beam: int = 8
    """Hypotheses kept by one-pass fusion."""
    nbest: int = 20
    """Hypotheses kept where nothing is fused before the end (CTC beam, rescoring)."""
    interval: int = 20
    """Frames between two scorings of delayed fusion."""
    prompt: str = ""
    """Text the language model reads before every transcript: a topic, names, a sentence in the right style."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of language and attention models; scores in bfloat16 differ by tenths of a nat."""
    batch_seconds: float = 120.0
    """Padded audio recognized at once; halved by itself when memory runs out."""


def transcribe(
    files: Positional[tuple[Path, ...]],
    /,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    decoding: str = "auto",
    format: Literal["txt", "json", "srt", "vtt", "ctm"] = "txt",
    out: Path | None = None,
) -> int:
    """Transcribes audio files and folders.

    Args:
        files: Audio files, folders of them, or manifests.
        models: Models.
        decoding: A named decoding (see `duolect compare --help`) or a JSON file; auto: labelwise-delayed where the unit LM has the
            acoustic model's units, else delayed.
        format: What is written: plain text, or with word times and confidences.
        out: Folder for one file per recording; without it everything goes to standard output.
    """
    from duolect.recognize.files import written

    if not files:
        raise ValueError("name at least one audio file, folder or manifest")
    recognizer = _recognizer(models, {"it": decoding}, word_times=format != "txt")
    failures: list[str] = []
    taken: set[Path] = set()
    for path in files:
        source = _source(path, failures)
        if source is None:
            continue
        found = {r.id: r for results in recognizer.recognize(source.utterances, progress=sys.stderr.isatty()) for r in results.values()}
        for result in (found[u.id] for u in source.utterances):
            if result.error is not None:
                failures.append(f"{result.fields.get('audio_filepath', result.id)}: {result.error}")
                continue
            text = written(result, format)
            if out is None:
                many = len(files) > 1 or len(source.utterances) > 1
                print(f"{result.id}\t{text}" if many and format == "txt" else text, end="", flush=True)
            else:
                target = _free(out / f"{_file_name(result.id)}.{format}", taken)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
    return _report(failures)


def decode(
    data: Path,
    out: Path,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    decoding: str = "auto",
    set: UseAppendAction[tuple[str, ...]] = (),
    keep: int | None = None,
    words: bool = False,
) -> int:
    """Recognizes a corpus into a hypotheses file (JSON lines with n-best lists and every scorer's part); continues a killed run.

    Args:
        data: Manifest, folder, LibriSpeech tree or audio file.
        out: The hypotheses file.
        models: Models.
        decoding: A named decoding (see `duolect compare --help`) or a JSON file; auto: labelwise-delayed where the unit LM has the
            acoustic model's units, else delayed.
        set: Changes a field of the decoding: --set beam=16 --set terms.llm.scale=0.3
        keep: At most so many hypotheses a line.
        words: Also times and confidences of the words.
    """
    from duolect.recognize.files import decode_to_file

    failures: list[str] = []
    source = _source(data, failures)
    if source is None:
        return _report(failures)
    recognizer = _recognizer(models, {"it": decoding}, overrides=_pairs(set), word_times=words)
    lines = decode_to_file(recognizer, "it", source.utterances, out, keep=keep)
    failures += [f"{r.id}: {r.error}" for r in lines if r.error is not None]
    _say_score(lines, data)
    return _report(failures)


def rescore(
    hypotheses: Path,
    out: Path,
    lm: str = "smollm2-135m",
    name: str = "llm",
    scale: float | None = None,
    prompt: str = "",
    batch: int = 8,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
) -> int:
    """Adds a language model's score to every hypothesis of a hypotheses file, and ranks anew if a scale is given.

    Args:
        hypotheses: A file from `duolect decode`.
        out: The file to write.
        lm: Language model; one in the hypotheses' own labels is recognized by its vocabulary, any other scores the text.
        name: What the new part is called.
        scale: Its scale; without one only the part is added, for `duolect tune`.
        prompt: Text read before every transcript.
        batch: Utterances scored at once.
        device: auto, cpu, cuda, ...
        precision: Of the language model.
    """
    from dataclasses import replace

    from tqdm import tqdm

    from duolect.recognize.models import Models
    from duolect.scorer import read_hypotheses, write_hypotheses
    from duolect.search.rescore import labels_for, ranked, rescored

    lines = list(read_hypotheses(hypotheses))
    scorer = Models(device=_device(device), precision=precision).language(lm, prompt=prompt)
    if any(name in h.parts for line in lines for h in line.nbest):
        raise ValueError(f"{hypotheses}: the hypotheses have a part {name!r} already: choose another --name")
    if batch < 1:
        raise ValueError(f"--batch {batch}: at least 1 utterance has to be scored at once")
    labels = labels_for(scorer.vocabulary, [h for line in lines for h in line.nbest], begun=bool(prompt.strip()))
    done = []
    for start in tqdm(range(0, len(lines), batch), unit="batch", disable=not sys.stderr.isatty()):
        part = lines[start : start + batch]
        lists = rescored([line.nbest for line in part], name=name, scorer=scorer, labels=labels)
        done += [replace(line, nbest=tuple(found)) for line, found in zip(part, lists, strict=True)]
    if scale is not None:
        names = {p for line in done for h in line.nbest for p in h.parts} - {name}
        scales = {**dict.fromkeys(names, 1.0), name: scale}
        if len(names) > 1:
            print(
                f"ranking with scale 1 for {', '.join(sorted(names))}; tune them together for better: duolect tune {out}", file=sys.stderr
            )
        done = [replace(line, nbest=tuple(ranked(line.nbest, scales))) for line in done]
    write_hypotheses(out, done)
    _say_score(done, hypotheses)
    return 0


def compare(
    data: Path = DEMO,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    decodings: tuple[str, ...] = (),
    out: Path = Path("out/compare"),
    normalizer: Literal["none", "basic", "whisper-english"] = "whisper-english",
    limit: int | None = None,
) -> int:
    """Several decodings of one corpus side by side: WER with interval, errors by kind, speed, difference to the first row.

    Named decodings: ctc-greedy ctc rescore rescore-prior delayed delayed-prior word-end shortest unit-rescore labelwise labelwise-prior
    labelwise-delayed aed-greedy aed aed+ctc-rescore aed+ctc-time aed+ctc-label; all of them by default.

    Args:
        data: Manifest, folder or LibriSpeech tree with transcripts; default: the recordings that come with duolect.
        models: Models.
        decodings: Names or JSON files; the first is what the others are compared with.
        out: Folder for table.md, table.json and one hypotheses file per decoding.
        normalizer: What is done to both texts before words are compared.
        limit: Only the first so many utterances.
    """
    from duolect.evaluate.normalize import normalizer as normalizer_of
    from duolect.evaluate.table import json_table, markdown_table, plain_table, rows
    from duolect.evaluate.wer import score_recognized
    from duolect.recognize.presets import PRESETS
    from duolect.run import environment, write_json
    from duolect.scorer import write_hypotheses

    failures: list[str] = []
    source = _source(data, failures)
    if source is None:
        return _report(failures)
    utterances = [u for u in source.utterances if u.text is not None][:limit]
    if not utterances:
        raise ValueError(f"{data}: no utterance has a transcript ('text'), so nothing can be compared; `duolect transcribe` needs none")
    names = decodings or tuple(PRESETS)
    recognizer = _recognizer(models, {name: name for name in names}, warn=[u.fields for u in utterances])
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for results in recognizer.recognize(utterances):
        for name, result in results.items():
            found[name][result.id] = result
    scores, seconds, audio = {}, {}, 0.0
    for name in names:
        lines = [found[name][u.id] for u in utterances]
        write_hypotheses(out / "hypotheses" / f"{_file_name(Path(name).stem if name.endswith('.json') else name)}.jsonl", lines)
        title = PRESETS[name].title if name in PRESETS else name
        scores[title] = score_recognized(
            lines, normalizer=normalizer_of(normalizer), corpus=str(data.name if data.is_dir() else data.parent.name)
        )
        seconds[title] = sum(r.seconds for r in lines)
        audio = max(audio, sum(float(r.fields.get("duration") or 0) for r in lines if r.error is None))
        failures += [f"{title}: {r.id}: {r.error}" for r in lines if r.error is not None]
    table = rows(scores, seconds=seconds, audio_seconds=audio)
    print(plain_table(table))
    (out / "table.md").write_text(markdown_table(table) + "\n", encoding="utf-8")
    write_json(out / "table.json", {"table": json_table(table), "env": environment(device=recognizer.models.device, seed=0)})
    print(f"\nwritten: {out / 'table.md'}, {out / 'table.json'}, {out / 'hypotheses'}/", file=sys.stderr)
    return _report(failures)


def _recognizer(
    options: ModelOptions,
    decodings: Mapping[str, str],
    *,
    overrides: Mapping[str, str] | None = None,
    word_times: bool = False,
    warn: Sequence[Mapping[str, Any]] = (),
) -> Recognizer:
    _quiet()
    from duolect.recognize.models import Models
    from duolect.recognize.presets import decoding_of
    from duolect.recognize.recognizer import Recognizer

    models = Models(device=_device(options.device), precision=options.precision)
    decodings = {name: _chosen(which, options, models) for name, which in decodings.items()}
    ingredients = _ingredients(options, models, decodings.values(), warn)
    made = {name: decoding_of(which, ingredients, overrides) for name, which in decodings.items()}
    return Recognizer(models, options.am, made, batch_seconds=options.batch_seconds, word_times=word_times)


def _chosen(decoding: str, options: ModelOptions, models: Any) -> str:
    """The name of a decoding, `auto` replaced: both language models where the unit LM speaks the acoustic model's units."""
    from duolect.models.embedded import resolve
    from duolect.vocabulary import VocabularyError, load_vocabulary

    if decoding != "auto":
        return decoding
    place = Path(resolve(options.unit_lm))
    if not place.exists():
        raise ValueError(f"--unit-lm {options.unit_lm}: is no embedded model and no folder; see `duolect models list`")
    try:
        same = load_vocabulary(place).digest() == models.acoustic(options.am).vocabulary.digest()
    except VocabularyError:
        same = False
    return "labelwise-delayed" if same else "delayed"


def _ingredients(options: ModelOptions, models: Any, decodings: Any, warn: Sequence[Mapping[str, Any]]) -> Ingredients:
    from duolect.evaluate.tune import read_scales, same_corpus_warning
    from duolect.recognize.presets import DEFAULT_SCALES, PRESETS, Ingredients

    if min(options.beam, options.nbest) < 1:
        raise ValueError(f"a beam of {min(options.beam, options.nbest)} holds no hypothesis: give 1 or more")
    folder = options.scales or models.scales_folder(options.am)
    if options.scales is not None and not options.scales.is_dir():
        raise ValueError(
            f"--scales {options.scales}: is no folder: name the folder of the files that `duolect tune` writes (llm.json, ...)"
        )
    scales = dict(DEFAULT_SCALES)
    references = {str(f["id"]): str(f.get("text", "")) for f in warn}
    for wanted in sorted({p.scales for name in decodings if (p := PRESETS.get(name)) and p.scales}):
        path = folder / f"{wanted}.json" if folder else None
        if path is not None and path.is_file():
            tuned = read_scales(path)
            if missing := set(DEFAULT_SCALES[wanted]) - set(tuned.scales):
                raise ValueError(
                    f"{path}: has scales for {', '.join(tuned.scales)}, but {wanted} needs {', '.join(missing)}: name the parts so"
                )
            scales[wanted] = {**DEFAULT_SCALES[wanted], **tuned.scales}
            note = f"tuned on {tuned.corpus or path}"
            if warning := same_corpus_warning(tuned, references=references):
                models.say(f"warning: {path.name}: {warning}")
        else:
            note = f"not tuned for this pair of models: `duolect tune` writes {wanted}.json"
        models.say(f"scales {wanted}: " + ", ".join(f"{k} {v:g}" for k, v in scales[wanted].items()) + f" ({note})")
    return Ingredients(
        lm=options.lm,
        unit_lm=options.unit_lm,
        aed=options.aed,
        prompt=options.prompt,
        beam=options.beam,
        nbest=options.nbest,
        interval=options.interval,
        scales=scales,
    )


def _source(path: Path, failures: list[str]) -> Source | None:
    from duolect.data.sources import SourceError, open_source

    try:
        source = open_source(path)
    except SourceError as error:
        failures.append(str(error))
        return None
    failures += [str(p) for p in source.problems]
    return source


def _device(name: str) -> str:
    import torch

    if name != "auto":
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {name} was asked for, but torch sees no CUDA device here: use --device cpu, and see `duolect doctor`")
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quiet() -> None:
    # Loading bars and notes of transformers would tear our own progress line apart.
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _file_name(id: str) -> str:
    """An id as the name of a file in one folder: ids may hold slashes and dots, which must not lead out of it."""
    return re.sub(r"[^\w.\- ]+", "_", id).lstrip(".") or "_"


def _free(path: Path, taken: set[Path]) -> Path:
    """The path, numbered where this run has written one of that name already."""
    free, number = path, 2
    while free in taken:
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    taken.add(free)
    return free


def _pairs(assignments: Sequence[str]) -> dict[str, str]:
    for text in assignments:
        if "=" not in text:
            raise ValueError(f"--set {text}: expected field=value, for example --set beam=16")
    return dict(text.split("=", 1) for text in assignments)


def _say_score(lines: Sequence[Any], data: Path) -> None:
    from duolect.evaluate.normalize import normalizer
    from duolect.evaluate.wer import score_recognized

    if lines and all(isinstance(r.fields.get("text"), str) for r in lines):
        print(score_recognized(lines, normalizer=normalizer("whisper-english"), corpus=data.parent.name), file=sys.stderr)


def _report(failures: Sequence[str]) -> int:
    if failures:
        print(f"\n{len(failures)} failed:", file=sys.stderr)
        for line in failures:
            print(f"  {line}", file=sys.stderr)
    return 1 if failures else 0
