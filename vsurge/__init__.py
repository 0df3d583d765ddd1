"""vSurge: LLM inference in pure JAX.

Names are imported when they are first used, so that `import vsurge` costs next to nothing; jax comes with the
first of them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import (
        CheckpointError,
        ConfigError,
        Model,
        PartitionAxis,
        Qwen3Config,
        load_model,
        random_model,
        save_model,
    )
    from .runtime import (
        EngineError,
        EngineFailed,
        EngineMetrics,
        EngineStopped,
        Generation,
        GuidedDecodingParams,
        Logprob,
        OutOfMemory,
        Processes,
        QueueFull,
        RequestMetrics,
        ReturnSample,
        SamplingParams,
        StepFailed,
        join_processes,
        vSurge,
    )

    __version__: str

_ROOM_OF = {
    "CheckpointError": "model",
    "ConfigError": "model",
    "Model": "model",
    "PartitionAxis": "model",
    "Qwen3Config": "model",
    "join_processes": "runtime",
    "load_model": "model",
    "random_model": "model",
    "save_model": "model",
    "EngineError": "runtime",
    "EngineFailed": "runtime",
    "EngineMetrics": "runtime",
    "EngineStopped": "runtime",
    "Generation": "runtime",
    "GuidedDecodingParams": "runtime",
    "Logprob": "runtime",
    "OutOfMemory": "runtime",
    "Processes": "runtime",
    "QueueFull": "runtime",
    "RequestMetrics": "runtime",
    "ReturnSample": "runtime",
    "SamplingParams": "runtime",
    "StepFailed": "runtime",
    "vSurge": "runtime",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "EngineFailed",
    "EngineMetrics",
    "EngineStopped",
    "Generation",
    "GuidedDecodingParams",
    "Logprob",
    "Model",
    "OutOfMemory",
    "PartitionAxis",
    "Processes",
    "QueueFull",
    "Qwen3Config",
    "RequestMetrics",
    "ReturnSample",
    "SamplingParams",
    "StepFailed",
    "__version__",
    "demo_model_path",
    "join_processes",
    "load_model",
    "random_model",
    "save_model",
    "vSurge",
]


def demo_model_path() -> Path:
    """The folder of the small trained checkpoint that ships with the package."""
    return Path(__file__).parent / "model" / "demo"


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        value = getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("vsurge")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
