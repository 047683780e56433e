"""Acoustic models as a Task: CTC heads, and a decoder where there is one, learn from transcribed speech."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import kaldialign
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.audio.augment import Augmentation, augment_audio, hidden_features, random_for, speechless, speed_for
from duolect.audio.features import HOP, SECONDS_PER_FRAME
from duolect.audio.io import AudioError
from duolect.config import registered
from duolect.data.batching import batches_by_seconds, dealt, shuffled_batches, sub_epoch
from duolect.data.filter import Case, Labelled, with_case
from duolect.data.pieces import SubwordSampler
from duolect.data.utterance import Utterance, load_audio
from duolect.models.aed import AedModel
from duolect.models.attention_decoder import smoothed_cross_entropy
from duolect.models.attention_maps import attention_maps
from duolect.models.ctc import CtcModel, CtcOutput, Heads, spotter_of
from duolect.models.encoders import Encoded, Encoder
from duolect.models.extended import ExtendedEncoder
from duolect.models.speech_llm import SpeechLlm, Trainable
from duolect.search.ctc import ctc_greedy
from duolect.search.fusion import Fused
from duolect.search.label import label_beam_search
from duolect.train.checkpoint import TrainError
from duolect.train.parallel import Numbers, computing
from duolect.train.task import Batch, Place, Ratio, Task, shares
from duolect.vocabulary import Vocabulary

CHECK_SECONDS = 60.0  # of padded audio in a batch of validation
MOST_UNREADABLE = 0.05  # share of the utterances, above which training stops
KEPT_HOURS = 40.0  # of audio that is held decoded in memory (16 bit: 115 MB an hour), so that a small corpus is decoded once
NO_CONTEXT = 0.25  # share of the utterances whose prompt names no words
OWN_WORDS, OTHER_WORDS = 3, 10  # of the transcript and of other utterances, at most, in a prompt
LOOKED_AT = 8  # utterances of a validation whose attention is looked at
CONTEXT_LETTERS = 4  # of a word there, at least

Recording = tuple[Path, "tuple[int, int] | None"]


@registered
@dataclass(frozen=True)
class Corpus:
    """Speech to learn from. source: anything `duolect decode` reads. parts: an epoch hears one of so many (all, before one returns). begin:
    the first epoch that hears it, so that what is easy (few voices, no noise) may come first."""

    source: str
    parts: int = 1
    augment: Augmentation = field(default_factory=Augmentation)
    begin: int = 0


@registered
@dataclass(frozen=True)
class Learning:
    """What the task does with the data. batch_seconds: of padded audio in an update. smoothing: of the labels, in the decoder's gradient.

    rising: so many epochs, from the first, hear short utterances first: CTC finds its alignments there (arXiv 1512.02595). sampling: alpha
    of segmentations drawn anew in each epoch (the smaller the more varied), None for always the best one. kept_versions:
    where the encoder below is frozen, so many augmented versions of an utterance are encoded once and kept in memory; 0: nothing is kept.
    """

    batch_seconds: float = 60.0
    smoothing: float = 0.1
    rising: int = 0
    sampling: float | None = None
    kept_versions: int = 0
    decoder_check: int = 50  # utterances of the first validation set that are recognized by the decoder too


@dataclass(frozen=True)
class Heard:
    """An utterance to learn from, and the number of its corpus."""

    item: Labelled
    corpus: int


@dataclass(frozen=True)
class AsrBatch(Batch):
    """Audio [B, N] (samples) or kept frames [B, T, D], with sizes [B]; hidden features; labels [B, L] by head, with sizes."""

    sound: Tensor
    sizes: Tensor
    hidden: Tensor | None
    labels: Mapping[str, Tensor]
    label_sizes: Mapping[str, Tensor]
    kept: bool = False
    context: tuple[tuple[str, ...], ...] = ()  # words for the prompt of each utterance, or nothing

    @property
    def counts(self) -> Mapping[str, int]:
        # A decoder predicts the end, too.
        return {name: int(n.sum()) + (len(n) if name.startswith("ce") else 0) for name, n in self.label_sizes.items()}


class _HeadsOf(nn.Module):
    """All heads of a CTC model by `forward`, which is where a sharded model gathers its weights."""

    def __init__(self, model: CtcModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, lengths: Tensor, *, hidden: Tensor | None = None) -> Heads:
        return self.model.heads(features, lengths, hidden=hidden)


class AsrTask(Task[Heard, AsrBatch]):
    """CTC (and attention) training of a model on corpora; checks: validation sets by name."""

    model: Trainable

    def __init__(
        self,
        model: Trainable,
        learning: Learning,
        corpora: Sequence[tuple[Corpus, Sequence[Labelled]]],
        checks: Mapping[str, Sequence[Labelled]],
        *,
        seed: int,
        case: Case = "lower",
        card: str = "",
        frames: dict[tuple[Recording, int], Tensor] | None = None,
        precision: Numbers = "fp32",
    ) -> None:
        self.model, self.learning, self.corpora, self.checks, self.seed, self.card = model, learning, list(corpora), checks, seed, card
        self.case: Case = case
        self.precision: Numbers = precision  # of what an encoder at rest is asked once
        self.ctc = model if isinstance(model, CtcModel) else model.ctc
        self._network = _HeadsOf(model) if isinstance(model, CtcModel) else model
        self._at_rest = _at_rest(model) if learning.kept_versions else None
        hours = sum(x.seconds for _, items in self.corpora for x in items) / 3600
        self._audio: dict[Recording, np.ndarray] | None = {} if hours <= KEPT_HOURS else None
        self._frames = {} if frames is None else frames  # of the encoder that rests, by version
        self._unreadable: set[Recording] = set()
        self._sampler = None if learning.sampling is None else SubwordSampler(self.ctc.vocabulary, alpha=learning.sampling)

    @property
    def network(self) -> nn.Module:
        return self._network

    def groups(self) -> Mapping[str, nn.Module]:
        """`top` (heads, layers on top of a pre-trained encoder), the model's other parts, `spotter` where there is one, `encoder`."""
        encoder, spotter = self.ctc.encoder, spotter_of(self.ctc.encoder)
        top = [self.ctc.head, self.ctc.aux, *([encoder.top] if isinstance(encoder, ExtendedEncoder) else [])]
        groups: dict[str, nn.Module] = {"top": nn.ModuleList(top), **self.model.parts()}
        if spotter is not None and any(p.requires_grad for p in spotter.parameters()):
            groups["spotter"] = spotter
        return {**groups, "encoder": encoder}

    def name_of(self, item: Heard) -> str:
        return item.item.utterance.id

    def plan(self, epoch: int, parts: int) -> Sequence[Sequence[tuple[Heard, ...]]]:
        begun = [n for n, (corpus, _) in enumerate(self.corpora) if corpus.begin <= epoch]
        chosen = [Heard(x, n) for n in begun for x in self._of_epoch(n, epoch)]
        # As they will be heard: lengths that a speed drawn later changed by a tenth would triple the padding.
        seconds = [x.item.seconds / self._speed(x, epoch) for x in chosen]
        batches = shuffled_batches(
            seconds, batch_seconds=self.learning.batch_seconds, seed=self.seed, epoch=epoch, at_least=min(parts, len(chosen))
        )
        if epoch < self.learning.rising:
            batches = sorted(batches, key=lambda batch: max(seconds[i] for i in batch))
        return [dealt([chosen[i] for i in batch], parts=parts) for batch in batches]

    def _of_epoch(self, number: int, epoch: int) -> Sequence[Labelled]:
        """What of a corpus is heard in an epoch; utterances of one shard stay together, so that few are read."""
        corpus, items = self.corpora[number]
        if corpus.parts == 1:
            return items
        shards = [x.utterance.audio for x in items]
        return [items[i] for i in sub_epoch(shards, index=epoch, parts=corpus.parts, seed=self.seed)]

    def load(self, items: Sequence[Heard], place: Place) -> AsrBatch | None:
        told = isinstance(self.model, SpeechLlm) and self.model.takes_context
        rows = [(*row, self._context(x, place.epoch) if told else ()) for x in items if (row := self._row(x, place)) is not None]
        if not rows:
            return None
        sounds, hidden, labelled, context = zip(*rows, strict=True)
        batch = self._batch(sounds, hidden, [self._resegmented(x, place.epoch) for x in labelled])
        return replace(batch, context=context if told else ())

    def _context(self, heard: Heard, epoch: int) -> tuple[str, ...]:
        """Words for a prompt, drawn anew in each epoch: for half of the utterances some of their own, and one each of others of the corpus.

        Of NO_CONTEXT there are none at all. As in CLAS (arXiv 1808.02480), but without short words, which nobody lists.
        """
        random, others = random_for(self.seed, epoch, heard.item.utterance.id, "context"), self.corpora[heard.corpus][1]
        if random.random() < NO_CONTEXT:
            return ()
        drawn = [(heard.item, int(random.integers(0, 2) * random.integers(1, OWN_WORDS + 1)))]
        drawn += [(others[i], 1) for i in random.integers(0, len(others), random.integers(0, OTHER_WORDS + 1))]
        found: list[str] = []
        for item, most in drawn:
            words = sorted({word for word in self._text(item).split() if len(word) >= CONTEXT_LETTERS})
            found += [words[i] for i in random.permutation(len(words))[:most]]
        found = list(dict.fromkeys(found))
        return tuple(found[i] for i in random.permutation(len(found)))

    def _resegmented(self, item: Labelled, epoch: int) -> Labelled:
        if self._sampler is None:
            return item
        text = self.ctc.vocabulary.decode(item.labels)
        labels = self._sampler.sample(text, random_for(self.seed, epoch, item.utterance.id, "pieces"))
        return replace(item, labels=tuple(labels))

    def _row(self, heard: Heard, place: Place) -> tuple[Tensor, np.ndarray | None, Labelled] | None:
        """(audio [N] or kept frames [T, D], hidden features [F, mels], the item); None where the audio cannot be read."""
        settings, versions = self.corpora[heard.corpus][0].augment, self.learning.kept_versions
        version, utterance = self._version(place.epoch), heard.item.utterance
        random = random_for(self.seed, version, utterance.id)
        chance = random_for(self.seed, version, utterance.id, "speechless")
        silent = bool(chance.random() < settings.speechless)
        item = Labelled(replace(utterance, text=""), ()) if silent else heard.item
        try:
            if versions and (_place(utterance), version) in self._frames:
                return self._partly_hidden(self._frames[_place(utterance), version], heard, place), None, item
            others = self.corpora[heard.corpus][1]
            babble = [self._sound(others[i].utterance) for i in random.integers(0, len(others), 4)] if settings.noise_chance else []
            sound = augment_audio(self._sound(utterance), random, settings, speed=self._speed(heard, place.epoch), others=babble)
            audio = torch.from_numpy(speechless(len(sound), chance) if silent else sound)
        except AudioError as error:
            self._cannot_read(utterance, error)
            return None
        if versions:
            self._frames[_place(utterance), version] = frames = self._encoded(audio).half()
            return self._partly_hidden(frames, heard, place), None, item
        spec, mels = settings.spec, self.ctc.encoder.mels
        hidden = None if spec is None else hidden_features(-(-len(audio) // HOP), mels, random, spec, step=place.step)
        return audio, hidden, item

    def _partly_hidden(self, frames: Tensor, heard: Heard, place: Place) -> Tensor:
        """Kept frames [T, D], stretches of time and of channels set to 0, anew in each epoch: SpecAugment behind the encoder."""
        frames, spec = frames.float(), self.corpora[heard.corpus][0].augment.spec
        if spec is None:
            return frames
        assert self._at_rest is not None
        per_frame = round(self._at_rest.seconds_per_frame / SECONDS_PER_FRAME)  # the widths of masks are in feature frames
        random = random_for(self.seed, place.epoch, heard.item.utterance.id, "masks")
        dim = self._at_rest.dim  # channels behind them are numbers
        hidden = torch.from_numpy(hidden_features(len(frames) * per_frame, dim, random, spec, step=place.step)[::per_frame])
        parts = frames[:, :dim].masked_fill(hidden, 0.0), frames[:, dim:].masked_fill(hidden.all(1)[:, None], 0.0)
        return torch.cat(parts, 1)

    def _version(self, epoch: int) -> int:
        """Which augmentation an epoch hears."""
        return epoch % self.learning.kept_versions if self.learning.kept_versions else epoch

    def _speed(self, heard: Heard, epoch: int) -> float:
        return speed_for(self.seed, self._version(epoch), heard.item.utterance.id, self.corpora[heard.corpus][0].augment)

    def _sound(self, utterance: Utterance) -> np.ndarray:
        if self._audio is None:
            return load_audio(utterance)
        kept = self._audio.get(_place(utterance))
        if kept is None:
            kept = self._audio[_place(utterance)] = (load_audio(utterance).clip(-1, 1) * 32767).astype(np.int16)
        return kept.astype(np.float32) / 32767

    def _cannot_read(self, utterance: Utterance, error: AudioError) -> None:
        """Says it once. Raises TrainError where too much of the speech cannot be read."""
        if _place(utterance) in self._unreadable:
            return
        self._unreadable.add(_place(utterance))
        print(f"left out: {utterance.id}: {error}", file=sys.stderr, flush=True)
        count, everything = len(self._unreadable), sum(len(items) for _, items in self.corpora)
        if count > max(MOST_UNREADABLE * everything, 5):
            raise TrainError(f"{count} of {everything} utterances cannot be read, such as {utterance.id} ({error}): mend the data")

    @torch.no_grad()
    def _encoded(self, audio: Tensor) -> Tensor:
        """[T, D] frames of the encoder that rests, in eval mode: what it always gives."""
        base = self._at_rest
        assert base is not None
        was = base.training
        base.eval()
        device = next(base.parameters()).device
        features = base.features(audio.to(device))
        with computing(device, self.precision):
            frames = base(features[None], torch.tensor([len(features)], device=device)).frames[0].cpu()
        base.train(was)
        return frames

    def _batch(self, sounds: Sequence[Tensor], hidden: Sequence[np.ndarray | None], labelled: Sequence[Labelled]) -> AsrBatch:
        masks = None
        if any(x is not None for x in hidden):
            shape = len(hidden), max(len(x) for x in hidden if x is not None), self.ctc.encoder.mels
            masks = torch.zeros(shape, dtype=torch.bool)
            for row, mask in enumerate(hidden):
                if mask is not None:
                    masks[row, : len(mask)] = torch.from_numpy(mask)
        labels, sizes = {}, {}
        for name, vocabulary in self._targets().items():
            own = [x.labels if vocabulary is self.ctc.vocabulary else vocabulary.encode(self._text(x)) for x in labelled]
            labels[name] = nn.utils.rnn.pad_sequence([torch.tensor(x, dtype=torch.long) for x in own], batch_first=True)
            sizes[name] = torch.tensor([len(x) for x in own])
        return AsrBatch(
            nn.utils.rnn.pad_sequence(list(sounds), batch_first=True),
            torch.tensor([len(x) for x in sounds]),
            masks,
            labels,
            sizes,
            kept=bool(self.learning.kept_versions) and sounds[0].ndim == 2,
            seconds=sum(x.seconds for x in labelled),
        )

    def _text(self, item: Labelled) -> str:
        return " ".join(with_case(item.utterance.text or "", self.case).split())

    def _targets(self) -> dict[str, Vocabulary]:
        """The labels that each loss needs, by its name."""
        heads = {"ctc": self.ctc.vocabulary, **{f"ctc{n}": v for n, v in self.ctc.aux_vocabularies.items()}}
        if isinstance(self.model, AedModel):
            heads |= {"ce": self.ctc.vocabulary, **{f"ce{n}": self.ctc.vocabulary for n in self.model.decoder.dims.aux}}
        if isinstance(self.model, SpeechLlm):
            heads = {"ce": self.model.vocabulary} | (heads if self.model.dims.encoder != "rest" else {})
            heads |= {"ctc_llm": self.ctc.vocabulary} if self.model.dims.audio_head else {}
        return heads

    def losses(self, batch: AsrBatch) -> Mapping[str, Tensor]:
        return self._scored(batch)[0]

    def _scored(self, batch: AsrBatch) -> tuple[dict[str, Tensor], CtcOutput]:
        """(sums of the losses, the main head's output)."""
        labels, sizes = batch.labels, batch.label_sizes
        losses: dict[str, Tensor] = {}
        told = {"context": batch.context} if batch.context else {}
        if isinstance(self.model, CtcModel):
            heads = self._from_frames(batch) if batch.kept else self.network(**self._features(batch))
        else:
            if batch.kept:
                assert isinstance(self.model, SpeechLlm)
                output = self.model.of_heads(self._from_frames(batch), labels["ce"], sizes["ce"], **told)
            else:
                output = self.network(**self._features(batch), labels=labels["ce"], sizes=sizes["ce"], **told)
            heads, smoothing = output.heads, self.learning.smoothing
            losses["ce"] = smoothed_cross_entropy(output.logits, output.targets, smoothing=smoothing)
            if output.heard is not None:
                losses["ctc_llm"] = ctc_loss(output.heard, labels["ctc_llm"], sizes["ctc_llm"], self.ctc.vocabulary)
            for n, logits in output.aux.items():
                losses[f"ce{n}"] = smoothed_cross_entropy(logits, output.targets, smoothing=smoothing)
        if "ctc" in labels:
            losses["ctc"] = ctc_loss(heads.main, labels["ctc"], sizes["ctc"], self.ctc.vocabulary)
            for n, head in heads.aux.items():
                losses[f"ctc{n}"] = ctc_loss(head, labels[f"ctc{n}"], sizes[f"ctc{n}"], self.ctc.aux_vocabularies[n])
        return losses, heads.main

    def _features(self, batch: AsrBatch) -> dict[str, Tensor | None]:
        """What the network hears, as its arguments."""
        features = [self.ctc.encoder.features(x[:n]) for x, n in zip(batch.sound, batch.sizes.tolist(), strict=True)]
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True)
        lengths = torch.tensor([len(x) for x in features], device=padded.device)
        return {"features": padded, "lengths": lengths, "hidden": None if batch.hidden is None else batch.hidden[:, : padded.shape[1]]}

    def _from_frames(self, batch: AsrBatch) -> Heads:
        encoder, encoded = self.ctc.encoder, Encoded(batch.sound, batch.sizes)
        whole = self._at_rest is encoder
        assert whole or isinstance(encoder, ExtendedEncoder)
        return self.ctc.of_encoded(encoded if whole else encoder.top(encoded))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
        figures: dict[str, Ratio] = {}
        for number, (name, items) in enumerate(self.checks.items()):
            batches = batches_by_seconds([x.seconds for x in items], batch_seconds=CHECK_SECONDS)
            mine = shares(batches, rank, world)
            found = [part for batch, counts in mine for part in [self._check([items[i] for i in batch])] if counts]
            names = sorted({key for part in found for key in part}, key=lambda key: (key != "WER", key))
            for key in names:
                parts = [part[key] for part in found if key in part]
                figures[f"{name} {key}"] = replace(parts[0], sum=sum(p.sum for p in parts), count=sum(p.count for p in parts))
            if not isinstance(self.model, CtcModel) and number == 0 and self.learning.decoder_check:
                few, sounds = self._readable(items[rank : self.learning.decoder_check : world])
                found = self._attended(sounds)
                heard = {f"{name} decoder WER": errors([text for text, _ in found], few)}
                heard[f"{name} runaway"] = Ratio(sum(ran for _, ran in found), len(found), "percent")
                if isinstance(self.model, SpeechLlm) and (looks := self._looks(self.model, few[:LOOKED_AT], sounds)):
                    heard[f"{name} attention on audio"] = Ratio(sum(looks), len(looks), "percent")
                # The first figure decides what is best, and the CTC model of a speech LLM may rest.
                figures = {**heard, **figures} if isinstance(self.model, SpeechLlm) else {**figures, **heard}
        return figures

    def _looks(self, model: SpeechLlm, items: Sequence[Labelled], sounds: Sequence[np.ndarray]) -> list[float]:
        """Share of attention on audio where a label of each transcript is predicted, mean over layers and heads; nothing for added layers.

        The very first position is left out: there attention rests that is of no use elsewhere, and without a prompt it is audio.
        """
        if model.dims.attention == "cross":  # which see nothing else
            return []
        pairs = zip(items, sounds, strict=False)
        maps = (attention_maps(model, audio=sound, labels=model.vocabulary.encode(self._text(item))) for item, sound in pairs)
        return [float(x.audio_mass(skip=1).mean()) for x in maps]

    def _check(self, items: Sequence[Labelled]) -> dict[str, Ratio]:
        """WER of the main head, greedy, and the losses, on one batch; what cannot be read is left out."""
        items, audios = self._readable(items)
        if not items:
            return {}
        sounds = [torch.from_numpy(x) for x in audios]
        device = next(self.model.parameters()).device
        batch = self._batch(sounds, [None] * len(items), items).on(device)
        losses, output = self._scored(replace(batch, kept=False))
        heard = ctc_greedy(output.log_probs, output.lengths, vocabulary=self.ctc.vocabulary)
        figures = {name: Ratio(float(x), batch.counts[name]) for name, x in losses.items()}
        return {"WER": errors([nbest[0].text for nbest in heard], items), **figures}

    def _readable(self, items: Sequence[Labelled]) -> tuple[list[Labelled], list[np.ndarray]]:
        kept, audios = [], []
        for item in items:
            try:
                audios.append(self._sound(item.utterance))
                kept.append(item)
            except AudioError as error:
                self._cannot_read(item.utterance, error)
        return kept, audios

    def _attended(self, sounds: Sequence[np.ndarray]) -> list[tuple[str, bool]]:
        """What the decoder hears, greedily, and whether it ran on until it was stopped."""
        assert not isinstance(self.model, CtcModel)
        found: list[tuple[str, bool]] = []
        for start in range(0, len(sounds), 16):
            audios = sounds[start : start + 16]
            limit = torch.tensor([len(x) // 1600 + 10 for x in audios])  # ten labels a second
            lists = label_beam_search({"it": Fused(scorer=self.model.scorer(audios), scale=1.0)}, len(audios), beam=1, max_labels=limit)
            found += [
                (nbest[0].text, len(nbest[0].labels) >= most) if nbest else ("", True)
                for nbest, most in zip(lists, limit.tolist(), strict=True)
            ]
        return found

    def save(self, folder: Path, weights: Mapping[str, Tensor], *, note: str) -> None:
        self.model.save(folder, card=f"{self.card}\nTrained so far: {note}.\n", state=weights)


def _at_rest(model: Trainable) -> Encoder:
    """The encoder whose frames can be kept, because nothing below them learns. Raises TrainError where there is none."""
    if isinstance(model, SpeechLlm) and model.dims.encoder == "rest":  # and with it all its CTC heads
        return model.ctc.encoder
    encoder = model.encoder if isinstance(model, CtcModel) and not model.aux_vocabularies else None
    if not isinstance(encoder, ExtendedEncoder) or any(p.requires_grad for p in encoder.base.parameters()):
        raise TrainError(
            "kept_versions keeps the frames of an encoder that rests: give the model one, and layers on top with one CTC head, or an LLM"
        )
    return encoder.base


def _place(utterance: Utterance) -> Recording:
    """What tells recordings apart: ids of two corpora may be the same."""
    return utterance.audio, utterance.span


def ctc_loss(output: CtcOutput, labels: Tensor, sizes: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Sum over utterances of -log p(labels [B, L] | output); 0 where no alignment fits."""
    assert vocabulary.blank is not None
    log_probs = output.log_probs.transpose(0, 1)
    return F.ctc_loss(log_probs, labels, output.lengths, sizes, blank=vocabulary.blank, reduction="sum", zero_infinity=True)


def errors(heard: Sequence[str], items: Sequence[Labelled]) -> Ratio:
    """Word errors and words, texts as they are but for case."""
    wrong = words = 0
    for text, item in zip(heard, items, strict=True):
        reference = (item.utterance.text or "").lower().split()
        wrong += kaldialign.edit_distance(reference, text.lower().split())["total"]
        words += len(reference)
    return Ratio(wrong, words, "percent")
