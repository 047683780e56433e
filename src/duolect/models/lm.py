"""Any Hugging Face causal language model as a Scorer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from duolect.models import ModelError, Precision, loading
from duolect.models.cache import Trie
from duolect.models.ctc import kind_of, read_config
from duolect.models.decoder import DecoderScorer, OutputLayer
from duolect.models.embedded import converted, resolve
from duolect.models.finetuned import KIND, load_fitted, written_of
from duolect.models.ngram import NGRAM_FILES
from duolect.models.packed import NewNodes, bytes_per_position, node_cache, run_packed, use_packed_attention
from duolect.vocabulary import VOCABULARY_FILE, TokenizerVocabulary, Vocabulary, VocabularyError, load_vocabulary


class HFCausalLM(DecoderScorer):
    """log p(text labels) by a causal LM of transformers.

    `prompt`: text in front of every history (context, instruction), conditioned on and not scored. `written`: how the words are written
    that it was fitted to. Rows of the output matrix beyond the vocabulary are left out of the softmax.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary, *, prompt: str = "") -> None:
        self.model = model.eval()
        use_packed_attention(model)
        self.vocabulary = vocabulary
        self.prompt = prompt
        self.written = written_of(model)
        self.decoder: Any = model.base_model
        with torch.no_grad():
            self.output = output_layer(model, vocabulary)
        text_config: Any = model.config.get_text_config(decoder=True)
        self._layers = int(text_config.num_hidden_layers)
        self._longest = longest_history(model)
        _check(self)

    @classmethod
    def load(cls, name: str | Path, *, dtype: Precision = "float32", device: str = "cpu", prompt: str = "") -> HFCausalLM:
        """The scorer of a hub id, a folder (of transformers or of ours, with vocabulary.json), or a .gguf file."""
        if kind_of(name) == "speech_llm":
            from duolect.models.speech_llm import SpeechLlm  # which needs this file

            heard = SpeechLlm.load(name, dtype=dtype, device=device)  # without audio it is a language model
            return cls(heard.llm, heard.vocabulary, prompt=prompt)
        model, vocabulary = load_language_model(name, dtype=dtype)
        return cls(model.to(device), vocabulary, prompt=prompt)  # pyright: ignore[reportArgumentType]

    def bytes_of(self, *, labels: int) -> int:
        """Bytes of the keys and values of so many labels behind the prompt."""
        return bytes_per_position(self.model.config, self.output.weight.dtype) * (len(self._prompts(1)[0]) + labels)

    def _cache(self, rows: int) -> Cache:
        return node_cache(self._layers)

    def _prompts(self, rows: int) -> list[list[int]]:
        return [[self.vocabulary.bos, *(self.vocabulary.encode(self.prompt.rstrip()) if self.prompt.strip() else [])]] * rows

    def _hidden(self, trie: Trie, new: NewNodes) -> Tensor:
        require_positions(int(new.positions.max()) + 1, self._longest)
        return run_packed(self.decoder, new, trie.cache, self.output.weight.dtype, input_ids=new.labels[None])


def load_language_model(name: str | Path, *, dtype: Precision = "float32") -> tuple[PreTrainedModel, Vocabulary]:
    """The model of transformers of a hub id, a folder (of transformers or of ours) or a .gguf file, and its vocabulary. ModelError."""
    if kind_of(name) == KIND:
        return load_fitted(Path(name), load_language_model(resolve(read_config(Path(name))["source"]), dtype=dtype))
    if str(name).endswith(NGRAM_FILES):
        raise ModelError(f"{name}: is an n-gram, expected a causal language model of transformers: name smollm2-135m, a folder or a hub id")
    source = _located(name)
    with loading(name, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model, _vocabulary(source, model.config)


def language_vocabulary(name: str | Path) -> Vocabulary:
    """The vocabulary of a model that `HFCausalLM.load` loads, without the weights where they are not needed for it."""
    if kind_of(name) in (KIND, "speech_llm"):
        return HFCausalLM.load(name).vocabulary
    source = _located(name)
    return _vocabulary(source, AutoConfig.from_pretrained(source))


def _located(name: str | Path) -> str:
    """The folder or hub id of a model; of a .gguf file the folder that it was converted to."""
    return str(converted(Path(name)) if Path(name).suffix == ".gguf" and Path(name).is_file() else name)


def _vocabulary(source: str, config: Any) -> Vocabulary:
    if (Path(source) / VOCABULARY_FILE).is_file():
        return load_vocabulary(source)
    # A model without a bos (Qwen) starts from its end-of-text label (paper.md 6.22).
    ends = {name: x[0] if isinstance(x := getattr(config, f"{name}_token_id"), list) else x for name in ("bos", "eos")}
    return TokenizerVocabulary.load(source, **ends)


def longest_history(model: PreTrainedModel) -> int:
    """How many positions the model attends to."""
    config: Any = model.config.get_text_config(decoder=True)
    # A sliding window would need masks by distance; histories of speech stay far below it, so that is where we stop.
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
    return min((x for x in limits if x), default=2**20)


def require_positions(count: int, most: int) -> None:
    """Raises ModelError for a history, audio and prompts included, of more positions than the model attends to."""
    if count > most:
        raise ModelError(
            f"a history of {count} positions is longer than the {most} that the language model attends to: split audio or text into "
            "shorter pieces (in a speech LLM, an adapter of a larger factor or fewer context words also help)"
        )


def output_layer(model: PreTrainedModel, vocabulary: Vocabulary) -> OutputLayer:
    """The model's output matrix, its rows beyond the vocabulary left out, with gradients where they are on. Raises ModelError."""
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings: it is not a language model")
    rows = head.weight.shape[0]
    if vocabulary.size > rows:
        raise VocabularyError(
            f"the tokenizer has {vocabulary.size} labels, the output matrix of {type(model).__name__} only {rows} rows: "
            "tokenizer and model do not belong together"
        )
    config = model.config
    scale = 1.0 / getattr(config, "logits_scaling", 1.0) * (getattr(config, "logit_scale", None) or 1.0)
    bias = getattr(head, "bias", None)
    weight = head.weight[: vocabulary.size]
    return OutputLayer(weight, None if bias is None else bias[: vocabulary.size], scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _check(scorer: HFCausalLM) -> None:
    # Decoders differ in what they do behind their last hidden state and in whether they honour a 4D mask; three labels tell.
    vocabulary = scorer.vocabulary
    probe = [vocabulary.bos, min(vocabulary.size - 1, 5), min(vocabulary.size - 1, 7)]
    device = scorer.output.weight.device
    model: Any = scorer.model
    ids = torch.tensor([probe], device=device)
    if max(vocabulary.bos, vocabulary.eos) >= vocabulary.size:
        raise ModelError(
            f"{type(model).__name__} starts with label {vocabulary.bos} and ends with {vocabulary.eos}, but its tokenizer has only "
            f"{vocabulary.size}: set bos_token_id and eos_token_id in its config.json"
        )
    wanted = model(input_ids=ids).logits[0, :, : vocabulary.size].float().log_softmax(-1)
    prompt, scorer.prompt = scorer.prompt, ""
    try:
        state = scorer.start(1)
        for step in (1, 2):
            _, state = scorer.advance(state, ids[:, step : step + 1], torch.ones(1, dtype=torch.long, device=device))
    except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"{type(model).__name__} cannot be scored through a cache of explicit positions and masks: {error}") from error
    finally:
        scorer.prompt = prompt
    got = scorer.log_probs(state)[0]
    tolerance = 2e-3 if scorer.output.weight.dtype == torch.float32 else 0.5
    if not torch.allclose(got, wanted[-1], atol=tolerance, rtol=1e-3):
        raise ModelError(
            f"{type(model).__name__}: step-by-step log-probabilities differ from its full forward by "
            f"{float((got - wanted[-1]).abs().max()):.3g}; "
            "its attention or its output layer does something this scorer does not know"
        )
