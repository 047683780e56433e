"""Model folders of tiny random models, and a corpus of short noises with transcripts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duolect.models.ctc import CtcModel
from duolect.models.encoders import WhisperDims, WhisperEncoder
from duolect.models.priors import count_words, smoothed, text_priors, write_priors
from duolect.models.speech_llm import SpeechLlm, SpeechLlmDims
from duolect.recognize.models import Models
from duolect.vocabulary import SentencePieceVocabulary
from tests.conftest import byte_level, sentence_pieces, tiny_lm

TEXTS = ["ab abba", "ba", "bab aa bb", "a ab", "abba ba", "bb bab ab", "aa"]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> dict[str, Path]:
    """Folders: `am` (CTC, SentencePiece units), `unit` (LM in these units), `llm` (byte-level LM), `sllm` (a speech LLM of `am` and `llm`),
    and a `corpus` with manifest."""
    root = tmp_path_factory.mktemp("zoo")
    pieces = sentence_pieces(TEXTS * 5, size=16)
    torch.manual_seed(0)
    encoder = WhisperEncoder(WhisperDims(dim=16, layers=1, heads=2, positions=1500))
    am = CtcModel(encoder, SentencePieceVocabulary(pieces.model, blank="last"), stack=2)
    with torch.no_grad():
        am.head.weight.mul_(6)  # peaky enough that beams differ
    am.save(root / "am", card="tiny", dtype=torch.float32)
    for name, vocabulary in (("unit", pieces), ("llm", byte_level(TEXTS * 5))):
        lm = tiny_lm("llama", vocabulary)
        lm.model.save_pretrained(root / name)
        vocabulary.save(root / name)
    heard = SpeechLlm(CtcModel.load(root / "am"), lm.model, lm.vocabulary, SpeechLlmDims(before="ab", learns="all", embeddings="learn"))
    heard.save(root / "sllm", card="tiny", dtype=torch.float32)
    kinds = {kind: torch.rand(am.vocabulary.size, dtype=torch.float64) for kind in ("softmax", "counts", "sampled")}
    write_priors(root / "am", am.vocabulary, {k: smoothed(x, am.vocabulary, uniform=0.1) for k, x in kinds.items()}, source="no data")
    of_llm = {"llm": text_priors(count_words(TEXTS), lm.vocabulary)["sampled"]}
    write_priors(root / "am", lm.vocabulary, of_llm, source="no data")
    rng = np.random.default_rng(1)
    (root / "corpus").mkdir()
    with open(root / "corpus" / "manifest.jsonl", "w") as manifest:
        for i, text in enumerate(TEXTS):
            seconds = 0.4 + 0.25 * ((i * 3) % 5)
            audio = rng.normal(0, 0.1, int(16000 * seconds)) * np.sin(np.arange(int(16000 * seconds)) / (20 + 9 * i))
            soundfile.write(root / "corpus" / f"u{i}.wav", audio, 16000)
            line = {
                "id": f"u{i}",
                "audio_filepath": f"u{i}.wav",
                "duration": seconds,
                "text": text,
                "domain": "ab"[i % 2],
                "speaker": f"s{i % 3}",
            }
            manifest.write(json.dumps(line) + "\n")
    return {name: root / name for name in ("am", "unit", "llm", "sllm", "corpus")}


@pytest.fixture
def models() -> Models:
    return Models(say=lambda text: None)
