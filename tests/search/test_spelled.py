"""CTC probabilities of words against sums over all paths of frames, whatever labels they are of."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

from duolect.search.fusion import EveryLabel, Fused
from duolect.search.label import label_beam_search
from duolect.search.prefix import CtcPrefix
from duolect.search.spelled import CtcWords, Spelled
from duolect.vocabulary import CharacterVocabulary, SentencePieceVocabulary, Vocabulary
from tests.conftest import sentence_pieces

FRAMES = 5


@pytest.fixture(scope="module")
def pieces() -> SentencePieceVocabulary:
    """Words of a and b that can be cut in several ways, one of them whole."""
    return SentencePieceVocabulary(sentence_pieces(["ab abba a", "ba ab bab", "a a b"] * 9, size=10).model, blank="last")


def sequences(log_probs: torch.Tensor, blank: int) -> dict[tuple[int, ...], float]:
    """The probability of every label sequence, path by path."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    rows = log_probs.double().exp().tolist()
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        found[tuple(x for x, _ in itertools.groupby(path) if x != blank)] += math.prod(r[x] for r, x in zip(rows, path, strict=True))
    return found


@pytest.mark.parametrize("words", [["ab"], ["a", "a"], ["a", "a", "a"], ["b", "ab"], ["abba"], ["bb", "b"], ["aa", "a"], ["ba", "bab"], []])
def test_a_word_is_all_of_its_segmentations(pieces: SentencePieceVocabulary, words: list[str]) -> None:
    torch.manual_seed(len(words))
    log_probs = spoken(2, FRAMES, pieces=pieces)
    lengths = torch.tensor([FRAMES, FRAMES - 1])
    scorer = CtcWords(CtcPrefix(log_probs, lengths, vocabulary=pieces))
    labels = torch.tensor([[scorer.number(word) for word in words]] * 2, dtype=torch.long)
    score, state = scorer.advance(scorer.start(2), labels, torch.tensor([len(words)] * 2))
    steps, parts = scorer.start(2), torch.zeros(2)
    for i in range(len(words)):
        gained, steps = scorer.advance(steps, labels[:, i : i + 1], torch.tensor([1, 1]))
        parts = parts + gained
    torch.testing.assert_close(parts, score)
    turned = scorer.select(state, torch.tensor([1, 0, 1]))
    assert turned.utterance.tolist() == [1, 0, 1]
    text = "".join(" " + word for word in words)
    for row in (0, 1):
        found = sequences(log_probs[row, : lengths[row]], pieces.blank or 0)
        texts = {y: "".join(pieces.label_texts[label] for label in y) for y in found}
        begun = math.log(sum(p for y, p in found.items() if any(texts_of(pieces, y[:n]) == text for n in range(len(y) + 1))))
        whole = math.log(sum(p for y, p in found.items() if texts[y] == text))
        assert float(score[row]) == pytest.approx(begun, abs=1e-4)
        assert float(score[row] + scorer.finish(state)[row]) == pytest.approx(whole, abs=1e-4)


def spoken(*shape: int, pieces: Vocabulary) -> torch.Tensor:
    """Random log-probs, nought for labels that no text has: a path over them spells the same."""
    silent = torch.tensor([not text and i != pieces.blank for i, text in enumerate(pieces.label_texts)])
    return torch.randn(*shape, pieces.size).masked_fill(silent, -1e4).log_softmax(-1)


def texts_of(pieces: Vocabulary, labels: tuple[int, ...]) -> str:
    return "".join(pieces.label_texts[label] for label in labels)


@pytest.mark.parametrize("kind", ["pieces", "letters"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_beginning_of_a_text_is_the_sum_of_all_that_begins_so(pieces: SentencePieceVocabulary, kind: str, steps: int) -> None:
    """Whatever the labels are and however the calls cut what is read; a label may be in the middle of what is asked."""
    spelt = pieces if kind == "pieces" else CharacterVocabulary(["<pad>", "|", "A", "B"])
    read = CharacterVocabulary(["<pad>", "|", "a", "b"], blank="<pad>")
    torch.manual_seed(steps)
    log_probs, lengths = spoken(2, FRAMES, pieces=spelt), torch.tensor([FRAMES, FRAMES - 1])
    scorer = Spelled(CtcPrefix(log_probs, lengths, vocabulary=spelt), read)
    found = [sequences(log_probs[row, : lengths[row]], spelt.blank or 0) for row in (0, 1)]
    lead = " " if kind == "pieces" else ""
    for text in ("abba", "a a", "a a a", "aaa", "aab a", "bb b", "ab ba", "b abb"):
        labels = torch.tensor([read.encode(text)] * 2)
        state, total = scorer.start(2), torch.zeros(2)
        for i in range(0, labels.shape[1], steps):
            part = labels[:, i : i + steps]
            gained, state = scorer.advance(state, part, torch.tensor([part.shape[1]] * 2))
            state = scorer.select(state, torch.tensor([0, 1]))
            total = total + gained
            begun = lead + text[: i + steps]
            for row in (0, 1):
                p = sum(p for y, p in found[row].items() if texts_of(spelt, y).lower().startswith(begun))
                assert float(total[row]) == pytest.approx(math.log(p) if p else -math.inf, abs=1e-4), (text, begun)
        whole = [sum(p for y, p in found[row].items() if texts_of(spelt, y).lower() == lead + text) for row in (0, 1)]
        for got, p in zip((total + scorer.finish(state)).tolist(), whole, strict=True):
            assert got == pytest.approx(math.log(p) if p else -math.inf, abs=1e-4), text


@pytest.mark.parametrize("kind", ["pieces", "letters"])
def test_a_bound_is_never_below_what_a_label_scores(pieces: SentencePieceVocabulary, kind: str) -> None:
    """And near it where a label is one letter: only that a label said twice needs a blank is left out."""
    spelt = pieces if kind == "pieces" else CharacterVocabulary(["<pad>", "|", "A", "B"])
    read = CharacterVocabulary(["<pad>", "|", "a", "b", "q"])
    torch.manual_seed(2)
    scorer = Spelled(CtcPrefix(spoken(1, FRAMES, pieces=spelt), torch.tensor([FRAMES]), vocabulary=spelt), read)
    state, near = scorer.start(1), 0
    for label in [0, *read.encode("ab a bba")]:
        if label:
            _, state = scorer.advance(state, torch.tensor([[label]]), torch.tensor([1]))
        bound = scorer.bound(state)
        assert bound is not None and bound.shape == (1, read.size)
        for y in (2, 3):
            exact, _ = scorer.advance(state, torch.tensor([[y]]), torch.tensor([1]))
            assert float(bound[0, y]) >= float(exact) - 1e-5, (label, y)
            near += math.isclose(float(bound[0, y]), float(exact), abs_tol=1e-4)
        assert float(bound[0, 1]) == (0.0 if label != 1 else -math.inf), "a separator is free, and no second one"
        assert float(bound[0, 4]) == -math.inf, "no label has a q"
    assert near >= 6


def test_what_cannot_be_written_is_judged_as_the_vocabulary_writes_it(pieces: SentencePieceVocabulary) -> None:
    read = CharacterVocabulary(["<pad>", "|", "a", "b", "q"])
    prefix = CtcPrefix(spoken(1, FRAMES, pieces=pieces), torch.tensor([FRAMES]), vocabulary=pieces)
    scorer = Spelled(prefix, read)
    one = torch.tensor([1])
    score, state = scorer.advance(scorer.start(1), torch.tensor([read.encode("q")]), one)
    assert float(score) == 0.0, "until its end"
    labels = torch.tensor([pieces.encode("q")])
    gained, after = prefix.advance(prefix.start(1), labels, torch.tensor([labels.shape[1]]))
    assert float(scorer.finish(state)) == pytest.approx(float(gained + prefix.finish(after)), abs=1e-4)


def test_joint_search_over_letters_scores_texts_exactly(pieces: SentencePieceVocabulary) -> None:
    letters = CharacterVocabulary(["<pad>", "|", "a", "b"])
    torch.manual_seed(7)
    log_probs = spoken(1, FRAMES, pieces=pieces)
    lead = CtcPrefix(torch.randn(1, 4, letters.size).log_softmax(-1), torch.tensor([4]), vocabulary=letters)
    ctc = Spelled(CtcPrefix(log_probs, torch.tensor([FRAMES]), vocabulary=pieces), letters)
    fused = {"lead": Fused(scorer=lead, scale=1.0), "ctc": Fused(scorer=ctc, scale=1.0, when=EveryLabel(lookahead=False))}
    found = sequences(log_probs[0], pieces.blank or 0)
    (nbest,) = label_beam_search(fused, 1, beam=200, max_labels=4, ends="apart", stop="all")
    assert len(nbest) > 20
    for hypothesis in nbest:
        text = "".join(" " + word for word in hypothesis.text.split())
        p = sum(p for y, p in found.items() if texts_of(pieces, y) == text)
        if p:
            assert hypothesis.parts["ctc"] == pytest.approx(math.log(p), abs=1e-4), hypothesis.text
    best = nbest[0].score({"lead": 1.0, "ctc": 1.0})
    (narrow,) = label_beam_search(fused, 1, beam=4, max_labels=4, ends="apart")
    assert narrow[0].score({"lead": 1.0, "ctc": 1.0}) == pytest.approx(best, abs=1e-4), "no label goes unjudged"


@pytest.mark.parametrize(("beam", "proposals"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_a_narrow_joint_search_is_the_naive_one(pieces: SentencePieceVocabulary, beam: int, proposals: int) -> None:
    """Proposals by the leading score and the bound, judged in full, the best kept; ends beside the beam."""
    letters = CharacterVocabulary(["<pad>", "|", "a", "b"])
    torch.manual_seed(3)
    leads, heard = torch.randn(2, 5, letters.size).log_softmax(-1), spoken(2, FRAMES, pieces=pieces)
    lengths = torch.tensor([FRAMES, FRAMES])

    def scorers(rows: slice) -> tuple[CtcPrefix, Spelled]:
        n = lengths[rows]
        return CtcPrefix(leads[rows], n, vocabulary=letters), Spelled(CtcPrefix(heard[rows], n, vocabulary=pieces), letters)

    lead, ctc = scorers(slice(None))
    fused = {"lead": Fused(scorer=lead, scale=1.0), "ctc": Fused(scorer=ctc, scale=0.7, when=EveryLabel(lookahead=False))}
    found = label_beam_search(fused, 2, beam=beam, max_labels=4, ends="apart", stop="all", proposals=proposals)
    for i, nbest in enumerate(found):
        wanted = naive(*scorers(slice(i, i + 1)), scale=0.7, beam=beam, proposals=proposals, longest=4)
        assert [h.labels for h in nbest] == [labels for labels, _ in wanted]
        assert [h.score({"lead": 1.0, "ctc": 0.7}) for h in nbest] == pytest.approx([score for _, score in wanted], abs=1e-4)


def naive(lead: CtcPrefix, ctc: Spelled, *, scale: float, beam: int, proposals: int, longest: int) -> list[tuple[tuple[int, ...], float]]:
    """Joint search of one utterance, every history scored from its begin."""

    def said(scorer: CtcPrefix | Spelled, labels: tuple[int, ...], *, whole: bool = False) -> float:
        score, state = scorer.advance(scorer.start(1), torch.tensor([labels or (0,)]), torch.tensor([len(labels)]))
        return float(score + scorer.finish(state)) if whole else float(score)

    def bounds(labels: tuple[int, ...]) -> list[float]:
        _, state = ctc.advance(ctc.start(1), torch.tensor([labels or (0,)]), torch.tensor([len(labels)]))
        bound = ctc.bound(state)
        assert bound is not None
        return bound[0].tolist()

    now, ends = [()], list[tuple[tuple[int, ...], float]]()
    for step in range(longest + 1):
        for labels in now:
            ends.append((labels, said(lead, labels, whole=True) + scale * said(ctc, labels, whole=True)))
        if step == longest:
            break
        grown = list[tuple[tuple[int, ...], float]]()
        for labels in now:
            bound, before = bounds(labels), scale * said(ctc, labels)
            grown += [((*labels, y), said(lead, (*labels, y)) + before + scale * bound[y]) for y in (1, 2, 3)]
        proposed = [labels for labels, score in sorted(grown, key=lambda x: -x[1])[: beam * proposals] if score > -math.inf]
        judged = [(labels, said(lead, labels) + scale * said(ctc, labels)) for labels in proposed]
        now = [labels for labels, score in sorted(judged, key=lambda x: -x[1])[:beam] if score > -math.inf]
    return sorted([x for x in ends if x[1] > -math.inf], key=lambda x: -x[1])[:beam]


def test_labels_that_never_come_are_not_proposed(pieces: SentencePieceVocabulary) -> None:
    torch.manual_seed(5)
    scorer = CtcPrefix(spoken(1, FRAMES, pieces=pieces), torch.tensor([FRAMES]), vocabulary=pieces)
    never = torch.arange(pieces.size) % 2 == 0
    (nbest,) = label_beam_search({"ctc": Fused(scorer=scorer, scale=1.0)}, 1, beam=50, max_labels=3, never=never)
    assert nbest and {y % 2 for h in nbest for y in h.labels} == {1}
