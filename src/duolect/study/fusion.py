"""How a CTC model and language models are best joined: every schedule, beam and prior, scales tuned on other speech (paper.md 4.1)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from duolect.config import digest
from duolect.data.sources import open_source
from duolect.data.utterance import Utterance
from duolect.evaluate.nbest import nbest_lists
from duolect.evaluate.normalize import normalizer
from duolect.evaluate.surface import Range
from duolect.evaluate.table import Row, rows
from duolect.evaluate.tune import Tuned, tune, write_scales
from duolect.evaluate.wer import Score, score_recognized
from duolect.recognize.decoding import Decoding, Greedy, Language, Prior, Term, TimeSynchronous, policy_of
from duolect.recognize.files import decode_to_files
from duolect.recognize.models import Models
from duolect.recognize.recognizer import Recognizer
from duolect.run import write_json
from duolect.scorer import Recognized, Scorer, read_hypotheses, write_hypotheses
from duolect.search.fusion import AtWordEnd, Every, EveryLabel, LabelPrior, Schedule, ShortestHypothesis
from duolect.search.rescore import LabelsOf, labels_of_text, own_labels, ranked, rescored

KINDS = ("softmax", "counts", "sampled", "llm")


@dataclass(frozen=True)
class FusionStudy:
    """A CTC model and language models by the names of their rows. tune, test: corpora of other speakers; limit: utterances of each.

    nbest: of the lists that are rescored, and that scales are tuned on; beam: of one-pass search; interval: frames between two scorings
    where nothing else is said; intervals, beams: what is varied.
    """

    am: str
    lms: Mapping[str, str]
    tune: str
    test: str
    priors: Sequence[str] = KINDS
    intervals: Sequence[int] = (1, 5, 10, 20)
    beams: Sequence[int] = (1, 4, 8, 16, 32, 64)
    interval: int = 20
    beam: int = 8
    nbest: int = 64
    limit: int | None = None


@dataclass
class _Study:
    """A study at work: the table's lines as they come."""

    study: FusionStudy
    models: Models
    out: Path
    scores: dict[str, Score] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def same(self, lm: str) -> bool:
        """Whether a language model's labels are the CTC model's."""
        return self._lm(lm).vocabulary.digest() == self.models.acoustic(self.study.am).vocabulary.digest()

    def _lm(self, lm: str) -> Any:
        return self.models.language(self.study.lms[lm])

    def kinds(self, lm: str) -> list[str]:
        """The priors that there are for a language model, `` for none."""
        return ["", *(kind for kind in self.study.priors if not (kind == "llm" and self.same(lm)))]

    def lists(self, corpus: str, utterances: Sequence[Utterance]) -> list[Recognized]:
        """The corpus' n-best lists with the part of every language model and prior; what is in the file already is not computed again."""
        path, study = self.out / f"{corpus}.jsonl", self.study
        found = list(read_hypotheses(path)) if path.is_file() else []
        if [line.id for line in found] != [u.id for u in utterances]:
            recognizer = Recognizer(self.models, study.am, {"lists": TimeSynchronous(study.nbest)})
            found = decode_to_files(recognizer, utterances, {"lists": path})["lists"]
        for name, scorer, labels in self._scorers():
            if all(name in h.parts for line in found for h in line.nbest):
                continue
            self.models.say(f"{corpus}: {name} of {sum(len(line.nbest) for line in found)} hypotheses")
            for start in range(0, len(found), 8):
                part = found[start : start + 8]
                scored = rescored([line.nbest for line in part], name=name, scorer=scorer, labels=labels)
                found[start : start + 8] = [replace(line, nbest=tuple(h)) for line, h in zip(part, scored, strict=True)]
            write_hypotheses(path, found)
        return list(read_hypotheses(path))  # as rounded there, so that a run that goes on finds the same scales

    def _scorers(self) -> list[tuple[str, Scorer[Any], LabelsOf]]:
        """(part, its scorer, how it reads hypotheses) of language models and priors."""
        study, own = self.study, self.models.acoustic(self.study.am).vocabulary
        found: list[tuple[str, Scorer[Any], LabelsOf]] = [
            (kind, LabelPrior(self.models.prior(study.am, kind), own), own_labels) for kind in study.priors if kind != "llm"
        ]
        for lm, model in study.lms.items():
            scorer = self._lm(lm)
            labels = own_labels if self.same(lm) else labels_of_text(scorer.vocabulary, policy=policy_of(scorer))
            found.append((lm, scorer, labels))
            if "llm" in self.kinds(lm):
                prior = LabelPrior(self.models.prior(study.am, "llm", of=model), scorer.vocabulary)
                found.append((f"llm {lm}", prior, labels))
        return found

    def add(self, title: str, lines: Sequence[Recognized], *, timed: bool = True) -> None:
        """A line of the table."""
        self.scores[title] = score_recognized(lines, normalizer=normalizer("whisper-english"), corpus=Path(self.study.test).stem)
        if timed:
            self.seconds[title] = sum(r.seconds for r in lines)

    def tuned(self, lm: str, kind: str, lists: Sequence[Recognized]) -> Tuned:
        """The scales of a language model and a prior on n-best lists, that of CTC being 1; also written to a file."""
        prior = f"llm {lm}" if kind == "llm" else kind
        numbers = nbest_lists(lists, normalizer=normalizer("whisper-english"), parts=["ctc", lm, *([prior] if kind else [])])
        free = {lm: Range(0.0, 2.0), **({prior: Range(-2.0, 0.0, of=lm)} if kind else {})}
        found = tune(numbers, reference="ctc", free=free)
        write_scales(self.out / "scales" / f"{_file(lm)}-{kind or 'none'}.json", tuned=found)
        return found

    def one_pass(self, lm: str, tuned: Mapping[str, Tuned], best: str) -> dict[str, Decoding]:
        """The one-pass decodings of a language model by the titles of their rows; best: the prior where it is not varied."""
        study, model, same = self.study, self.study.lms[lm], self.same(lm)

        def made(kind: str, when: Schedule, beam: int = study.beam, prior_when: Schedule | None = None) -> Decoding:
            scales = list(tuned[kind].scales.values())
            terms: dict[str, Term] = {"lm": Language(model, scales[1], when)}
            if kind:
                held = not same and prior_when is None
                of = model if kind == "llm" else ""
                terms["prior"] = Prior(kind, scales[2], prior_when or when, words=held and not of, of=of)
            return TimeSynchronous(beam, terms)

        usual: Schedule = EveryLabel() if same else Every(study.interval)
        named = "label-wise" if same else f"every {study.interval}"
        found = {f"{_with(lm, kind)}, {named}": made(kind, usual) for kind in self.kinds(lm)}
        title = _with(lm, best)
        if not same:
            found |= {f"{title}, every {n}": made(best, Every(n)) for n in study.intervals if n != study.interval}
            found |= {f"{title}, word end": made(best, AtWordEnd()), f"{title}, shortest hypothesis": made(best, ShortestHypothesis(4))}
            found |= (
                {f"{title}, every {study.interval}, prior at once": made(best, usual, prior_when=EveryLabel())} if best in KINDS[:3] else {}
            )
        return found | {f"{title}, {named}, beam {n}": made(best, usual, n) for n in study.beams if n != study.beam}


def measured(study: FusionStudy, out: Path, models: Models) -> tuple[Row, ...]:
    """The rows of a study; what is in `out` already is not made again. ValueError, ModelError, PriorError for what cannot be compared."""
    work, heard = _Study(study, models, out), {}
    _same_models(study, out)
    for name, source in (("tune", study.tune), ("test", study.test)):
        heard[name] = [u for u in open_source(source).utterances if u.text is not None][: study.limit]
        if not heard[name]:
            raise ValueError(f"{source}: no utterance has a transcript, so nothing can be compared")
    if both := {u.id for u in heard["tune"]} & {u.id for u in heard["test"]}:
        raise ValueError(
            f"{len(both)} utterances, such as {min(both)}, are in {study.tune} and in {study.test}: scales need speech of their own"
        )
    lists = {name: work.lists(name, utterances) for name, utterances in heard.items()}
    chosen: dict[str, Decoding] = {"CTC greedy": Greedy(), f"CTC beam {study.beam}": TimeSynchronous(study.beam)}
    rescoring: dict[str, list[Recognized]] = {}
    for lm in study.lms:
        tuned = {kind: work.tuned(lm, kind, lists["tune"]) for kind in work.kinds(lm)}
        for kind, found in tuned.items():
            best = [replace(line, nbest=tuple(ranked(line.nbest, found.scales))) for line in lists["test"]]
            rescoring[f"{_with(lm, kind)}, {study.nbest}-best rescoring"] = best
        chosen |= work.one_pass(lm, tuned, min(tuned, key=lambda kind: tuned[kind].cross_validated or tuned[kind].wer))
    # Other scales make another decoding: its name says so, and what was decoded by older ones is left alone.
    files = {title: out / "hypotheses" / f"{_file(title)}-{digest(decoding)[:6]}.jsonl" for title, decoding in chosen.items()}
    known = {title: list(read_hypotheses(path)) for title, path in files.items() if path.is_file()}
    missing = {t: path for t, path in files.items() if [r.id for r in known.get(t, ())] != [u.id for u in heard["test"]]}
    if missing:
        recognizer = Recognizer(models, study.am, {title: chosen[title] for title in missing})
        known |= decode_to_files(recognizer, heard["test"], missing)
    for title in list(chosen)[:2]:
        work.add(title, known[title])
    for lm in study.lms:  # a language model's lines together: first of lists, then of one pass
        for title, lines in {**rescoring, **known}.items():
            if title.startswith((f"+ {lm},", f"+ {lm} -")) and title not in work.scores:
                work.add(title, lines, timed=title in known)
    audio = sum(float(r.fields.get("duration") or 0.0) for r in known["CTC greedy"])
    return rows(work.scores, seconds=work.seconds, audio_seconds=audio)


def _same_models(study: FusionStudy, out: Path) -> None:
    """Writes out/models.json; ValueError where what lies there is of other models, or of older weights in the same folders."""

    def state(name: str) -> list[Any]:
        place = Path(name)
        files = [x for x in (place, *place.glob("*")) if x.is_file()]
        return [str(place.resolve()) if files else name, max((x.stat().st_mtime_ns for x in files), default=0)]

    path, new = (
        out / "models.json",
        {"--am": state(study.am), **{f"--lm {x}": state(y) for x, y in study.lms.items()}, "--nbest": study.nbest},
    )
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and (out / "tune.jsonl").is_file() else {}
    if other := [name for name in new if old.get(name, new[name]) != new[name]]:
        raise ValueError(
            f"{out} holds a study of another or since changed {', '.join(other)} (see {path}): name another --out, or delete the folder"
        )
    write_json(path, {**old, **new})


def _with(lm: str, kind: str) -> str:
    return f"+ {lm} - {kind} prior" if kind else f"+ {lm}"


def _file(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title).split())
