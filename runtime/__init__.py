"""The engine: requests, scheduler, page pool, compiled steps, sampling, streaming."""

from .channel import ReturnSample
from .errors import EngineError, EngineFailed, EngineStopped, OutOfMemory, QueueFull, StepFailed
from .generation import Generation
from .guided_params import GuidedDecodingParams
from .metrics import EngineMetrics, RequestMetrics
from .processes import Processes, join_processes
from .sampling_params import SamplingParams
from .surge import vSurge
from .token_logprobs import Logprob

__all__ = [
    "EngineError",
    "EngineFailed",
    "EngineMetrics",
    "EngineStopped",
    "Generation",
    "GuidedDecodingParams",
    "Logprob",
    "OutOfMemory",
    "Processes",
    "QueueFull",
    "RequestMetrics",
    "ReturnSample",
    "SamplingParams",
    "StepFailed",
    "join_processes",
    "vSurge",
]
