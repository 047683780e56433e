"""A language model in other label units: new embedding and output matrices (paper.md 1.10: Qwen2 in the acoustic model's pieces)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from duolect.vocabulary import Vocabulary

Initial = Literal["pieces", "random"]


def tied_name(model: nn.Module, llm: PreTrainedModel) -> str | None:
    """The second name that embeddings of `llm` have in the state of a model that holds it, where they are its output matrix too."""
    head: Any = llm.get_output_embeddings()
    if head.weight is not llm.get_input_embeddings().weight:  # pyright: ignore[reportAttributeAccessIssue]
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


@torch.no_grad()
def label_embeddings(matrix: Tensor, old: Vocabulary, new: Vocabulary, *, initial: Initial = "pieces") -> Tensor:
    """[new.size, W] embeddings of the labels of `new`, of a matrix [>= old.size, W] of those of `old`.

    `pieces`: the mean of the old embeddings of the label's text, with its space in front where it begins a word; bos and eos are the old
    ones; a label without text (blank, unknown) is the mean of all. `random`: normal, with the old mean and deviation
    of each dimension.
    """
    matrix = matrix[: old.size].float()
    out = torch.randn(new.size, matrix.shape[1]) * matrix.std(0).cpu() + matrix.mean(0).cpu()
    if initial == "random":
        return out.to(matrix.device)
    for label in range(new.size):
        if label in (new.bos, new.eos):
            ids = [old.bos if label == new.bos and new.bos != new.eos else old.eos]
        else:
            text = new.decode([label])
            ids = old.encode((" " if new.starts_word(label) else "") + text)
        out[label] = (matrix[ids].mean(0) if ids else matrix.mean(0)).cpu()
    return out.to(matrix.device)


def rehead(model: PreTrainedModel, old: Vocabulary, new: Vocabulary, *, initial: Initial = "pieces") -> None:
    """Gives the model embedding and output matrices for `new`, in place; tied ones stay tied."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    dtype = embeddings.weight.dtype
    fresh = nn.Embedding.from_pretrained(label_embeddings(embeddings.weight, old, new, initial=initial).to(dtype), freeze=False)
    output = nn.Linear(head.weight.shape[1], new.size, bias=False, dtype=dtype, device=head.weight.device)
    output.weight = fresh.weight if tied else nn.Parameter(label_embeddings(head.weight, old, new, initial=initial).to(dtype))
    model.set_input_embeddings(fresh)
    model.set_output_embeddings(output)
    model.config.vocab_size = new.size
    model.config.bos_token_id, model.config.eos_token_id = new.bos, new.eos
    model.config.pad_token_id = None
