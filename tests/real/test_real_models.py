"""The embedded models on real recordings: real tokenizers, step-by-step scores, batches, relations between decodings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import duolect
from duolect.data.sources import open_source
from duolect.data.utterance import load_audio
from duolect.models.embedded import resolve
from duolect.models.lm import HFCausalLM
from duolect.recognize.models import Models
from duolect.recognize.presets import Ingredients, decoding_of
from duolect.recognize.recognizer import Recognizer
from duolect.search.ctc import ctc_beam_search
from duolect.search.fusion import Every, Fused, Retokenized
from duolect.search.rescore import text_scores
from duolect.vocabulary import load_vocabulary
from tests.oracles import all_alignments, lm_from_scratch, random_log_probs

pytestmark = pytest.mark.slow
DEMO = Path(duolect.__file__).parent / "embedded" / "demo"
SENTENCE = "he hoped there would be stew for dinner turnips and carrots and bruised potatoes"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(say=lambda text: None)


@pytest.fixture(scope="module")
def smollm(models) -> HFCausalLM:
    return models.language("smollm2-135m")


def test_smollm_step_by_step_equals_one_forward(smollm):
    labels = smollm.vocabulary.encode(SENTENCE)
    state, total = smollm.start(1), 0.0
    for cut in (1, 3, 2, 100):
        chunk, labels_left = labels[:cut], labels[cut:]
        gained, state = smollm.advance(state, torch.tensor([chunk]), torch.tensor([len(chunk)]))
        total += float(gained)
        labels = labels_left
    total += float(smollm.finish(state))
    assert total == pytest.approx(lm_from_scratch(smollm, smollm.vocabulary.encode(SENTENCE)), abs=5e-3)


def test_smollm_prefers_what_people_say(smollm):
    texts = ["it is hard to recognize speech", "it is hard to wreck a nice beach"]
    chunks = [smollm.vocabulary.encode(t) for t in texts]
    width = max(map(len, chunks))
    state = smollm.select(smollm.start(1), torch.zeros(2, dtype=torch.long))
    score, _ = smollm.advance(state, torch.tensor([c + [0] * (width - len(c)) for c in chunks]), torch.tensor([len(c) for c in chunks]))
    assert float(score[0]) > float(score[1])


def test_the_fitted_model_reads_as_transcripts_are_written(models, smollm):
    fitted = models.language("duolect-lm")
    assert fitted.written == "lower" and fitted.vocabulary.digest() == smollm.vocabulary.digest()
    said = ["he had been waiting there for more than an hour", "there was nothing to be seen but the open sea"]
    base, better = (sum(score for score, _ in text_scores(scorer, said)) for scorer in (smollm, fitted))
    assert better > base + 5.0


@pytest.mark.parametrize("name", ["smollm2-135m", "whisper-base", "duolect-unit-lm"])
def test_real_tokenizers_cut_texts_word_by_word(models, name):
    if name == "duolect-unit-lm":
        vocabulary = load_vocabulary(resolve(name))
    elif name == "whisper-base":
        vocabulary = models.attention(name).vocabulary
    else:
        vocabulary = models.language(name).vocabulary
    assert vocabulary.word_joint != "none"
    if name != "duolect-unit-lm":
        assert len(vocabulary.encode(" the")) == 1, "a tokenizer whose first merges are missing cuts the commonest words"
    words = SENTENCE.split()
    assert [y for i, w in enumerate(words) for y in vocabulary.encode_word(w, first=i == 0)] == vocabulary.encode(SENTENCE)
    assert vocabulary.decode(vocabulary.encode(SENTENCE)).strip() == SENTENCE


def test_delayed_fusion_with_smollm_is_exact(letters, smollm):
    x = random_log_probs(2, 4, letters, seed=21)
    lengths = torch.tensor([4, 3])
    got = ctc_beam_search(
        x, lengths, vocabulary=letters, beam=2000, fused={"llm": Fused(scorer=Retokenized(smollm, letters), scale=0.3, when=Every(2))}
    )
    for b, n in enumerate(lengths.tolist()):
        ctc = {y: s for y, s in all_alignments(x[b, :n], letters.blank).items() if s > -1e6}
        assert len(got[b]) == len(ctc)
        for h in got[b][:40]:
            text = " ".join(letters.decode(h.labels).split())
            assert h.parts["llm"] == pytest.approx(lm_from_scratch(smollm, smollm.vocabulary.encode(text)), abs=5e-3)


def test_floors_leave_the_best_hypothesis_of_the_demo_recordings(models):
    am, utterances = models.acoustic("duolect-ctc"), open_source(DEMO).utterances
    out = am.log_probs_of([load_audio(u) for u in utterances])
    plain, floored = (
        ctc_beam_search(out.log_probs, out.lengths, vocabulary=am.vocabulary, beam=16, **floors)
        for floors in ({}, {"label_floor": 5.0, "beam_floor": 10.0})
    )
    assert sum(a[0].labels == b[0].labels for a, b in zip(plain, floored, strict=True)) >= 0.99 * len(utterances)


@pytest.mark.parametrize("name", ["ctc", "labelwise-prior", "delayed"])
def test_sixteen_recordings_in_any_order_equal_each_alone(models, name):
    utterances = sorted(open_source(DEMO).utterances, key=lambda u: u.seconds or 0)[:16]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    decodings = {name: decoding_of(name, Ingredients(beam=4, nbest=4))}

    def run(which, seconds):
        recognizer = Recognizer(models, "duolect-ctc", decodings, batch_seconds=seconds)
        return {r[name].id: r[name] for r in recognizer.recognize(which, progress=False)}

    together, alone = run([utterances[i] for i in order], 1000.0), run(utterances, 0.1)
    for u in utterances:
        a, b = together[u.id], alone[u.id]
        assert a.error is None and a.text == b.text
        for h, g in zip(a.nbest, b.nbest, strict=True):
            assert dict(h.parts) == pytest.approx(dict(g.parts), abs=2e-3, rel=1e-4)


def test_language_models_help_on_the_demo_recordings(models):
    from duolect.evaluate.normalize import normalizer
    from duolect.evaluate.wer import score_recognized

    utterances = open_source(DEMO).utterances
    names = ("ctc-greedy", "labelwise")
    recognizer = Recognizer(models, "duolect-ctc", {n: decoding_of(n, Ingredients()) for n in names})
    found = list(recognizer.recognize(utterances, progress=False))
    wer = {n: score_recognized([f[n] for f in found], normalizer=normalizer("whisper-english")).errors.rate for n in names}
    assert wer["ctc-greedy"] < 25
    assert wer["labelwise"] < wer["ctc-greedy"]


def test_the_shipped_speech_llm_and_ctc_are_better_than_ctc(models):
    from duolect.evaluate.normalize import normalizer
    from duolect.evaluate.wer import score_recognized

    utterances = sorted(open_source(DEMO).utterances, key=lambda u: u.seconds or 0)[:24]
    names = ("ctc-greedy", "sllm-greedy", "sllm-draft", "sllm+ctc-time", "sllm+ctc-label")
    recognizer = Recognizer(models, "duolect-ctc", {n: decoding_of(n, Ingredients()) for n in names})
    found = list(recognizer.recognize(utterances, progress=False))
    wer = {n: score_recognized([f[n] for f in found], normalizer=normalizer("whisper-english")).errors.rate for n in names}
    assert max(wer["sllm+ctc-time"], wer["sllm+ctc-label"]) < min(wer["ctc-greedy"], wer["sllm-greedy"])
    assert all(f["sllm-draft"].text == f["sllm-greedy"].text for f in found), "drafts change the speed only"
