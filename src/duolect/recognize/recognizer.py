"""Running decodings over audio: batches by seconds, long recordings cut at pauses, one bad file never stops the rest."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duolect.audio.io import SAMPLE_RATE, AudioError, AudioWarning
from duolect.data.batching import batches_by_seconds
from duolect.data.utterance import Utterance, load_audio
from duolect.models import ModelError
from duolect.models.ctc import AcousticModel, CtcOutput
from duolect.models.priors import PriorError
from duolect.recognize.decoding import WRITTEN, Batch, Decoding
from duolect.recognize.models import Models, free_memory
from duolect.run import progress_bar
from duolect.scorer import Hypothesis, Recognized
from duolect.search.align import Word, align, pauses, words
from duolect.search.fusion import SearchError
from duolect.vocabulary import VocabularyError

MEMORY_SHARE = 0.5
"""Of the memory that is free, what keys and values may take by plan: stores grow by doubling, and there is more than them."""

SEGMENT_SECONDS = 28.0
"""Longer recordings are searched in segments: an AED hears 30 s at most, and a language model remembers only so much."""

LETTER_SECONDS = 0.06
"""What a letter takes in speech that is read: some 15 of them a second, spaces counted."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording with its CTC log-probs [T, V] and, where decoders want them, frames [T, D] if it is all of the recording;
    seconds from the begin of the recording."""

    owner: int
    start: float
    audio: np.ndarray
    log_probs: Tensor
    frames: Tensor | None = None

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLE_RATE


@dataclass(frozen=True)
class Found:
    """What a decoding made of a segment."""

    nbest: Sequence[Hypothesis]
    seconds: float
    words: Sequence[Word]


@dataclass(frozen=True)
class Recognizer:
    """An acoustic model and any number of named decodings over it; each batch is encoded once for all of them.

    batch_seconds: padded audio that is searched at once; more is faster until memory runs out, then batches are halved. word_times: also
    align each best transcript, which puts `words` into the result.
    """

    models: Models
    acoustic: str
    decodings: Mapping[str, Decoding]
    batch_seconds: float = 120.0
    word_times: bool = False

    def recognize(self, utterances: Sequence[Utterance], *, progress: bool = True) -> Iterator[dict[str, Recognized]]:
        """For each utterance, in an order that suits batching, what each decoding made of it; failures carry an error and no transcript."""
        self.models.acoustic(self.acoustic)
        for decoding in self.decodings.values():
            for term in decoding.terms.values():
                term.load(self.models, self.acoustic)
            for line in decoding.explained(self.models, self.acoustic):
                if len(self.decodings) == 1:
                    self.models.say(line)
        durations = [u.seconds if u.seconds else 10.0 for u in utterances]
        form = "{desc}{percentage:3.0f}%|{bar:24}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]{postfix}"
        with progress_bar(total=sum(durations), bar_format=form, disable=not progress) as bar:
            for batch in batches_by_seconds(durations, batch_seconds=self.batch_seconds):
                loaded: list[tuple[Utterance, np.ndarray]] = []
                for utterance in (utterances[i] for i in batch):
                    try:
                        loaded.append(_heard(utterance))
                    except AudioError as error:
                        yield self._failed(utterance, error)
                yield from self._batch(loaded)
                bar.update(min(sum(durations[i] for i in batch), max(0.0, bar.total - bar.n)))

    def batch_of(self, utterance: Utterance) -> Batch:
        """The one utterance as the decodings hear it. Raises AudioError, and SearchError for a recording that is searched in segments."""
        model, (_, audio) = self.models.acoustic(self.acoustic), _heard(utterance)
        segments = _segments(0, audio, model.log_probs_of([audio]), model)
        if len(segments) > 1:
            raise SearchError(
                f"{utterance.id}: {len(audio) / SAMPLE_RATE:.0f} s are searched in {len(segments)} segments, each scored alone: "
                f"cut the recording into files of at most {SEGMENT_SECONDS:g} s"
            )
        return self._prepared(segments, model)

    def misfits(self) -> dict[str, str]:
        """Why decodings cannot work with these models (no priors, a unit LM of other units), by name: each hears a tenth of a second."""
        model, audio, found = self.models.acoustic(self.acoustic), np.zeros(SAMPLE_RATE // 10, np.float32), {}
        batch = self._prepared([Segment(0, 0.0, audio, model.log_probs_of([audio]).log_probs[0])], model)
        for name, decoding in self.decodings.items():
            try:
                for term in decoding.terms.values():
                    term.load(self.models, self.acoustic)
                decoding.explained(self.models, self.acoustic)
                decoding.run(batch)
            except (PriorError, SearchError, VocabularyError) as error:
                found[name] = " ".join(str(error).split())
        return found

    def _batch(self, loaded: Sequence[tuple[Utterance, np.ndarray]]) -> Iterator[dict[str, Recognized]]:
        if not loaded:
            return
        try:
            yield from self._together(loaded)
        except (ModelError, RuntimeError, MemoryError) as error:
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error)
            if not isinstance(error, ModelError) and not memory:
                raise
            if len(loaded) > 1:
                if memory:
                    self.models.say(f"out of memory with {len(loaded)} utterances at once: halving the batch")
                half = len(loaded) // 2
                yield from self._batch(loaded[:half])
                yield from self._batch(loaded[half:])
            elif len(self.decodings) > 1:
                # One decoding's trouble is not the others': each gets its own try at the utterance.
                alone = (replace(self, decodings={name: decoding}) for name, decoding in self.decodings.items())
                yield {name: result for one in alone for found in one._batch(loaded) for name, result in found.items()}
            else:
                yield self._failed(loaded[0][0], error)

    def _together(self, loaded: Sequence[tuple[Utterance, np.ndarray]]) -> list[dict[str, Recognized]]:
        model = self.models.acoustic(self.acoustic)
        begin = time.perf_counter()
        sharing = {name for name, decoding in self.decodings.items() if decoding.shares_encoder(self.models, self.acoustic)}
        output = model.log_probs_of([audio for _, audio in loaded], frames=bool(sharing))
        encoding = (time.perf_counter() - begin) / max(sum(len(audio) for _, audio in loaded), 1)  # per sample
        found: dict[str, dict[int, list[tuple[float, Found]]]] = {name: defaultdict(list) for name in self.decodings}
        shared: set[int] = set()  # utterances whose frames the decoders read
        segments = [s for i, (_, audio) in enumerate(loaded) for s in _segments(i, audio, output, model)]
        for indices in batches_by_seconds([s.seconds for s in segments], batch_seconds=self.batch_seconds):
            for part in self._fitting([segments[i] for i in indices]):
                batch = self._prepared(part, model)
                shared |= {s.owner for s in part if batch.output.frames is not None}
                for name, decoding in self.decodings.items():
                    for segment, result in zip(part, self._search(decoding, batch, part, model), strict=True):
                        found[name][segment.owner].append((segment.start, result))
        results: list[dict[str, Recognized]] = []
        for i, (utterance, audio) in enumerate(loaded):
            fields = {**{k: v for k, v in utterance.fields.items() if v is not None}, "duration": round(len(audio) / SAMPLE_RATE, 3)}
            results.append(
                {
                    name: self._joined(
                        fields, found[name][i], encoding * len(audio) * (decoding.hears_ctc or (name in sharing and i in shared))
                    )
                    for name, decoding in self.decodings.items()
                }
            )
        return results

    def _fitting(self, segments: Sequence[Segment]) -> list[Sequence[Segment]]:
        """The segments in order, in parts whose decoders' keys and values fit the memory, or are of one segment; said where it is more."""
        decodings = self.decodings.values()
        asked = [max((d.bytes_of(self.models, self.acoustic, seconds=s.seconds) for d in decodings), default=0) for s in segments]
        if not max(asked):
            return [segments]
        room, parts, begin = MEMORY_SHARE * free_memory(self.models.device), list[Sequence[Segment]](), 0
        for end in range(1, len(segments) + 1):
            # Stores are padded to the fullest one.
            if end == len(segments) or (end + 1 - begin) * max(asked[begin : end + 1]) > room:
                parts.append(segments[begin:end])
                begin = end
        if len(parts) > 1:
            self.models.say_once(
                "memory",
                f"{len(segments)} utterances at once may need {len(segments) * max(asked) / 2**30:.2g} GiB of keys and values, and "
                f"{room / 2**30:.2g} GiB ({MEMORY_SHARE:.0%} of the free memory) may be used: searching {max(map(len, parts))} at most",
            )
        return parts

    def _prepared(self, segments: Sequence[Segment], model: AcousticModel) -> Batch:
        lengths = torch.tensor([len(s.log_probs) for s in segments])
        padded = torch.nn.utils.rnn.pad_sequence([s.log_probs for s in segments], batch_first=True)
        frames = [s.frames for s in segments if s.frames is not None]
        every = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True) if len(frames) == len(segments) else None
        output = CtcOutput(padded, lengths, every)
        return Batch([s.audio for s in segments], output, model.vocabulary, self.acoustic, self.models, model.seconds_per_frame)

    def _search(self, decoding: Decoding, batch: Batch, segments: Sequence[Segment], model: AcousticModel) -> list[Found]:
        begin, batch.borrowed = time.perf_counter(), 0.0
        lists = decoding.run(batch)
        share = (time.perf_counter() - begin + batch.borrowed) / (sum(s.seconds for s in segments) or 1.0)
        times = [timed_words(nbest[0], s, model) if self.word_times and nbest else [] for nbest, s in zip(lists, segments, strict=True)]
        return [Found(nbest, share * s.seconds, found) for nbest, s, found in zip(lists, segments, times, strict=True)]

    def _joined(self, fields: Mapping[str, Any], parts: Sequence[tuple[float, Found]], encoding: float) -> Recognized:
        """One recording of its segments: the n-best list of a single one as it is, else the best ones in a row."""
        results = [f for _, f in sorted(parts, key=lambda item: item[0])]
        seconds = encoding + sum(f.seconds for f in results)
        nbest = results[0].nbest if len(results) == 1 else _in_a_row([f.nbest[0] for f in results if f.nbest])
        extra = {"words": [{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(w).items()} for f in results for w in f.words]}
        return Recognized(fields, tuple(nbest), seconds, extra=extra if self.word_times else {})

    def _failed(self, utterance: Utterance, error: BaseException) -> dict[str, Recognized]:
        cause = " ".join(str(error).split()) or type(error).__name__
        return {name: Recognized(utterance.fields, (), 0.0, cause) for name in self.decodings}


def timed_words(hypothesis: Hypothesis, segment: Segment, model: AcousticModel) -> list[Word]:
    """The words of a transcript with times in the recording.

    CTC says where a label is sure, often in one frame of a whole word: a word lasts LETTER_SECONDS a letter at least, if nothing comes
    before that. One in another vocabulary (an AED's) is aligned without case and punctuation, and keeps its own spelling. Where the
    segment has too few frames for the words, they share it evenly, with confidence 0.
    """
    vocabulary, spelled = model.vocabulary, hypothesis.text.split()
    assert vocabulary.blank is not None
    known = all(0 <= y < vocabulary.size for y in hypothesis.labels) and vocabulary.decode(hypothesis.labels) == hypothesis.text
    plain = spelled if known else [WRITTEN["lower"](word, first=False) for word in spelled]
    labels = hypothesis.labels if known else vocabulary.encode(" ".join(filter(None, plain)))
    aligned, found = align(segment.log_probs, labels, blank=vocabulary.blank), list[Word]()
    if aligned is None:
        share = segment.seconds / max(1, len(spelled))
        found = [Word(word, i * share, (i + 1) * share, 0.0) for i, word in enumerate(spelled)]
    elif known:
        found = words(aligned, vocabulary=vocabulary, seconds_per_frame=model.seconds_per_frame)
    else:
        ends = [len(vocabulary.encode(" ".join(filter(None, plain[: i + 1])))) for i in range(len(plain))]
        for text, start, end in zip(spelled, [0, *ends], ends, strict=False):
            timed = words(aligned[start:end], vocabulary=vocabulary, seconds_per_frame=model.seconds_per_frame)
            # A dash alone, or letters that the CTC model does not have, belong to the moment where the word before them ends.
            now = found[-1].end if found else 0.0
            found.append(Word(text, timed[0].start, timed[-1].end, timed[0].confidence) if timed else Word(text, now, now, 0.0))
    after = [*(word.start for word in found[1:]), segment.seconds]
    spoken = [LETTER_SECONDS * sum(c.isalnum() for c in w.text) * (w.end > w.start) for w in found]
    ends = [max(w.end, min(w.start + least, later)) for w, least, later in zip(found, spoken, after, strict=False)]
    return [Word(w.text, w.start + segment.start, end + segment.start, w.confidence) for w, end in zip(found, ends, strict=True)]


def _heard(utterance: Utterance) -> tuple[Utterance, np.ndarray]:
    """The utterance and its samples; what its audio suffers from becomes its field `warning`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        audio = load_audio(utterance)
    if said := "; ".join(str(w.message) for w in caught if issubclass(w.category, AudioWarning)):
        utterance = replace(utterance, fields={**utterance.fields, "warning": said})
    return utterance, audio


def _segments(owner: int, audio: np.ndarray, output: CtcOutput, model: AcousticModel) -> list[Segment]:
    """A recording, row `owner` of an output, cut at pauses where it is long: decoders then hear each part anew, as they have learned to."""
    assert model.vocabulary.blank is not None
    length, step = int(output.lengths[owner]), model.seconds_per_frame
    log_probs = output.log_probs[owner, :length]
    parts = list(pauses(log_probs[:, model.vocabulary.blank], longest=int(SEGMENT_SECONDS / step)))
    frames = output.frames[owner, :length] if output.frames is not None and len(parts) == 1 else None
    out = []
    for start, end in parts:
        last = len(audio) if end == length else round(end * step * SAMPLE_RATE)
        out.append(Segment(owner, start * step, audio[round(start * step * SAMPLE_RATE) : last], log_probs[start:end], frames))
    return out


def _in_a_row(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    names = hypotheses[0].parts if hypotheses else ()
    parts = {name: sum(h.parts[name] for h in hypotheses) for name in names}
    text = " ".join(t for h in hypotheses if (t := h.text.strip()))
    return [Hypothesis(tuple(y for h in hypotheses for y in h.labels), text, parts)]
