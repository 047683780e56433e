"""CTC prefix scores against a loop over frames and brute force; label-synchronous search against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch

from duolect.search.fusion import AtEnd, AtWordEnd, Every, EveryLabel, Fused, Retokenized, SearchError, held_to_words
from duolect.search.label import label_beam_search
from duolect.search.prefix import CtcPrefix
from tests.conftest import tiny_lm
from tests.oracles import all_alignments, lm_from_scratch, random_log_probs

LENGTHS = torch.tensor([6, 4, 2])


def naive_prefix_score(x, labels, blank):
    """log p(labels ...) by the textbook recursion over frames, for one prefix of one utterance, x [T, V]."""
    neg = -float("inf")
    frames = len(x)
    nonblank = [neg] * (frames + 1)
    blanks = [0.0] + [float(x[: t + 1, blank].sum()) for t in range(frames)]
    psi = 0.0
    last = None
    for c in labels:
        new, new_blank, psi = [neg] * (frames + 1), [neg] * (frames + 1), neg
        for t in range(1, frames + 1):
            phi = blanks[t - 1] if c == last else _logadd(nonblank[t - 1], blanks[t - 1])
            new[t] = _logadd(new[t - 1], phi) + float(x[t - 1, c])
            new_blank[t] = _logadd(new_blank[t - 1], new[t - 1]) + float(x[t - 1, blank])
            psi = _logadd(psi, phi + float(x[t - 1, c]))
        nonblank, blanks, last = new, new_blank, c
    return psi, _logadd(nonblank[-1], blanks[-1])


def _logadd(a, b):
    return float(torch.logaddexp(torch.tensor(a, dtype=torch.double), torch.tensor(b, dtype=torch.double)))


@pytest.mark.parametrize("peak", [1.0, 6.0, 25.0])
def test_prefix_scores_equal_the_loop_over_frames(letters, peak):
    x = random_log_probs(3, 12, letters, seed=2, peak=peak)
    lengths = torch.tensor([12, 7, 1])
    scorer = CtcPrefix(x, lengths, vocabulary=letters)
    spoken = [y for y in range(letters.size) if y not in (letters.blank, letters.eos)]
    for prefix in [(), (0,), (0, 0), (1, 3, 1), (0, 1, 1, 3)]:
        state = scorer.start(3)
        score, state = scorer.advance(state, torch.tensor([prefix] * 3).view(3, -1), torch.full((3,), len(prefix)))
        got = scorer.log_probs(state)
        for b, n in enumerate(lengths.tolist()):
            psi, exact = naive_prefix_score(x[b, :n].double(), prefix, letters.blank)
            if psi == -float("inf"):
                continue
            assert float(score[b]) == pytest.approx(psi, abs=1e-4)
            assert float(got[b, letters.eos]) == pytest.approx(exact - psi, abs=1e-4)
            for c in spoken:
                longer, _ = naive_prefix_score(x[b, :n].double(), (*prefix, c), letters.blank)
                if longer - psi > -200:
                    assert float(got[b, c]) == pytest.approx(longer - psi, abs=2e-4)


@pytest.mark.parametrize("rows", [[0, 1], [1, 0, 1]])
def test_a_label_that_only_faint_frames_have_gets_its_exact_score(letters, rows):
    x = torch.full((2, 12, letters.size), -80.0)
    x[:, 0, 1], x[:, 1:, 0] = 0.0, 0.0  # heard: 1, then 0 for the rest
    x[..., 3] = -torch.inf
    x[:, 8, 3] = -1.0  # 3 may be heard in one frame alone, before which no more than 1 has e^-560
    lengths = torch.tensor([12, 10])
    scorer = CtcPrefix(x, lengths, vocabulary=letters)
    state = scorer.select(scorer.start(2), torch.tensor(rows))
    _, state = scorer.advance(state, torch.ones(len(rows), 1, dtype=torch.long), torch.ones(len(rows), dtype=torch.long))
    got = scorer.log_probs(state)
    for r, b in enumerate(rows):
        own = x[b, : lengths[b]].double()
        psi, _ = naive_prefix_score(own, (1,), letters.blank)
        for c in (0, 3):
            longer, _ = naive_prefix_score(own, (1, c), letters.blank)
            assert float(got[r, c]) == pytest.approx(longer - psi, abs=1e-3)
        assert float(got[r, 3]) < -500


def test_prefix_probabilities_of_all_continuations_sum_to_one(letters):
    x = random_log_probs(2, 9, letters, seed=4)
    scorer = CtcPrefix(x, torch.tensor([9, 5]), vocabulary=letters)
    state = scorer.start(2)
    _, state = scorer.advance(state, torch.tensor([[0, 1], [1, 1]]), torch.tensor([2, 1]))
    assert scorer.log_probs(state).exp().sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_prefix_rows_may_be_gathered_in_any_order_and_candidates_chosen(letters):
    x = random_log_probs(2, 9, letters, seed=4)
    scorer = CtcPrefix(x, torch.tensor([9, 5]), vocabulary=letters)
    state = scorer.select(scorer.start(2), torch.tensor([1, 0, 0, 1, 0]))
    labels = torch.tensor([[0], [1], [0], [3], [0]])
    _, state = scorer.advance(state, labels, torch.tensor([1, 1, 0, 1, 1]))
    whole = scorer.log_probs(state)
    candidates = torch.tensor([[4, 0], [1, 1], [3, 0], [0, 4], [1, 3]])
    assert torch.equal(scorer.log_probs(state, candidates), whole.gather(1, candidates))
    shuffled = torch.tensor([4, 2, 0, 1, 3])
    assert torch.allclose(scorer.log_probs(scorer.select(state, shuffled)), whole[shuffled], atol=1e-6)


def test_prefix_scores_of_a_batch_equal_those_alone(letters):
    x = random_log_probs(4, 10, letters, seed=9)
    lengths = torch.tensor([10, 3, 7, 1])
    together = CtcPrefix(x, lengths, vocabulary=letters)
    whole = together.log_probs(together.start(4))
    for b, n in enumerate(lengths.tolist()):
        alone = CtcPrefix(x[b : b + 1, :n], lengths[b : b + 1], vocabulary=letters)
        assert torch.allclose(alone.log_probs(alone.start(1))[0], whole[b], atol=1e-5)


@pytest.mark.parametrize("ends", ["beam", "apart"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_label_search_ranks_all_sequences_like_enumeration(letters, kind, exponent, ends):
    lm = tiny_lm(kind, letters)
    longest = 3
    spoken = [y for y in range(letters.size) if y not in (letters.blank, letters.eos)]
    every_one = [y for n in range(longest + 1) for y in itertools.product(spoken, repeat=n)]
    wanted = {y: lm_from_scratch(lm, y) for y in every_one}
    (got,) = label_beam_search(
        {"lm": Fused(scorer=lm, scale=1.0)}, 1, beam=2000, max_labels=longest, length_exponent=exponent, stop="all", ends=ends
    )
    assert {h.labels: h.parts["lm"] for h in got} == pytest.approx(wanted, abs=2e-4)
    normalized = [wanted[h.labels] / (len(h.labels) + 1) ** exponent for h in got]
    assert normalized == pytest.approx(sorted(normalized, reverse=True), abs=2e-4)


@pytest.mark.parametrize("ends", ["beam", "apart"])
@pytest.mark.parametrize("when", [EveryLabel(), EveryLabel(lookahead=False), Every(2), AtWordEnd(), AtEnd()])
def test_joint_with_ctc_every_sequence_has_its_exact_score(letters, when, ends):
    lm = tiny_lm("qwen2", letters)
    x = random_log_probs(3, 6, letters, seed=12)[:, :5]
    lengths = torch.tensor([5, 3, 1])
    fused = {"ctc": Fused(scorer=CtcPrefix(x, lengths, vocabulary=letters), scale=0.6), "lm": Fused(scorer=lm, scale=0.4, when=when)}
    got = label_beam_search(fused, 3, beam=4000, max_labels=5, stop="all", ends=ends)
    for b, n in enumerate(lengths.tolist()):
        ctc = {y: s for y, s in all_alignments(x[b, :n], letters.blank).items() if s > -1e6}
        assert {h.labels for h in got[b]} == set(ctc)
        for h in got[b]:
            assert h.parts["ctc"] == pytest.approx(ctc[h.labels], abs=3e-4)
            assert h.parts["lm"] == pytest.approx(lm_from_scratch(lm, h.labels), abs=3e-4)


@pytest.mark.parametrize("ends", ["beam", "apart"])
@pytest.mark.parametrize("other", ["bytes", "pieces"])
@pytest.mark.parametrize("when", [Every(1), AtWordEnd(), AtEnd()])
def test_joint_search_is_exact_through_another_tokenizer(letters, other_vocabularies, other, when, ends):
    lm = tiny_lm("llama", other_vocabularies[other])
    x = random_log_probs(2, 5, letters, seed=13)
    lengths = torch.tensor([5, 4])
    fused = {
        "ctc": Fused(scorer=CtcPrefix(x, lengths, vocabulary=letters), scale=1.0),
        "llm": Fused(scorer=Retokenized(lm, letters), scale=0.4, when=when),
    }
    got = label_beam_search(fused, 2, beam=4000, max_labels=5, stop="all", ends=ends)
    for b, n in enumerate(lengths.tolist()):
        ctc = {y: s for y, s in all_alignments(x[b, :n], letters.blank).items() if s > -1e6}
        assert {h.labels for h in got[b]} == set(ctc)
        for h in got[b]:
            text = " ".join(letters.decode(h.labels).split())
            assert h.parts["llm"] == pytest.approx(lm_from_scratch(lm, lm.vocabulary.encode(text)), abs=3e-4)


def test_greedy_is_beam_one(letters):
    lm = tiny_lm("llama", letters, seed=5)
    (got,) = label_beam_search({"lm": Fused(scorer=lm, scale=1.0)}, 1, beam=1, max_labels=7)
    history = []
    state = lm.start(1)
    while len(history) < 7:
        scores = lm.log_probs(state)[0]
        scores[letters.blank] = -float("inf")
        best = int(scores.argmax())
        if best == letters.eos:
            break
        history.append(best)
        _, state = lm.advance(state, torch.tensor([[best]]), torch.tensor([1]))
    assert got[0].labels == tuple(history)


@pytest.mark.parametrize("ends", ["beam", "apart"])
@pytest.mark.parametrize("beam", [1, 3, 8])
@pytest.mark.parametrize("when", [EveryLabel(), AtWordEnd()])
def test_label_search_of_a_batch_equals_each_alone(letters, beam, when, ends):
    lm = tiny_lm("llama", letters)
    x = random_log_probs(5, 9, letters, seed=14)
    lengths = torch.tensor([9, 2, 7, 4, 9])

    def search(b):
        fused = {
            "ctc": Fused(scorer=CtcPrefix(x[b], lengths[b], vocabulary=letters), scale=0.7),
            "lm": Fused(scorer=lm, scale=0.3, when=when),
        }
        return label_beam_search(fused, len(lengths[b]), beam=beam, max_labels=lengths[b], ends=ends)

    order = torch.tensor([4, 1, 0, 3, 2])
    together = search(order)
    for place, b in enumerate(order.tolist()):
        (alone,) = search(torch.tensor([b]))
        assert [h.labels for h in together[place]] == [h.labels for h in alone]
        for h, g in zip(together[place], alone, strict=True):
            assert dict(h.parts) == pytest.approx(dict(g.parts), abs=1e-4)


@pytest.mark.parametrize("ends", ["beam", "apart"])
def test_stopping_early_does_not_change_the_best(letters, ends):
    lm = tiny_lm("gpt2", letters, seed=3)
    x = random_log_probs(4, 10, letters, seed=15)
    lengths = torch.tensor([10, 8, 5, 10])
    fused = {"ctc": Fused(scorer=CtcPrefix(x, lengths, vocabulary=letters), scale=0.7), "lm": Fused(scorer=lm, scale=0.3)}
    soon = label_beam_search(fused, 4, beam=6, max_labels=lengths, stop="best", ends=ends)
    late = label_beam_search(fused, 4, beam=6, max_labels=lengths, stop="all", ends=ends)
    assert [hs[0].labels for hs in soon] == [hs[0].labels for hs in late]


def test_an_end_apart_needs_no_slot_of_the_beam(letters):
    """Silence: the LM wants to talk, CTC, asked at word ends only, knows that nothing was said."""
    lm = tiny_lm("llama", letters, seed=2)
    silence = torch.full((1, 12, letters.size), -12.0)
    silence[..., letters.blank] = -1e-4
    fused = {
        "llm": Fused(scorer=lm, scale=1.0),
        "ctc": Fused(scorer=held_to_words(CtcPrefix(silence, torch.tensor([12]), vocabulary=letters)), scale=1.0, when=AtWordEnd()),
    }
    (talking,), (quiet,) = (label_beam_search(fused, 1, beam=2, max_labels=8, ends=ends) for ends in ("beam", "apart"))
    assert quiet[0].labels == () and talking[0].labels != ()
    assert quiet[0].score({"llm": 1.0, "ctc": 1.0}) > talking[0].score({"llm": 1.0, "ctc": 1.0})


def test_label_search_refuses_what_cannot_work(letters):
    lm = tiny_lm("llama", letters)
    with pytest.raises(SearchError, match="beam of 0"):
        label_beam_search({"lm": Fused(scorer=lm, scale=1.0)}, 1, beam=0, max_labels=3)
    with pytest.raises(SearchError, match="proposes labels"):
        label_beam_search({"lm": Fused(scorer=lm, scale=1.0, when=AtEnd())}, 1, beam=2, max_labels=3)
    with pytest.raises(SearchError, match="proposes labels"):
        label_beam_search({}, 1, beam=2, max_labels=3)
