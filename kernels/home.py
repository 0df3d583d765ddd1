"""The user's directory, where tables of block sizes are looked for and the commands write."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def home_path() -> Path:
    """`VSURGE_HOME`, or `vsurge` in the platform's cache folder. It need not exist yet."""
    if chosen := os.environ.get("VSURGE_HOME"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches/vsurge").expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache, "vsurge") if cache else Path("~/.cache/vsurge").expanduser()
