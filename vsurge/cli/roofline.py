"""A roofline of what `vsurge tune` found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..kernels.tuning.chips import find_chip

if TYPE_CHECKING:
    from .tune import Found


def draw_roofline(path: Path, chip: str, title: str, found: Sequence[Found]) -> None:
    """Draws what each winner reaches on equal lengths under the limits of one core, as a PNG.

    Args:
        path: of the PNG.
        chip: one of `CHIPS`.
        title: of the model.
        found: searches, their trials and their winners.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .tune import winner

    known = find_chip(chip)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    intensity = np.geomspace(1, 10_000, 200)
    axes.plot(intensity, np.minimum(known.tflops, intensity * known.gbytes_per_s / 1e3), color="black")
    for search, trials, entries in found:
        best = [winner(trials, entry) for entry in entries]
        points = [trial.predicted[at][0] for at, trial in enumerate(best)]
        times_us = [trial.equal_lengths_us(at) for at, trial in enumerate(best)]
        flops = [point.call.useful_flops(point.batch) for point in points]
        bytes_moved = [point.call.useful_bytes(point.batch) for point in points]
        x = [operations / size for operations, size in zip(flops, bytes_moved, strict=True)]
        y = [operations / time_us / 1e6 for operations, time_us in zip(flops, times_us, strict=True)]
        contexts = ", ".join(map(str, search.contexts))
        by = entries[0].provenance["by"]
        axes.plot(x, y, "o", label=f"{search.call.kernel}, {by}: contexts of {contexts}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte of keys and values",
        ylabel="TFLOP/s (of pairs that are not masked)",
        title=f"{title} on one core of {chip}: {known.gbytes_per_s:g} GB/s, {known.tflops:g} TFLOP/s",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
