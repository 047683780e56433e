"""Pictures of numbers, to PNG. matplotlib is imported only here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duolect.evaluate.tune import Probes


class PlotError(RuntimeError):
    """A picture cannot be drawn."""


def wer_surface(probes: Probes, *, best: Mapping[str, float], path: str | Path) -> None:
    """Writes the WER over one scale (a curve) or over the first two (contours, the best of the others), the optimum marked."""
    figure_class = _figure()
    figure = figure_class(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    at = [best[name] for name in probes.names]
    if len(probes.names) == 1:
        order = np.argsort(probes.scales[:, 0])
        axes.plot(probes.scales[order, 0], probes.wer[order], color="#1f5a99")
        axes.plot([at[0]], [float(probes.wer.min())], "o", color="#b3331d", label=f"best: {at[0]:.3f}")
        axes.set(xlabel=f"scale of {probes.names[0]}", ylabel="WER, %")
    else:
        # The plane shows what the best choice of all further scales gives.
        points, inverse = np.unique(probes.scales[:, :2].round(9), axis=0, return_inverse=True)
        wer = np.full(len(points), np.inf)
        np.minimum.at(wer, inverse.ravel(), probes.wer)
        spread = float(np.quantile(wer, 0.6)) - float(wer.min())
        levels = float(wer.min()) + np.linspace(0, max(spread, 0.05), 16)
        filled = axes.tricontourf(points[:, 0], points[:, 1], wer, levels=levels, cmap="viridis_r", extend="max")
        figure.colorbar(filled, label="WER, %", format="%.2f")
        axes.plot([at[0]], [at[1]], "o", color="#b3331d", label=f"best: {at[0]:.3f}, {at[1]:.3f}")
        axes.set(xlabel=f"scale of {probes.names[0]}", ylabel=f"scale of {probes.names[1]}")
    axes.legend(loc="best")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("matplotlib is missing: pip install 'duolect[plots]'") from error
    return Figure
