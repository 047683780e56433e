"""Long audio in windows: equally long pieces that overlap, and of each only what lies far enough from its inner edges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from duolect.models import ModelError

OVERLAP_SECONDS = 4.0  # of adjacent windows: half of it is context that is thrown away at each inner edge
BATCH_SECONDS = 120.0  # of padded audio that is encoded at once


@dataclass(frozen=True)
class Window:
    """A piece [start, end) of an utterance, of whose frames those of [keep_from, keep_to) count."""

    utterance: int
    start: int
    end: int
    keep_from: int
    keep_to: int


@dataclass(frozen=True)
class Windowing:
    """How audio is cut: units (samples or feature frames) per second and per output frame, the longest window, how much goes in a batch."""

    per_second: int
    per_frame: int
    seconds: float
    batch_seconds: float = BATCH_SECONDS

    def of(self, utterance: int, size: int) -> list[Window]:
        """Windows over `size` units, equally long, at multiples of an output frame; what they keep covers everything once."""
        step = 2 * self.per_frame
        longest, overlap = (int(s * self.per_second) // step * step for s in (self.seconds, OVERLAP_SECONDS))
        overlap = min(overlap, longest // 2 // step * step)  # of an encoder that hears little at once
        if size <= longest:
            return [Window(utterance, 0, size, 0, size)]
        count = -(-(size - overlap) // (longest - overlap))
        steps = -(-(size - longest) // self.per_frame)  # the last window starts so many output frames in, and ends with the audio
        starts = [round(i * steps / (count - 1)) * self.per_frame for i in range(count)]
        edges = [0, *((b + a + longest) // 2 // self.per_frame * self.per_frame for a, b in pairwise(starts)), size]
        kept = zip(starts, pairwise(edges), strict=True)
        return [Window(utterance, start, min(start + longest, size), first, last) for start, (first, last) in kept]

    def joined(self, sizes: Sequence[int], encode: Callable[[list[Window]], Sequence[Tensor]]) -> list[Tensor]:
        """[T, ...] per utterance of `sizes` units, out of what `encode` gives for each window [start, end) of a batch: its frames.

        ModelError where windows have to be joined and their frames do not last per_frame each.
        """
        windows = [w for i, size in enumerate(sizes) for w in self.of(i, size)]
        found: dict[Window, Tensor] = {}
        for batch in self._batches(windows):
            for w, frames in zip(batch, encode(batch), strict=True):
                if w.end - w.start < sizes[w.utterance] and abs(len(frames) * self.per_frame - (w.end - w.start)) > 4 * self.per_frame:
                    raise ModelError(
                        f"{(w.end - w.start) / self.per_second:.1f} s of audio gave {len(frames)} frames, but one should last "
                        f"{self.per_frame / self.per_second:.3f} s: long audio cannot be joined, cut it into segments"
                    )
                first, last = ((edge - w.start) // self.per_frame for edge in (w.keep_from, w.keep_to))
                found[w] = frames[first : len(frames) if w.keep_to == w.end else last]
        return [torch.cat([found[w] for w in windows if w.utterance == i]) for i in range(len(sizes))]

    def over(self, features: Sequence[Tensor], run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
        """[T, ...] per utterance of features [F, ...]; `run` gives (frames [B, T, ...], lengths) of a padded batch and its lengths [B]."""

        def encode(batch: list[Window]) -> list[Tensor]:
            parts = [features[w.utterance][w.start : w.end] for w in batch]
            lengths = torch.tensor([len(x) for x in parts], device=parts[0].device)
            frames, sizes = run(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), lengths)
            return [x[:n] for x, n in zip(frames, sizes.tolist(), strict=True)]

        return self.joined([len(x) for x in features], encode)

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Windows of like length together, one at least."""
        room, batch = int(self.batch_seconds * self.per_second), list[Window]()
        for window in sorted(windows, key=lambda w: w.start - w.end):
            if batch and (len(batch) + 1) * (batch[0].end - batch[0].start) > room:
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch
