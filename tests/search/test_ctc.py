"""CTC beam search against brute force: every schedule, both recombinations, through Retokenized, in batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from duolect.search.ctc import ctc_beam_search
from duolect.search.fusion import (
    AtEnd,
    AtWordEnd,
    Every,
    EveryLabel,
    Fused,
    LabelPrior,
    Retokenized,
    SearchError,
    ShortestHypothesis,
    TextPolicy,
    held_to_words,
)
from duolect.vocabulary import VocabularyError
from tests.conftest import tiny_lm
from tests.oracles import all_alignments, lm_from_scratch, random_log_probs

SCHEDULES = {
    "every_label": EveryLabel(),
    "every_label without lookahead": EveryLabel(lookahead=False),
    "every 1": Every(1),
    "every 2": Every(2),
    "every 3": Every(3),
    "at word end": AtWordEnd(),
    "shortest 1": ShortestHypothesis(1),
    "shortest 2": ShortestHypothesis(2),
    "at end": AtEnd(),
}
LENGTHS = torch.tensor([6, 4, 1, 5])
EXHAUSTIVE = 4000


def frames(letters, seed: int = 3, groups: int = 4, most: int = 6):
    return random_log_probs(groups, most, letters, seed=seed)


@pytest.mark.parametrize("recombine", ["sum", "max"])
def test_without_fusion_every_label_sequence_has_its_exact_score(letters, recombine):
    x = frames(letters)
    got = ctc_beam_search(x, LENGTHS, vocabulary=letters, beam=EXHAUSTIVE, recombine=recombine)
    for b, n in enumerate(LENGTHS.tolist()):
        wanted = {y: s for y, s in all_alignments(x[b, :n], letters.blank, combine=recombine).items() if s > -1e6}
        assert {h.labels: h.parts["ctc"] for h in got[b]} == pytest.approx(wanted, abs=2e-4)
        assert [h.parts["ctc"] for h in got[b]] == sorted(wanted.values(), reverse=True) or got[b][0].parts["ctc"] == pytest.approx(
            max(wanted.values()), abs=2e-4
        )


@pytest.mark.parametrize("recombine", ["sum", "max"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_a_wide_beam_no_schedule_matters(letters, schedule, kind, recombine):
    if kind != "llama" and recombine == "max":
        pytest.skip("one model type is enough for the second recombination")
    lm = tiny_lm(kind, letters)
    x = frames(letters, groups=3)[:, :5]
    lengths = torch.tensor([5, 4, 2])
    got = ctc_beam_search(
        x,
        lengths,
        vocabulary=letters,
        beam=EXHAUSTIVE,
        recombine=recombine,
        fused={"lm": Fused(scorer=lm, scale=0.7, when=SCHEDULES[schedule])},
    )
    for b, n in enumerate(lengths.tolist()):
        ctc = {y: s for y, s in all_alignments(x[b, :n], letters.blank, combine=recombine).items() if s > -1e6}
        assert len(got[b]) == len(ctc)
        for h in got[b]:
            assert h.parts["ctc"] == pytest.approx(ctc[h.labels], abs=3e-4)
            assert h.parts["lm"] == pytest.approx(lm_from_scratch(lm, h.labels), abs=3e-4)
        scores = [h.score({"ctc": 1.0, "lm": 0.7}) for h in got[b]]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("other", ["bytes", "pieces"])
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if not SCHEDULES[s].lookahead])
def test_exact_through_another_tokenizer_with_a_prior_in_step(letters, other_vocabularies, schedule, other):
    inner = tiny_lm("llama", other_vocabularies[other])
    prior = LabelPrior(torch.tensor([0.4, 0.3, 0.1, 0.2, 0.1]).log(), letters)
    of_llm = LabelPrior(torch.randn(inner.vocabulary.size, generator=torch.Generator().manual_seed(0)), inner.vocabulary)
    fused = {
        "llm": Fused(scorer=Retokenized(inner, letters), scale=0.5, when=SCHEDULES[schedule]),
        "prior": Fused(scorer=held_to_words(prior), scale=-0.3, when=SCHEDULES[schedule]),
        "immediate": Fused(scorer=prior, scale=-0.2, when=EveryLabel()),
        "of llm": Fused(scorer=Retokenized(of_llm, letters), scale=-0.1, when=SCHEDULES[schedule]),
    }
    x = frames(letters, groups=2)[:, :5]
    lengths = torch.tensor([5, 4])
    got = ctc_beam_search(x, lengths, vocabulary=letters, beam=EXHAUSTIVE, fused=fused)
    for b, n in enumerate(lengths.tolist()):
        ctc = {y: s for y, s in all_alignments(x[b, :n], letters.blank).items() if s > -1e6}
        assert len(got[b]) == len(ctc)
        for h in got[b]:
            text = " ".join(letters.decode(h.labels).split())
            assert h.parts["ctc"] == pytest.approx(ctc[h.labels], abs=3e-4)
            assert h.parts["llm"] == pytest.approx(lm_from_scratch(inner, inner.vocabulary.encode(text)), abs=3e-4)
            assert h.parts["prior"] == pytest.approx(sum(float(prior.table[y]) for y in h.labels), abs=1e-4)
            assert h.parts["immediate"] == pytest.approx(h.parts["prior"], abs=1e-4)
            assert h.parts["of llm"] == pytest.approx(sum(float(of_llm.table[y]) for y in inner.vocabulary.encode(text)), abs=1e-4)


@pytest.mark.parametrize("schedule", ["every_label without lookahead", "every 2", "every 3", "at word end", "shortest 2"])
def test_a_delayed_prior_is_in_step_with_the_model_it_corrects(letters, schedule):
    """Against a language model that is the prior itself, nothing is left at any time: a narrow search is the one without both."""
    unigram = LabelPrior(torch.tensor([-3.0, -0.2, 0.0, 0.0, 0.0]), letters)  # rewriting changes delimiters, which count 0
    x, lengths, when = frames(letters, groups=4, most=9, seed=8), torch.tensor([9, 7, 9, 8]), SCHEDULES[schedule]

    def labels(**priors):
        lm = Fused(scorer=Retokenized(unigram, letters), scale=1.5, when=when)
        found = ctc_beam_search(x, lengths, vocabulary=letters, beam=3, fused={"lm": lm, **priors} if priors else {})
        return [[h.labels for h in nbest] for nbest in found]

    assert labels(prior=Fused(scorer=held_to_words(unigram), scale=-1.5, when=when)) == labels()
    assert labels(prior=Fused(scorer=unigram, scale=-1.5, when=EveryLabel())) != labels(), "an immediate prior is ahead of it"


@pytest.mark.parametrize("beam", [1, 2, 5, 17])
@pytest.mark.parametrize("schedule", ["every_label", "every 2", "at word end", "shortest 1"])
def test_a_batch_gives_what_each_utterance_gives_alone(letters, schedule, beam):
    lm = tiny_lm("llama", letters)
    x = frames(letters, groups=6, most=9, seed=8)
    lengths = torch.tensor([9, 3, 7, 9, 1, 5])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    fused = {"lm": Fused(scorer=lm, scale=0.6, when=SCHEDULES[schedule])}
    together = ctc_beam_search(x[order], lengths[order], vocabulary=letters, beam=beam, fused=fused)
    for place, b in enumerate(order.tolist()):
        alone = ctc_beam_search(x[b : b + 1, : lengths[b]], lengths[b : b + 1], vocabulary=letters, beam=beam, fused=fused)[0]
        assert [h.labels for h in together[place]] == [h.labels for h in alone]
        for h, g in zip(together[place], alone, strict=True):
            assert dict(h.parts) == pytest.approx(dict(g.parts), abs=1e-4)


def test_fusion_at_the_end_is_rescoring_of_the_list(letters):
    lm = tiny_lm("qwen2", letters)
    x = frames(letters, most=8, groups=3, seed=5)
    lengths = torch.tensor([8, 6, 3])
    nbest = ctc_beam_search(x, lengths, vocabulary=letters, beam=6)
    fused = ctc_beam_search(x, lengths, vocabulary=letters, beam=6, fused={"lm": Fused(scorer=lm, scale=0.8, when=AtEnd())})
    for plain, both in zip(nbest, fused, strict=True):
        scored = sorted(((h.parts["ctc"] + 0.8 * lm_from_scratch(lm, h.labels), h.labels) for h in plain), reverse=True)
        assert [labels for _, labels in scored] == [h.labels for h in both]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scale_zero_is_ctc_alone(letters, schedule):
    x = frames(letters, most=8, groups=3, seed=6)
    lengths = torch.tensor([8, 6, 3])
    plain = ctc_beam_search(x, lengths, vocabulary=letters, beam=4)
    fused = ctc_beam_search(
        x, lengths, vocabulary=letters, beam=4, fused={"lm": Fused(scorer=tiny_lm("llama", letters), scale=0.0, when=SCHEDULES[schedule])}
    )
    assert [[h.labels for h in hs] for hs in plain] == [[h.labels for h in hs] for hs in fused]


def test_narrow_beams_find_what_a_naive_prefix_search_finds(letters):
    x = frames(letters, most=7, groups=5, seed=11)
    lengths = torch.full((5,), 7)
    got = ctc_beam_search(x, lengths, vocabulary=letters, beam=3)
    for b in range(5):
        wanted = _naive_prefix_search(x[b].double().exp(), letters.blank, 3)
        assert [h.labels for h in got[b]] == [y for y, _ in wanted]


def _naive_prefix_search(probs, blank, beam, floor=math.inf):
    beams = {(): (1.0, 0.0)}
    for row in probs.tolist():
        new = {}
        for y, (pb, pl) in beams.items():
            for c, p in enumerate(row):
                b, label = new.get(y, (0.0, 0.0))
                if c == blank:
                    new[y] = (b + (pb + pl) * p, label)
                    continue
                if y and c == y[-1]:
                    new[y] = (b, label + pl * p)
                longer = (*y, c)
                b, label = new.get(longer, (0.0, 0.0))
                new[longer] = (b, label + (pb if y and c == y[-1] else pb + pl) * p)
        least = max(map(sum, new.values())) * math.exp(-floor)
        beams = {y: p for y, p in sorted(new.items(), key=lambda item: -sum(item[1]))[:beam] if sum(p) >= least and sum(p) > 0}
    return sorted(((y, sum(p)) for y, p in beams.items()), key=lambda item: -item[1])


def _peaky(letters, *, seed: int, groups: int = 5, most: int = 14):
    """Log-probs of which many frames have blank alone above a floor of 3, at both ends and in runs too, and some one label alone."""
    x = random_log_probs(groups, most, letters, seed=seed)
    sure = torch.rand(groups, most, generator=torch.Generator().manual_seed(seed)) < 0.5
    x[..., letters.blank] += torch.where(sure, 9.0, 0.0)
    x[:, ::3, (letters.blank + 1) % letters.size] += 12.0
    x[:, 7:9, (letters.blank + 2) % letters.size] += 24.0
    return x.log_softmax(-1)


def _below(x, floor):
    return x.masked_fill(x < x.amax(-1, keepdim=True) - floor, -torch.inf)


def test_frames_of_blank_alone_and_floors_give_what_a_naive_prefix_search_finds(letters):
    x = _peaky(letters, seed=12)
    assert 0.1 < ((_below(x, 3.0) > -torch.inf).sum(2) == 1).float().mean() < 0.9
    got = ctc_beam_search(x, torch.full((5,), 14), vocabulary=letters, beam=4, label_floor=3.0, beam_floor=2.5)
    for b in range(5):
        wanted = _naive_prefix_search(_below(x[b], 3.0).double().exp(), letters.blank, 4, floor=2.5)
        assert [h.labels for h in got[b]] == [y for y, _ in wanted]
        assert [h.parts["ctc"] for h in got[b]] == pytest.approx([math.log(p) for _, p in wanted], abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_label_floor_is_the_search_over_what_is_above_it_frame_by_frame(letters, schedule):
    lm, x, lengths = tiny_lm("llama", letters), _peaky(letters, seed=13), torch.tensor([14, 5, 1, 9, 14])
    fused = {"lm": Fused(scorer=lm, scale=0.6, when=SCHEDULES[schedule])}
    got = ctc_beam_search(x, lengths, vocabulary=letters, beam=5, fused=fused, label_floor=4.0)
    # A label of p ~ 0 in every frame: none is of blank alone, so none is skipped.
    floored = _below(x, 4.0).clamp(min=-300.0)
    wanted = ctc_beam_search(floored, lengths, vocabulary=letters, beam=5, fused=fused)
    for a, b in zip(got, wanted, strict=True):
        b = [h for h in b if h.parts["ctc"] > -150]
        assert [h.labels for h in a[: len(b)]] == [h.labels for h in b]
        for h, g in zip(a, b, strict=False):
            assert dict(h.parts) == pytest.approx(dict(g.parts), abs=2e-4)


def test_endless_floors_are_none(letters):
    x, lm = frames(letters, groups=4, most=6), tiny_lm("llama", letters)
    for fused in ({}, {"lm": Fused(scorer=lm, scale=0.6)}):
        plain = ctc_beam_search(x, LENGTHS, vocabulary=letters, beam=6, fused=fused)
        endless = ctc_beam_search(x, LENGTHS, vocabulary=letters, beam=6, fused=fused, label_floor=math.inf, beam_floor=math.inf)
        assert endless == plain


def test_a_floored_batch_gives_what_each_utterance_gives_alone(letters):
    x, lengths = _peaky(letters, seed=14), torch.tensor([3, 14, 1, 8, 0])
    floors = {"beam": 6, "label_floor": 4.0, "beam_floor": 3.0}
    together = ctc_beam_search(x, lengths, vocabulary=letters, **floors)
    for b, n in enumerate(lengths.tolist()):
        alone = ctc_beam_search(x[b : b + 1, :n], lengths[b : b + 1], vocabulary=letters, **floors)[0]
        assert [h.labels for h in together[b]] == [h.labels for h in alone]


def test_empty_batch_and_zero_frames(letters):
    assert ctc_beam_search(torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.long), vocabulary=letters, beam=3) == []
    (hypotheses,) = ctc_beam_search(torch.zeros(1, 0, 5), torch.zeros(1, dtype=torch.long), vocabulary=letters, beam=3)
    assert [h.labels for h in hypotheses] == [()]


def test_where_a_scorer_rules_out_everything_the_acoustic_order_stands(letters):
    x = frames(letters)
    lm = tiny_lm("llama", letters)
    lm.output = replace(lm.output, bias=torch.full((letters.size,), 0.0).index_fill(0, torch.tensor([letters.eos]), -torch.inf))
    plain = ctc_beam_search(x, LENGTHS, vocabulary=letters, beam=4)
    fused = ctc_beam_search(x, LENGTHS, vocabulary=letters, beam=4, fused={"lm": Fused(scorer=lm, scale=0.5, when=AtEnd())})
    assert [[h.labels for h in hs] for hs in fused] == [[h.labels for h in hs] for hs in plain]
    assert all(h.parts["lm"] == -float("inf") for hs in fused for h in hs)


def test_wrong_input_is_refused_with_the_next_step(letters, other_vocabularies):
    x, n = frames(letters), LENGTHS
    with pytest.raises(SearchError, match="distance below the best"):
        ctc_beam_search(x, n, vocabulary=letters, beam=2, label_floor=-5.0)
    with pytest.raises(SearchError, match="beam of 0"):
        ctc_beam_search(x, n, vocabulary=letters, beam=0)
    with pytest.raises(VocabularyError, match="Retokenized"):
        ctc_beam_search(
            x, n, vocabulary=letters, beam=2, fused={"llm": Fused(scorer=tiny_lm("llama", other_vocabularies["bytes"]), scale=1.0)}
        )
    with pytest.raises(SearchError, match="AtWordEnd"):
        word_wise = Retokenized(tiny_lm("llama", other_vocabularies["bytes"]), letters, policy=TextPolicy(case="lower"))
        ctc_beam_search(x, n, vocabulary=letters, beam=2, fused={"llm": Fused(scorer=word_wise, scale=1.0)})
    with pytest.raises(SearchError, match="smooth"):
        LabelPrior(torch.tensor([0.5, 0.0, 0.1, 0.3, 0.1]).log(), letters)
    with pytest.raises(SearchError, match="own name"):
        ctc_beam_search(x, n, vocabulary=letters, beam=2, fused={"ctc": Fused(scorer=tiny_lm("llama", letters), scale=1.0)})
