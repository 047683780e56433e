"""N-best lists as numbers: per hypothesis its word errors and what each scorer gave it. What scale tuning works on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import kaldialign
import numpy as np
from numpy.typing import NDArray

from duolect.evaluate.normalize import Normalizer
from duolect.evaluate.wer import ScoreError
from duolect.scorer import Recognized


@dataclass(frozen=True, eq=False)
class NBestLists:
    """N utterances with up to H hypotheses each, best first, padded at the end.

    words [N]: of the reference. errors [N, H]: of each hypothesis. parts: name -> [N, H] natural log, unscaled, finite. possible [N, H]:
    the hypothesis is there and no part of it is -inf; at least one per utterance. impossible: how many have a part of -inf: they are
    never chosen, at no scale, unless their list has nothing else (then its first is). first, oracle [N]: errors of the first and of the
    best hypothesis. failed: ids without hypotheses, all words deleted. digest: of ids and references.
    """

    ids: tuple[str, ...]
    words: NDArray[np.int64]
    errors: NDArray[np.int64]
    parts: Mapping[str, NDArray[np.float64]]
    possible: NDArray[np.bool_]
    first: NDArray[np.int64]
    oracle: NDArray[np.int64]
    impossible: int = 0
    failed: tuple[str, ...] = ()
    corpus: str = ""
    digest: str = ""
    signature: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, rows: NDArray[np.int64]) -> NBestLists:
        """The lists of some utterances by their places; what is told of the whole file (digest, failed, impossible) stays."""
        arrays = {name: getattr(self, name)[rows] for name in ("words", "errors", "possible", "first", "oracle")}
        return replace(self, ids=tuple(self.ids[i] for i in rows), parts={k: v[rows] for k, v in self.parts.items()}, **arrays)


def padded_lists(
    errors: Sequence[Sequence[int]],
    *,
    parts: Mapping[str, Sequence[Sequence[float]]],
    words: Sequence[int],
    ids: Sequence[str] | None = None,
) -> NBestLists:
    """The lists of ragged numbers; an utterance without hypotheses has all its words deleted. ScoreError for NaN or +inf parts."""
    ids = tuple(ids) if ids is not None else tuple(str(i) for i in range(len(errors)))
    lengths = np.array([len(x) for x in errors], np.int64)
    shape = (len(errors), max(1, int(lengths.max(initial=0))))
    real = np.arange(shape[1]) < np.maximum(lengths, 1)[:, None]
    filled = np.arange(shape[1]) < lengths[:, None]
    counts = np.asarray(words, np.int64)
    padded_errors = np.zeros(shape, np.int64)
    padded_errors[filled] = np.fromiter((e for x in errors for e in x), np.int64)
    padded_errors[lengths == 0, 0] = counts[lengths == 0]
    padded: dict[str, NDArray[np.float64]] = {}
    possible = real.copy()
    for name, values in parts.items():
        padded[name] = np.zeros(shape)
        padded[name][filled] = np.fromiter((v for x in values for v in x), np.float64)
        for row, column in np.argwhere(np.isnan(padded[name]) | (padded[name] == np.inf)):
            value = padded[name][row, column]
            raise ScoreError(f"utterance {ids[row]}, hypothesis {column + 1}: part {name!r} is {value}; expected a log-probability")
        possible &= padded[name] > -np.inf
    impossible = int((real & ~possible).sum())
    possible[~possible.any(axis=1), 0] = True
    finite = {name: np.where(values > -np.inf, values, 0.0) for name, values in padded.items()}
    oracle = np.where(real, padded_errors, np.iinfo(np.int64).max).min(axis=1)
    return NBestLists(ids, counts, padded_errors, finite, possible, first=padded_errors[:, 0], oracle=oracle, impossible=impossible)


def nbest_lists(recognized: Iterable[Recognized], *, normalizer: Normalizer, parts: Sequence[str], corpus: str = "") -> NBestLists:
    """The lists of a hypotheses file, with the errors of every hypothesis counted (once per distinct normalized text of an utterance).

    ScoreError for a line without a reference `text`, an id twice, or a hypothesis without one of the parts.
    """
    references: dict[str, str] = {}
    words, errors, failed = [], [], []
    values: dict[str, list[list[float]]] = {name: [] for name in parts}
    for line in recognized:
        reference = line.fields.get("text")
        if not isinstance(reference, str):
            raise ScoreError(f"utterance {line.id} has no reference in its field 'text' to compare with: add it, or remove the line")
        if line.id in references:
            raise ScoreError(f"id {line.id!r} stands twice in the hypotheses")
        references[line.id] = reference
        nbest = line.nbest if line.error is None else ()
        if not nbest:
            failed.append(line.id)
        target = normalizer(reference).split()
        words.append(len(target))
        texts = [normalizer(h.text) for h in nbest]
        counted = {text: _edits(target, text.split()) for text in set(texts)}
        errors.append([counted[text] for text in texts])
        for name in parts:
            values[name].append([_part(line.id, i, h.parts, name) for i, h in enumerate(nbest)])
    signature = f"norm:{normalizer}|compounds:apart|corpus:{corpus or '?'}|utts:{len(references)}"
    lists = padded_lists(errors, parts=values, words=words, ids=list(references))
    return replace(lists, failed=tuple(failed), corpus=corpus, digest=corpus_digest(references), signature=signature)


def corpus_digest(references: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits of ids and raw references, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(references.items()), ensure_ascii=False).encode()).hexdigest()[:12]


def _edits(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """The fewest edits between two texts in words. What both begin and end with is left out first: most of it, in a list."""
    begin, least = 0, min(len(ours), len(theirs))
    while begin < least and ours[begin] == theirs[begin]:
        begin += 1
    end = 0
    while end < least - begin and ours[-1 - end] == theirs[-1 - end]:
        end += 1
    ours, theirs = ours[begin : len(ours) - end], theirs[begin : len(theirs) - end]
    return int(kaldialign.edit_distance(ours, theirs)["total"]) if ours and theirs else len(ours) + len(theirs)


def _part(key: str, index: int, parts: Mapping[str, float], name: str) -> float:
    if name not in parts:
        has = ", ".join(parts) or "none"
        raise ScoreError(f"utterance {key}, hypothesis {index + 1}: no part {name!r} (it has: {has}); rescore the lists with it first")
    return float(parts[name])
