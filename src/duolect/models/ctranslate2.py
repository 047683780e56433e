"""Whisper in CTranslate2's format to a Hugging Face folder; read as bytes, nothing is executed."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

NUMBERS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


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
    """Writes a Hugging Face Whisper folder: weights in fp16 as they came, config, generation config, tokenizer, feature extractor.

    model: model.bin, settings: the config.json beside it (suppressed tokens, alignment heads). config.json says float32, so that a load
    without a dtype computes in fp32. Raises FormatError.
    """
    variables = read_model(model)
    weights = whisper_weights(variables)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(weights, tokenizer, json.loads(settings.read_text()), folder)


def whisper_weights(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state dict of WhisperForConditionalGeneration, fp16. Raises FormatError if a variable is left over or missing."""
    left = dict(variables)

    def take(name: str) -> Tensor:
        value = left.pop(name, None)
        if value is None:
            raise FormatError(f"variable {name} is missing: not a Whisper model of the known layout")
        if value.dtype == np.int8:  # one scale per output row
            value = value.astype(np.float32) / left.pop(f"{name}_scale").reshape(-1, *[1] * (value.ndim - 1))
        return torch.from_numpy(value.astype(np.float16))

    weights: dict[str, Tensor] = {}
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            weights[f"model.encoder.{conv}.{kind}"] = take(f"encoder/{conv}/{kind}")
    weights["model.decoder.embed_tokens.weight"] = take("decoder/embeddings/weight")
    for part in ("encoder", "decoder"):
        weights[f"model.{part}.embed_positions.weight"] = take(f"{part}/position_encodings/encodings")
        for to, source in _layer_names(part, variables):
            for name, value in _parts(take, source):
                weights[f"model.{part}.{to}{name}"] = value
    spare = {name for name in left if np.size(left[name]) > 1 and not name.startswith("decoder/projection")}
    if spare:
        raise FormatError(f"variables without a place: {sorted(spare)[:4]}: not a Whisper model of the known layout")
    return {name: value.contiguous().clone() for name, value in weights.items()}


def _layer_names(part: str, variables: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """(Hugging Face's name, CTranslate2's name) of every block of one side that has weights."""
    count = 1 + max(int(m[1]) for name in variables if (m := re.match(rf"{part}/layer_(\d+)/", name)))
    pairs = [("layer_norm", f"{part}/layer_norm")]
    for i in range(count):
        to, source = f"layers.{i}.", f"{part}/layer_{i}/"
        pairs += [(to + "self_attn", source + "self_attention"), (to + "self_attn_layer_norm", source + "self_attention/layer_norm")]
        if part == "decoder":
            pairs += [(to + "encoder_attn", source + "attention"), (to + "encoder_attn_layer_norm", source + "attention/layer_norm")]
        pairs += [(to + "fc1", source + "ffn/linear_0"), (to + "fc2", source + "ffn/linear_1")]
        pairs += [(to + "final_layer_norm", source + "ffn/layer_norm")]
    return pairs


def _parts(take: Callable[[str], Tensor], source: str) -> list[tuple[str, Tensor]]:
    """The named weights of one block: a norm, a linear layer, or an attention whose q, k, v lie in one (k, v in cross-attention) matrix."""
    if source.endswith("layer_norm"):
        return [(".weight", take(f"{source}/gamma")), (".bias", take(f"{source}/beta"))]
    if "ffn" in source:
        return [(".weight", take(f"{source}/weight")), (".bias", take(f"{source}/bias"))]
    crossed = source.endswith("/attention")
    layers = [take(f"{source}/linear_{i}/{kind}") for i in range(3 if crossed else 2) for kind in ("weight", "bias")]
    if crossed:
        (k, v), (_, v_bias) = layers[2].chunk(2), layers[3].chunk(2)
        q, q_bias = layers[0], layers[1]
    else:
        (q, k, v), (q_bias, _, v_bias) = layers[0].chunk(3), layers[1].chunk(3)  # Whisper has no bias on k
    return [
        (".q_proj.weight", q),
        (".q_proj.bias", q_bias),
        (".k_proj.weight", k),
        (".v_proj.weight", v),
        (".v_proj.bias", v_bias),
        (".out_proj.weight", layers[-2]),
        (".out_proj.bias", layers[-1]),
    ]


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
        names = [f"<|{name}|>" for name in _languages()]
        generation["lang_to_id"] = {name: i for name in names if (i := pieces.token_to_id(name)) is not None}
        generation["task_to_id"] = {task: pieces.token_to_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    config.save_pretrained(folder)
    GenerationConfig(**generation).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
    special = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=pieces, **special).save_pretrained(folder)


def _languages() -> list[str]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return list(LANGUAGES)


def _unsigned(file: BinaryIO, kind: str) -> int:
    return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_unsigned(file, "H"))[:-1].decode()
