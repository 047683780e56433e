"""Delayed fusion of a causal LM every 20 frames: histories in a trie, against each history scored anew, with and without doublets.

The same search (`ctc_beam_search`), CTC outputs and model on all sides. `doubled`: at each call of the LM, every history of the beam runs
whole through the model, one padded batch, no cache; `distinct`: equal histories of an utterance run once; `trie`: duolect, which also keeps
what was computed before.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from harness import milliseconds, seconds_of
from rescoring import TOLERANCE, greatest_difference, model
from torch import Tensor

from duolect.data.sources import read_manifest
from duolect.data.utterance import load_audio
from duolect.models.ctc import load_acoustic_model
from duolect.scorer import Hypothesis, Scorer
from duolect.search.ctc import ctc_beam_search
from duolect.search.fusion import Every, Fused, Retokenized

DEMO = Path(__file__).parents[1] / "src" / "duolect" / "embedded" / "demo" / "manifest.jsonl"


@dataclass(frozen=True)
class Rows:
    """(utterance, labels so far, log p of them) of each row."""

    rows: tuple[tuple[int, tuple[int, ...], float], ...]


class WithoutCache(Scorer[Rows]):
    """log p by whole forwards of histories; `distinct`: of equal ones a single time. positions: how many went through the model."""

    def __init__(self, network: Any, lm: Any, *, distinct: bool) -> None:
        self.network, self.vocabulary, self.distinct, self.positions = network, lm.vocabulary, distinct, 0

    def start(self, rows: int) -> Rows:
        return Rows(tuple((i, (), 0.0) for i in range(rows)))

    def log_probs(self, state: Rows, labels: Tensor | None = None) -> Tensor:
        raise NotImplementedError("delayed fusion does not look ahead")

    def advance(self, state: Rows, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Rows]:
        news = [(u, (*said, *chunk[:n])) for (u, said, _), chunk, n in zip(state.rows, labels.tolist(), lengths.tolist(), strict=True)]
        moved = [i for i, n in enumerate(lengths.tolist()) if n]
        found = dict(zip(moved, self._scores([news[i] for i in moved], end=False), strict=True))
        scores = [found.get(i, state.rows[i][2]) for i in range(len(news))]
        gained = [x - old for x, (_, _, old) in zip(scores, state.rows, strict=True)]
        return torch.tensor(gained), Rows(tuple((u, y, x) for (u, y), x in zip(news, scores, strict=True)))

    def finish(self, state: Rows) -> Tensor:
        totals = self._scores([(u, y) for u, y, _ in state.rows], end=True)
        return torch.tensor([x - old for x, (_, _, old) in zip(totals, state.rows, strict=True)])

    def select(self, state: Rows, rows: Tensor) -> Rows:
        return Rows(tuple(state.rows[i] for i in rows.tolist()))

    @torch.no_grad()
    def _scores(self, histories: list[tuple[int, tuple[int, ...]]], *, end: bool) -> list[float]:
        asked = list(dict.fromkeys(histories)) if self.distinct else histories
        if not asked:
            return []
        bos, eos = self.vocabulary.bos, self.vocabulary.eos
        texts = [[*y, eos] if end else list(y) for _, y in asked]
        width = max(map(len, texts))
        ids = torch.tensor([[bos, *x[:-1], *[eos] * (width - len(x))] for x in texts])
        targets = torch.tensor([[*x, *[eos] * (width - len(x))] for x in texts])
        real = torch.arange(width)[None] < torch.tensor([len(x) for x in texts])[:, None]
        self.positions += ids.numel()
        logits = self.network(input_ids=ids, use_cache=False).logits[..., : self.vocabulary.size].float()
        found = torch.where(real, logits.gather(2, targets[..., None])[..., 0] - logits.logsumexp(-1), 0.0).sum(1).tolist()
        return [dict(zip(asked, found, strict=True))[h] for h in histories] if self.distinct else found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model: does it run, are the results equal")
    parser.add_argument("--data", type=harness.existing, default=DEMO, help="a manifest")
    parser.add_argument("--am", default="duolect-ctc", help="CTC model: name or folder")
    parser.add_argument("--model", help="folder of a causal language model; else smollm2-135m if it was pulled")
    parser.add_argument("--utterances", type=int, default=6)
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--interval", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="no new round after so long (one is always made)")
    args = parser.parse_args()
    harness.use_threads(args.threads)
    lm, what = model(args.model, quick=args.quick)
    am = load_acoustic_model(args.am)
    if lm.vocabulary.word_joint == "none" or (args.quick and args.model is None):
        from duolect.models.lm import HFCausalLM

        lm = HFCausalLM.load(Path(__file__).parents[1] / "src/duolect/embedded/unit-lm")  # small, and read by words all the same
        what = "duolect-unit-lm"
    found = sorted((u for u in read_manifest(args.data).utterances if u.seconds), key=lambda u: -(u.seconds or 0.0))
    chosen = found[:: max(1, len(found) // args.utterances)][: args.utterances]
    heard = am.log_probs_of([load_audio(u) for u in chosen])
    network = copy.deepcopy(lm.model)
    network.set_attn_implementation("sdpa")
    plain = {name: WithoutCache(network, lm, distinct=name == "distinct") for name in ("doubled", "distinct")}

    def searched(scorer: Scorer[Any]) -> list[list[Hypothesis]]:
        term = Fused(scorer=Retokenized(scorer, am.vocabulary), scale=0.4, when=Every(args.interval))
        return ctc_beam_search(heard.log_probs, heard.lengths, vocabulary=am.vocabulary, beam=args.beam, fused={"lm": term})

    ways: dict[str, Callable[[], list[list[Hypothesis]]]] = {n: lambda s=s: searched(s) for n, s in {**plain, "trie": lm}.items()}
    results = {name: way() for name, way in ways.items()}
    positions = {name: scorer.positions for name, scorer in plain.items()}
    texts = {name: [[h.text for h in nbest] for nbest in lists] for name, lists in results.items()}
    parts = {name: [[h.parts["lm"] for h in nbest] for nbest in lists] for name, lists in results.items()}
    worst = max(greatest_difference(parts["doubled"], parts[name]) for name in parts)
    if any(t != texts["doubled"] for t in texts.values()) or worst > TOLERANCE:
        sys.exit(f"error: results differ ({worst:.2g}); nothing was timed")
    calls = {name: lambda way=way: seconds_of(way)[0] for name, way in ways.items()}
    timings = harness.interleaved(calls, repetitions=args.repetitions, seconds=args.seconds)
    row: dict[str, Any] = {"utterances": len(chosen), "beam": args.beam, "interval": args.interval}
    row |= {f"{name} positions": count for name, count in positions.items()}
    row |= {f"{name} ms": milliseconds(t.median / len(chosen)) for name, t in timings.items()}
    for name in ("distinct", "trie"):
        row[f"x {name}"] = harness.times(timings["doubled"], timings[name])
        row[f"x cpu {name}"] = harness.times(timings["doubled"], timings[name], by="cpu")
    notes = [f"model: {what}, fp32; {args.am}; n-best texts equal, parts within {worst:.1e}", "positions: padded, through the model"]
    harness.print_table([row], title="median milliseconds per utterance of one-pass delayed fusion; x: times as fast as doubled")
    row["details"] = {name: harness.measures(t) for name, t in timings.items()}
    settings = {**vars(args), "data": args.data.name, "model": what}
    harness.save("delayed", [row], settings=settings, notes=notes, quick=args.quick)


if __name__ == "__main__":
    main()
