"""What a benchmark writes down: samples, and what each figure is to be divided by."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1  # of the JSON files


@dataclass(frozen=True)
class Ceilings:
    """What the device reached at best in the same run.

    Attributes:
        bandwidth_gb_s: 10^9 bytes a second, of a large read or of a large copy (read and written), whichever
            is more.
        matrix_gflop_s: 10^9 operations a second, of a large bfloat16 matrix product.
        read_gb_s, copy_gb_s: of both; None where a report is older than these fields.
    """

    bandwidth_gb_s: float
    matrix_gflop_s: float
    read_gb_s: float | None = None
    copy_gb_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was measured, or was to be.

    Attributes:
        suite: "kernels", "steps" or "engine".
        name: what runs, like "decode attention".
        implementation: whose it is.
        case: what tells it from others of its name: sizes, dtypes.
        seconds: samples, each of one run; empty if it was not measured.
        num_bytes: that one run cannot do without reading or writing.
        operations: that it cannot do without.
        tokens: that it makes or takes in; 0 where that says nothing.
        not_measured: why there are no samples; None if there are.
    """

    suite: str
    name: str
    implementation: str
    case: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seconds: tuple[float, ...] = ()
    num_bytes: int = 0
    operations: int = 0
    tokens: int = 0
    not_measured: str | None = None

    @property
    def median_s(self) -> float:
        """Raises `statistics.StatisticsError` if it was not measured."""
        return statistics.median(self.seconds)

    def mbu(self, ceilings: Ceilings) -> float:
        """Memory bandwidth utilization: the bytes over the median time and the measured bandwidth."""
        return self.num_bytes / self.median_s / (ceilings.bandwidth_gb_s * 1e9)

    def mfu(self, ceilings: Ceilings) -> float:
        """The operations over the median time and the measured matrix rate."""
        return self.operations / self.median_s / (ceilings.matrix_gflop_s * 1e9)

    def roofline_s(self, ceilings: Ceilings) -> float:
        """Seconds that it takes at least, for its bytes or for its operations."""
        return max(
            self.num_bytes / (ceilings.bandwidth_gb_s * 1e9),
            self.operations / (ceilings.matrix_gflop_s * 1e9),
        )

    def share_of_roofline(self, ceilings: Ceilings) -> float:
        return self.roofline_s(ceilings) / self.median_s


@dataclass(frozen=True, kw_only=True)
class LoadRow:
    """Requests that came at a rate, and how they fared; times in seconds.

    Attributes:
        requests_per_s: the rate at which they arrived, on average; None if all were there from the start.
        num_requests, seconds: how many, and from the first one's arrival to the last one's end.
        input_tokens, output_tokens: of all.
        ttft_s: each request's time to its first token, from its arrival.
        token_gaps_s: between its tokens, of all requests.
        e2e_s: each request's time to its end.
        num_steps: of the engine, in this time.
        num_bytes: weights once for each step, and the keys and values that each token's step reads.
        idle_share: of the time in which the engine had something to do, that in which the device may have had
            no step of it, from host timestamps (`EngineMetrics.device_idle_seconds`): gaps between steps are
            no more than this. None where a report is older than this field.
    """

    requests_per_s: float | None
    num_requests: int
    seconds: float
    input_tokens: int
    output_tokens: int
    ttft_s: tuple[float, ...]
    token_gaps_s: tuple[float, ...]
    e2e_s: tuple[float, ...]
    num_steps: int
    num_bytes: int
    idle_share: float | None = None

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run of the benchmarks.

    Attributes:
        machine: from `describe_machine`.
        model: what it was, in words; None where only kernels ran.
        ceilings: of the device.
        rows, loads: what was measured.
        settings: what else the command was given.
        took_s: seconds of each part of the run, with all that was built, compiled and tried out for it.
    """

    machine: Mapping[str, Any]
    model: str | None
    ceilings: Ceilings
    rows: tuple[Row, ...] = ()
    loads: tuple[LoadRow, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    took_s: Mapping[str, float] = field(default_factory=dict[str, float])

    def write(self, path: Path) -> None:
        """As JSON, with every sample; folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no report of this format.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document.pop("format")
        if found == FORMAT:
            document["ceilings"] = Ceilings(**document["ceilings"])
            document["rows"] = tuple(Row(**_with_tuples(row)) for row in document["rows"])
            document["loads"] = tuple(LoadRow(**_with_tuples(row)) for row in document["loads"])
            return Report(**document)
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # ValueError: neither JSON nor UTF-8
        raise ValueError(f"{path}: is no report of `vsurge bench`") from error
    raise ValueError(f"{path}: is a report of format {found}, this version reads {FORMAT}")


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def machine_slug(machine: Mapping[str, Any]) -> str:
    """A machine's name for files, like "intel-xeon-avx512f-2-cores" or "nvidia-h200".

    Of a processor's vector extensions it has the last one, which decides how fast products are.
    """
    if machine.get("accelerator") is not None:
        name = str(machine["accelerator"])
    else:
        # "Intel(R) Xeon(R) Processor @ 2.50GHz (avx2)"
        processor = re.sub(r"\((R|TM)\)| (Processor|CPU)\b|@[^(]*", "", str(machine["processor"]))
        kind, _, extensions = processor.partition("(")
        name = f"{kind}-{extensions.split(',')[-1]}-{machine['cores']}-cores"
    return file_slug(name)


def file_slug(name: str) -> str:
    """A name for files: lower case, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_folder() -> Path:
    """`benchmarks/results` of a checkout, else the current folder."""
    room = Path(__file__).resolve().parent
    return room / "results" if (room.parent / ".git").exists() else Path.cwd()


def percentiles(values: Iterable[float]) -> tuple[float, float, float] | None:
    """The 50th, 90th and 99th percentile, between neighbours in proportion; None of nothing."""
    import numpy as np

    found = np.fromiter(values, float)
    return None if found.size == 0 else tuple(np.percentile(found, (50, 90, 99)).tolist())
