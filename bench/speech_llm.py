"""Speech LLMs: drafts against plain greedy search, a batch against utterance by utterance, and what CTC costs in joint search.

The same model and audio on every side, results compared before anything is timed; encoding is outside of all timings.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import milliseconds, seconds_of
from torch import Tensor

from duolect.data.sources import open_source
from duolect.data.utterance import load_audio
from duolect.models.ctc import CtcOutput, load_acoustic_model
from duolect.models.embedded import resolve
from duolect.models.speech_llm import SpeechLlm
from duolect.recognize.decoding import WRITTEN, foreign
from duolect.scorer import Hypothesis, Scorer
from duolect.search.ctc import ctc_greedy
from duolect.search.draft import Draft, greedy_with_drafts
from duolect.search.fusion import EveryLabel, Fused
from duolect.search.label import label_beam_search
from duolect.search.prefix import CtcPrefix
from duolect.search.spelled import Spelled

DEMO = Path(__file__).parents[1] / "src" / "duolect" / "embedded" / "demo" / "manifest.jsonl"


class Timed(Scorer[Any]):
    """A scorer whose calls are timed; everything else is the inner one's."""

    def __init__(self, scorer: Scorer[Any]) -> None:
        self.scorer, self.vocabulary, self.seconds = scorer, scorer.vocabulary, 0.0

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            self.seconds += time.perf_counter() - begin

    def start(self, rows: int) -> Any:
        return self._call(self.scorer.start, rows)

    def log_probs(self, state: Any, labels: Tensor | None = None) -> Tensor:
        return self._call(self.scorer.log_probs, state, labels)

    def advance(self, state: Any, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
        return self._call(self.scorer.advance, state, labels, lengths)

    def finish(self, state: Any) -> Tensor:
        return self._call(self.scorer.finish, state)

    def bound(self, state: Any) -> Tensor | None:
        return self._call(self.scorer.bound, state)

    def select(self, state: Any, rows: Tensor) -> Any:
        return self._call(self.scorer.select, state, rows)


class Heard:
    """A batch of utterances as the searches take it, encoded."""

    def __init__(self, model: SpeechLlm, acoustic: Any, audios: Sequence[np.ndarray]) -> None:
        self.model, self.acoustic, self.audios = model, acoustic, audios
        self.output: CtcOutput = acoustic.log_probs_of(audios)
        self.scorer = model.scorer(audios)
        self.limit = torch.tensor([len(x) // 1600 + 10 for x in audios])
        greedy = ctc_greedy(self.output.log_probs, self.output.lengths, vocabulary=acoustic.vocabulary)
        self.drafts = [WRITTEN[model.written].text(nbest[0].text) for nbest in greedy]

    def greedy(self) -> list[Hypothesis]:
        found = label_beam_search({"llm": Fused(scorer=self.scorer, scale=1.0)}, len(self.audios), beam=1, max_labels=self.limit)
        return [nbest[0] for nbest in found]

    def drafted(self, settings: Draft) -> list[Hypothesis]:
        return [nbest[0] for nbest in greedy_with_drafts(self.scorer, self.drafts, max_labels=self.limit, settings=settings).nbest]

    def joint(self, beam: int, *, timed: dict[str, Timed] | None = None) -> list[Hypothesis]:
        """Label-synchronous search with CTC; timed: takes the scorers, whose seconds count."""
        prefix = CtcPrefix(self.output.log_probs, self.output.lengths, vocabulary=self.acoustic.vocabulary)
        scorers: dict[str, Scorer[Any]] = {"llm": self.scorer, "ctc": prefix}
        when = EveryLabel()
        if prefix.vocabulary.digest() != self.model.vocabulary.digest():
            scorers["ctc"], when = Spelled(prefix, self.model.vocabulary, policy=WRITTEN["lower"]), EveryLabel(lookahead=False)
        if timed is not None:
            timed |= {name: Timed(x) for name, x in scorers.items()}
            scorers = dict(timed)
        fused = {"llm": Fused(scorer=scorers["llm"], scale=1.0), "ctc": Fused(scorer=scorers["ctc"], scale=1.0, when=when)}
        never = foreign(self.model.vocabulary, WRITTEN[self.model.written])
        found = label_beam_search(fused, len(self.audios), beam=beam, max_labels=self.limit, ends="apart", never=never)
        return [nbest[0] for nbest in found]


def require_equal(name: str, wanted: Sequence[Hypothesis], got: Sequence[Hypothesis]) -> None:
    """Exits where two searches that must agree do not."""
    if wrong := [i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a.labels != b.labels]:
        i = wrong[0]
        sys.exit(f"error: {name}: {len(wrong)} of {len(wanted)} differ, such as {wanted[i].text!r} and {got[i].text!r}; nothing was timed")


def compared(ways: dict[str, Callable[[], list[Hypothesis]]], *, title: str, repetitions: int, seconds: float) -> dict[str, Any]:
    """A line of the table: the ways must agree, the first is what the others are compared with."""
    results = {name: way() for name, way in ways.items()}
    first = next(iter(ways))
    for name in ways:
        require_equal(f"{title}, {name}", results[first], results[name])
    calls = {name: lambda way=way: seconds_of(way)[0] for name, way in ways.items()}
    timings = harness.interleaved(calls, repetitions=repetitions, seconds=seconds)
    row: dict[str, Any] = {"what": title, "labels": sum(len(h.labels) for h in results[first])}
    for name, found in timings.items():
        row[f"{name} ms"] = milliseconds(found.median)
    for name in list(ways)[1:]:
        row[f"x {name}"] = harness.times(timings[first], timings[name])
        row[f"x cpu {name}"] = harness.times(timings[first], timings[name], by="cpu")
    row["details"] = {name: harness.measures(t) for name, t in timings.items()}
    return row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="duolect-sllm", help="a speech LLM: its folder, or a name")
    parser.add_argument(
        "--am", default="duolect-ctc", help="CTC model whose transcript is the draft and that is the joint search's partner"
    )
    parser.add_argument("--data", type=harness.existing, default=DEMO, help="recordings")
    parser.add_argument("--utterances", type=int, default=12, help="recordings taken, spread over the data")
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 8], help="of joint search")
    parser.add_argument("--chunk", type=int, default=16, help="draft labels checked in one pass")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for every side")
    parser.add_argument("--repetitions", type=int, default=2, help="rounds over all ways")
    parser.add_argument("--seconds", type=float, default=120.0, help="no new round of a line after so long (one is always made)")
    args = parser.parse_args()
    harness.use_threads(args.threads)
    utterances = open_source(args.data).utterances
    audios = [load_audio(u) for u in utterances[:: max(len(utterances) // args.utterances, 1)][: args.utterances]]
    model, acoustic = SpeechLlm.load(resolve(args.model)), load_acoustic_model(args.am)
    batch, alone = Heard(model, acoustic, audios), [Heard(model, acoustic, [audio]) for audio in audios]
    limits: dict[str, Any] = {"repetitions": args.repetitions, "seconds": args.seconds}
    draft = Draft(args.chunk)
    rows = [
        compared(
            {"greedy": lambda: [x.greedy()[0] for x in alone], "drafted": lambda: [x.drafted(draft)[0] for x in alone]},
            title="greedy, one by one",
            **limits,
        ),
        compared({"greedy": batch.greedy, "drafted": lambda: batch.drafted(draft)}, title="greedy, batch", **limits),
    ]
    passes = greedy_with_drafts(batch.scorer, batch.drafts, max_labels=batch.limit, settings=draft)
    shares = []
    for beam in args.beams:
        ways = {"one by one": lambda: [x.joint(beam)[0] for x in alone], "batch": lambda: batch.joint(beam)}  # noqa: B023 - called at once
        rows.append(compared(ways, title=f"joint with CTC, beam {beam}", **limits))
        timed: dict[str, Timed] = {}
        batch.joint(beam, timed=timed)
        shares.append(f"beam {beam}: {timed['ctc'].seconds / timed['llm'].seconds:.1%}")
    steps = sum(len(nbest[0].labels) + 1 for nbest in passes.nbest)
    notes = [
        f"model: {args.model}; {len(audios)} recordings, {sum(map(len, audios)) / 16000:.0f} s; encoding is not timed",
        f"drafts: {passes.accepted} of {steps} labels and ends were a draft's; {passes.passes} passes of the batch, greedy "
        f"{max(len(n[0].labels) for n in passes.nbest) + 1}",
        f"time in the CTC scorer over time in the LLM, joint search of the batch: {', '.join(shares)}",
        "all ways of a line gave the same labels",
    ]
    shown = [{k: v for k, v in row.items() if k != "details"} for row in rows]
    harness.print_table(shown, title="median milliseconds for all recordings; x: times as fast; x cpu: by least processor time")
    harness.save("speech_llm", rows, settings=vars(args), notes=notes, quick=False)


if __name__ == "__main__":
    main()
