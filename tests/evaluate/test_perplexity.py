from __future__ import annotations

import math

import numpy as np
import pytest

from duolect.evaluate.perplexity import Scored, perplexities, plain_rows


def test_perplexities_are_those_of_the_definition() -> None:
    scored = [Scored("b", 10.0, 5, 4), Scored("a", 2.0, 3, 3), Scored("b", 6.0, 2, 2)]
    rows = perplexities(scored, model="m", text="dir/t.txt")
    assert [r.domain for r in rows] == ["all", "a", "b"] and [r.sentences for r in rows] == [3, 1, 2]
    assert rows[0].label_ppl == pytest.approx(math.exp(18 / 10)) and rows[0].word_ppl == pytest.approx(math.exp(18 / 9))
    assert rows[2].word_ppl == pytest.approx(math.exp(16 / 6)) and rows[1].word_interval is None
    assert rows[0].labels_per_word == pytest.approx(7 / 6)  # the ends are left out
    assert "t.txt" in plain_rows(rows) and "dir" not in plain_rows(rows)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(60):
        words = rng.integers(3, 30, 80)
        nats = words * rng.normal(4.0, 1.0, 80)
        interval = perplexities([Scored("", n, int(w), int(w)) for n, w in zip(nats, words, strict=True)], model="", text="")[
            0
        ].word_interval
        assert interval is not None
        hits += interval.low <= math.exp(4.0) <= interval.high
    assert 50 <= hits <= 60


def test_one_domain_has_no_row_of_its_own() -> None:
    rows = perplexities([Scored("x", 1.0, 1, 1)] * 3, model="", text="")
    assert [r.domain for r in rows] == ["all"]
