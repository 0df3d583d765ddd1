"""Options of an engine that compiles two programs."""

from __future__ import annotations

SMALL = ("--max-length", "64", "--max-concurrent-decodes", "2", "--max-batched-tokens", "16")
