"""duolect prior: what is estimated from audio, transcripts and texts, what is kept, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from duolect.data.sources import open_source
from duolect.data.utterance import load_audio
from duolect.models.ctc import load_acoustic_model
from duolect.models.embedded import SHIPPED
from duolect.models.priors import PRIORS_FILE, count_words, label_counts, read_prior, softmax_prior, text_priors
from duolect.vocabulary import load_vocabulary
from tests.recognize.conftest import TEXTS


def test_all_kinds_are_estimated_in_one_go_and_the_rest_of_the_file_stays(duolect, zoo, tmp_path):
    command = ["prior", "--am", zoo["am"], "--out", tmp_path]
    code, out, err = duolect(*command, "--data", zoo["corpus"], "--lm", zoo["llm"])
    assert "warning: 7 utterances and 7 transcripts are few for a prior" in err
    assert code == 0 and f"{PRIORS_FILE}: softmax, counts, sampled, llm from 7 utterances and 7 transcripts" in out
    model, llm, utterances = load_acoustic_model(zoo["am"]), load_vocabulary(zoo["llm"]), open_source(zoo["corpus"]).utterances
    words = count_words(TEXTS)
    own = {"softmax": softmax_prior((model.log_probs_of([load_audio(u)]) for u in utterances), model.vocabulary)}
    own |= text_priors(words, model.vocabulary)
    for kind, prior in own.items():
        torch.testing.assert_close(read_prior(tmp_path, kind, model.vocabulary), prior)
    torch.testing.assert_close(read_prior(tmp_path, "llm", llm), text_priors(words, llm)["sampled"])
    counts, table = label_counts(words, model.vocabulary), own["counts"].double()
    share = table.exp() * (table < 0)
    entropy, perplexity = float(-(share * table).sum()), float((-(counts * table).sum() / counts.sum()).exp())
    assert f"counts   entropy {entropy:.3f} nats, perplexity {perplexity:.1f} of transcripts; likeliest: " in out
    (tmp_path / "text").write_text("AB ab\n\nba\n" * 50)
    code, out, err = duolect(*command, "--text", tmp_path / "text", "--seed", "3")
    assert code == 0 and "warning" not in err and "counts, sampled from 0 utterances and 100 transcripts" in out
    again = text_priors(count_words(["ab ab", "ba"] * 50), model.vocabulary, seed=3)
    torch.testing.assert_close(read_prior(tmp_path, "sampled", model.vocabulary), again["sampled"])
    torch.testing.assert_close(read_prior(tmp_path, "softmax", model.vocabulary), own["softmax"])
    torch.testing.assert_close(read_prior(tmp_path, "llm", llm), text_priors(words, llm)["sampled"])


def test_what_cannot_be_read_is_left_out_and_said(duolect, zoo, tmp_path):
    for i, text in enumerate((None, "ab")):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "bad.wav").write_bytes(b"not audio")
        (folder / "good.wav").write_bytes((zoo["corpus"] / "u0.wav").read_bytes())
        if text:
            (folder / "good.txt").write_text(text)
    code, out, err = duolect("prior", "--data", tmp_path / "0", "--am", zoo["am"], "--out", tmp_path)
    assert code == 1 and "softmax from 1 utterances and 0 transcripts" in out and "bad.wav" in err and "perplexity" not in out
    code, _, err = duolect("prior", "--data", tmp_path / "0", "--am", zoo["am"], "--out", tmp_path, "--lm", zoo["llm"])
    assert code == 2 and "has no transcripts to count: name a text with --text" in err
    code, out, _ = duolect("prior", "--data", tmp_path / "1", "--am", zoo["am"], "--out", tmp_path)
    assert code == 1 and "softmax, counts, sampled from 1 utterances and 1 transcripts" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--am", "{am}"], "name audio with --data, a text with --text, or both"),
        (["--data", "{corpus}"], "duolect-ctc: has no folder that is yours: name one for priors.safetensors with --out, or a copy of"),
        (["--data", "{corpus}", "--am", f"{SHIPPED}/ctc"], "has no folder that is yours"),
        (["--text", "{am}/nowhere", "--am", "{am}"], "cannot be read"),
        (["--data", "{corpus}", "--am", "{am}", "--lm", "smolm2-135m"], "did you mean smollm2-135m?"),
    ],
)
def test_a_mistake_is_one_line(duolect, zoo, words, expected):
    code, _, err = duolect("prior", *(w.format(**zoo) for w in words))
    assert code == 2 and expected in err and "Traceback" not in err
