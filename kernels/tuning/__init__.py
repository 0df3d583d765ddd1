"""What the TPU compiler says of a kernel, on any machine."""

from .calls import Batch, Call
from .chips import CHIPS, Chip
from .compiler import compile_for
from .loops import LoopRun
from .predict import Compilers, predict
from .prediction import Assumptions, Prediction
from .replay import ReplayError
from .schedule import Loop, Schedule, ScheduleError

__all__ = [
    "CHIPS",
    "Assumptions",
    "Batch",
    "Call",
    "Chip",
    "Compilers",
    "Loop",
    "LoopRun",
    "Prediction",
    "ReplayError",
    "Schedule",
    "ScheduleError",
    "compile_for",
    "predict",
]
