"""explain: why one hypothesis won against another."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from duolect.cli.checks import writable
from duolect.cli.options import ModelOptions, device_of, recognized_in, recognizer_for, source_of

if TYPE_CHECKING:
    from duolect.data.utterance import Utterance
    from duolect.recognize.decoding import Language
    from duolect.recognize.explain import Explanation, Row
    from duolect.recognize.recognizer import Recognizer
    from duolect.scorer import Recognized

MANY = 3
"""Words in a row that make no difference and are shown one by one."""


def explain(
    hypotheses: Positional[Path],
    id: Positional[str],
    /,
    models: Annotated[ModelOptions, arg(name="")] = ModelOptions(),
    against: str = "2",
    decoding: str = "",
    name: str = "",
    data: Path | None = None,
    all: bool = False,
    json: Path | None = None,
) -> int:
    """Why the best hypothesis of an utterance won: what each scorer gave to each word of it and of another, which adds up to their scores.

    Example: duolect explain llm.jsonl utterance-7 --against reference

    Args:
        hypotheses: A file from `duolect decode` or `rescore`; what made it is read from the .json beside it.
        id: Of the utterance.
        models: Models, where --decoding names what made the file. --lm: the model of a part that the decoding does not know. --scales: also
            a file of `duolect tune`, by whose scales hypotheses are then ranked and explained instead of those that made the file.
        against: The other hypothesis: a rank in the list, `reference` for the line's text, or any text.
        decoding: What made the file, where the .json beside it is missing: a named decoding or a JSON file.
        name: Which part is by --lm, where the decoding knows several not.
        data: The manifest or folder that was recognized, where its audio paths start there.
        all: Show every word; else many in a row that make no difference are one line.
        json: Also write everything to this file.
    """
    from duolect.evaluate.tune import read_scales
    from duolect.recognize.explain import explained, scorers_of, written
    from duolect.recognize.files import read_settings
    from duolect.run import write_json

    writable("--json", json, inputs=[hypotheses], kinds=[".json"])
    ranking = models.scales if models.scales is not None and models.scales.is_file() else None
    line = _line(recognized_in(hypotheses), id, hypotheses)
    made = {} if decoding else read_settings(hypotheses)
    chosen: Mapping[str, float] = read_scales(ranking).scales if ranking else made.get("scales", {})
    if missing := chosen.keys() - line.nbest[0].parts.keys():
        has = ", ".join(line.nbest[0].parts) or "none"
        raise ValueError(f"{ranking or hypotheses}: scales for {', '.join(sorted(missing))}, but {id} has the parts {has}")
    listed = sorted(line.nbest, key=lambda h: -h.score(chosen)) if ranking else list(line.nbest)
    rank = _rank(against, line, len(listed))
    recognizer = _recognizer(made, decoding, models, hypotheses)
    batch = recognizer.batch_of(_utterance(line, hypotheses, data))
    known = recognizer.decodings["it"]
    rescored = _rescored(made, models, name, [part for part in line.nbest[0].parts if part not in known.scales()])
    scorers = scorers_of(known, batch, rescored)
    other = listed[rank - 1] if rank else written(line.fields["text"] if against == "reference" else against, scorers)
    rank = rank or next((i for i, h in enumerate(listed, start=1) if h.text.strip() == other.text), 0)
    if rank:
        other = listed[rank - 1]
    if rank == 1:
        raise ValueError(f"--against {against}: that is the best hypothesis itself; name another rank or text")
    scales = chosen or known.scales()
    found = explained(listed[0], other, scorers=scorers, scales=scales)
    found = replace(found, notes=[*found.notes, *_notes(found, rank, known, ranking)])
    print(_shown(found, line, rank, against, every=all))
    if json is not None:
        write_json(json, {"id": line.id, "rank": rank or None, **found.to_json()})
    return 0


def _line(lines: list[Recognized], id: str, path: Path) -> Recognized:
    found = next((line for line in lines if line.id == id), None)
    if found is None:
        near = difflib.get_close_matches(id, [line.id for line in lines], 1)
        raise ValueError(f"{path}: no line has id {id!r}{f', is {near[0]} meant?' if near else f' ({len(lines)} have others)'}")
    if not found.nbest:
        raise ValueError(f"{path}: {id} has no hypothesis" + (f" ({found.error})" if found.error else ""))
    return found


def _rank(against: str, line: Recognized, count: int) -> int:
    """The rank that is asked for, 0 for a text."""
    if against == "reference" and not isinstance(line.fields.get("text"), str):
        raise ValueError(f"--against reference: {line.id} has no reference in its field 'text'")
    if not against.strip():
        raise ValueError("--against: expected a rank, `reference` or a text")
    if not against.lstrip("-").isdigit():
        return 0
    if not 2 <= int(against) <= count:
        some = f"{count} hypotheses: name a rank from 2 to {count}" if count > 1 else "one hypothesis only: name a text, or `reference`"
        raise ValueError(f"--against {against}: {line.id} has {some}")
    return int(against)


def _recognizer(made: Mapping[str, Any], decoding: str, models: ModelOptions, path: Path) -> Recognizer:
    """Of the decoding that made the file, by its settings or by --decoding."""
    from duolect.config import from_json
    from duolect.recognize.models import Models
    from duolect.recognize.recognizer import Recognizer

    if decoding:
        folder = None if models.scales is not None and models.scales.is_file() else models.scales
        return recognizer_for(replace(models, scales=folder), {"it": decoding})
    if models.scales is not None and not models.scales.is_file():
        raise ValueError(f"--scales {models.scales}: expected a scales file of `duolect tune`; folders of them go with --decoding")
    if "decoding" not in made:
        raise ValueError(f"{path}.json, which says what made {path.name}, is not there: name it with --decoding (and --am, --lm, ...)")
    known = from_json(made["decoding"], where=f"{path}.json")
    return Recognizer(Models(device=device_of(models.device), precision=made["precision"]), made["acoustic"], {"it": known})


def _rescored(made: Mapping[str, Any], models: ModelOptions, name: str, unknown: list[str]) -> dict[str, Language]:
    """The language models of parts that the decoding does not know: as `duolect rescore` noted them, or --lm."""
    from duolect.recognize.decoding import Language

    found = {part: Language(x["lm"], 1.0, prompt=x["prompt"]) for part, x in made.get("rescored", {}).items() if part in unknown}
    if name and name not in unknown:
        raise ValueError(f"--name {name}: expected a part that the decoding does not know: {', '.join(unknown) or 'there is none'}")
    lms = list(models.lm)
    if lms and made and not name and all(part in found for part in unknown):
        raise ValueError(f"--lm {lms[0]}: the file's .json says by which model each part is: leave --lm out, or name a part with --name")
    if lms and (rest := [name] if name else [part for part in unknown if part not in found]):
        if len(rest) > 1:
            raise ValueError(f"--lm {lms[0]}: the decoding does not know {', '.join(rest)}: say with --name which of them is by that model")
        if len(lms) > 1:
            raise ValueError(f"--lm {' '.join(lms)}: one model at a time explains a part that the decoding does not know")
        found[rest[0]] = Language(lms[0], 1.0, prompt=models.prompt)
    return found


def _utterance(line: Recognized, path: Path, data: Path | None) -> Utterance:
    from duolect.data.utterance import Utterance

    if data is not None:
        failures: list[str] = []
        source = source_of(data, failures)
        found = next((u for u in source.utterances if u.id == line.id), None) if source else None
        if found is None:
            raise ValueError(f"--data {data}: has no utterance {line.id}" + (f" ({failures[0]})" if failures else ""))
        return found
    if not isinstance(audio := line.fields.get("audio_filepath"), str):
        raise ValueError(f"{path}: {line.id} has no audio_filepath: name the manifest with --data")
    if not (path.parent / audio).is_file():
        raise ValueError(f"{path.parent / audio}: is not there; if the paths of {path.name} start elsewhere, name the manifest with --data")
    span = line.fields.get("audio_bytes")
    return Utterance(line.id, path.parent / audio, None, None, line.fields, span and (span[0], span[1]))


def _notes(found: Explanation, rank: int, decoding: Any, by: Path | None) -> list[str]:
    from duolect.recognize.explain import summed

    notes = []
    if rank:
        if found.difference < 0:
            notes.append(f"A is the first by {by}" if by else "A is the first all the same: it was ranked by other scales")
    elif found.difference < 0:
        notes.append("B is better by these scores and not in the list: the search lost it; a larger --beam or --nbest may find it")
    else:
        notes.append("B is not in the list, and these scores do not want it: no larger beam would choose it")
    if exponent := getattr(decoding, "length_exponent", 0.0):
        both = (found.a, summed(found.rows).parts_a), (found.b, summed(found.rows).parts_b)
        a, b = (sum(found.scales[n] * x for n, x in parts.items()) / (len(h.labels) + 1) ** exponent for h, parts in both)
        notes.append(f"the search ranked by score / (labels + 1)^{exponent:g}: A {a:.3f}, B {b:.3f}")
    return notes


def _shown(found: Explanation, line: Recognized, rank: int, against: str, *, every: bool) -> str:
    """The table for people."""
    from duolect.evaluate.table import aligned
    from duolect.recognize.explain import summed

    names, table = found.names, [["", "A", "B", *(cell for name in found.names for cell in (f"{name} A", f"{name} B", "diff")), "A - B"]]

    def add(mark: str, a: str, b: str, row: Row) -> None:
        numbers = []
        for n in names:
            numbers += [f"{row.parts_a[n]:.2f}" if a else "", f"{row.parts_b[n]:.2f}" if b else ""]
            numbers.append(f"{row.difference[n]:+.2f}" if abs(row.difference[n]) >= 0.005 else ".")
        table.append([mark, a, b, *numbers, f"{row.total:+.2f}" if abs(row.total) >= 0.005 else "."])

    for alike, run in groupby(found.rows, key=lambda r: r.same and all(abs(x) < 0.005 for x in r.difference.values())):
        rows = list(run)
        if alike and len(rows) > MANY and not every:
            add("", f"({len(rows)} words)", '"', summed(rows))
            continue
        for row in rows:
            add("" if row.same else "*", row.a, '"' if row.same else row.b, row)
    add("", "sum", "sum", summed(found.rows))
    what = f"rank {rank}" if rank else "the reference" if against == "reference" else "the text given"
    score = " ".join(f"{found.scales[n]:+g} {n}" for n in names if found.scales[n]).removeprefix("+")
    head = [
        f"{line.id}: score = {score}; natural log; diff: scaled, A minus B",
        f"A (rank 1): {found.a.text.strip()}",
        f"B ({what}): {found.b.text.strip()}",
    ]
    return "\n".join([*head, "", aligned(table, left=3), "", found.verdict, *found.notes])
