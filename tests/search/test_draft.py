"""Speculative decoding gives what greedy search gives, whatever the draft; loops are seen."""

from __future__ import annotations

import pytest
import torch

from duolect.search.draft import Draft, greedy_with_drafts, remainder
from duolect.search.fusion import Fused, SearchError
from duolect.search.label import LONGEST_LOOP, label_beam_search, looping
from duolect.vocabulary import Vocabulary
from tests.conftest import tiny_lm

LIMITS = torch.tensor([5, 9, 12, 30, 1])


def greedy(lm, *, repeats: int | None = None):
    found = label_beam_search({"llm": Fused(scorer=lm, scale=1.0)}, len(LIMITS), beam=1, max_labels=LIMITS, repeats=repeats)
    return [nbest[0] for nbest in found]


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("units", ["bytes", "pieces"])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_any_draft_leaves_greedy_search_as_it_is(other_vocabularies: dict[str, Vocabulary], kind: str, units: str, chunk: int) -> None:
    for seed in range(3):
        lm = tiny_lm(kind, other_vocabularies[units], seed=seed)
        wanted = greedy(lm)
        good = [h.text for h in wanted]
        halves = [t[: len(t) // 2] + "b" + t[len(t) // 2 + 1 :] for t in good]
        for drafts in (good, halves, [""] * len(good), ["ab ba", "baab abba bab", "a", "bb aa ab", "q"]):
            found = greedy_with_drafts(lm, drafts, max_labels=LIMITS, settings=Draft(chunk))
            for a, (b,) in zip(wanted, found.nbest, strict=True):
                assert a.labels == b.labels and a.text == b.text
                assert b.parts["llm"] == pytest.approx(a.parts["llm"], abs=1e-3)


def test_a_good_draft_needs_fewer_passes(letters: Vocabulary) -> None:
    lms = (tiny_lm("qwen2", letters, seed=seed) for seed in range(20))
    lm = next(lm for lm in lms if len(set(greedy(lm)[3].labels)) > 1 and len(greedy(lm)[3].labels) > 20)
    wanted = greedy(lm)
    longest = max(len(h.labels) for h in wanted)
    none = greedy_with_drafts(lm, [""] * len(wanted), max_labels=LIMITS)
    good = greedy_with_drafts(lm, [h.text for h in wanted], max_labels=LIMITS)
    assert none.passes == longest + 1 and none.accepted == 0
    assert good.passes < none.passes / 2 and good.accepted > 0.5 * sum(len(h.labels) for h in wanted)


def test_with_slack_a_draft_that_is_nearly_as_good_wins(other_vocabularies: dict[str, Vocabulary]) -> None:
    vocabulary = other_vocabularies["bytes"]
    lm, drafts = tiny_lm("gpt2", vocabulary, seed=1), ["ab ba", "baab abba bab", "a", "bb aa ab", "ab"]
    exact = greedy_with_drafts(lm, drafts, max_labels=LIMITS)
    loose = greedy_with_drafts(lm, drafts, max_labels=LIMITS, settings=Draft(slack=100.0))
    gated = greedy_with_drafts(lm, drafts, max_labels=LIMITS, settings=Draft(slack=100.0, entropy=100.0))
    for b, draft in enumerate(drafts):
        labels = vocabulary.encode(draft)[: int(LIMITS[b])]
        assert list(loose.nbest[b][0].labels[: len(labels)]) == labels
        assert gated.nbest[b][0].labels == exact.nbest[b][0].labels
    assert any(loose.nbest[b][0].labels != exact.nbest[b][0].labels for b in range(len(drafts)))
    with pytest.raises(SearchError, match="chunk >= 1"):
        Draft(chunk=0)


@pytest.mark.parametrize(
    "written, draft, rest",
    [
        ("the cat", "the cat sat", " sat"),
        ("the cut", "the cat sat", " sat"),
        ("the c", "the cat sat", "at sat"),
        ("the d", "the cat sat", "at sat"),
        ("the big cat", "the cat sat", " sat"),
        ("the sat", "the cat sat down", " down"),
        ("the cat sat on it", "the cat sat", ""),
        ("cat", "the cat sat", " sat"),
        ("the cat sat", "the cat sat", ""),
        ("", "the", "the"),
        ("the", "", ""),
    ],
)
def test_the_rest_of_a_draft_is_found_behind_what_was_written(written: str, draft: str, rest: str) -> None:
    assert remainder(written, draft) == rest


def test_loops_are_seen() -> None:
    def loops(labels: list[int], repeats: int) -> bool:
        padded = torch.tensor([[*labels, *[7] * (20 - len(labels))]])
        return bool(looping(padded, torch.tensor([len(labels)]), repeats=repeats)[0])

    assert loops([1, 2, 2, 2], 3) and not loops([1, 2, 2, 2], 4) and not loops([2, 2, 2, 1], 3)
    assert loops([5, 1, 2, 3, 1, 2, 3], 2) and not loops([5, 1, 2, 3, 1, 2, 3], 3)
    assert not loops([], 2) and not loops([1], 2)
    for period in range(1, LONGEST_LOOP + 1):
        once = list(range(period))
        assert loops([*once, *once], 2) and not loops([9, *once, 11, *once], 2)


def test_a_hypothesis_that_loops_is_made_to_end(other_vocabularies: dict[str, Vocabulary]) -> None:
    looped = 0
    for seed in range(6):
        lm = tiny_lm("qwen2", other_vocabularies["bytes"], seed=seed)
        for free, held in zip(greedy(lm), greedy(lm, repeats=3), strict=True):
            labels = torch.tensor([free.labels])
            ends = [n for n in range(len(free.labels)) if bool(looping(labels, torch.tensor([n]), repeats=3)[0])]
            looped += bool(ends)
            assert held.labels == (free.labels[: ends[0]] if ends else free.labels)
    assert looped
