"""64-best rescoring: a trie of histories (`rescored` with HFCausalLM) against one plain padded batch per utterance, the same model.

Plain: bos + labels of all hypotheses of a list as one padded batch, a full forward without a cache, fp32 log-softmax over the whole
vocabulary, the labels' and eos' entries summed: what most toolkits do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Timing, milliseconds, seconds_of
from synthetic import MadeUp, nbest_list

from duolect.models.embedded import where
from duolect.models.lm import HFCausalLM
from duolect.scorer import Hypothesis, read_hypotheses
from duolect.search.rescore import LabelsOf, labels_of_text, rescored

TOLERANCE = 1e-3
"""Greatest difference of a hypothesis' log p, relative to max(1, |log p| / 100): fp32 over 30 layers and another order of sums."""

Lists = Sequence[Sequence[Hypothesis]]


def model(name: str | None, *, quick: bool) -> tuple[HFCausalLM, LabelsOf, str]:
    """(the scorer, how texts become its labels, what it is)."""
    folder = Path(name) if name else where("smollm2-135m")
    if folder is not None and not (quick and name is None):
        lm = HFCausalLM.load(folder)
        return lm, labels_of_text(lm.vocabulary), f"{folder.name}, fp32"
    from transformers import LlamaConfig, LlamaForCausalLM

    size = 512 if quick else 49152
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2) if quick else dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    torch.manual_seed(1)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=size, max_position_embeddings=2048, tie_word_embeddings=True, **shape))
    vocabulary = MadeUp([f"▁{i}" for i in range(size)], blank=None)

    def labels(hypothesis: Hypothesis) -> list[int]:
        # About 1.3 labels a word, as a tokenizer of this size gives: one for a short word, two for a longer one.
        out: list[int] = []
        for word in hypothesis.text.split():
            seed = sum(ord(c) * 31**i for i, c in enumerate(word))
            out += [1 + seed % (size - 1)] + ([1 + seed * 7 % (size - 1)] if len(word) > 6 else [])
        return out

    reason = "" if quick else "; smollm2-135m is not here (duolect models pull smollm2-135m)"
    return HFCausalLM(llama, vocabulary), labels, f"a random Llama of {sum(p.numel() for p in llama.parameters()) / 1e6:.0f} M{reason}"


def lists(path: Path | None, *, utterances: int, size: int, quick: bool) -> tuple[list[list[Hypothesis]], str]:
    """(n-best lists of at most `size`, where they are from)."""
    if path is not None:
        found = [list(line.nbest[:size]) for line in read_hypotheses(path) if len(line.nbest) > 1]
        if not found:
            sys.exit(f"error: {path} has no line with an n-best list: decode with a beam of {size}")
        step = max(len(found) // utterances, 1)
        return found[::step][:utterances], str(path)
    longest = 8 if quick else 26
    made = [nbest_list(words=longest - b % 3 * longest // 4, size=size, doubtful=6, seed=b) for b in range(utterances)]
    return made, "made up: six doubtful places in a sentence, the likeliest combinations"


@torch.no_grad()
def plain(lm: HFCausalLM, nbest: Lists, labels: LabelsOf) -> list[list[float]]:
    """log p(labels eos) of each hypothesis, by one padded batch per list."""
    vocabulary, network = lm.vocabulary, lm.model
    out = []
    for hypotheses in nbest:
        chunks = [list(labels(h)) for h in hypotheses]
        lengths = torch.tensor([len(c) for c in chunks])
        width = int(lengths.max()) + 1
        ids = torch.tensor([[vocabulary.bos, *c, *[vocabulary.eos] * (width - 1 - len(c))] for c in chunks])
        targets = torch.tensor([[*c, *[vocabulary.eos] * (width - len(c))] for c in chunks])
        real = torch.arange(width)[None] <= lengths[:, None]
        logits = network(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[..., : vocabulary.size]
        log_probs = logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
        out.append(torch.where(real, log_probs, 0.0).sum(1).tolist())
    return out


def one_by_one(lm: HFCausalLM, nbest: Lists, labels: LabelsOf) -> list[list[float]]:
    """The same numbers by `rescored`, each utterance alone."""
    return [scores for hypotheses in nbest for scores in together(lm, [hypotheses], labels)]


def together(lm: HFCausalLM, nbest: Lists, labels: LabelsOf) -> list[list[float]]:
    """The same numbers by `rescored`, all utterances at once."""
    return [[h.parts["lm"] for h in hypotheses] for hypotheses in rescored(nbest, name="lm", scorer=lm, labels=labels)]


def shapes(nbest: Lists, labels: LabelsOf) -> dict[str, Any]:
    """How much the hypotheses share. Positions: what has to go through the model, bos included."""
    padded = real = distinct = 0
    for hypotheses in nbest:
        chunks = [tuple(labels(h)) for h in hypotheses]
        padded += len(chunks) * (max(map(len, chunks)) + 1)
        real += sum(len(c) + 1 for c in chunks)
        distinct += len({c[:n] for c in chunks for n in range(len(c) + 1)})
    return {"lists": len(nbest), "hypotheses": sum(map(len, nbest)), "positions padded": padded, "positions": real, "distinct": distinct,
            "unique ratio": round(distinct / real, 4), "x at best": round(padded / distinct, 2)}


def greatest_difference(wanted: list[list[float]], got: list[list[float]]) -> float:
    """Greatest difference, relative where |log p| > 100."""
    a, b = (torch.tensor([x for row in scores for x in row], dtype=torch.double) for scores in (wanted, got))
    return float(((a - b).abs() / (a.abs() / 100).clamp(min=1)).max())


def compared(lm: HFCausalLM, nbest: Lists, labels: LabelsOf, *, repetitions: int, seconds: float) -> tuple[dict[str, Timing], dict[str, float]]:
    """(timings, differences to plain). Raises SystemExit where results differ."""
    ways: dict[str, Callable[[HFCausalLM, Lists, LabelsOf], list[list[float]]]] = {"plain": plain, "one by one": one_by_one, "together": together}
    results = {name: way(lm, nbest, labels) for name, way in ways.items()}
    differences = {name: greatest_difference(results["plain"], found) for name, found in results.items()}
    if wrong := {name: d for name, d in differences.items() if not d <= TOLERANCE}:
        sys.exit(f"error: results differ from plain: {wrong}; nothing was timed")
    calls = {name: lambda way=way: seconds_of(lambda: way(lm, nbest, labels))[0] for name, way in ways.items()}
    return harness.interleaved(calls, repetitions=repetitions, seconds=seconds), differences


def _row(name: str, nbest: Lists, labels: LabelsOf, timings: dict[str, Timing], differences: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"input": name, **shapes(nbest, labels)}
    for way, found in timings.items():
        row[f"{way} ms"] = milliseconds(found.median / len(nbest))
    for way in ("one by one", "together"):
        row[f"x {way}"] = harness.times(timings["plain"], timings[way])
    row["details"] = {way: {"median_ms": milliseconds(t.median), "min_ms": milliseconds(t.least), "count": t.count,
                            "max_difference": differences[way]} for way, t in timings.items()}
    return row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model and short lists: does it run, are the results equal")
    parser.add_argument("--hypotheses", type=Path, help="a hypotheses file of duolect with n-best lists (decode with beam 64); else made up")
    parser.add_argument("--model", help="folder of a causal language model; else smollm2-135m if it was pulled")
    parser.add_argument("--utterances", type=int, default=8, help="lists taken from the file (spread over it) or made up")
    parser.add_argument("--size", type=int, default=64, help="hypotheses of a list at most")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for every side")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds over all ways")
    parser.add_argument("--seconds", type=float, default=240.0, help="no new round after so long (one is always made)")
    args = parser.parse_args()
    harness.use_threads(args.threads)
    lm, labels, what = model(args.model, quick=args.quick)
    nbest, source = lists(args.hypotheses, utterances=2 if args.quick else args.utterances, size=16 if args.quick else args.size, quick=args.quick)
    print(f"{what}; {source} ...", file=sys.stderr, flush=True)
    timings, differences = compared(lm, nbest, labels, repetitions=2 if args.quick else args.repetitions, seconds=args.seconds)
    rows = [_row("made up" if args.hypotheses is None else args.hypotheses.name, nbest, labels, timings, differences)]
    notes = [f"model: {what}", f"lists: {source}",
             f"every hypothesis' log p is plain's within {max(differences.values()):.1e} (per 100 nat where it is below -100)",
             "`x at best` is padded positions / distinct ones: what sharing alone can give if every position costs the same"]
    shown = [{k: v for k, v in row.items() if k != "details"} for row in rows]
    harness.print_table(shown, title="median milliseconds per utterance of rescoring n-best lists; x: times as fast as plain")
    harness.save("rescoring", rows, settings=vars(args), notes=notes, quick=args.quick)


if __name__ == "__main__":
    main()
