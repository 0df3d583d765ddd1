"""Options of an engine that compiles one kind of decode step and one of mixed steps."""

from __future__ import annotations

SMALL = ("--max-length", "64", "--max-concurrent-decodes", "2", "--max-batched-tokens", "16")
