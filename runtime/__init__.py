"""The engine: requests, scheduler, page pool, compiled steps, sampling, streaming."""

from .channel import ReturnSample
from .errors import EngineError, EngineFailed, EngineStopped, OutOfMemory, QueueFull, StepFailed
from .generation import Generation
from .sampling_params import SamplingParams
from .surge import vSurge

__all__ = [
    "EngineError",
    "EngineFailed",
    "EngineStopped",
    "Generation",
    "OutOfMemory",
    "QueueFull",
    "ReturnSample",
    "SamplingParams",
    "StepFailed",
    "vSurge",
]
