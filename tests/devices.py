"""How many devices the runtime's tests spread their model over."""

from __future__ import annotations

import os

TP = int(os.environ.get("VSURGE_TEST_TP", "1"))
