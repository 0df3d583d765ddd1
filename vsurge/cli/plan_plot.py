"""A plan's picture: what a slice gives in all against what each user gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..planning import SlicePlan


def draw_plans(path: Path, title: str, plans: Sequence[SlicePlan]) -> None:
    """Draws throughput against per-user speed as a PNG, one curve per slice and context.

    Batches that do not fit are left out; a slice with none is named in the legend all the same.

    Args:
        path: of the PNG.
        title: of the model.
        plans: what to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for plan in plans:
        contexts = sorted({step.context for step in plan.decode})
        if not any(step.fits for step in plan.decode):
            axes.plot([], [], label=f"{plan.slice.name}: does not fit")
        for context in contexts:
            steps = [step for step in plan.decode if step.context == context and step.fits]
            if not steps:
                continue
            x, y = [s.user_tokens_per_s for s in steps], [s.tokens_per_s for s in steps]
            shared = f"{plan.replicas} x tp {plan.tp}"
            axes.plot(x, y, "o-", label=f"{plan.slice.name}, {shared}: contexts of {context:,}")
            for step, at in zip(steps, zip(x, y, strict=True), strict=True):
                axes.annotate(
                    f"{step.batch * step.replicas:,}",
                    at,
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=7,
                )
    axes.set(
        yscale="log",
        xlabel="tokens/s of a user",
        ylabel="tokens/s of the slice",
        title=f"{title}, decoding, predicted; sequences beside the points",
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
