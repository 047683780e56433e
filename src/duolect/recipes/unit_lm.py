"""A small causal Transformer in the units of a CTC model, for label-wise fusion.

python -m duolect.recipes.unit_lm --units runs/ctc/model --text ../shared/data/text/librispeech_train_clean_100.txt \
    --heldout ../shared/data/text/librispeech_heldout.txt --out runs/unit_lm
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from duolect.data.batching import dealt, shuffled_batches
from duolect.train.loop import TrainConfig, train
from duolect.train.optim import WarmUp
from duolect.train.task import Batch, Place, Ratio, Task
from duolect.vocabulary import SentencePieceVocabulary, Vocabulary, load_vocabulary

MAX_LABELS = 400
IGNORED = -100  # labels of padding


@dataclass(frozen=True)
class UnitLm:
    """The recipe; the model is as large as a quarter of an hour on one core can teach a million words."""

    dim: int = 192
    layers: int = 3
    heads: int = 3
    feed_forward: int = 512
    dropout: float = 0.0
    batch_labels: int = 3000
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            seconds=1500, learning_rates={"model": 3e-3}, schedule=WarmUp(60), weight_decay=0.05, log_every=20, validate_every=300
        )
    )


@dataclass(frozen=True)
class Sentences(Batch):
    """Labels [B, L] after bos, and up to eos; targets of padding are IGNORED."""

    inputs: Tensor
    targets: Tensor

    @property
    def counts(self) -> Mapping[str, int]:
        return {"nats": int((self.targets != IGNORED).sum())}

    def tensors(self) -> Mapping[str, Tensor]:
        return {"inputs": self.inputs, "targets": self.targets}

    def on(self, device: torch.device) -> Sentences:
        return Sentences(self.inputs.to(device), self.targets.to(device))


class UnitLmTask(Task[tuple[int, ...], Sentences]):
    """Next-label prediction of sentences, each after bos and up to eos."""

    model: LlamaForCausalLM

    def __init__(
        self,
        model: LlamaForCausalLM,
        recipe: UnitLm,
        vocabulary: Vocabulary,
        sentences: Sequence[tuple[int, ...]],
        heldout: Sequence[str],
        card: str,
    ) -> None:
        self.model, self.recipe, self.vocabulary, self.sentences, self.card = model, recipe, vocabulary, sentences, card
        self.heldout = [(tuple(vocabulary.encode(line)), len(line.split())) for line in heldout]

    def groups(self) -> Mapping[str, nn.Module]:
        return {"model": self.model}

    def plan(self, epoch: int, parts: int) -> Sequence[Sequence[tuple[tuple[int, ...], ...]]]:
        sizes, seed = [float(len(x) + 1) for x in self.sentences], self.recipe.train.seed
        batches = shuffled_batches(sizes, batch_seconds=self.recipe.batch_labels, seed=seed, epoch=epoch, at_least=min(parts, len(sizes)))
        return [dealt([self.sentences[i] for i in batch], parts=parts) for batch in batches]

    def load(self, items: Sequence[tuple[int, ...]], place: Place) -> Sentences:
        bos, eos = self.vocabulary.bos, self.vocabulary.eos
        inputs = nn.utils.rnn.pad_sequence([torch.tensor([bos, *x]) for x in items], batch_first=True, padding_value=eos)
        targets = nn.utils.rnn.pad_sequence([torch.tensor([*x, eos]) for x in items], batch_first=True, padding_value=IGNORED)
        return Sentences(inputs, targets)

    def losses(self, batch: Sentences) -> Mapping[str, Tensor]:
        # Padding lies behind what counts, so causal attention needs no mask.
        logits = self.model(input_ids=batch.inputs, use_cache=False).logits
        return {"nats": F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")}

    def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
        mine = self.heldout[rank::world]
        device, nats, labels = next(self.model.parameters()).device, 0.0, 0
        for start in range(0, len(mine), 32):
            batch = self.load([x for x, _ in mine[start : start + 32]], Place()).on(device)
            nats, labels = nats + float(self.losses(batch)["nats"]), labels + batch.counts["nats"]
        words = sum(count + 1 for _, count in mine)
        return {"unit PPL": Ratio(nats, labels, "exp"), "word PPL": Ratio(nats, words, "exp")}

    def save(self, folder: Path, weights: Mapping[str, Tensor], *, note: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        tied = {"lm_head.weight"}
        halves = {name: value.half().contiguous() for name, value in weights.items() if name not in tied}
        save_file(halves, folder / "model.safetensors.part", metadata={"format": "pt"})
        (folder / "model.safetensors.part").replace(folder / "model.safetensors")
        self.vocabulary.save(folder)
        (folder / "README.md").write_text(f"{self.card}\nTrained so far: {note}.\n")


def unit_lm(recipe: UnitLm, *, units: Path, text: Path, heldout: Path, out: Path, card: str = "") -> Mapping[str, float]:
    """The last validation figures; trains (or goes on with) a language model in the units of the model folder `units`."""
    vocabulary = load_vocabulary(units)
    if not isinstance(vocabulary, SentencePieceVocabulary):
        raise ValueError(f"{units}: its units are no SentencePiece model: name the folder of a CTC model with one")
    vocabulary = vocabulary.without_blank()
    config = LlamaConfig(
        vocab_size=vocabulary.size,
        hidden_size=recipe.dim,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
        pad_token_id=None,
        attention_dropout=recipe.dropout,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(recipe.train.seed)
    model = LlamaForCausalLM(config)
    sentences = [tuple(vocabulary.encode(line))[:MAX_LABELS] for line in _lines(text)]
    check = _lines(heldout)[::24]
    return train(UnitLmTask(model, recipe, vocabulary, sentences, check, card), recipe.train, out)


def _lines(path: Path) -> list[str]:
    return [line.strip().lower() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("units", "text", "heldout", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0, help="budget of wall-clock time; the learning rate decays over it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = UnitLm()
    recipe = replace(recipe, train=replace(recipe.train, seconds=given.minutes * 60))
    print(json.dumps(dict(unit_lm(recipe, units=given.units, text=given.text, heldout=given.heldout, out=given.out))))


if __name__ == "__main__":
    main()
