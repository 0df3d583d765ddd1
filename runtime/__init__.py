"""The engine: requests, scheduler, page pool, compiled steps, sampling, streaming."""

from .channel import ReturnSample
from .errors import EngineError, EngineFailed, EngineStopped, OutOfMemory, QueueFull, StepFailed
from .generation import Generation
from .guided_params import GuidedDecodingParams
from .sampling_params import SamplingParams
from .surge import vSurge
from .token_logprobs import Logprob

__all__ = [
    "EngineError",
    "EngineFailed",
    "EngineStopped",
    "Generation",
    "GuidedDecodingParams",
    "Logprob",
    "OutOfMemory",
    "QueueFull",
    "ReturnSample",
    "SamplingParams",
    "StepFailed",
    "vSurge",
]
