"""The embedded CTC model: Whisper base's encoder with a CTC head, fine-tuned on three hours of real and more synthesized speech.

    python -m duolect.recipes.embedded --train ../shared/data/train/manifest.jsonl --synth synth/manifest.jsonl \
        --text ../shared/data/text/librispeech_train_clean_100.txt --dev ../shared/data/dev/manifest.jsonl --out runs/ctc
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import kaldialign
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.audio.augment import Augmentation, augment_audio, random_for, spec_augment
from duolect.audio.features import whisper_log_mel
from duolect.audio.io import AudioError, read_audio
from duolect.data.sources import read_manifest
from duolect.data.utterance import Utterance
from duolect.models.ctc import AcousticModel, CtcModel
from duolect.models.embedded import resolve
from duolect.models.encoders import WhisperEncoder
from duolect.train.loop import STATE, Loss, Task, TrainConfig, train
from duolect.vocabulary import SentencePieceVocabulary, Vocabulary

PIECES = 256
WORDS = re.compile(r"[a-z']+( [a-z']+)*")
MIN_SECONDS, MAX_SECONDS = 0.4, 20.0
MILD = Augmentation(snr_db=(10.0, 30.0), time_masks=1, time_width=20, mel_masks=1, mel_width=8)


@dataclass(frozen=True)
class EmbeddedCtc:
    """The recipe. frozen_layers: of the encoder, from below, with its convolutions; merge_after: layers at 50 Hz, others run at 25 Hz."""

    whisper: str = "whisper-base"
    merge_after: int = 2
    frozen_layers: int = 2
    batch_seconds: float = 24.0
    held_out: int = 40
    synth_per_real: float = 0.7
    pieces: int = PIECES
    probe_seconds: float = 1500.0
    probe_steps: int = 350
    # Mild: an utterance is heard a few times at most, so what slows learning down costs more than it protects (docs/LOG.md).
    real: Augmentation = field(default_factory=lambda: replace(MILD, noise_chance=0.1))
    synth: Augmentation = field(default_factory=lambda: replace(MILD, noise_chance=0.3))
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=20_000, seconds=6000, learning_rates={"head": 1e-3, "encoder": 2e-4}, average=0.998, validate_every=300, save_every=100
        )
    )


def train_pieces(text: str | Path, *, pieces: int = PIECES) -> SentencePieceVocabulary:
    """SentencePiece unigram pieces of a text file, one sentence a line, with a blank behind them; eos 0, bos 1, unknown 2."""
    import sentencepiece

    model = io.BytesIO()
    with open(text, encoding="utf-8") as lines:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.strip().lower() for line in lines),
            model_writer=model,
            vocab_size=pieces,
            model_type="unigram",
            character_coverage=1.0,
            eos_id=0,
            bos_id=1,
            unk_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
            max_sentence_length=10_000,
        )
    return SentencePieceVocabulary(model.getvalue(), blank="last")


@dataclass(frozen=True)
class Item:
    """An utterance to learn from: its labels, and whether it is real speech."""

    utterance: Utterance
    labels: tuple[int, ...]
    real: bool

    @property
    def seconds(self) -> float:
        return self.utterance.seconds or 0.0


def items(manifest: str | Path, vocabulary: Vocabulary, *, real: bool) -> list[Item]:
    """The utterances whose text is lower-case words only, of usable length and not denser than one label per 45 ms."""
    found = []
    for utterance in read_manifest(manifest).utterances:
        text = (utterance.text or "").lower().strip()
        labels = tuple(vocabulary.encode(text)) if WORDS.fullmatch(text) else ()
        seconds = utterance.seconds or 0.0
        if labels and max(MIN_SECONDS, 0.045 * len(labels)) <= seconds <= MAX_SECONDS:
            found.append(Item(utterance, labels, real))
    return found


def hold_out(found: Sequence[Item], count: int) -> tuple[list[Item], list[Item]]:
    """(for training, about `count` of rare speakers for validation), no speaker in both."""
    by_speaker: dict[str, list[Item]] = {}
    for item in found:
        by_speaker.setdefault(str(item.utterance.fields.get("speaker")), []).append(item)
    held: list[Item] = []
    for speaker in sorted(by_speaker, key=lambda s: random_for(0, 0, s, "held out").random()):
        if len(held) < count and len(by_speaker[speaker]) <= 4:
            held += by_speaker[speaker]
    ids = {x.utterance.id for x in held}
    return [x for x in found if x.utterance.id not in ids], held


class Audios:
    """Decoded audio, kept as 16 bit in memory: one core decodes nothing twice."""

    def __init__(self) -> None:
        self.kept: dict[Path, np.ndarray] = {}

    def __call__(self, utterance: Utterance) -> np.ndarray:
        """The samples [N], float32. Raises AudioError."""
        kept = self.kept.get(utterance.audio)
        if kept is None:
            kept = (read_audio(utterance.audio).clip(-1, 1) * 32767).astype(np.int16)
            self.kept[utterance.audio] = kept
        return kept.astype(np.float32) / 32767


class CtcTask(Task[tuple[Item, ...]]):
    """CTC fine-tuning of a CtcModel on real speech and as much (times synth_per_real) synthesized speech, drawn anew each epoch."""

    model: CtcModel

    def __init__(
        self,
        model: CtcModel,
        recipe: EmbeddedCtc,
        real: Sequence[Item],
        synth: Path | None,
        checks: Mapping[str, Sequence[Item | Utterance]],
        card: str,
    ) -> None:
        self.model, self.recipe, self.real, self.synth, self.checks, self.card = model, recipe, list(real), synth, checks, card
        self.audios = Audios()

    def groups(self) -> Mapping[str, nn.Module]:
        return {"head": self.model.head, "encoder": self.model.encoder}

    def plan(self, epoch: int) -> Sequence[tuple[Item, ...]]:
        seed = self.recipe.train.seed
        chosen = list(self.real)
        if self.synth is not None:
            # Another stretch of one shuffled list each epoch: everything is heard once before anything is heard twice.
            spoken = items(self.synth, self.model.vocabulary, real=False)
            order = random_for(seed, 0, "synth", "order").permutation(len(spoken))
            room, at, count = sum(x.seconds for x in self.real) * self.recipe.synth_per_real, 0.0, 0
            start = int(epoch * room / max(1.0, sum(x.seconds for x in spoken)) * len(spoken))
            while at < room and count < len(spoken):
                item = spoken[order[(start + count) % len(spoken)]]
                chosen.append(item)
                at, count = at + item.seconds, count + 1
        return batched(chosen, self.recipe.batch_seconds, random_for(seed, epoch, "batches", "order"))

    def loss(self, batch: tuple[Item, ...], epoch: int) -> Loss:
        features, labels = [], []
        for item in batch:
            try:
                features.append(self._features(item, epoch))
            except AudioError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            labels.append(torch.tensor(item.labels))
        lengths = torch.tensor([len(x) for x in features])
        output = self.model(nn.utils.rnn.pad_sequence(features, batch_first=True), lengths)
        sizes = torch.tensor([len(x) for x in labels])
        total = ctc_loss(output.log_probs, torch.cat(labels), output.lengths, sizes, self.model.vocabulary)
        return Loss(total, int(sizes.sum()), float(lengths.sum()) * 0.01)

    def _features(self, item: Item, epoch: int) -> Tensor:
        settings = self.recipe.real if item.real else self.recipe.synth
        random = random_for(self.recipe.train.seed, epoch, item.utterance.id)
        others = [self.audios(self.real[i].utterance) for i in random.integers(0, len(self.real), 4)]
        audio = augment_audio(self.audios(item.utterance), random, settings, others=others)
        return spec_augment(whisper_log_mel(torch.from_numpy(audio)), random, settings)

    def validate(self) -> Mapping[str, float]:
        return {
            f"{name} WER": greedy_wer(self.model, [x.utterance if isinstance(x, Item) else x for x in part], self.audios)
            for name, part in self.checks.items()
        }

    def save(self, folder: Path, *, note: str) -> None:
        self.model.save(folder, card=f"{self.card}\nTrained so far: {note}.\n")


def ctc_loss(log_probs: Tensor, labels: Tensor, frames: Tensor, sizes: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Sum over utterances of -log p(labels | log_probs [B, T, V]); labels [sum(sizes)] in a row; 0 where no alignment fits."""
    assert vocabulary.blank is not None
    return F.ctc_loss(log_probs.transpose(0, 1), labels, frames, sizes, blank=vocabulary.blank, reduction="sum", zero_infinity=True)


def probe_head(task: CtcTask, *, seconds: float, steps: int, rate: float) -> None:
    """Trains the head alone on what the frozen encoder gives for `seconds` of audio, heard once.

    CTC begins with a long plateau of blanks. The head leaves it in cheap steps on kept frames, and fine-tuning then starts from alignments.
    """
    model, kept, heard = task.model, [], 0.0
    model.eval()
    short = [item for batch in task.plan(0) for item in batch if item.seconds < 8.0]
    short.sort(key=lambda item: random_for(0, 0, item.utterance.id, "probe").random())
    for batch in batched(short, task.recipe.batch_seconds, random_for(0, 0, "probe", "batches")):
        features = [whisper_log_mel(torch.from_numpy(task.audios(item.utterance))) for item in batch]
        with torch.no_grad():
            encoded = model.encoder(nn.utils.rnn.pad_sequence(features, batch_first=True), torch.tensor([len(x) for x in features]))
        lengths = encoded.lengths.tolist()
        kept += [(x[:n].clone(), torch.tensor(item.labels)) for x, n, item in zip(encoded.frames, lengths, batch, strict=True)]
        heard += sum(item.seconds for item in batch)
        if heard > seconds:
            break
    optimizer, total = torch.optim.AdamW(model.head.parameters(), lr=rate), 0.0
    random = random_for(task.recipe.train.seed, 0, "probe", "order")
    for step in range(steps):
        chosen = [kept[i] for i in random.integers(0, len(kept), 16)]
        optimizer.param_groups[0]["lr"] = rate * (1 - 0.9 * step / steps)
        log_probs = model.head(nn.utils.rnn.pad_sequence([x for x, _ in chosen], batch_first=True)).log_softmax(-1)
        frames, sizes = (torch.tensor([len(pair[k]) for pair in chosen]) for k in (0, 1))
        loss = ctc_loss(log_probs, torch.cat([y for _, y in chosen]), frames, sizes, model.vocabulary) / sizes.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
        if (step + 1) % 50 == 0:
            print(f"head alone: step {step + 1} of {steps}, loss {total / 50:.4f} ({len(kept)} utterances)", file=sys.stderr, flush=True)
            total = 0.0


def batched(found: Sequence[Item], batch_seconds: float, random: np.random.Generator) -> list[tuple[Item, ...]]:
    """Batches of like lengths, at most batch_seconds with padding, in random order; lengths are blurred so that company changes."""
    order = sorted(found, key=lambda x: x.seconds * random.uniform(0.9, 1.1))
    batches: list[list[Item]] = [[]]
    for item in order:
        longest = max([item.seconds, *(x.seconds for x in batches[-1])])
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_seconds:
            batches.append([])
        batches[-1].append(item)
    return [tuple(batches[i]) for i in random.permutation(len(batches)) if batches[i]]


def greedy_wer(model: AcousticModel, utterances: Sequence[Utterance], audios: Audios, *, together: int = 16) -> float:
    """WER in percent of the best label per frame, repeats collapsed, on lower-case texts without normalization."""
    errors = words = 0
    for start in range(0, len(utterances), together):
        part = utterances[start : start + together]
        output = model.log_probs_of([audios(x) for x in part])
        for utterance, log_probs, length in zip(part, output.log_probs, output.lengths, strict=True):
            best = torch.unique_consecutive(log_probs[:length].argmax(-1)).tolist()
            heard = model.vocabulary.decode([x for x in best if x != model.vocabulary.blank]).split()
            reference = (utterance.text or "").lower().split()
            errors, words = errors + kaldialign.edit_distance(reference, heard)["total"], words + len(reference)
    return 100 * errors / max(1, words)


def embedded_ctc(
    recipe: EmbeddedCtc, *, real: Path, synth: Path | None, text: Path, dev: Path | None, out: Path, card: str = ""
) -> Mapping[str, float]:
    """The last validation figures; trains (or goes on with) the model in `out`."""
    pieces = out / "sentencepiece.model"
    out.mkdir(parents=True, exist_ok=True)
    if not pieces.is_file():
        pieces.write_bytes(train_pieces(text, pieces=recipe.pieces).model)
    vocabulary = SentencePieceVocabulary(pieces.read_bytes(), blank="last")
    encoder = WhisperEncoder.from_whisper(resolve(recipe.whisper), merge_after=recipe.merge_after)
    for frozen in (encoder.conv1, encoder.conv2, *encoder.layers[: recipe.frozen_layers]):
        frozen.requires_grad_(False)
    torch.manual_seed(recipe.train.seed)
    model = CtcModel(encoder, vocabulary)
    nn.init.normal_(model.head.weight, std=0.02)
    nn.init.zeros_(model.head.bias)
    training, held = hold_out(items(real, vocabulary, real=True), recipe.held_out)
    checks: dict[str, Sequence[Item | Utterance]] = {"held-out": held}
    if dev is not None:
        checks["dev"] = read_manifest(dev).utterances
    hours = sum(x.seconds for x in training) / 3600
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) / 1e6 for frozen in (True, False))
    print(
        f"{len(training)} real utterances ({hours:.2f} h), {len(held)} held out; {size:.1f} M parameters, {trained:.1f} M trained",
        file=sys.stderr,
        flush=True,
    )
    task = CtcTask(model, recipe, training, synth, checks, card)
    if recipe.probe_steps and not (out / STATE).is_file():
        probe_head(task, seconds=recipe.probe_seconds, steps=recipe.probe_steps, rate=3e-3)
    return train(task, recipe.train, out)


def blended(folders: Sequence[Path], *, whisper: str, share: float) -> CtcModel:
    """The mean of models of one run, its encoder mixed with 1 - share of Whisper's own (WiSE-FT, arXiv 2109.01903).

    Small batches at high rates leave noise, which the mean takes out; three hours of speech narrow what Whisper knew, and the mix brings
    part of it back. Raises ValueError for models of different shapes.
    """
    models = [CtcModel.load(folder) for folder in folders]
    if len({json.dumps(m.encoder.settings()) + m.vocabulary.digest() for m in models}) != 1:
        raise ValueError(f"{', '.join(map(str, folders))}: are models of different shapes or units: name models of one run")
    states = [model.state_dict() for model in models]
    weights = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    merge_after = models[0].encoder.settings()["merge_after"]
    assert merge_after is None or isinstance(merge_after, int)
    own = WhisperEncoder.from_whisper(resolve(whisper), merge_after=merge_after).state_dict()
    for name, value in own.items():
        weights[f"encoder.{name}"] = share * weights[f"encoder.{name}"] + (1 - share) * value
    models[0].load_state_dict(weights)
    return models[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, needed in (("train", True), ("text", True), ("out", True), ("synth", False), ("dev", False)):
        parser.add_argument(f"--{name}", type=Path, required=needed)
    parser.add_argument("--whisper", default=EmbeddedCtc.whisper)
    parser.add_argument("--minutes", type=float, default=100.0, help="budget of wall-clock time; the learning rate decays over it")
    parser.add_argument("--steps", type=int, default=20_000)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = EmbeddedCtc(whisper=given.whisper)
    recipe = replace(recipe, train=replace(recipe.train, steps=given.steps, seconds=given.minutes * 60))
    embedded_ctc(recipe, real=given.train, synth=given.synth, text=given.text, dev=given.dev, out=given.out)


if __name__ == "__main__":
    main()
