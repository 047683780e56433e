"""Frame collapse, label pruning, forced alignment, pauses: against plain loops and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from duolect.search.align import align, pauses, words
from duolect.search.ctc import ctc_beam_search, ctc_greedy
from duolect.search.fusion import SearchError
from duolect.search.reduce import prune_labels, soft_collapse
from tests.oracles import collapsed, random_log_probs

LENGTHS = torch.tensor([9, 4, 1])


def naive_collapse(x, threshold):
    """[T', V] of one utterance, x [T, V], by a loop over frames."""
    groups = []
    for t in range(len(x)):
        sure = float(x[t].max().exp()) >= threshold
        if groups and sure and float(x[t - 1].max().exp()) >= threshold and int(x[t].argmax()) == int(x[t - 1].argmax()):
            groups[-1].append(t)
        else:
            groups.append([t])
    return torch.stack([x[g].amax(0).log_softmax(-1) for g in groups])


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_soft_collapse_equals_the_loop(letters, threshold):
    x = random_log_probs(3, 9, letters, seed=1, peak=4.0)
    x[:, 3:6] = x[:, 2:3]  # runs to merge
    got, lengths = soft_collapse(x, LENGTHS, threshold=threshold)
    shorter = False
    for b, n in enumerate(LENGTHS.tolist()):
        rows = naive_collapse(x[b, :n], threshold)
        assert int(lengths[b]) == len(rows)
        assert torch.allclose(got[b, : len(rows)].exp(), rows.exp(), atol=1e-5)
        shorter |= len(rows) < n
    assert shorter or threshold == 0.9


def test_no_collapse_and_no_pruning_change_nothing(letters):
    x = random_log_probs(3, 9, letters, seed=2)
    got, lengths = soft_collapse(x, LENGTHS, threshold=1.1)
    assert torch.equal(lengths, LENGTHS)
    assert prune_labels(x, LENGTHS, keep=letters.size, vocabulary=letters) is x
    plain = ctc_beam_search(x, LENGTHS, vocabulary=letters, beam=4)
    again = ctc_beam_search(got, lengths, vocabulary=letters, beam=4)
    assert [[h.labels for h in hs] for hs in plain] == [[h.labels for h in hs] for hs in again]


def test_pruned_labels_are_the_weakest_of_each_utterance(letters):
    x = random_log_probs(3, 9, letters, seed=3)
    got = prune_labels(x, LENGTHS, keep=2, vocabulary=letters)
    for b, n in enumerate(LENGTHS.tolist()):
        rank = x[b, :n].amax(0)
        rank[letters.blank] = torch.inf
        kept = set(rank.topk(3).indices.tolist())
        assert {v for v in range(letters.size) if bool(got[b, :n, v].isfinite().all())} == kept
        assert got[b, :n].exp().sum(-1).tolist() == pytest.approx([1.0] * n, abs=1e-5)
    with pytest.raises(SearchError, match="leaves nothing"):
        prune_labels(x, LENGTHS, keep=0, vocabulary=letters)


def test_alignment_is_the_best_of_all_paths(letters):
    x = random_log_probs(1, 6, letters, seed=4)[0]
    for labels in [(0,), (0, 0), (1, 3, 0), (0, 1, 1), (0, 1, 0, 1)]:
        paths = [p for p in itertools.product(range(letters.size), repeat=6) if collapsed(p, letters.blank) == labels]
        best = max(paths, key=lambda p: float(x[torch.arange(6), list(p)].sum()))
        found = align(x, labels, blank=letters.blank)
        assert found is not None and [item.label for item in found] == list(labels)
        rebuilt = [letters.blank] * 6
        for item in found:
            rebuilt[item.start : item.end] = [item.label] * (item.end - item.start)
            assert item.log_prob == pytest.approx(float(x[item.start : item.end, item.label].max()), abs=1e-5)
        assert float(x[torch.arange(6), rebuilt].sum()) == pytest.approx(float(x[torch.arange(6), list(best)].sum()), abs=1e-4)
    assert align(x, (0, 0, 0, 0), blank=letters.blank) is None, "four equal labels need three blanks between: seven frames"
    assert align(x, (), blank=letters.blank) == []


def test_words_have_times_and_confidences(letters):
    labels = letters.encode("ab ba")
    x = torch.full((12, letters.size), 0.01)
    spoken = {1: labels[0], 3: labels[1], 5: labels[2], 7: labels[3], 9: labels[4]}
    for t in range(12):
        x[t, spoken.get(t, letters.blank)] = 0.9
    found = align(x.log_softmax(-1) * 0 + (x / x.sum(-1, keepdim=True)).log(), labels, blank=letters.blank)
    first, second = words(found, vocabulary=letters, seconds_per_frame=0.04)
    assert (first.text, second.text) == ("ab", "ba")
    assert (first.start, first.end) == pytest.approx((0.04, 0.16))
    assert (second.start, second.end) == pytest.approx((0.28, 0.40))
    assert first.confidence == pytest.approx(0.9 / 0.94, abs=1e-3)


def test_pauses_cover_everything_once_and_cut_where_it_is_silent():
    blank = torch.full((1000,), -5.0)
    blank[280:300] = blank[620:650] = -0.01
    cuts = pauses(blank, longest=400)
    assert cuts[0][0] == 0 and cuts[-1][1] == 1000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts)) and all(0 < end - start <= 400 for start, end in cuts)
    assert 280 <= cuts[0][1] <= 300 and 620 <= cuts[1][1] <= 650
    assert pauses(blank[:300], longest=400) == [(0, 300)]


def test_greedy_is_the_best_label_of_each_frame(letters):
    x = random_log_probs(3, 9, letters, seed=7)
    got = ctc_greedy(x, LENGTHS, vocabulary=letters)
    for b, n in enumerate(LENGTHS.tolist()):
        (h,) = got[b]
        assert h.labels == collapsed(x[b, :n].argmax(-1).tolist(), letters.blank)
        assert h.parts["ctc"] == pytest.approx(float(x[b, :n].max(-1).values.sum()), abs=1e-4)
