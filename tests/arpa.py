"""A small backoff n-gram with absolute discounting, written as ARPA: what lmplz would give, for tests (KenLM's package has no lmplz)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

DISCOUNT = 0.4


def write_arpa(path: Path, sentences: Iterable[Sequence[str]], *, order: int = 3, unknown: bool = True) -> Path:
    """The file at `path`, an n-gram of that order over the sentences' words."""
    counts = [Counter[tuple[str, ...]]() for _ in range(order)]
    for words in (["<s>", *s, "</s>"] for s in sentences):
        for n in range(order):
            counts[n].update(tuple(words[i : i + n + 1]) for i in range(len(words) - n) if n or words[i] != "<s>")
    total = sum(counts[0].values())
    share = DISCOUNT * len(counts[0]) / total / (len(counts[0]) + 1)  # what discounting frees, for all words and <unk> alike
    p = {g: (c - DISCOUNT) / total + share for g, c in counts[0].items()} | ({("<unk>",): share} if unknown else {})
    backoff = dict[tuple[str, ...], float]()
    for level in counts[1:]:
        histories, kinds = Counter[tuple[str, ...]](), Counter(g[:-1] for g in level)
        for g, c in level.items():
            histories[g[:-1]] += c
        backoff |= {h: DISCOUNT * kinds[h] / n for h, n in histories.items()}
        p |= {g: (c - DISCOUNT) / histories[g[:-1]] + backoff[g[:-1]] * p[g[1:]] for g, c in level.items()}  # interpolated
    p[("<s>",)] = 1e-99
    lines = ["\\data\\", *(f"ngram {n}={sum(len(g) == n for g in p)}" for n in range(1, order + 1))]
    for n in range(1, order + 1):
        lines += ["", f"\\{n}-grams:"]
        for g in (g for g in p if len(g) == n):
            lines.append(f"{math.log10(p[g]):.6f}\t{' '.join(g)}" + (f"\t{math.log10(backoff[g]):.6f}" if backoff.get(g, 0) > 0 else ""))
    path.write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")
    return path
