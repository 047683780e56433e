from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from duolect.evaluate.bootstrap import Interval, rate_interval, resampled_sums
from duolect.evaluate.normalize import normalizer
from duolect.evaluate.wer import Errors, ScoreError, alignment_lines, compare, count_errors, score_json, score_recognized
from duolect.scorer import Hypothesis, Recognized
from tests.evaluate.lines import score

NONE = normalizer("none")


def brute_force(reference: list[str], hypothesis: list[str], *, merge: bool) -> int:
    """The fewest edits, by trying every first move."""

    @cache
    def least(i: int, j: int) -> int:
        if i == len(reference) and j == len(hypothesis):
            return 0
        ways = []
        if i < len(reference):
            ways.append(1 + least(i + 1, j))
        if j < len(hypothesis):
            ways.append(1 + least(i, j + 1))
        if i < len(reference) and j < len(hypothesis):
            ways.append((reference[i] != hypothesis[j]) + least(i + 1, j + 1))
            if merge:
                ways += [least(k, j + 1) for k in range(i + 2, len(reference) + 1) if "".join(reference[i:k]) == hypothesis[j]]
                ways += [least(i + 1, k) for k in range(j + 2, len(hypothesis) + 1) if "".join(hypothesis[j:k]) == reference[i]]
        return min(ways)

    return least(0, 0)


@pytest.mark.parametrize("merge", [False, True])
def test_errors_equal_brute_force(merge):
    draw = random.Random(0)
    for _ in range(300):
        ours, theirs = ([draw.choice(["a", "b", "ab", "ba", "c"]) for _ in range(draw.randint(0, 6))] for _ in range(2))
        found = count_errors(" ".join(ours), " ".join(theirs), merge_compounds=merge)
        assert found.total == brute_force(ours, theirs, merge=merge), (ours, theirs)
        assert found.words == len(ours)
        if not merge:
            assert found.insertions - found.deletions == len(theirs) - len(ours)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "merge", "expected"),
    [
        ("", "", False, Errors()),
        ("", "a b", False, Errors(insertions=2)),
        ("a b", "", False, Errors(deletions=2, words=2)),
        ("the white paper", "the whitepaper", False, Errors(1, 1, 0, 3)),
        ("the white paper", "the whitepaper", True, Errors(words=3)),
        ("whitepaper", "white paper", True, Errors(words=1)),
        ("a b c", "a x c d", False, Errors(1, 0, 1, 3)),
    ],
)
def test_errors_table(reference, hypothesis, merge, expected):
    assert count_errors(reference, hypothesis, merge_compounds=merge) == expected


def test_rates():
    assert Errors(1, 2, 3, 40).rate == 15.0
    assert Errors().rate == 0.0
    assert Errors(insertions=1).rate == math.inf
    assert Errors(1, 2, 3, 4) + Errors(1, 1, 1, 1) == Errors(2, 3, 4, 5)


def test_alignment_lines():
    assert alignment_lines("the cat sat down", "the cart sat right down") == [
        "REF: the cat  sat ***** down",
        "HYP: the cart sat right down",
        "         S        I",
    ]
    assert alignment_lines("a white paper", "whitepaper", merge_compounds=True) == ["REF: a white paper", "HYP: * whitepaper", "     D"]
    blocks = alignment_lines("one two three four", "one two tree four", width=15)
    assert len(blocks) == 6
    assert all(len(line) <= 15 for line in blocks)
    assert alignment_lines("", "") == ["REF:", "HYP:", ""]


def naive_interval(errors, words, draws, seed):
    draw = random.Random(seed)
    rates = []
    for _ in range(draws):
        rows = [draw.randrange(len(words)) for _ in words]
        rates.append(100 * sum(errors[i] for i in rows) / sum(words[i] for i in rows))
    return np.quantile(rates, [0.025, 0.975])


@pytest.mark.parametrize("kinds", [3, 60], ids=["multinomial", "gathered"])
def test_interval_equals_a_naive_loop(kinds):
    rng = np.random.default_rng(1)
    words = 1 + rng.integers(5, 40, kinds)[rng.integers(0, kinds, 60)]
    errors = (words * 0.2).astype(int)
    errors[::3] += 2 if kinds > 3 else 0
    found = rate_interval(errors, words, seed=3)
    naive = naive_interval(errors.tolist(), words.tolist(), 3000, 4)
    spread = naive[1] - naive[0]
    assert found is not None
    assert [found.low, found.high] == pytest.approx(naive, abs=0.08 * spread)


def test_both_ways_of_drawing_are_the_same_distribution():
    values = np.repeat([[0, 10], [3, 7]], [30, 20], axis=0)
    apart = values * 1000 + np.arange(50)[:, None]  # all rows differ: drawn row by row
    few, many = (resampled_sums(v, draws=20_000, seed=0) for v in (values, apart))
    many = many // 1000  # the marks add up to less than 50 * 50 and vanish, up to a carry
    assert few.mean(axis=0) == pytest.approx(many.mean(axis=0), rel=0.02)
    assert few.std(axis=0) == pytest.approx(many.std(axis=0), rel=0.05)


REFERENCES = {"a": "one two three", "b": "four five", "c": "", "d": "six"}


def test_score_keeps_failed_and_empty_utterances():
    found = score(
        REFERENCES,
        {"a": "one too three", "b": None, "c": "noise", "d": ""},
        normalizer=NONE,
        corpus="toy",
        domains={"a": "read", "b": "read", "c": "call", "d": "call"},
    )
    assert found.errors == Errors(1, 3, 1, 6)
    assert found.failed == ("b",)
    assert found.empty_references == ("c",)
    assert found.sentence_error_rate == 100.0
    assert found.domains["read"].errors == Errors(1, 2, 0, 5)
    assert found.domains["call"].errors == Errors(0, 1, 1, 1)
    assert found.domains["call"].utterances == 2
    assert [u.id for u in found.utterances] == list(REFERENCES)
    assert str(found).startswith("WER 83.33 [")


def test_signature_says_how_the_number_came_about():
    whisper = normalizer("whisper-english")
    found = score({"a": "x"}, {"a": "x"}, normalizer=whisper, merge_compounds=True, corpus="test|other")
    fields = dict(part.split(":", 1) for part in found.signature.split("|"))
    assert fields["norm"].startswith("whisper-english@")
    assert fields["align"].startswith("kaldialign@")
    assert fields["duolect"].startswith("0.")
    assert (fields["compounds"], fields["corpus"], fields["utts"], fields["boot"]) == ("merged", "test/other", "1", "10000xutterance@0")
    assert found.interval is None  # one utterance says nothing of the spread


def corpus(utterances: int, rate: float, seed: int) -> tuple[dict[str, str], dict[str, str | None]]:
    draw, noise = random.Random(0), random.Random(seed)
    references = {f"u{i:03}": " ".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 12))) for i in range(utterances)}
    return references, {k: " ".join("x" if noise.random() < rate else w for w in v.split()) for k, v in references.items()}


def test_the_interval_does_not_depend_on_the_order_of_the_file():
    references, hypotheses = corpus(200, 0.2, 1)
    one = score(references, hypotheses, normalizer=NONE)
    other = score(dict(reversed(list(references.items()))), hypotheses, normalizer=NONE)
    assert one.interval == other.interval


def test_speakers_that_hang_together_widen_the_interval():
    references = {f"u{i}": "a b c d" for i in range(200)}
    speakers = {k: f"s{i // 20}" for i, k in enumerate(references)}
    hypotheses: dict[str, str | None] = {k: "x x c d" if int(speakers[k][1:]) % 2 else v for k, v in references.items()}
    apart = score(references, hypotheses, normalizer=NONE)
    together = score(references, hypotheses, normalizer=NONE, speakers=speakers)
    assert apart.interval and together.interval
    assert together.interval.high - together.interval.low > 3 * (apart.interval.high - apart.interval.low)


def test_compare_is_paired():
    references, worse = corpus(300, 0.2, 1)
    better: dict[str, str | None] = {k: references[k] if i % 20 == 0 else h for i, (k, h) in enumerate(worse.items())}
    a, b = (score(references, x, normalizer=NONE) for x in (worse, better))
    found = compare(a, b)
    assert found.difference == pytest.approx(b.errors.rate - a.errors.rate)
    assert a.interval and b.interval and a.interval.low < b.errors.rate < a.interval.high  # unpaired, nothing could be said
    assert found.p_value < 0.05
    assert found.interval and found.interval.low <= found.difference <= found.interval.high
    back = compare(b, a)
    assert (back.difference, back.p_value) == (-found.difference, found.p_value)


def test_compare_equal_and_unrelated_systems():
    references, one = corpus(300, 0.2, 1)
    a = score(references, one, normalizer=NONE)
    same = compare(a, a)
    assert (same.difference, same.p_value, same.better, same.interval) == (0.0, 1.0, 0.5, Interval(0.0, 0.0))
    much_better = compare(a, score(references, corpus(300, 0.05, 2)[1], normalizer=NONE))
    assert much_better.difference < -5
    assert much_better.p_value == pytest.approx(2 / 10_001)
    assert much_better.better == 1.0


def test_compare_refuses_what_cannot_be_compared():
    a = score(REFERENCES, REFERENCES, normalizer=NONE)
    fewer = {k: v for k, v in REFERENCES.items() if k != "d"}
    with pytest.raises(ScoreError, match=r"1 only in the first \(d\), 0 only in the second \(none\)"):
        compare(a, score(fewer, fewer, normalizer=NONE))
    changed = {**REFERENCES, "a": "one two"}
    with pytest.raises(ScoreError, match=r"1 utterances have another reference .*: a"):
        compare(a, score(changed, changed, normalizer=NONE))


def line(key: str, text: str | None, hypothesis: str | None, **fields: object) -> Recognized:
    given = {"id": key, **({} if text is None else {"text": text}), **fields}
    return (
        Recognized(given, [])
        if hypothesis == ""
        else (Recognized(given, [], error="corrupt") if hypothesis is None else Recognized(given, [Hypothesis((), hypothesis, {})]))
    )


def test_score_recognized():
    lines = [line("a", "x y", "x y", domain="read", speaker=3), line("b", "z", None, speaker=4)]
    found = score_recognized(lines, normalizer=NONE, unit="speaker")
    assert found.errors == Errors(deletions=1, words=3)
    assert found.failed == ("b",)
    assert set(found.domains) == {"read", "other"}
    assert "xspeaker@" in found.signature
    with pytest.raises(ScoreError, match="'a' stands twice"):
        score_recognized([lines[0], lines[0]], normalizer=NONE)
    with pytest.raises(ScoreError, match="1 of 2 lines have no reference in their field 'text': c"):
        score_recognized([lines[0], line("c", None, "x")], normalizer=NONE)
    with pytest.raises(ScoreError, match="1 of 2 utterances have no speaker: c"):
        score_recognized([lines[0], line("c", "x", "x")], normalizer=NONE, unit="speaker")


def test_score_json_is_json():
    found = score({"a": "", "b": ""}, {"a": "y", "b": ""}, normalizer=NONE)
    data = score_json(found)
    json.dumps(data, allow_nan=False)
    assert (data["wer"], data["insertions"], data["empty_references"]) == (None, 1, ["a", "b"])
    assert score_json(replace(found, interval=None))["interval"] is None
