"""64-best rescoring: a trie of histories (`rescored` with HFCausalLM) against one plain padded batch per utterance, the same model.

Plain: bos + labels of all hypotheses of a list as one padded batch, a full forward without a cache, fp32 log-softmax over the whole
vocabulary, the labels' and eos' entries summed: what most toolkits do.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Timing, milliseconds, seconds_of
from synthetic import MadeUp, nbest_list, sentence

from duolect.models.embedded import where
from duolect.models.lm import HFCausalLM
from duolect.scorer import Hypothesis, read_hypotheses
from duolect.search.rescore import LabelsOf, labels_of_text, rescored

TOLERANCE = 1e-3
"""Greatest difference of a hypothesis' log p, relative to max(1, |log p| / 100): fp32 over 30 layers and another order of sums."""

Lists = Sequence[Sequence[Hypothesis]]


def model(name: str | None, *, quick: bool) -> tuple[HFCausalLM, str]:
    """(the scorer, what it is)."""
    folder = Path(name) if name else where("smollm2-135m")
    if folder is not None and not (quick and name is None):
        lm = HFCausalLM.load(folder)
        return lm, f"{folder.name}, fp32"
    from transformers import LlamaConfig, LlamaForCausalLM

    size, width, inner, layers, heads = (512, 96, 192, 2, 3) if quick else (49152, 576, 1536, 30, 9)
    torch.manual_seed(1)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    )
    reason = "" if quick else "; smollm2-135m is not here (duolect models pull smollm2-135m)"
    about = f"a random Llama of {sum(p.numel() for p in llama.parameters()) / 1e6:.3g} M parameters{reason}"
    return HFCausalLM(llama, MadeUp([f"▁{i}" for i in range(size)], blank=None)), about


def lists(path: Path | None, *, utterances: int, size: int, quick: bool) -> tuple[list[list[Hypothesis]], str]:
    """(n-best lists of at most `size`, where they are from)."""
    if path is not None:
        found = [list(line.nbest[:size]) for line in read_hypotheses(path) if len(line.nbest) > 1]
        if not found:
            sys.exit(f"error: {path} has no line with an n-best list: decode with a beam of {size}")
        step = max(len(found) // utterances, 1)
        return found[::step][:utterances], path.name
    longest = 8 if quick else 28
    made = [nbest_list(words=longest - b % 3 * longest // 4, size=size, doubtful=8, seed=b) for b in range(utterances)]
    return made, "made up: eight doubtful places, late rather than early, the likeliest combinations"


@torch.no_grad()
def plain(network: Any, lm: HFCausalLM, nbest: Lists, labels: LabelsOf) -> list[list[float]]:
    """log p(labels eos) of each hypothesis, by one padded batch per list through `network`, the model as transformers runs it."""
    vocabulary = lm.vocabulary
    prompt = [vocabulary.bos, *(vocabulary.encode(lm.prompt) if lm.prompt else [])]
    out = []
    for hypotheses in nbest:
        chunks = [list(labels(h)) for h in hypotheses]
        lengths = torch.tensor([len(c) for c in chunks])
        width = int(lengths.max()) + 1
        ids = torch.tensor([[*prompt, *c, *[vocabulary.eos] * (width - 1 - len(c))] for c in chunks])
        targets = torch.tensor([[*c, *[vocabulary.eos] * (width - len(c))] for c in chunks])
        real = torch.arange(width)[None] <= lengths[:, None]
        seen = torch.nn.functional.pad(real.long(), (len(prompt) - 1, 0), value=1)
        logits = network(input_ids=ids, attention_mask=seen, use_cache=False, logits_to_keep=width).logits[..., : vocabulary.size]
        log_probs = logits.float().log_softmax(-1).gather(2, targets[..., None])[..., 0]
        out.append(torch.where(real, log_probs, 0.0).sum(1).tolist())
    return out


def one_by_one(lm: HFCausalLM, nbest: Lists, labels: LabelsOf) -> list[list[float]]:
    """The same numbers by `rescored`, each utterance alone."""
    return [scores for hypotheses in nbest for scores in together(lm, [hypotheses], labels)]


def together(lm: HFCausalLM, nbest: Lists, labels: LabelsOf) -> list[list[float]]:
    """The same numbers by `rescored`, all utterances at once."""
    return [[h.parts["lm"] for h in hypotheses] for hypotheses in rescored(nbest, name="lm", scorer=lm, labels=labels)]


def shapes(nbest: Lists, labels: LabelsOf, *, prompt: int) -> dict[str, Any]:
    """How much the hypotheses share. Positions: what has to go through the model, bos and prompt included."""
    padded = real = distinct = 0
    for hypotheses in nbest:
        chunks = [tuple(labels(h)) for h in hypotheses]
        padded += len(chunks) * (prompt + max(map(len, chunks)) + 1)
        real += sum(prompt + len(c) + 1 for c in chunks)
        distinct += prompt + len({c[:n] for c in chunks for n in range(len(c) + 1)})
    return {
        "lists": len(nbest),
        "hypotheses": sum(map(len, nbest)),
        "prompt": prompt,
        "positions": padded,
        "real": real,
        "distinct": distinct,
        "unique ratio": round(distinct / real, 4),
        "x at best": round(padded / distinct, 2),
    }


def greatest_difference(wanted: list[list[float]], got: list[list[float]]) -> float:
    """Greatest difference, relative where |log p| > 100."""
    a, b = (torch.tensor([x for row in scores for x in row], dtype=torch.double) for scores in (wanted, got))
    return float(((a - b).abs() / (a.abs() / 100).clamp(min=1)).max())


def compared(
    network: Any, lm: HFCausalLM, nbest: Lists, labels: LabelsOf, *, repetitions: int, seconds: float
) -> tuple[dict[str, Timing], dict[str, float]]:
    """(timings, differences to plain). Raises SystemExit where results differ."""
    ways: dict[str, Callable[[], list[list[float]]]] = {
        "plain": lambda: plain(network, lm, nbest, labels),
        "one by one": lambda: one_by_one(lm, nbest, labels),
        "together": lambda: together(lm, nbest, labels),
    }
    results = {name: way() for name, way in ways.items()}
    differences = {name: greatest_difference(results["plain"], found) for name, found in results.items()}
    if wrong := {name: d for name, d in differences.items() if not d <= TOLERANCE}:
        sys.exit(f"error: results differ from plain: {wrong}; nothing was timed")
    calls = {name: lambda way=way: seconds_of(way)[0] for name, way in ways.items()}
    return harness.interleaved(calls, repetitions=repetitions, seconds=seconds), differences


def measured(network: Any, lm: HFCausalLM, nbest: Lists, *, prompt: str, source: str, repetitions: int, seconds: float) -> dict[str, Any]:
    """One line of the table."""
    lm.prompt = prompt
    labels = labels_of_text(lm.vocabulary)
    timings, differences = compared(network, lm, nbest, labels, repetitions=repetitions, seconds=seconds)
    row: dict[str, Any] = {"input": source, **shapes(nbest, labels, prompt=len(lm.vocabulary.encode(prompt)) if prompt else 0)}
    for way, found in timings.items():
        row[f"{way} ms"] = milliseconds(found.median / len(nbest))
    for way in ("one by one", "together"):
        row[f"x {way}"] = harness.times(timings["plain"], timings[way])
        row[f"x cpu {way}"] = harness.times(timings["plain"], timings[way], by="cpu")
    row["details"] = {way: {**harness.measures(t), "max_difference": differences[way]} for way, t in timings.items()}
    return row


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model and short lists: does it run, are the results equal")
    parser.add_argument("--hypotheses", type=harness.existing, help="a hypotheses file of duolect with n-best lists; else made up")
    parser.add_argument("--model", help="folder of a causal language model; else smollm2-135m if it was pulled")
    parser.add_argument("--utterances", type=int, default=6, help="lists taken from the file (spread over it) or made up")
    parser.add_argument("--size", type=int, default=64, help="hypotheses of a list at most")
    parser.add_argument("--context", type=int, default=40, help="words of context in front, in the second line of the table")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for every side")
    parser.add_argument("--repetitions", type=int, default=2, help="rounds over all ways")
    parser.add_argument("--seconds", type=float, default=120.0, help="no new round of a line after so long (one is always made)")
    args = parser.parse_args()
    harness.use_threads(args.threads)
    lm, what = model(args.model, quick=args.quick)
    count, size = (2, 16) if args.quick else (args.utterances, args.size)
    nbest, source = lists(args.hypotheses, utterances=count, size=size, quick=args.quick)
    network = copy.deepcopy(lm.model)
    network.set_attn_implementation("sdpa")  # ours runs the model with an attention of its own
    name = "made up" if args.hypotheses is None else args.hypotheses.name
    rows = []
    for words in (0, args.context):
        print(f"{what}; {source}; {words} words of context ...", file=sys.stderr, flush=True)
        context = sentence(words, seed=1)
        rows.append(measured(network, lm, nbest, prompt=context, source=name, repetitions=args.repetitions, seconds=args.seconds))
    worst = max(d["max_difference"] for row in rows for d in row["details"].values())
    notes = [
        f"model: {what}",
        f"lists: {source}",
        f"every hypothesis' log p is plain's within {worst:.1e} (per 100 nat where it is below -100)",
        "positions: as plain pads them; real: without padding; distinct: nodes of the trie; unique ratio: distinct / real; "
        "x at best: positions / distinct, what sharing alone can give if every position costs the same",
    ]
    if args.hypotheses is not None:
        lm.prompt, everything = "", lists(args.hypotheses, utterances=10**9, size=100, quick=False)[0]
        labels = labels_of_text(lm.vocabulary)
        ratios = {n: shapes([x[:n] for x in everything], labels, prompt=0)["unique ratio"] for n in (10, 50, 100)}
        notes.append(f"unique ratio of all {len(everything)} lists: " + ", ".join(f"{x} at N = {n}" for n, x in ratios.items()))
    shown = [{k: v for k, v in row.items() if k != "details"} for row in rows]
    harness.print_table(
        shown,
        title="median milliseconds per utterance of rescoring n-best lists; x: times as fast as plain; x cpu: by least processor time",
    )
    harness.save("rescoring", rows, settings=vars(args), notes=notes, quick=args.quick)


if __name__ == "__main__":
    main()
