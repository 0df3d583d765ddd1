"""What can go wrong in the engine, apart from bad arguments (ValueError, TypeError)."""
# ruff: noqa: N818  (these names are public, and say what happened)

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .channel import ReturnSample


class EngineError(RuntimeError):
    """Base of everything below."""


class EngineStopped(EngineError):
    """The engine is not running: `start()` it."""


class EngineFailed(EngineError):
    """An exception ended the engine's thread; `__cause__` holds it. `start()` begins anew."""


class StepFailed(EngineError):
    """An exception in a step that a prompt of the call was part of; `__cause__` holds it. The engine goes on.

    It is raised once the other prompts of the call have ended, which the step did not have.

    Attributes:
        samples: per prompt its final `ReturnSample`, and None for those that failed.
    """

    def __init__(self, message: str, samples: Sequence[ReturnSample | None] = ()) -> None:
        super().__init__(message)
        self.samples = list(samples)


class QueueFull(EngineError):
    """More requests than `max_queued_requests` would wait; try again later, or with fewer prompts."""


class OutOfMemory(EngineError):
    """The cache does not fit the device; the message gives sizes and a setting that would fit."""
