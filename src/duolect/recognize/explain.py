"""Why one hypothesis won against another: what every scorer gave to every word of both, which adds up to their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import kaldialign
import torch

from duolect.recognize.decoding import WRITTEN, Batch, Decoding, Language, Term, reduced
from duolect.scorer import Hypothesis, Scorer
from duolect.search.fusion import ByWord, TextPolicy
from duolect.search.prefix import CtcPrefix
from duolect.vocabulary import Vocabulary

_GAP = ""  # kaldialign's sign for nothing
END, SEARCH, WHOLE = "(end)", "(search)", "(whole)"
"""Rows behind the words: the end of the text; what the search counted otherwise; scorers of which only the whole is known."""
_PLAIN = WRITTEN["lower"]
Parts = Mapping[str, float]


@dataclass(frozen=True)
class Scorers:
    """What scores hypotheses in labels of a vocabulary. acoustic: the part that the CTC search itself sums up, if there is one."""

    vocabulary: Vocabulary
    by_name: Mapping[str, Scorer[Any]]
    acoustic: str | None
    spelled: TextPolicy  # how the leading model writes


@dataclass(frozen=True)
class Row:
    """A word of A beside one of B, "" where there is none; parts unscaled, of a scorer that has none 0. difference: scaled, A minus B."""

    a: str
    b: str
    parts_a: Parts
    parts_b: Parts
    difference: Parts

    @property
    def total(self) -> float:
        return sum(self.difference.values())

    @property
    def same(self) -> bool:
        return self.a == self.b


def summed(rows: Sequence[Row]) -> Row:
    """The parts and differences of some rows added up."""
    columns = ("parts_a", "parts_b", "difference")
    return Row("", "", *({name: sum(getattr(row, part)[name] for row in rows) for name in rows[0].difference} for part in columns))


@dataclass(frozen=True)
class Explanation:
    """Two hypotheses side by side; the differences of all rows add up to score A - score B. notes: what the reader must know."""

    a: Hypothesis
    b: Hypothesis
    scales: Mapping[str, float]
    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.rows[-1].difference)

    @property
    def difference(self) -> float:
        """Score A - score B."""
        return summed(self.rows).total

    @property
    def verdict(self) -> str:
        """A sentence: who wins, at which words, by whom, and who alone turned it."""
        ahead = self.difference >= 0
        sign, winner, loser = (1.0, "A", "B") if ahead else (-1.0, "B", "A")
        places = _places(self.rows)
        gains = [{name: sign * sum(row.difference[name] for row in place) for name in self.names} for place in places]
        best = max(range(len(places)), key=lambda i: sum(gains[i].values()))
        who = max(gains[best], key=lambda name: gains[best][name])
        text = f"{winner} wins by {abs(self.difference):.2f}: {_called(places[best], ahead)} {sum(gains[best].values()):+.2f}"
        text += f", of which {who} {gains[best][who]:+.2f}" if len(self.names) > 1 else ""
        turned = [name for name, x in summed(self.rows).difference.items() if sign * x > abs(self.difference)]
        if turned and len(self.names) > 1:
            text += f"; without {' or '.join(turned)}, {loser} would win"
        return text

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; -inf is null."""

        def finite(parts: Parts) -> dict[str, float | None]:
            return {k: round(v, 5) if math.isfinite(v) else None for k, v in parts.items()}

        columns = ("parts_a", "parts_b", "difference")
        rows = [{"a": row.a, "b": row.b, **{name: finite(getattr(row, name)) for name in columns}} for row in self.rows]
        two = {name: {"text": h.text, "labels": list(h.labels), "parts": finite(h.parts)} for name, h in (("a", self.a), ("b", self.b))}
        return {
            **two, "scales": dict(self.scales), "rows": rows, "by_scorer": finite(summed(self.rows).difference),
            **finite({"difference": self.difference}), "verdict": self.verdict, "notes": list(self.notes),
        }  # fmt: skip


def scorers_of(decoding: Decoding, batch: Batch, rescored: Mapping[str, Language] | None = None) -> Scorers:
    """The scorers of a decoding for its batch of one utterance, and language models that scored its hypotheses afterwards."""
    terms: dict[str, Term] = {**decoding.terms}
    acoustic = next((name for name in decoding.scales() if name not in terms), None)
    found: dict[str, Scorer[Any]] = {}
    if acoustic is not None:
        limits = {name: getattr(decoding, name, None) for name in ("collapse", "keep_labels")}
        output, vocabulary, spelled = reduced(batch.output, batch.vocabulary, **limits), batch.vocabulary, _PLAIN
        found[acoustic] = CtcPrefix(output.log_probs, output.lengths, vocabulary=vocabulary)
    else:
        lead, term = next(iter(terms.items()))
        found[lead] = term.native(batch)
        vocabulary, spelled = found[lead].vocabulary, term.spelling(batch)
    for name, term in {**terms, **(rescored or {})}.items():
        if name not in found:
            found[name] = term.fused(batch, vocabulary).scorer
    return Scorers(vocabulary, found, acoustic, spelled)


def written(text: str, scorers: Scorers) -> Hypothesis:
    """A text as a hypothesis without parts, in the spelling of the leading model where it does not say its own (all lower case, plain)."""
    vocabulary = scorers.vocabulary
    if text == _PLAIN.text(text) or vocabulary.decode(vocabulary.encode(text)).strip() != text.strip():
        text = scorers.spelled.text(text)
    labels = tuple(vocabulary.encode(text))
    return Hypothesis(labels, vocabulary.decode(labels).strip(), {})


def explained(a: Hypothesis, b: Hypothesis, *, scorers: Scorers, scales: Mapping[str, float]) -> Explanation:
    """A beside B, word by word. Parts that no scorer here knows are compared as wholes, where both have them."""
    both = [h if h.labels or not h.text else Hypothesis(tuple(scorers.vocabulary.encode(h.text)), h.text, h.parts) for h in (a, b)]
    spans = [_words(h.labels, scorers.vocabulary) for h in both]
    pieces = [{} for _ in both]
    for name, scorer in scorers.by_name.items():
        for piece, found in zip(pieces, _by_word(scorer, scorers.vocabulary, [h.labels for h in both], spans), strict=True):
            piece[name] = found
    texts = [_texts(h.labels, span, scorers.vocabulary) for h, span in zip(both, spans, strict=True)]
    wholes = [name for name in a.parts if name in b.parts and name not in scorers.by_name]
    names = [*scorers.by_name, *wholes]
    used = {name: scales.get(name, 0.0) for name in names}

    def row(a: str, b: str, *parts: Parts) -> Row:
        ours, theirs = ({name: x.get(name, 0.0) for name in names} for x in parts)
        # Also -inf against -inf, or times a scale of 0, is no difference.
        change = {name: x * (ours[name] - theirs[name]) if x and ours[name] != theirs[name] else 0.0 for name, x in used.items()}
        return Row(a, b, ours, theirs, change)

    rows, at = [], [0, 0]
    for pair in kaldialign.align(texts[0], texts[1], _GAP):
        given = []
        for side, word in enumerate(pair):
            given.append({name: piece[at[side]] for name, piece in pieces[side].items()} if word != _GAP else {})
            at[side] += word != _GAP
        rows.append(row(*pair, *given))
    rows.append(row(END, END, *({name: piece[-1] for name, piece in one.items()} for one in pieces)))
    notes = []
    rests = [_rest(h, one, scorers.acoustic) for h, one in zip(both, pieces, strict=True)]
    if a.parts and b.parts and any(any(rest.values()) for rest, _ in rests):
        rows.append(row(SEARCH, SEARCH, rests[0][0], rests[1][0]))
        notes.append(f"{SEARCH}: alignments that the search did not count (its beam dropped them, or it counts the best one only)")
    elif rests[0][0].get(acoustic := scorers.acoustic or ""):
        notes.append(f"both are scored over all alignments; the search that made the file gave A {a.parts[acoustic]:.2f} ({acoustic})")
    notes += [f"the file's parts of {who} do not fit: {said}" for who, (_, all_said) in zip("AB", rests, strict=True) for said in all_said]
    if wholes:
        rows.append(row(WHOLE, WHOLE, *({name: h.parts[name] for name in wholes} for h in (a, b))))
        notes.append(f"{', '.join(wholes)}: no part of the decoding, known of whole hypotheses only; --lm names the model of one")
    if unknown := [name for name in a.parts if name not in names]:
        notes.append(f"{', '.join(unknown)}: not known of B, left out; --lm names the model of one")
    if silent := [name for name, scale in used.items() if not scale]:
        none = "scale 0 or none in this ranking (rescored without scales?), so it counted nothing: --scales FILE gives one"
        notes.append(f"{', '.join(silent)}: {none}")
    return Explanation(both[0], both[1], used, rows, notes)


def _words(labels: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Where each word ends."""
    return [i for i in range(1, len(labels) + 1) if i == len(labels) or vocabulary.word_starts[labels[i]]]


def _texts(labels: Sequence[int], ends: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    spans = [labels[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    return [vocabulary.decode(span).strip() or "".join(vocabulary.piece(y) for y in span) for span in spans]


def _by_word(
    scorer: Scorer[Any], vocabulary: Vocabulary, hypotheses: Sequence[Sequence[int]], spans: Sequence[Sequence[int]]
) -> list[list[float]]:
    """For each hypothesis log p of each word behind the words before it, then of the end.

    All beginnings at once: log p of each up to a word's end, whose differences are the words' own. A scorer that hears whole words gives
    one up when the next begins, so it is shown the next one's first label; behind the last word, any that begins one.
    """
    starter: list[int] = [y for y, starts in enumerate(vocabulary.word_starts) if starts][:1] if isinstance(scorer, ByWord) else []
    rows, whole = [], []
    for labels, ends in zip(hypotheses, spans, strict=True):
        rows += [[*labels[:end], *(labels[end : end + 1] or starter if starter else ())] for end in ends]
        whole.append(len(rows))
        rows.append(list(labels))
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.tensor([[*row, *[0] * (int(lengths.max()) - len(row))] for row in rows], dtype=torch.long).view(len(rows), -1)
    with torch.no_grad():
        score, state = scorer.advance(scorer.select(scorer.start(1), torch.zeros(len(rows), dtype=torch.long)), padded, lengths)
        reached, rest = score.tolist(), scorer.finish(scorer.select(state, torch.tensor(whole))).tolist()
    out = []
    for last, ends, end in zip(whole, spans, rest, strict=True):
        upto = [0.0, *reached[last - len(ends) : last], reached[last] + end]
        # Behind what is impossible nothing costs more.
        out.append([0.0 if x == -math.inf else y - x for x, y in pairwise(upto)])
    return out


def _rest(h: Hypothesis, pieces: Mapping[str, Sequence[float]], acoustic: str | None) -> tuple[dict[str, float], list[str]]:
    """(what the file's parts have beyond the words' sums, what of it no search can have done)."""
    rest, strange = {}, []
    for name, piece in pieces.items():
        total = sum(piece)
        if name not in h.parts or h.parts[name] == total:
            continue
        gap = h.parts[name] - total
        rest[name] = gap if abs(gap) > 1e-3 else 0.0
        if not math.isfinite(gap) or (abs(gap) > 0.05 and (name != acoustic or gap > 0)):
            strange.append(f"{name} {h.parts[name]:.2f} in the file, {total:.2f} by the models here (another model, prompt, audio?)")
    return rest, strange


def _places(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their words together with their neighbours that do; the others each alone."""
    places: list[list[Row]] = []
    for row in rows:
        if places and not row.same and not places[-1][-1].same:
            places[-1].append(row)
        else:
            places.append([row])
    return places


def _called(place: Sequence[Row], ahead: bool) -> str:
    if place[0].a in (END, SEARCH, WHOLE):
        return {END: "the end of the text", SEARCH: "what the search counted", WHOLE: "scores of the whole text"}[place[0].a] + " gives it"
    if place[0].same:
        return f'"{place[0].a}", in both but behind other words, gives it'
    ours, theirs = (" ".join(filter(None, (getattr(row, side) for row in place))) for side in ("a", "b"))
    won, lost = (ours, theirs) if ahead else (theirs, ours)
    return f'"{won}" against "{lost}" gives it' if won and lost else f'"{won}" more gives it' if won else f'leaving "{lost}" out gives it'
