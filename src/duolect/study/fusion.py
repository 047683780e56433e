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
from duolect.recognize.models import Models, state_of
from duolect.recognize.recognizer import Recognizer
from duolect.run import write_json
from duolect.scorer import Recognized, Scorer, read_hypotheses, write_hypotheses
from duolect.search.fusion import AtWordEnd, Every, EveryLabel, LabelPrior, Schedule, ShortestHypothesis
from duolect.search.rescore import LabelsOf, labels_of_text, own_labels, ranked, rescored

KINDS = ("softmax", "counts", "sampled", "llm")


@dataclass(frozen=True)
class FusionStudy:
    """A CTC model and language models by the names of their rows. tune, test: corpora of other speakers; limit: utterances of each.

    nbest: of the lists that are rescored, and that scales are tuned on; rounds: how often they are tuned anew with what one-pass search
    found. beam: of one-pass search; interval: frames between two scorings where nothing else is said; intervals, beams: what is varied.
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
    rounds: int = 1
    limit: int | None = None


@dataclass
class _Study:
    """A study at work: the table's lines as they come."""

    study: FusionStudy
    models: Models
    out: Path
    scores: dict[str, Score] = field(default_factory=dict)
    rounds: int = 0  # of decoding, begun

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

    def add(self, title: str, lines: Sequence[Recognized]) -> None:
        """A line of the table."""
        self.scores[title] = score_recognized(lines, normalizer=normalizer("whisper-english"), corpus=Path(self.study.test).stem)

    def tuned(self, lm: str, kind: str, lists: Sequence[Recognized], utterances: Sequence[Utterance]) -> tuple[Tuned, Tuned]:
        """The scales of a language model and a prior for rescoring and for one pass, that of CTC being 1; also written to files.

        The former are the best on the n-best lists; the latter, `rounds` times, on these and all that one-pass search found by the last
        ones: lists hold nothing that a language model with too large a scale would do, such as leaving words out.
        """
        prior = f"llm {lm}" if kind == "llm" else kind
        names = {"ctc": "ctc", "lm": lm, **({"prior": prior} if kind else {})}
        free = {lm: Range(0.0, 2.0), **({prior: Range(-2.0, 0.0, of=lm)} if kind else {})}
        found: list[Tuned] = []
        for number in range(self.study.rounds + 1):
            numbers = nbest_lists(lists, normalizer=normalizer("whisper-english"), parts=list(names.values()))
            found.append(tune(numbers, reference="ctc", free=free))
            name = f"{_file(lm)}-{kind or 'none'}{'-one-pass' if number else ''}.json"
            write_scales(self.out / "scales" / name, tuned=found[-1])
            if number < self.study.rounds:
                decoding = self.decoding(lm, kind, found[-1], self.usual(lm))
                heard = self.decoded({f"tune, {_with(lm, kind)}": decoding}, utterances)
                lists = [_both(a, b, names) for a, b in zip(lists, next(iter(heard.values())), strict=True)]
        return found[0], found[-1]

    def usual(self, lm: str) -> Schedule:
        """When a language model is asked where that is not varied."""
        return EveryLabel() if self.same(lm) else Every(self.study.interval)

    def decoding(
        self, lm: str, kind: str, tuned: Tuned, when: Schedule, beam: int | None = None, *, prior_when: Schedule | None = None
    ) -> Decoding:
        """One-pass search with a language model and a prior, which is in step with it unless prior_when says otherwise."""
        model, scales = self.study.lms[lm], list(tuned.scales.values())
        terms: dict[str, Term] = {"lm": Language(model, scales[1], when)}
        if kind:
            of = model if kind == "llm" else ""
            held = not self.same(lm) and prior_when is None and not of
            terms["prior"] = Prior(kind, scales[2], prior_when or when, words=held, of=of)
        return TimeSynchronous(beam or self.study.beam, terms)

    def one_pass(self, lm: str, tuned: Mapping[str, Tuned], best: str) -> dict[str, Decoding]:
        """The one-pass decodings of a language model by the titles of their rows; best: the prior where it is not varied."""
        study, same, usual, title, found = self.study, self.same(lm), self.usual(lm), _with(lm, best), tuned[best]
        named = "label-wise" if same else f"every {study.interval}"
        made = {f"{_with(lm, kind)}, {named}": self.decoding(lm, kind, tuned[kind], usual) for kind in self.kinds(lm)}
        if not same:
            whens: dict[str, Schedule] = {f"every {n}": Every(n) for n in study.intervals if n != study.interval}
            whens |= {"word end": AtWordEnd(), "shortest hypothesis": ShortestHypothesis(4)}
            made |= {f"{title}, {name}": self.decoding(lm, best, found, when) for name, when in whens.items()}
            if best and best != "llm":
                made[f"{title}, {named}, prior at once"] = self.decoding(lm, best, found, usual, prior_when=EveryLabel())
        return made | {f"{title}, {named}, beam {n}": self.decoding(lm, best, found, usual, n) for n in study.beams if n != study.beam}

    def decoded(self, decodings: Mapping[str, Decoding], utterances: Sequence[Utterance]) -> dict[str, list[Recognized]]:
        """What decodings make of utterances, by title; what is in files already is not made again."""
        self.rounds += 1
        rounds = 1 + sum(len(self.kinds(lm)) * self.study.rounds + 1 for lm in self.study.lms)
        self.models.say(f"decoding {self.rounds} of {rounds}: {'; '.join(decodings)}")
        # Other scales make another decoding: its file's name says so, and what was decoded by older ones is left alone.
        files = {t: self.out / "hypotheses" / f"{_file(t)}-{digest(decoding)[:6]}.jsonl" for t, decoding in decodings.items()}
        return decode_to_files(Recognizer(self.models, self.study.am, decodings), utterances, files)


def measured(study: FusionStudy, out: Path, models: Models) -> tuple[Row, ...]:
    """The rows of a study; what is in `out` already is not made again. ValueError, ModelError, PriorError for what cannot be compared."""
    work, heard = _Study(study, models, out), {}
    if taken := sorted(study.lms.keys() & {"ctc", *KINDS[:3]}):
        raise ValueError(f"a language model is called {', '.join(taken)}, as another part of the hypotheses is: rename its folder")
    _same_models(study, out)
    for name, source in (("tune", study.tune), ("test", study.test)):
        heard[name] = [u for u in open_source(source).utterances if u.text is not None][: study.limit]
        if not heard[name]:
            raise ValueError(f"{source}: no utterance has a transcript, so nothing can be compared")
    if both := {u.id for u in heard["tune"]} & {u.id for u in heard["test"]}:
        raise ValueError(
            f"{len(both)} utterances (as {min(both)}) are in {study.tune} and in {study.test}: scales need speech of their own"
        )
    lists = {name: work.lists(name, utterances) for name, utterances in heard.items()}
    chosen: dict[str, Decoding] = {"CTC greedy": Greedy(), f"CTC beam {study.beam}": TimeSynchronous(study.beam)}
    for title, lines in work.decoded(chosen, heard["test"]).items():
        work.add(title, lines)
    for lm in study.lms:
        tuned = {kind: work.tuned(lm, kind, lists["tune"], heard["tune"]) for kind in work.kinds(lm)}
        for kind, (scales, _) in tuned.items():
            # Its time is not known: scores of all models lie in one file.
            best = [replace(line, nbest=tuple(ranked(line.nbest, scales.scales)), seconds=0.0) for line in lists["test"]]
            work.add(f"{_with(lm, kind)}, {study.nbest}-best rescoring", best)
        passed = {kind: scales for kind, (_, scales) in tuned.items()}
        decodings = work.one_pass(lm, passed, min(passed, key=lambda kind: passed[kind].cross_validated or passed[kind].wer))
        for title, lines in work.decoded(decodings, heard["test"]).items():
            work.add(title, lines)
    return rows(work.scores)


def _both(line: Recognized, other: Recognized, names: Mapping[str, str]) -> Recognized:
    """A line with the hypotheses of another that it lacks, their parts renamed by `names`; how they were found is forgotten."""
    here = {h.labels for h in line.nbest}
    new = [replace(h, parts={names[part]: x for part, x in h.parts.items()}) for h in other.nbest if h.labels not in here]
    return replace(line, nbest=(*line.nbest, *new))


def _same_models(study: FusionStudy, out: Path) -> None:
    """Writes out/models.json; ValueError where what lies there is of other models, or of older weights in the same folders."""
    path = out / "models.json"
    new = {"--am": state_of(study.am), **{f"--lm {x}": state_of(y) for x, y in study.lms.items()}, "--nbest": study.nbest}
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and (out / "tune.jsonl").is_file() else {}
    if other := [name for name in new if old.get(name, new[name]) != new[name]]:
        raise ValueError(
            f"{out} holds a study of another or since changed {', '.join(other)} (see {path}): name another --out, or delete it"
        )
    write_json(path, {**old, **new})


def _with(lm: str, kind: str) -> str:
    return f"+ {lm} - {kind} prior" if kind else f"+ {lm}"


def _file(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title).split())
