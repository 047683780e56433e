"""A small causal Transformer in the units of a CTC model, for label-wise fusion.

python -m duolect.recipes.unit_lm --units runs/ctc/model --text ../shared/data/text/librispeech_train_clean_100.txt \
    --heldout ../shared/data/text/librispeech_heldout.txt --out runs/unit_lm
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from duolect.audio.augment import random_for
from duolect.train.loop import Loss, Task, TrainConfig, train
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
            steps=20_000, seconds=1500, learning_rates={"model": 3e-3}, warmup_steps=60, weight_decay=0.05, log_every=20, validate_every=300
        )
    )


class UnitLmTask(Task[tuple[tuple[int, ...], ...]]):
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

    def plan(self, epoch: int) -> Sequence[tuple[tuple[int, ...], ...]]:
        random = random_for(self.recipe.train.seed, epoch, "sentences", "order")
        order = sorted(self.sentences, key=lambda x: len(x) * random.uniform(0.9, 1.1))
        batches: list[list[tuple[int, ...]]] = [[]]
        for sentence in order:
            if batches[-1] and (len(sentence) + 1) * (len(batches[-1]) + 1) > self.recipe.batch_labels:
                batches.append([])
            batches[-1].append(sentence)
        return [tuple(batches[i]) for i in random.permutation(len(batches))]

    def loss(self, batch: tuple[tuple[int, ...], ...], epoch: int) -> Loss:
        bos, eos = self.vocabulary.bos, self.vocabulary.eos
        inputs = nn.utils.rnn.pad_sequence([torch.tensor([bos, *x]) for x in batch], batch_first=True, padding_value=eos)
        targets = nn.utils.rnn.pad_sequence([torch.tensor([*x, eos]) for x in batch], batch_first=True, padding_value=IGNORED)
        # Padding lies behind what counts, so causal attention needs no mask.
        logits = self.model(input_ids=inputs, use_cache=False).logits
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return Loss(total, sum(len(x) + 1 for x in batch))

    def validate(self) -> Mapping[str, float]:
        nats = labels = 0.0
        sentences = [x for x, _ in self.heldout]
        for start in range(0, len(sentences), 32):
            loss = self.loss(tuple(sentences[start : start + 32]), 0)
            nats, labels = nats + float(loss.sum), labels + loss.count
        words = sum(count + 1 for _, count in self.heldout)
        return {"unit PPL": math.exp(nats / labels), "word PPL": math.exp(nats / words)}

    def save(self, folder: Path, *, note: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        tied = {"lm_head.weight"}
        weights = {name: value.half().contiguous() for name, value in self.model.state_dict().items() if name not in tied}
        save_file(weights, folder / "model.safetensors.part", metadata={"format": "pt"})
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
