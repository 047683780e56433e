from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from duolect.evaluate.nbest import NBestLists, _edits, corpus_digest, nbest_lists, padded_lists
from duolect.evaluate.normalize import normalizer
from duolect.evaluate.plots import wer_surface
from duolect.evaluate.surface import Range, surface_of
from duolect.evaluate.tune import ScalesError, _Search, read_scales, same_corpus_warning, tune, write_scales
from duolect.evaluate.wer import ScoreError, count_errors
from duolect.scorer import Hypothesis, Recognized

NONE = normalizer("none")
PAPER = {"llm": Range(0.0, 2.0), "prior": Range(-2.0, 0.0, of="llm")}


def synthetic(utterances: int, hypotheses: int, *, seed: int = 0, llm: float = 0.5, prior: float = -0.3) -> NBestLists:
    """Ragged lists in which ctc + llm * part + prior * part tells the errors best."""
    rng = np.random.default_rng(seed)
    words = rng.integers(5, 30, utterances)
    errors = np.minimum(rng.poisson(2.0, (utterances, hypotheses)), words[:, None])
    parts = {"llm": rng.normal(0, 6, errors.shape) - 2.0 * errors, "prior": rng.normal(0, 5, errors.shape)}
    parts["ctc"] = -llm * parts["llm"] - prior * parts["prior"] - 1.5 * errors + rng.normal(0, 1.0, errors.shape)
    order = np.argsort(-parts["ctc"], axis=1)
    keep = rng.integers(1, hypotheses + 1, utterances)

    def ragged(values):
        return [row[:k] for row, k in zip(np.take_along_axis(values, order, axis=1).tolist(), keep, strict=True)]

    return padded_lists(ragged(errors), parts={k: ragged(v) for k, v in parts.items()}, words=words.tolist())


def brute_force(lists: NBestLists, scales: dict[str, float]) -> list[int]:
    """Errors per utterance by Python's max, the first of equal scores."""
    errors = []
    for i in range(len(lists)):
        listed = [j for j in range(lists.errors.shape[1]) if lists.possible[i, j]]
        errors.append(int(lists.errors[i, max(listed, key=lambda j: (sum(s * lists.parts[k][i, j] for k, s in scales.items()), -j))]))
    return errors


def test_surface_equals_brute_force():
    lists = synthetic(40, 9)
    surface = surface_of(lists, reference="ctc", free=PAPER)
    assert 0 < len(surface.rows) < len(lists)
    weights = np.random.default_rng(1).integers(0, 3, len(lists))
    for point in np.random.default_rng(0).uniform((0.0, -2.0), (2.0, 0.0), (25, 2)):
        expected = brute_force(lists, {"ctc": 1.0, "llm": point[0], "prior": point[0] * point[1]})
        assert surface.utterance_errors(point).tolist() == expected
        assert surface.weighted(surface.errors(point[None]), weights).tolist() == [int(weights @ expected)]


@pytest.mark.parametrize(("coordinate", "low", "high"), [(0, 0.0, 2.0), (1, -2.0, 0.0)])
def test_line_search_is_exact(coordinate, low, high):
    lists = synthetic(60, 12, seed=3)
    surface = surface_of(lists, reference="ctc", free=PAPER)
    weights = np.random.default_rng(1).integers(0, 3, len(lists))
    point = np.array([0.55, -0.4])
    line = surface.line(point, coordinate=coordinate, low=low, high=high, weights=weights)
    assert (np.diff(line.edges) >= 0).all()
    assert (line.edges[0], line.edges[-1]) == (low, high)
    dense = np.repeat(point[None], 4001, axis=0)
    dense[:, coordinate] = np.linspace(low, high, 4001) + 1e-7
    scanned = surface.weighted(surface.errors(dense), weights)
    assert scanned.tolist() == line.errors[np.searchsorted(line.edges[1:-1], dense[:, coordinate])].tolist()
    value, total = line.best()
    assert total == line.errors[np.diff(line.edges) > 1e-12].min() <= scanned.min()
    best = point.copy()
    best[coordinate] = value
    assert surface.weighted(surface.errors(best[None]), weights)[0] == total


def test_line_search_takes_the_middle_of_the_widest_stretch():
    # The second hypothesis wins above 0.5, the third, as good, above 1.0: one stretch without errors, from 0.5 to 2.
    lists = padded_lists([[1, 0, 0]], parts={"ctc": [[0.0, -1.0, -2.0]], "llm": [[0.0, 2.0, 3.0]]}, words=[4])
    surface = surface_of(lists, reference="ctc", free={"llm": Range()})
    line = surface.line(np.zeros(1), coordinate=0, low=0.0, high=2.0, weights=np.ones(1, int))
    assert line.best() == (1.25, 0)


def test_finds_the_known_optimum():
    lists = synthetic(400, 12, seed=1)
    found = tune(lists, reference="ctc", free=PAPER, draws=100, folds=3)
    assert found.scales["llm"] == pytest.approx(0.5, abs=0.12)
    assert found.scales["prior"] == pytest.approx(-0.3, abs=0.12)
    for name, interval in found.scale_intervals.items():
        assert interval and interval.low <= found.scales[name] + 0.05 and found.scales[name] - 0.05 <= interval.high
    assert found.errors == sum(brute_force(lists, dict(found.scales)))
    assert found.interval and found.interval.low <= found.wer <= found.interval.high
    assert found.cross_validated is not None
    assert found.oracle < found.wer <= found.cross_validated < found.alone <= found.first
    assert found.wer <= found.probes.wer.min() + 1e-9
    assert found.at_edge == ()


@pytest.mark.parametrize("search", ["line", "grid"])
@pytest.mark.parametrize("free", [{"llm": Range()}, PAPER, {**PAPER, "length": Range(-1.0, 1.0)}], ids=len)
def test_both_searches_find_the_known_optimum(search, free):
    made = synthetic(400, 12, seed=1, prior=-0.3 if "prior" in free else 0.0)
    noise = np.random.default_rng(5).normal(0, 4, made.errors.shape)
    lists = replace(made, parts={**made.parts, "length": noise})
    found = tune(lists, reference="ctc", free=free, search=search, draws=50, folds=2)
    optimum = {"llm": 0.5, "prior": -0.3, "length": 0.0}
    assert {name: found.scales[name] for name in free} == pytest.approx({name: optimum[name] for name in free}, abs=0.15)
    assert found.errors == sum(brute_force(lists, dict(found.scales)))
    assert f"|tune:{search}|" in found.signature


def test_the_grid_is_brute_force_over_its_grid_and_shrinks_to_the_best_box():
    lists = synthetic(60, 9, seed=4)
    made = _Search.of(lists, reference="ctc", free=PAPER, seed=0, method="grid", done=lambda: None)
    everyone, low, high = np.ones(len(lists), np.int64), np.array([0.0, -2.0]), np.array([2.0, 0.0])
    best = []
    for rounds in range(1, 4):
        points = [(x, y) for x in np.linspace(low[0], high[0], 21) for y in np.linspace(low[1], high[1], 21)]
        totals = [sum(brute_force(lists, {"ctc": 1.0, "llm": x, "prior": x * y})) for x, y in points]
        best.append(min(totals))
        found = made._grid(everyone, rounds)
        assert sum(brute_force(lists, {"ctc": 1.0, "llm": found[0], "prior": found[0] * found[1]})) == min(best)
        if rounds == 1:
            assert tuple(found) in [p for p, total in zip(points, totals, strict=True) if total == min(totals)]
        kept = np.array([p for p, total in zip(points, totals, strict=True) if total <= np.percentile(totals, 5) * 1.0001])
        low, high = kept.min(axis=0), kept.max(axis=0)


@pytest.mark.parametrize("free", [{"llm": Range()}, PAPER, {**PAPER, "length": Range(-1.0, 1.0)}], ids=len)
def test_a_grid_never_ends_above_what_the_plot_shows(free):
    for seed in range(12):  # few utterances: ragged surfaces, which a coarse grid steps over
        made = synthetic(12, 9, seed=seed, prior=-0.3 if "prior" in free else 0.0)
        lists = replace(made, parts={**made.parts, "length": np.random.default_rng(seed).normal(0, 4, made.errors.shape)})
        found = tune(lists, reference="ctc", free=free, search="grid", draws=1, folds=2)
        assert found.wer <= found.probes.wer.min() + 1e-9


def test_what_is_as_good_as_the_optimum():
    few, many = (tune(synthetic(n, 12, seed=1), reference="ctc", free=PAPER, draws=200, folds=2) for n in (30, 1000))
    for found in (few, many):
        near = found.probes.scales[found.probes.as_good]
        assert len(near) and found.probes.wer[found.probes.as_good].max() < found.alone
        for d, name in enumerate(PAPER):
            assert found.as_good[name].low == min(near[:, d].min(), found.scales[name])
            assert found.as_good[name].high == max(near[:, d].max(), found.scales[name])
    assert many.probes.as_good.sum() < few.probes.as_good.sum() / 2, "more utterances, narrower"


def test_parts_of_a_corpus_have_scales_of_their_own():
    parts = [synthetic(250, 12, seed=i, llm=llm) for i, llm in enumerate((0.3, 1.2))]
    lists = padded_lists(
        [e[p].tolist() for x in parts for e, p in zip(x.errors, x.possible, strict=True)],
        parts={k: [v[p].tolist() for x in parts for v, p in zip(x.parts[k], x.possible, strict=True)] for k in ("ctc", "llm", "prior")},
        words=[w for x in parts for w in x.words],
    )
    names = ["low"] * 250 + ["high"] * 250
    common = tune(lists, reference="ctc", free=PAPER, groups=names, draws=20, folds=3)
    assert list(common.groups) == ["high", "low"]
    for name, (part, llm) in zip(("low", "high"), zip(parts, (0.3, 1.2), strict=True), strict=True):
        group, alone = common.groups[name], tune(part, reference="ctc", free=PAPER, draws=20, folds=3)
        assert group.scales["llm"] == pytest.approx(llm, abs=0.15)
        assert (group.scales, group.wer, group.held_out) == (alone.scales, alone.wer, alone.cross_validated)
        assert group.common == pytest.approx(100 * sum(brute_force(part, dict(common.scales))) / group.words)
        assert group.gain == pytest.approx(group.held_out - group.held_out_common) and group.gain < 0
        assert group.gain_interval and group.gain_interval.low <= group.gain <= group.gain_interval.high
    errors = sum(g.common * g.words for g in common.groups.values())
    assert errors == pytest.approx(common.wer * common.words)
    one = tune(lists, reference="ctc", free=PAPER, groups=["single", *["rest"] * 499], draws=20, folds=2).groups["single"]
    assert (one.utterances, one.held_out, one.gain, one.gain_interval) == (1, None, None, None)


def test_errors_of_lists_are_those_of_the_score():
    draw = np.random.default_rng(0)
    words = list("abc")
    for _ in range(300):
        ours, theirs = (draw.choice(words, draw.integers(0, 8)).tolist() for _ in range(2))
        assert _edits(ours, theirs) == count_errors(" ".join(ours), " ".join(theirs)).total


def test_the_surface_is_drawn_for_any_number_of_scales(tmp_path):
    for free in ({"llm": Range()}, PAPER, {**PAPER, "length": Range()}):
        lists = synthetic(40, 6)
        lists = replace(lists, parts={**lists.parts, "length": lists.parts["llm"] * 0.5})
        wer_surface(tune(lists, reference="ctc", free=free, draws=20, folds=2), path=tmp_path / "new" / f"{len(free)}.png")
        with open(tmp_path / "new" / f"{len(free)}.png", "rb") as file:
            assert file.read(4) == b"\x89PNG"


def test_tuning_is_deterministic_and_starts_from_what_it_was_given():
    lists = synthetic(100, 8)
    one, other = (tune(lists, reference="ctc", free=PAPER, draws=50, folds=3) for _ in range(2))
    assert (one.scales, one.wer, one.interval) == (other.scales, other.wer, other.interval)
    assert (one.cross_validated, one.scale_intervals) == (other.cross_validated, other.scale_intervals)
    assert list(one.scales) == ["ctc", "llm", "prior"]


def test_nothing_to_gain_gives_the_middle_of_the_plateau():
    lists = padded_lists([[0], [1]], parts={"ctc": [[-1.0], [-1.0]], "llm": [[-1.0], [-2.0]]}, words=[3, 3])
    assert tune(lists, reference="ctc", free={"llm": Range(0.0, 2.0)}).scales == {"ctc": 1.0, "llm": 1.0}


def test_range_edge_is_told():
    lists = synthetic(300, 12, llm=1.5)
    assert tune(lists, reference="ctc", free={"llm": Range(0.0, 0.5)}, draws=10).at_edge == ("llm",)
    # 0 says that the part does not help; a wider range would not either.
    unhelpful = tune(synthetic(100, 12, prior=0.5), reference="ctc", free={"prior": Range(-1.0, 0.0)}, draws=10)
    assert unhelpful.scales["prior"] == pytest.approx(0.0, abs=0.05)
    assert unhelpful.at_edge == ()


@pytest.mark.parametrize("names", [1, 2, 3, 4])
def test_any_number_of_scales(names):
    rng = np.random.default_rng(0)
    errors = rng.integers(0, 5, (80, 6))
    parts = {f"p{i}": (rng.normal(0, 2, errors.shape) - 0.5 * errors).tolist() for i in range(names)}
    lists = padded_lists(errors.tolist(), parts={"am": rng.normal(0, 2, errors.shape).tolist(), **parts}, words=[9] * 80)
    found = tune(lists, reference="am", free={k: Range(0.0, 1.5) for k in parts}, draws=20, folds=2)
    assert found.errors == sum(brute_force(lists, dict(found.scales)))
    assert found.wer < found.alone


def test_impossible_and_missing_hypotheses():
    inf = float("inf")
    ctc, prior = [[-1.0, -2.0, -3.0], [-inf], [], [-1.0, -5.0]], [[-1.0, -inf, -1.5], [-1.0], [], [-1.0, -1.0]]
    parts = {"ctc": ctc, "prior": prior}
    lists = padded_lists([[2, 0, 1], [1], [], [3, 0]], parts=parts, words=[4, 4, 5, 3], ids=list("abcd"))
    assert lists.impossible == 2
    assert lists.first.tolist() == [2, 1, 5, 3]
    assert lists.oracle.tolist() == [0, 1, 5, 0]
    surface = surface_of(lists, reference="ctc", free={"prior": Range(-50.0, 0.0)})
    # Without exclusion the prior's -inf at a negative scale would make its hypothesis win everything.
    assert [surface.utterance_errors(np.array([x])).tolist() for x in (0.0, -1.0, -10.0)] == [[2, 1, 5, 3], [2, 1, 5, 3], [1, 1, 5, 3]]
    for bad in (float("nan"), inf):
        with pytest.raises(ScoreError, match=r"utterance b, hypothesis 2: part 'llm' is (nan|inf); expected a log-probability"):
            padded_lists([[1], [1, 1]], parts={"llm": [[-1.0], [-1.0, bad]]}, words=[1, 1], ids=["a", "b"])


def test_what_cannot_be_tuned():
    with pytest.raises(ValueError, match="no free scale"):
        tune(synthetic(5, 3), reference="ctc", free={})


def recognized(key: str, text: str, hypotheses: list[tuple[str, dict[str, float]]]) -> Recognized:
    return Recognized({"id": key, "text": text}, [Hypothesis((), t, p) for t, p in hypotheses], error=None if hypotheses else "corrupt")


LINES = [
    recognized("a", "the cat sat", [("the cat", {"ctc": -1.0, "llm": -9.0}), ("the cat sat", {"ctc": -2.0, "llm": -3.0})]),
    recognized("b", "white paper", [("whitepaper", {"ctc": -1.0, "llm": -4.0})]),
    recognized("c", "one two", []),
]


def test_lists_of_a_hypotheses_file():
    lists = nbest_lists(LINES, normalizer=NONE, parts=["ctc", "llm"], corpus="toy")
    assert lists.errors.tolist() == [[1, 0], [2, 0], [2, 0]]
    assert lists.possible.tolist() == [[True, True], [True, False], [True, False]]
    assert lists.words.tolist() == [3, 2, 2]
    assert lists.failed == ("c",)
    with pytest.raises(ScoreError, match=r"utterance a, hypothesis 1: no part 'prior' \(it has: ctc, llm\)"):
        nbest_lists(LINES, normalizer=NONE, parts=["prior"])
    with pytest.raises(ScoreError, match="'a' stands twice"):
        nbest_lists([LINES[0], LINES[0]], normalizer=NONE, parts=["ctc"])


def test_scales_file(tmp_path):
    lists = nbest_lists(LINES, normalizer=NONE, parts=["ctc", "llm"], corpus="toy")
    tuned = tune(lists, reference="ctc", free={"llm": Range()}, groups=["x", "x", "y"], draws=20)
    assert tuned.errors == 4
    write_scales(tmp_path / "scales.json", tuned=tuned, by="domain")
    stored = json.loads((tmp_path / "scales.json").read_text())
    assert {name: (g["utterances"], g["wer"], g["scales"]["ctc"]) for name, g in stored["by"]["domain"].items()} == {
        "x": (2, 40.0, 1.0), "y": (1, 100.0, 1.0)
    }  # fmt: skip
    assert set(stored["as_good"]) == {"llm"}
    scales = read_scales(tmp_path / "scales.json")
    assert scales.scales == dict(tuned.scales)
    assert (scales.corpus, scales.utterances, stored["wer"]) == ("toy", 3, tuned.wer)
    assert "norm:none@1|compounds:apart|corpus:toy|utts:3|tune:line" in stored["signature"]
    references = {x.id: x.fields["text"] for x in LINES}
    assert scales.digest == corpus_digest(dict(reversed(references.items())))
    warning = same_corpus_warning(scales, references=references)
    assert warning and "these same 3 utterances (toy)" in warning
    assert same_corpus_warning(scales, references={**references, "d": "x"}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no scales file"),
        ("[]", "expected"),
        ('{"scales": {"llm": "big"}}', "scale 'llm' is 'big'"),
        ('{"scales": {"llm": NaN}}', "is nan, expected a finite number"),
    ],
)
def test_broken_scales_file(tmp_path, text, message):
    path = tmp_path / "scales.json"
    path.write_text(text)
    with pytest.raises(ScalesError, match=message):
        read_scales(path)
    path.write_text(json.dumps({"scales": {"ctc": 1, "llm": 0.3}}))
    scales = read_scales(path)
    assert scales.scales == {"ctc": 1.0, "llm": 0.3}
    assert same_corpus_warning(scales, references={}) is None
