"""Reports as Markdown tables and pictures; nothing is in a table that was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .record import Ceilings, LoadRow, Report, Row, percentiles

NOT_MEASURED = "not measured"
Table = list[list[str]]


def markdown(report: Report) -> str:
    """All tables of a report, and what they were measured on."""
    parts = [f"## {title(report)}", *(f"- {line}" for line in described(report))]
    for suite, heading in (("kernels", "Kernels"), ("steps", "Steps"), ("engine", "Engine")):
        rows = [row for row in report.rows if row.suite == suite]
        if rows:
            parts += ["", f"### {heading}", "", *table(row_table(rows, report.ceilings))]
    if report.loads:
        parts += ["", "### Load", "", *table(load_table(report.loads, report.ceilings))]
    return "\n".join(parts) + "\n"


def title(report: Report) -> str:
    machine = report.machine
    return str(machine.get("accelerator") or f"{machine['processor']}, {machine['cores']} cores")


def described(report: Report) -> list[str]:
    """The machine, the versions and the denominators, in lines."""
    machine, ceilings = report.machine, report.ceilings
    versions = [f"{name} {version}" for name, version in machine["versions"].items() if version]
    driver = [f"driver {machine['driver']}"] if machine.get("driver") else []
    took = ", ".join(f"{part} {seconds:,.0f} s" for part, seconds in report.took_s.items())
    both = ""
    if ceilings.read_gb_s is not None and ceilings.copy_gb_s is not None:
        share = ceilings.bandwidth_gb_s / ceilings.copy_gb_s
        both = (
            f" (read {ceilings.read_gb_s:,.1f}, copied {ceilings.copy_gb_s:,.1f}: a share of the copy's "
            f"bandwidth is MBU times {share:.3f})"
        )
    lines = [
        f"commit {machine['commit']}; Python {machine['python']}, {', '.join([*versions, *driver])}",
        f"measured in the same run: {ceilings.bandwidth_gb_s:,.1f} GB/s of memory{both}, "
        f"{ceilings.matrix_gflop_s:,.0f} GFLOP/s of a bfloat16 product; MBU and MFU are shares of these, the "
        "roofline is what they allow",
    ]
    if took:
        lines.append(f"the run took {sum(report.took_s.values()):,.0f} s: {took}")
    return lines if report.model is None else [report.model, *lines]


def row_table(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    """Rows of a suite; medians."""
    keys = list(dict.fromkeys(key for row in rows for key in row.case))
    has_tokens = any(row.suite != "kernels" for row in rows)
    rate = ["tokens/s"] if has_tokens else []
    cells = [["what", "whose", *keys, "ms", *rate, "MBU", "MFU", "of roofline"]]
    for row in rows:
        case = [str(row.case.get(key, "")) for key in keys]
        if row.not_measured is not None:
            blank = [""] * (len(rate) + 2)
            cells.append([row.name, row.implementation, *case, NOT_MEASURED, *blank, row.not_measured])
            continue
        tokens = [f"{row.tokens / row.median_s:,.1f}"] if has_tokens else []
        shares = row.mbu(ceilings), row.mfu(ceilings), row.share_of_roofline(ceilings)
        time = _number(1e3 * row.median_s, 4)
        cells.append(
            [row.name, row.implementation, *case, time, *tokens, *(f"{share:.1%}" for share in shares)]
        )
    return cells


def load_table(loads: Sequence[LoadRow], ceilings: Ceilings) -> Table:
    """p50 / p90 / p99 of every time."""
    head = ["requests/s", "requests", "output tokens/s", "TTFT, ms", "between tokens, ms", "end to end, s",
            "MBU", "tokens a step", "device idle at most"]  # fmt: skip
    cells = [head]
    for load in loads:
        mbu = load.num_bytes / load.seconds / (ceilings.bandwidth_gb_s * 1e9)
        arrival = "all at once" if load.requests_per_s is None else _number(load.requests_per_s, 3)
        times = (load.ttft_s, 1e3), (load.token_gaps_s, 1e3), (load.e2e_s, 1.0)
        rate, batch = f"{load.output_tokens_per_s:,.1f}", f"{load.output_tokens / load.num_steps:.1f}"
        spread = [_percentiles(*each) for each in times]
        idle = "" if load.idle_share is None else f"{load.idle_share:.1%}"
        cells.append([arrival, f"{load.num_requests:,}", rate, *spread, f"{mbu:.1%}", batch, idle])
    return cells


def _percentiles(values: Iterable[float], times: float) -> str:
    found = percentiles(values)
    return "" if found is None else " / ".join(_number(times * value, 3) for value in found)


def _number(value: float, digits: int) -> str:
    """With so many digits, but a whole number with all of its own."""
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def table(cells: Table) -> list[str]:
    """Lines of Markdown; the first row is the head."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |"
        for row in cells
    ]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]


def predicted(folder: Path) -> list[str]:
    """Tables of what was predicted from the TPU compiler's schedules, of the files `tpu-CHIP.json`."""
    from .tpu.rows import Row as Predicted
    from .tpu.rows import table as predicted_table

    parts = list[str]()
    for path in sorted(folder.glob("tpu-*.json")):
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or "assumptions" not in document:
            continue
        names = Predicted.__dataclass_fields__
        rows = [Predicted(**{key: row[key] for key in names if key != "met"}) for row in document["rows"]]
        parts += [
            "", f"## TPU {document['chip']}, predicted from the compiler's schedule, never measured",
            f"- commit {document['machine']['commit']}", "", *predicted_table(rows),
        ]  # fmt: skip
    return parts


def draw(report: Report, folder: Path) -> list[Path]:
    """Draws what a report holds as PNGs: roofline, MBU against context, latency against load, peers.

    Returns:
        The files; none of what was not measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = [row for row in report.rows if row.not_measured is None]
    decode = [row for row in measured if (row.suite, row.name) == ("kernels", "decode")]
    engines = [row for row in measured if row.suite == "engine"]
    placed = [row for row in measured if row.operations and row.num_bytes]
    loads = [load for load in report.loads if load.requests_per_s is not None]
    pictures: dict[str, tuple[Any, Callable[..., None]]] = {
        "roofline": (placed, _draw_roofline),
        "mbu": (decode, _draw_mbu),
        "engines": (engines, _draw_engines),
        "load": (loads, _draw_load),
    }
    written = list[Path]()
    for name, (wanted, plot) in pictures.items():
        if wanted:
            written.append(folder / f"{name}.png")
            _picture(written[-1], partial(plot, rows=wanted, report=report))
    return written


def draw_load(path: Path, report: Report) -> None:
    """Draws latency against load as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _picture(path, partial(_draw_load, rows=report.loads, report=report))


def _picture(path: Path, plot: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    plot(axes)
    axes.grid(which="both", alpha=0.2)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _series(row: Row) -> str:
    kind = {"kernels": f"{row.name} attention", "steps": f"{row.name} step"}.get(row.suite, row.name)
    return f"{kind}, {row.implementation}"


def _draw_roofline(axes: Any, rows: Sequence[Row], report: Report) -> None:
    import numpy as np

    intensity = np.geomspace(0.5, 20_000, 200)
    limits = report.ceilings
    axes.plot(intensity, np.minimum(limits.matrix_gflop_s, intensity * limits.bandwidth_gb_s), color="black")
    for name in dict.fromkeys(map(_series, rows)):
        mine = [row for row in rows if _series(row) == name]
        x = [row.operations / row.num_bytes for row in mine]
        axes.plot(x, [row.operations / row.median_s / 1e9 for row in mine], "o", label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s",
        title=f"Measured, under the ceilings of the same run\n{title(report)}",
    )  # fmt: skip


def _draw_mbu(axes: Any, rows: Sequence[Row], report: Report) -> None:
    def label(row: Row) -> str:
        case = row.case
        return f"{row.implementation}, {case['kv']}, page {case['page']}, {case['sequences']} sequences"

    equal = [row for row in rows if isinstance(row.case["context"], int)]
    for name in dict.fromkeys(map(label, equal)):
        mine = sorted((row for row in equal if label(row) == name), key=lambda row: row.case["context"])
        x = [row.case["context"] for row in mine]
        axes.plot(x, [row.mbu(report.ceilings) for row in mine], "o-", label=name)
    axes.set(
        xscale="log", xlabel="tokens of context", ylabel="share of the measured bandwidth", ylim=(0, None),
        title=f"Decode attention\n{title(report)}",
    )  # fmt: skip


def _draw_engines(axes: Any, rows: Sequence[Row], report: Report) -> None:
    rates = [row.tokens / row.median_s for row in rows]
    axes.bar([row.implementation for row in rows], rates)
    limit = rows[0].tokens / rows[0].roofline_s(report.ceilings)
    axes.axhline(limit, color="black", linestyle="--", label=f"roofline: {limit:,.0f} tokens/s")
    case = ", ".join(f"{key} {value}" for key, value in rows[0].case.items())
    axes.set(ylabel="output tokens/s", title=f"{report.model}: {case}\n{title(report)}")


def _draw_load(axes: Any, rows: Sequence[LoadRow], report: Report) -> None:
    loads = sorted(rows, key=lambda load: load.requests_per_s or 0.0)
    rates = [load.requests_per_s for load in loads]
    for name, of in (("TTFT", "ttft_s"), ("between tokens", "token_gaps_s"), ("end to end", "e2e_s")):
        found = [percentiles(getattr(load, of)) for load in loads]
        for at, percentile in enumerate(("p50", "p99")):
            y = [None if each is None else 1e3 * each[2 * at] for each in found]
            axes.plot(rates, y, "o-" if at == 0 else "o--", label=f"{name}, {percentile}")
    axes.set(
        yscale="log", xlabel="requests/s that arrive", ylabel="ms",
        title=f"Latency against load: {report.model}\n{title(report)}",
    )  # fmt: skip
