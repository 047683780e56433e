"""Pictures of numbers, to PNG. matplotlib is imported only here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from duolect.evaluate.tune import Tuned


def wer_surface(tuned: Tuned, *, path: str | Path) -> None:
    """Writes the WER over one scale (a curve) or over the first two (contours, the best of the others), to PNG.

    Marked: the optimum with the 95% interval of each scale, and the region of scales whose WER is not significantly worse.
    """
    figure = figure_class()(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    probes, names = tuned.probes, tuned.probes.names[:2]
    at = [tuned.scales[name] for name in names]
    spans = [tuned.scale_intervals[name] for name in names]
    # Where the WER is flat, the middle of a flat stretch may lie outside of the interval of the points tried: the bar then ends in it.
    reach = [[[max(0.0, x - s.low)], [max(0.0, s.high - x)]] if s else None for x, s in zip(at, spans, strict=True)]
    style = {"fmt": "o", "color": "#b3331d", "capsize": 4, "label": f"best: {', '.join(f'{x:.3f}' for x in at)}; 95% interval of each"}
    corpus = f" on {tuned.corpus}" if tuned.corpus else ""
    # The picture shows what the best choice of all further scales gives.
    points, inverse = np.unique(probes.scales[:, : len(names)].round(9), axis=0, return_inverse=True)
    wer, good = np.full(len(points), np.inf), np.zeros(len(points))
    np.minimum.at(wer, inverse.ravel(), probes.wer)
    np.maximum.at(good, inverse.ravel(), probes.as_good)
    if len(names) == 1:
        axes.fill_between(
            points[:, 0], 0, 1, where=good > 0, transform=axes.get_xaxis_transform(), color="#dce9f5", label="not significantly worse (95%)"
        )
        axes.plot(points[:, 0], wer, color="#1f5a99")
        axes.errorbar(at, [tuned.wer], xerr=reach[0], **style)
        axes.set(xlabel=f"scale of {names[0]}", ylabel="WER, %")
    else:
        spread = float(np.quantile(wer, 0.9)) - float(wer.min())
        levels = float(wer.min()) + np.linspace(0, max(spread, 0.05), 16)
        filled = axes.tricontourf(points[:, 0], points[:, 1], wer, levels=levels, cmap="viridis_r", extend="max")
        figure.colorbar(filled, label="WER, %", format="%.2f")
        if 0 < good.sum() < len(good):
            worse = {"levels": [-0.5, 0.5], "colors": ["#ffffff90"], "hatches": ["////"]}
            axes.tricontourf(points[:, 0], points[:, 1], good, **worse)
            axes.tricontour(points[:, 0], points[:, 1], good, levels=[0.5], colors="black", linewidths=1)
            axes.fill_between([], [], [], facecolor="#ffffff", edgecolor="black", hatch="////", label="significantly worse (95%)")
        axes.errorbar(at[:1], at[1:], xerr=reach[0], yerr=reach[1], **style)
        axes.set(xlabel=f"scale of {names[0]}", ylabel=f"scale of {names[1]}")
    further = "".join(f", best {name} at each point" for name in probes.names[2:])
    axes.set_title(f"WER {tuned.wer:.2f}%{corpus}, {tuned.utterances} utterances{further}", fontsize=10, parse_math=False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class AttentionAxes:
    """What stands along attention maps [Q, K].

    kinds, keys: [K] prompt, audio or text, and names; seconds: [K] of audio, nan elsewhere. rows: [Q] names. words: where an alignment puts
    them, as boxes of rows and keys (first row, row behind, first key, key behind).
    """

    kinds: Sequence[str]
    keys: Sequence[str]
    seconds: Sequence[float]
    rows: Sequence[str]
    words: Sequence[tuple[int, int, int, int]]

    @property
    def boxed(self) -> np.ndarray:
        """bool [Q, K]: what lies in a box."""
        inside = np.zeros((len(self.rows), len(self.keys)), dtype=bool)
        for top, bottom, left, right in self.words:
            inside[top:bottom, left:right] = True
        return inside


def attention_panels(maps: Mapping[str, np.ndarray], *, axes: AttentionAxes, title: str, path: str | Path) -> None:
    """Writes attention maps [Q, K], side by side by their titles, the aligned words boxed."""
    figure_of = figure_class()
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    columns = min(3, len(maps))
    lines = -(-len(maps) // columns)
    wide, high = float(np.clip(0.06 * len(axes.keys), 3.6, 7.5)), float(np.clip(0.14 * len(axes.rows), 2.2, 18.0))
    figure = figure_of(figsize=(1.8 + columns * wide, 0.9 + lines * (high + 0.9)), layout="constrained")
    figure.suptitle(fill(title, int(12 * figure.get_figwidth())), fontsize=9, parse_math=False)
    panels = [figure.add_subplot(lines, columns, i + 1) for i in range(len(maps))]
    # Most weights are small: by their square roots, a tenth is still seen beside a one.
    norm = PowerNorm(0.5, 0.0, 1.0)
    for panel, (name, weights) in zip(panels, maps.items(), strict=True):
        image = panel.imshow(weights, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
        for top, bottom, left, right in axes.words:
            box = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor="#b3331d", linewidth=0.8)
            panel.add_patch(box)
        _ticks(panel, axes, wide=wide, high=high)
        panel.set_title(name, fontsize=9, pad=_regions(panel, axes.kinds, wide=wide))
    bar = figure.colorbar(image, ax=panels, label="attention weight", ticks=[0, 0.02, 0.1, 0.25, 0.5, 1.0], fraction=0.05, aspect=30)
    bar.ax.tick_params(labelsize=7)
    if axes.words:
        figure.legend([box], ["the word in the CTC alignment"], loc="outside lower left", fontsize=8, frameon=False)
    figure.supxlabel("keys: audio in seconds, text by label", fontsize=9)
    figure.supylabel("queries, by the label they predict", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # pieces of letters, and letters that the font lacks, become boxes
        figure.savefig(path, dpi=150)


def _ticks(panel: Any, axes: AttentionAxes, *, wide: float, high: float) -> None:
    """Labels as many ticks as a panel of so many inches has room for."""
    step = -(-len(axes.rows) * 0.12 // high)
    shown = range(0, len(axes.rows), int(step))
    panel.set_yticks(shown, [axes.rows[i] for i in shown], fontsize=7, parse_math=False)
    seconds = np.array(axes.seconds)
    heard, written = np.flatnonzero(np.isfinite(seconds)), np.flatnonzero(np.isnan(seconds))
    first, last, per_inch = float(seconds[heard[0]]), float(seconds[heard[-1]]), len(axes.keys) / wide
    every = next((s for s in (0.1, 0.2, 0.5, 1.0, 2.0) if (last - first) / s <= len(heard) / per_inch / 0.25), 5.0)
    times = np.arange(np.ceil(first / every), last / every + 1e-6) * every
    names = [(i, axes.keys[i]) for i in written[:: int(np.ceil(0.11 * per_inch))].tolist()]
    ticks = [*zip(np.interp(times, seconds[heard], heard), (f"{t:g}" for t in times.round(3)), strict=True), *names]
    panel.set_xticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7, parse_math=False)
    for label in panel.get_xticklabels()[len(times) :]:
        label.set_rotation(90)


def _regions(panel: Any, kinds: Sequence[str], *, wide: float) -> float:
    """Parts and names the stretches of keys of one kind; how many points above the panel the names need."""
    begin, need = 0, 16.0
    for kind, run in groupby(kinds):
        size = len(list(run))
        if begin:
            panel.axvline(begin - 0.5, color="#555555", linewidth=0.8)
        upright = wide * size / len(kinds) < 0.08 * len(kind)
        need = max(need, 42.0 if upright else 0.0)
        place = {"xycoords": panel.get_xaxis_transform(), "xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        panel.annotate(kind, (begin + (size - 1) / 2, 1.0), fontsize=8, color="#555555", rotation=90 if upright else 0, **place)
        begin += size
    return need


def figure_class() -> Any:
    """matplotlib's Figure. RuntimeError where there is none; asked before long work, it saves that work."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("matplotlib is missing: pip install 'duolect[plots]'") from error
    return Figure
