"""CTranslate2's Whisper files: written here by an own small writer from a random model, read back without a tensor lost or moved."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from duolect.models.ctranslate2 import FormatError, read_model, whisper_weights


def written(path: Path, variables: dict[str, np.ndarray], *, spec: str = "WhisperSpec", aliases: dict[str, str] | None = None) -> Path:
    """A model.bin as CTranslate2 writes it."""
    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        out += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", kinds[str(value.dtype)], value.nbytes) + value.tobytes()
    out += struct.pack("<I", len(aliases or {})) + b"".join(text(a) + text(b) for a, b in (aliases or {}).items())
    path.write_bytes(out)
    return path


def variables_of(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Hugging Face's Whisper weights under CTranslate2's names, q, k, v in one matrix."""
    w = {name.removeprefix("model."): value.half().numpy() for name, value in weights.items()}
    out = {"decoder/embeddings/weight": w["decoder.embed_tokens.weight"], "decoder/scale_embeddings": np.array(0, np.int8)}
    for part in ("encoder", "decoder"):
        out[f"{part}/position_encodings/encodings"] = w[f"{part}.embed_positions.weight"]
        norms = [("layer_norm", "layer_norm")]
        for i in range(2):
            to, source = f"{part}/layer_{i}", f"layers.{i}"
            norms += [
                (f"layer_{i}/self_attention/layer_norm", f"{source}.self_attn_layer_norm"),
                (f"layer_{i}/ffn/layer_norm", f"{source}.final_layer_norm"),
            ]
            zero = np.zeros(w[f"{part}.{source}.self_attn.q_proj.bias"].shape, np.float16)
            blocks = [("self_attention", "self_attn")]
            if part == "decoder":
                blocks.append(("attention", "encoder_attn"))
                norms.append((f"layer_{i}/attention/layer_norm", f"{source}.encoder_attn_layer_norm"))
            for block, name in blocks:
                q, k, v, o = (f"{part}.{source}.{name}.{x}_proj" for x in ("q", "k", "v", "out"))
                groups = [[q, k, v], [o]] if block == "self_attention" else [[q], [k, v], [o]]
                for n, group in enumerate(groups):
                    out[f"{to}/{block}/linear_{n}/weight"] = np.concatenate([w[f"{g}.weight"] for g in group])
                    out[f"{to}/{block}/linear_{n}/bias"] = np.concatenate([w.get(f"{g}.bias", zero) for g in group])
            for n, name in enumerate(("fc1", "fc2")):
                for kind in ("weight", "bias"):
                    out[f"{to}/ffn/linear_{n}/{kind}"] = w[f"{part}.{source}.{name}.{kind}"]
        for to, source in norms:
            out[f"{part}/{to}/gamma"], out[f"{part}/{to}/beta"] = w[f"{part}.{source}.weight"], w[f"{part}.{source}.bias"]
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            out[f"encoder/{conv}/{kind}"] = w[f"encoder.{conv}.{kind}"]
    return out


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=40,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=10,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    state = WhisperForConditionalGeneration(config).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items() if name != "proj_out.weight"}


def test_every_tensor_comes_back(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    variables = variables_of(weights)
    path = written(tmp_path / "model.bin", variables, aliases={"decoder/projection/weight": "decoder/embeddings/weight"})
    got = whisper_weights(read_model(path))
    assert got.keys() == weights.keys()
    for name, value in got.items():
        assert torch.equal(value, weights[name].half()), name


def test_int8_rows_are_scaled_back(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    variables = variables_of(weights)
    name = "encoder/layer_0/ffn/linear_0/weight"
    scale = 127 / np.abs(variables[name].astype(np.float32)).max(axis=1)
    quantized = np.round(variables[name].astype(np.float32) * scale[:, None]).astype(np.int8)
    path = written(tmp_path / "model.bin", {**variables, name: quantized, f"{name}_scale": scale.astype(np.float32)})
    got = whisper_weights(read_model(path))["model.encoder.layers.0.fc1.weight"]
    assert float((got - weights["model.encoder.layers.0.fc1.weight"]).abs().max()) < 0.03


def test_what_is_no_whisper_model_is_refused(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    variables = variables_of(weights)
    with pytest.raises(FormatError, match="holds a 'TransformerSpec', expected a WhisperSpec"):
        read_model(written(tmp_path / "other.bin", {}, spec="TransformerSpec"))
    whole = written(tmp_path / "model.bin", variables).read_bytes()
    (tmp_path / "torn.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match="was cut off"):
        read_model(tmp_path / "torn.bin")
    with pytest.raises(FormatError, match="adapter/weight has no place"):
        whisper_weights({**variables, "encoder/layer_0/adapter/weight": np.zeros((2, 2), np.float16)})


def test_a_tokenizer_without_its_first_merge_is_completed():
    from duolect.models.ctranslate2 import complete_merges

    vocab = {"Ġ": 0, "t": 1, "a": 2, "h": 3, "Ġt": 4, "Ġa": 5, "Ġth": 6, "<|end|>": 7}
    whole = [["Ġ", "t"], ["Ġ", "a"], ["Ġt", "h"]]
    damaged = {"added_tokens": [{"content": "<|end|>"}], "model": {"vocab": vocab, "merges": ["Ġ a", "Ġt h"]}}
    assert complete_merges(damaged)["model"]["merges"] == whole
    assert complete_merges({**damaged, "model": {"vocab": vocab, "merges": whole}})["model"]["merges"] == whole
