from __future__ import annotations

import math

import pytest
import torch

from duolect.config import with_overrides
from duolect.data.sources import open_source
from duolect.recognize.decoding import LabelSynchronous, Language, TimeSynchronous
from duolect.recognize.explain import END, SEARCH, WHOLE, explained, scorers_of, written
from duolect.recognize.presets import decoding_of
from duolect.recognize.recognizer import Recognizer
from duolect.scorer import Hypothesis
from tests.recognize.test_recognizer import ingredients, with_whisper

EXPLAINED = (
    "ctc", "rescore", "delayed", "delayed-prior", "word-end", "unit-rescore", "labelwise", "labelwise-prior", "labelwise-delayed",
    "aed", "aed+ctc-rescore", "aed+ctc-time", "aed+ctc-label", "sllm", "sllm+ctc-rescore", "sllm+ctc-label",
)  # fmt: skip


def made(zoo, models, decoding, index: int = 4):
    """(batch of one utterance, its list)."""
    recognizer = Recognizer(with_whisper(models), str(zoo["am"]), {"it": decoding})
    line = next(r["it"] for r in recognizer.recognize([open_source(zoo["corpus"]).utterances[index]], progress=False))
    return recognizer.batch_of(open_source(zoo["corpus"]).utterances[index]), line.nbest


def all_alignments(batch, labels) -> float:
    log_probs, lengths = batch.output.log_probs.transpose(0, 1), batch.output.lengths
    loss = torch.nn.functional.ctc_loss(
        log_probs, torch.tensor([labels]), lengths, torch.tensor([len(labels)]), blank=batch.vocabulary.blank, reduction="sum"
    )
    return -float(loss)


@pytest.mark.parametrize("name", EXPLAINED)
def test_words_add_up_to_what_the_search_found(zoo, models, name):
    decoding = decoding_of(name, ingredients(zoo))
    if isinstance(decoding, TimeSynchronous):
        decoding = with_overrides(decoding, {"beam": "200"})
    batch, nbest = made(zoo, models, decoding, index=0)
    scorers, scales = scorers_of(decoding, batch), decoding.scales()
    assert set(scorers.by_name) == set(scales) == set(nbest[0].parts)
    for a, b in [(nbest[0], nbest[1]), (nbest[1], nbest[0])]:
        found = explained(a, b, scorers=scorers, scales=scales)
        if math.isfinite(a.score(scales)):  # the tiny Whisper cannot write some words of the CTC model
            assert found.difference == pytest.approx(a.score(scales) - b.score(scales), abs=2e-3)
        for side, h in (("a", a), ("b", b)):
            words = [getattr(r, side) for r in found.rows if r.a not in (END, SEARCH)]
            assert [word for word in words if word in h.text.split()] == h.text.split()  # labels without text (a lone ▁) stand as they are
            for part in scales:
                total = sum(getattr(r, f"parts_{side}")[part] for r in found.rows if r.a != SEARCH)
                if part == scorers.acoustic:  # over all alignments: a beam drops some
                    assert total == pytest.approx(all_alignments(batch, h.labels), abs=1e-3)
                    assert h.parts[part] - total < 1e-3
                    assert name != "ctc" or h.parts[part] - total > -1e-3
                else:
                    assert total == pytest.approx(h.parts[part], abs=1e-3)
        assert ("A" if found.difference >= 0 else "B") == found.verdict[0]
        assert not [note for note in found.notes if "do not fit" in note]


def test_each_word_has_what_its_labels_were_given_one_by_one(zoo, models):
    decoding = decoding_of("labelwise-delayed", ingredients(zoo))
    batch, _ = made(zoo, models, decoding)
    scorers = scorers_of(decoding, batch)
    a, b = written("abba ba bab", scorers), written("ab bab", scorers)
    found = explained(a, b, scorers=scorers, scales=decoding.scales())
    starts, one = scorers.vocabulary.word_starts, torch.ones(1, dtype=torch.long)
    for name in ("ctc", "unit"):  # label by label
        scorer = scorers.by_name[name]
        state, words = scorer.start(1), []
        for label in a.labels:
            score, state = scorer.advance(state, torch.tensor([[label]]), one)
            words += [0.0] if starts[label] or not words else []
            words[-1] += float(score)
        expected = [*words, float(scorer.finish(state))]
        assert [r.parts_a[name] for r in found.rows if r.a] == pytest.approx(expected, abs=1e-3)
    llm = models.language(str(zoo["llm"]))
    state, expected = llm.start(1), []
    for i, word in enumerate(a.text.split()):  # in its own labels, word by word
        labels = llm.vocabulary.encode_word(word, first=i == 0)
        score, state = llm.advance(state, torch.tensor([labels]), one * len(labels))
        expected.append(float(score))
    assert [r.parts_a["llm"] for r in found.rows if r.a] == pytest.approx([*expected, float(llm.finish(state))], abs=1e-3)
    assert [r.b for r in found.rows].count("") == 1 and len(found.rows) == 4
    assert found.rows[-1].a == END


def test_what_the_search_dropped_has_a_row_of_its_own(zoo, models):
    decoding = TimeSynchronous(2)
    batch, nbest = made(zoo, models, decoding)
    found = explained(nbest[0], nbest[1], scorers=scorers_of(decoding, batch), scales={"ctc": 1.0})
    assert found.rows[-1].a == SEARCH and min(found.rows[-1].parts_a["ctc"], found.rows[-1].parts_b["ctc"]) < -1e-3
    assert found.difference == pytest.approx(nbest[0].parts["ctc"] - nbest[1].parts["ctc"])
    assert any("alignments that the search did not count" in note for note in found.notes)


def test_parts_of_other_models_are_told_and_wholes_kept(zoo, models):
    decoding = TimeSynchronous(60)
    batch, nbest = made(zoo, models, decoding)
    a, b = (Hypothesis(h.labels, h.text, {"ctc": h.parts["ctc"], "other": -i - 3.0}) for i, h in enumerate(nbest[:2]))
    scales = {"ctc": 1.0, "other": 0.5}
    found = explained(a, b, scorers=scorers_of(decoding, batch), scales=scales)
    assert found.rows[-1].a == WHOLE and found.rows[-1].difference == pytest.approx({"ctc": 0.0, "other": 0.5})
    assert found.difference == pytest.approx(a.score(scales) - b.score(scales), abs=2e-3)
    assert any(note.startswith("other: no part of the decoding") for note in found.notes)
    text = explained(a, written("ba", scorers_of(decoding, batch)), scorers=scorers_of(decoding, batch), scales=scales)
    assert text.names == ("ctc",) and any("other: not known of B" in note for note in text.notes)
    rescored = {"other": Language(str(zoo["llm"]))}
    named = explained(a, b, scorers=scorers_of(decoding, batch, rescored), scales=scales)
    assert any("parts of A do not fit: other -3.00 in the file" in note for note in named.notes)
    assert named.difference == pytest.approx(a.score(scales) - b.score(scales), abs=2e-3)


def test_texts_are_written_as_the_leading_model_writes(zoo, models):
    decoding = decoding_of("ctc", ingredients(zoo))
    batch, _ = made(zoo, models, decoding)
    assert written("Ab, bab!", scorers_of(decoding, batch)).text == "ab bab"
    aed = decoding_of("aed", ingredients(zoo))
    assert isinstance(aed, LabelSynchronous)
    scorers = scorers_of(aed, made(zoo, models, aed)[0])
    assert written("ab bab", scorers).text == scorers.spelled.text("ab bab")
    assert written("Ab bab", scorers).text == "Ab bab"


def test_what_is_impossible_costs_once(zoo, models):
    decoding = TimeSynchronous(8)
    batch, nbest = made(zoo, models, decoding)
    scorers = scorers_of(decoding, batch)
    found = explained(nbest[0], written("abba bab " * 40, scorers), scorers=scorers, scales={"ctc": 1.0})
    assert [r.parts_b["ctc"] for r in found.rows].count(-math.inf) == 1
    assert found.difference == math.inf and found.to_json()["difference"] is None
    assert found.verdict.startswith("A wins")
