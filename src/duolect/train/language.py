"""Language models learn the next label of sentences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from duolect.config import registered
from duolect.data.batching import dealt, shuffled_batches
from duolect.data.pieces import SubwordSampler
from duolect.data.text import TextLines
from duolect.models import decoder
from duolect.models.decoder import OutputLayer
from duolect.models.lm import output_layer
from duolect.train.task import Batch, Place, Ratio, Task, shares
from duolect.vocabulary import Vocabulary

IGNORED = -100  # labels of padding
_MEASURED = 1 << 25  # bytes of text whose labels are counted; of more, the lengths are estimated from the bytes


@registered
@dataclass(frozen=True)
class TextLearning:
    """Batches of sentences. batch_labels: padded labels of an update. longest: sentences of more labels are cut there, without an end.

    sampling: alpha of segmentations drawn anew each time, for SentencePiece units (see SubwordSampler). checked: sentences of each
    validation text, evenly spread.
    """

    batch_labels: int = 1800
    longest: int = 400
    sampling: float | None = None
    checked: int = 300


@dataclass(frozen=True)
class Sentences(Batch):
    """Labels [B, L] after bos, and up to eos; targets of padding are IGNORED."""

    inputs: Tensor
    targets: Tensor

    @property
    def counts(self) -> Mapping[str, int]:
        return {"nats": int((self.targets != IGNORED).sum())}


class _Nats(torch.autograd.Function):
    """Sum of -log p of labels [N] behind hidden states [N, width], by piece; a piece's gradients are made at once, its logits not kept.

    A thousand labels of a vocabulary of 262 k would be 1 GiB of logits, and as much again for each step from them to the loss and back.
    """

    @staticmethod
    def forward(  # learning: whether gradients are wanted, which a function does not know of itself
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, layer: OutputLayer, learning: bool
    ) -> Tensor:
        given = (hidden, weight, bias)
        learn = [learning and x is not None and need for x, need in zip(given, ctx.needs_input_grad, strict=False)]
        if not learn[1] and torch.is_autocast_enabled(hidden.device.type):  # once, not for every piece
            weight = weight.to(torch.get_autocast_dtype(hidden.device.type))
        sums = [torch.zeros_like(x) if x is not None and needed else None for x, needed in zip(given, learn, strict=True)]
        total = torch.zeros((), device=hidden.device)
        size = max(1, decoder.LOGITS_AT_ONCE // len(weight))
        with torch.set_grad_enabled(any(learn)):
            for at in range(0, len(labels), size):
                pieces: list[Any] = [x if x is None else x.detach() for x in (hidden[at : at + size], weight, bias)]
                wanted = [x.requires_grad_() for x, needed in zip(pieces, learn, strict=True) if x is not None and needed]
                logits = replace(layer, weight=pieces[1], bias=pieces[2])(pieces[0])
                nats = F.cross_entropy(logits, labels[at : at + size], reduction="sum")
                total += nats.detach()
                found = iter(torch.autograd.grad(nats, wanted) if wanted else ())
                for number, x in enumerate(sums):
                    if x is not None:
                        (x if number else x[at : at + size]).add_(next(found))
        ctx.save_for_backward(*(x for x in sums if x is not None))
        ctx.learn = learn
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        return (*(next(saved) * gradients[0] if needed else None for needed in ctx.learn), None, None, None)


class _NextLabel(nn.Module):
    """Sum of -log p of targets [B, L], IGNORED ones left out: a network around the model, whose shards are gathered in its forward."""

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.model, self.vocabulary = model, vocabulary

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        # Padding lies behind what counts, so causal attention needs no mask.
        hidden: Tensor = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        real, layer = targets != IGNORED, output_layer(self.model, self.vocabulary)
        nats: Any = _Nats.apply(hidden[real], layer.weight, layer.bias, targets[real], layer, torch.is_grad_enabled())
        return nats


class LmTask(Task[int, Sentences]):
    """Next-label prediction of sentences, each after bos and up to eos.

    corpora: texts, and how often each is read in an epoch. checks: validation texts by name. save: writes a model folder of a state dict
    and a note. New embeddings learn at the rate `embeddings`, all else at `llm`.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        learning: TextLearning,
        corpora: Sequence[tuple[TextLines, int]],
        checks: Mapping[str, TextLines],
        *,
        seed: int,
        save: Callable[[Path, Mapping[str, Tensor], str], None],
    ) -> None:
        self.model, self.vocabulary, self.learning, self.seed, self.checks = model, vocabulary, learning, seed, checks
        self.texts = [lines for lines, times in corpora for _ in range(times)]
        self.begins = np.cumsum([0, *map(len, self.texts)])  # item numbers run through the texts
        counted = {id(lines): np.minimum(self._lengths(lines), learning.longest) + 1.0 for lines, _ in corpora}
        self.sizes: list[float] = np.concatenate([counted[id(lines)] for lines in self.texts]).tolist()
        self.sampler = None if learning.sampling is None else SubwordSampler(vocabulary, alpha=learning.sampling)
        self._save = save
        self._network = _NextLabel(model, vocabulary)

    @property
    def network(self) -> nn.Module:
        return self._network

    def _lengths(self, lines: TextLines) -> np.ndarray:
        """[N] labels of each sentence, of large texts estimated."""
        whole = int(lines.sizes.sum()) <= _MEASURED
        some = range(len(lines)) if whole else np.linspace(0, len(lines) - 1, 2000).astype(int).tolist()
        counted = np.array([len(self.vocabulary.encode(lines[i])) for i in some], np.float64)
        return counted if whole else lines.sizes * (counted.sum() / lines.sizes[list(some)].sum())

    def groups(self) -> Mapping[str, nn.Module]:
        head: Any = self.model.get_output_embeddings()
        return {"embeddings": nn.ModuleList([self.model.get_input_embeddings(), head]), "llm": self.model}

    def plan(self, epoch: int, parts: int) -> Sequence[Sequence[tuple[int, ...]]]:
        batch = float(self.learning.batch_labels)
        batches = shuffled_batches(self.sizes, batch_seconds=batch, seed=self.seed, epoch=epoch, at_least=min(parts, len(self.sizes)))
        return [dealt(batch, parts=parts) for batch in batches]

    def load(self, items: Sequence[int], place: Place) -> Sentences | None:
        return self._batch([self._labels(item, place) for item in items])

    def _text(self, item: int) -> str:
        number = int(np.searchsorted(self.begins, item, side="right")) - 1
        return self.texts[number][item - int(self.begins[number])]

    def _labels(self, item: int, place: Place) -> list[int]:
        if self.sampler is None:
            return self.vocabulary.encode(self._text(item))
        return self.sampler.sample(self._text(item), np.random.default_rng([self.seed, place.epoch, item]))

    def _batch(self, sentences: Sequence[list[int]]) -> Sentences:
        bos, eos, longest = self.vocabulary.bos, self.vocabulary.eos, self.learning.longest
        ended = [[*x, eos][: longest + 1] for x in sentences]
        inputs = nn.utils.rnn.pad_sequence([torch.tensor([bos, *x[:-1]]) for x in ended], batch_first=True, padding_value=eos)
        targets = nn.utils.rnn.pad_sequence([torch.tensor(x) for x in ended], batch_first=True, padding_value=IGNORED)
        return Sentences(inputs, targets)

    def losses(self, batch: Sentences) -> Mapping[str, Tensor]:
        return {"nats": self.network(batch.inputs, batch.targets)}

    def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
        found: dict[str, Ratio] = {}
        for name, lines in self.checks.items():
            some = lines[:: max(1, len(lines) // self.learning.checked)][: self.learning.checked]
            words, nats, labels = 0, 0.0, 0
            for texts, counts in shares([some[i : i + 16] for i in range(0, len(some), 16)], rank, world):
                batch = self._batch([self.vocabulary.encode(x) for x in texts])
                total = float(self.losses(batch.on(self.model.device))["nats"])
                if counts:
                    words, nats = words + sum(len(x.split()) + 1 for x in texts), nats + total
                    labels += batch.counts["nats"]
            # The end counts as a word, as it counts as a label.
            found |= {
                f"{name} word PPL": Ratio(nats, words, "exp"),
                f"{name} label PPL": Ratio(nats, labels, "exp"),
            }
        return found

    def save(self, folder: Path, weights: Mapping[str, Tensor], *, note: str) -> None:
        self._save(folder, weights, note)

    def name_of(self, item: int) -> str:
        return f"{self._text(item)[:40]!r}"
