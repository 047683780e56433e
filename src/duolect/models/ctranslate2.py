"""Whisper in CTranslate2's format to a Hugging Face folder; read as bytes, nothing is executed."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

NUMBERS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
NAME = re.compile(r"(?P<part>encoder|decoder)/(layer_(?P<layer>\d+)/)?(?P<block>.+)/(?P<kind>weight|bias|gamma|beta|encodings)")
BLOCKS = {
    **{name: (name,) for name in ("conv1", "conv2", "layer_norm")},
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""CTranslate2's blocks and Hugging Face's, several where they lie in one matrix."""


class FormatError(ValueError):
    """The file is not a Whisper model of CTranslate2; the message names what was met."""


def read_model(path: str | Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model.bin by name, aliases resolved. Raises FormatError.

    Layout, little-endian: version u32, spec str, revision u32, count u32; per variable: name str, rank u8, sizes u32 each, type u8,
    bytes u32, data; then the count of aliases u32, each two str. A str is its length u16 and that many bytes with a final zero.
    """
    variables: dict[str, np.ndarray] = {}
    try:
        with open(path, "rb") as file:
            _unsigned(file, "I")
            spec = _string(file)
            if "Whisper" not in spec:
                raise FormatError(f"{path}: holds a {spec!r}, expected a WhisperSpec")
            _unsigned(file, "I")
            for _ in range(_unsigned(file, "I")):
                name, shape = _string(file), [_unsigned(file, "I") for _ in range(_unsigned(file, "B"))]
                kind, size = _unsigned(file, "B"), _unsigned(file, "I")
                variables[name] = np.frombuffer(file.read(size), NUMBERS[kind]).reshape(shape)
            for _ in range(_unsigned(file, "I")):
                alias, name = _string(file), _string(file)
                variables[alias] = variables[name]
    except (struct.error, KeyError, ValueError, UnicodeDecodeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path}: is no CTranslate2 model or was cut off ({type(error).__name__}: {error}): fetch it again") from error
    return variables


def convert_whisper(model: Path, tokenizer: Path, settings: Path, folder: Path) -> None:
    """Writes a Hugging Face Whisper folder of model.bin, tokenizer.json and `settings`, the config.json beside them. Raises FormatError.

    Weights stay fp16; config.json says float32, so that a load without a dtype computes in fp32.
    """
    weights = whisper_weights(read_model(model))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(weights, tokenizer, json.loads(settings.read_text()), folder)


def whisper_weights(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state dict of WhisperForConditionalGeneration, fp16. Raises FormatError if a variable is left over."""
    weights: dict[str, Tensor] = {}
    for name, value in variables.items():
        if value.size == 1 or name.endswith("_scale") or name.startswith("decoder/projection"):
            continue
        found = NAME.fullmatch(name)
        if found is None or found["block"] not in BLOCKS:
            raise FormatError(f"variable {name} has no place: not a Whisper model of the known layout")
        if value.dtype == np.int8:  # one scale per output row
            value = value.astype(np.float32) / variables[f"{name}_scale"].reshape(-1, *[1] * (value.ndim - 1))
        owner = f"model.{found['part']}." + (f"layers.{found['layer']}." if found["layer"] else "")
        kind = "bias" if found["kind"] in ("bias", "beta") else "weight"
        blocks = BLOCKS[found["block"]]
        for block, x in zip(blocks, torch.from_numpy(value.astype(np.float16)).chunk(len(blocks)), strict=True):
            if not (kind == "bias" and block.endswith("k_proj")):  # Whisper has none
                weights[f"{owner}{block}.{kind}"] = x.clone()
    return weights


def complete_merges(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A byte-level BPE tokenizer.json in which every label beyond the bytes can be reached by a merge.

    One of the packages lacks the first merge, so that every word with t in front falls apart into a lone space and the rest. Labels are
    numbered in the order of their merges, which tells where a missing one belongs. Raises FormatError where its halves are not certain.
    """
    model = tokenizer["model"]
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    special = {token["content"] for token in tokenizer.get("added_tokens", ())}
    reached = {a + b for a, b in merges}
    for piece, label in sorted(vocabulary.items(), key=lambda item: item[1]):
        if len(piece) < 2 or piece in reached or piece in special:
            continue
        halves = [
            (piece[:i], piece[i:])
            for i in range(1, len(piece))
            if max(vocabulary.get(piece[:i], label), vocabulary.get(piece[i:], label)) < label
        ]
        if len(halves) != 1:
            raise FormatError(
                f"the tokenizer has no merge for {piece!r} and {len(halves)} ways to make one: it is damaged, use another package"
            )
        before = sum(1 for a, b in merges if vocabulary[a + b] < label)
        merges.insert(before, halves[0])
    return {**tokenizer, "model": {**model, "merges": [list(m) for m in merges]}}


def _write_configs(weights: dict[str, Tensor], tokenizer: Path, settings: dict[str, Any], folder: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    pieces = Tokenizer.from_str(json.dumps(complete_merges(json.loads(tokenizer.read_text(encoding="utf-8")))))
    end, start = pieces.token_to_id("<|endoftext|>"), pieces.token_to_id("<|startoftranscript|>")
    dim, mels, _ = weights["model.encoder.conv1.weight"].shape
    layers = {part: len([n for n in weights if re.fullmatch(rf"model.{part}.layers.\d+.fc1.bias", n)]) for part in ("encoder", "decoder")}
    ends: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=len(weights["model.decoder.embed_tokens.weight"]),
        num_mel_bins=mels,
        d_model=dim,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=dim // 64,
        decoder_attention_heads=dim // 64,
        encoder_ffn_dim=4 * dim,
        decoder_ffn_dim=4 * dim,
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        suppress_tokens=None,
        begin_suppress_tokens=None,
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",
        **ends,
    )
    multilingual = pieces.token_to_id("<|de|>") is not None and config.vocab_size > 51864
    generation = {
        **ends,
        "no_timestamps_token_id": pieces.token_to_id("<|notimestamps|>"),
        "max_length": config.max_target_positions,
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "is_multilingual": multilingual,
        "begin_suppress_tokens": settings.get("suppress_ids_begin", [220, end]),
        "suppress_tokens": settings.get("suppress_ids"),
        "prev_sot_token_id": pieces.token_to_id("<|startofprev|>"),
        "alignment_heads": settings.get("alignment_heads"),
    }
    if multilingual:
        names = [f"<|{name}|>" for name in LANGUAGES]
        generation["lang_to_id"] = {name: i for name in names if (i := pieces.token_to_id(name)) is not None}
        generation["task_to_id"] = {task: pieces.token_to_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    config.save_pretrained(folder)
    GenerationConfig(**generation).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
    special = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=pieces, **special).save_pretrained(folder)


def _unsigned(file: BinaryIO, kind: str) -> int:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_unsigned(file, "H"))[:-1].decode()
