"""Tiny models and vocabularies for the tests of search and models; seeded, built in memory."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import logging as transformers_logging

from duolect.models.lm import HFCausalLM
from duolect.vocabulary import CharacterVocabulary, TokenizerVocabulary, Vocabulary

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()

WORDS = "a ab b ba abba bab baab aa bb abab"


def tiny_lm(kind: str, vocabulary: Vocabulary, *, seed: int = 1, spare_rows: int = 3) -> HFCausalLM:
    """A random causal LM of two layers whose predictions differ a lot, with more output rows than the vocabulary has labels."""
    size = vocabulary.size + spare_rows
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    configs = {
        "llama": lambda: LlamaConfig(vocab_size=size, num_key_value_heads=1, max_position_embeddings=256, **shape),
        "qwen2": lambda: Qwen2Config(vocab_size=size, num_key_value_heads=1, max_position_embeddings=256, **shape),
        "gpt2": lambda: GPT2Config(
            vocab_size=size,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=256,
            initializer_range=0.5,
            bos_token_id=vocabulary.bos,
            eos_token_id=vocabulary.eos,
        ),
    }
    torch.manual_seed(seed)
    return HFCausalLM(AutoModelForCausalLM.from_config(configs[kind]()), vocabulary)


def bytes_in(cache: Cache) -> int:
    """What a store of nodes holds of keys and values, room for more left out."""
    if isinstance(cache, EncoderDecoderCache):
        return bytes_in(cache.self_attention_cache) + bytes_in(cache.cross_attention_cache)
    stores = [x[:, :, : layer.filled] for layer in cache.layers for x in (layer.keys, layer.values)]  # type: ignore[attr-defined]
    return sum(x.numel() * x.element_size() for x in stores)


@pytest.fixture(scope="session")
def letters() -> CharacterVocabulary:
    """A CTC vocabulary of two letters, a word delimiter, eos and a blank in the middle."""
    return CharacterVocabulary(["a", "b", "<pad>", "|", "</s>"], bos="</s>", unknown="<unk>")


def byte_level(texts: list[str]) -> TokenizerVocabulary:
    """A byte-level BPE tokenizer (GPT-2, Llama 3, Qwen type) trained on a few words."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=280, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return TokenizerVocabulary(fast)


def sentence_pieces(texts: list[str], *, size: int = 14):
    """A SentencePiece unigram vocabulary without blank, trained on a few words."""
    import io

    import sentencepiece

    from duolect.vocabulary import SentencePieceVocabulary

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        bos_id=1,
        eos_id=0,
        unk_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return SentencePieceVocabulary(model.getvalue(), blank="none")


@pytest.fixture(scope="session")
def other_vocabularies() -> dict[str, Vocabulary]:
    """Tokenizers that cut the same words otherwise: one byte-level, one SentencePiece."""
    texts = [WORDS, "ab ab abba ba", "bab bab ab"] * 5
    return {"bytes": byte_level(texts), "pieces": sentence_pieces(texts)}
