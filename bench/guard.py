"""The hallucination guard on made errors: how many wrong transcripts it finds, of each kind, and how many right ones it suspects."""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import harness
import numpy as np
import torch
from hallucination import DEMO, nothing

from duolect.data.sources import open_source
from duolect.data.utterance import load_audio
from duolect.models.ctc import AcousticModel, load_acoustic_model
from duolect.search.guard import guarded, judge

PHRASES = ("you", "thank you", "bye", "so", "thank you for watching", "please subscribe")


def wrong(text: str, others: Sequence[str], draw: random.Random) -> Iterator[tuple[str, str, bool]]:
    """(kind of error, the spoiled text, whether cutting its end mends it) of a right one; others: right texts of other recordings."""
    words = text.split()
    last = words[-draw.randint(1, min(4, len(words))) :]
    yield "another sentence behind", f"{text} {draw.choice(others)}", True
    yield "a short phrase behind", f"{text} {draw.choice(PHRASES)}", True
    for times in (2, 5, 30, 200):
        yield f"last words {times} times more", " ".join([*words, *last * times]), True
    yield "another recording's", draw.choice(others), False
    yield "empty", "", False
    if len(words) >= 4:
        half = len(words) // 2
        yield "a sentence inside", " ".join([*words[:half], draw.choice(others), *words[half:]]), False
        yield "first half only", " ".join(words[:half]), False
        yield "second half only", " ".join(words[half:]), False


def counted(model: AcousticModel, spoken: Sequence[tuple[np.ndarray, str]], *, seed: int) -> dict[str, Counter[str]]:
    """By kind of transcript: how many, how many suspect, how many that cutting mended exactly."""
    draw, counts = random.Random(seed), dict[str, Counter[str]]()

    def look(kind: str, log_probs: torch.Tensor, text: str, right: str | None) -> None:
        found = judge(text.split(), log_probs, vocabulary=model.vocabulary, seconds_per_frame=model.seconds_per_frame)
        cut = guarded(text, found, policy="truncate").text
        counts.setdefault(kind, Counter()).update(transcripts=1, suspect=bool(found.causes), mended=right is not None and cut == right)

    for i, (audio, text) in enumerate(spoken):
        heard = model.log_probs_of([audio]).log_probs[0]
        others = [other for j, (_, other) in enumerate(spoken) if j != i and not set(other.split()) <= set(text.split())]
        look("right", heard, text, text)
        for kind, spoiled, by_cutting in wrong(text, others, draw):
            look(kind, heard, spoiled, text if by_cutting else None)
    for kind in ("silence", "noise", "tones"):
        for number, seconds in enumerate((2.0, 5.0, 12.0)):
            heard = model.log_probs_of([nothing(kind, seconds, number)]).log_probs[0]
            look(f"text over {kind}", heard, draw.choice(spoken)[1], "")
            look("no text over silence, noise, tones", heard, "", "")
    return counts


def main() -> None:
    """Prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--am", default="duolect-ctc", help="the CTC model that judges")
    parser.add_argument("--data", type=harness.existing, default=DEMO, help="speech with right transcripts")
    parser.add_argument("--limit", type=int, help="recordings of it")
    parser.add_argument("--seed", type=int, default=0, help="of the errors")
    args = parser.parse_args()
    harness.use_threads(1)
    spoken = [(load_audio(u), u.text.lower()) for u in open_source(args.data).utterances if u.text][: args.limit]
    with torch.inference_mode():
        counts = counted(load_acoustic_model(args.am), spoken, seed=args.seed)
    rows: list[dict[str, Any]] = [
        {"transcript": kind, **{name: c[name] for name in ("transcripts", "suspect", "mended")}} for kind, c in counts.items()
    ]
    harness.print_table(rows, title="transcripts, how many the guard suspects, how many `truncate` makes exactly right")
    harness.save("guard", rows, settings=vars(args), notes=[f"{len(spoken)} recordings"], quick=False)


if __name__ == "__main__":
    main()
