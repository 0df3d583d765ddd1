"""Says after a run how many of the faults put into the kernels were noticed."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    outcomes = {
        outcome: sum("test_a_fault_is_noticed" in getattr(report, "nodeid", "") for report in reports)
        for outcome, reports in terminalreporter.stats.items()
        if outcome in ("passed", "failed")
    }
    if total := sum(outcomes.values()):
        terminalreporter.write_line(f"kernel faults noticed: {outcomes.get('passed', 0)} of {total}")
