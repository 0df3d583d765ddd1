"""Small programs in the syntax of the TPU compiler's dumps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vsurge.kernels.tuning.schedule import Schedule, read_schedules

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
UTILIZATION = f"== CAPACTIY:\n{', '.join(UNITS)}\n 2 2 4 2 1 3 3 2 2 2\n== UTILIZATION:\n"


def write_dumps(
    folder: Path,
    bundles: Sequence[str],
    used: Sequence[str] = (),
    *,
    name: str = "1-kernel.1",
    call: str = "tpu_custom_call",
) -> None:
    """Writes the three dumps of a kernel, one bundle for each text; `used` has the slots of each."""
    lines = [f"{at:#6x} {bundle}" if ":" in bundle[:9] else f"{at:#6x}   :  {{ {bundle} }}"
        for at, bundle in enumerate(bundles)]  # fmt: skip
    used = used or ["0 " * len(UNITS)] * len(lines)
    (folder / f"{name}-00-schedule-analysis_packed-bundles-post-ra.txt").write_text(f'target="{call}"')
    (folder / f"{name}-01-packed-bundles-post-ra.txt").write_text("= control targets\n\n" + "\n".join(lines))
    (folder / f"{name}-02-pre-delay_hlo-static-per-bundle-utilization.txt").write_text(
        UTILIZATION + "\n".join(used)
    )


def schedule_of(*bundles: str, chip: str = "v6e") -> Schedule:
    """The schedule of a program, read from its dumps."""
    with tempfile.TemporaryDirectory() as folder:
        write_dumps(Path(folder), bundles)
        (schedule,) = read_schedules(Path(folder), chip)
    return schedule
