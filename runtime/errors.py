"""What can go wrong in the engine, apart from bad arguments (ValueError, TypeError)."""
# ruff: noqa: N818  (these names are public, and say what happened)

from __future__ import annotations


class EngineError(RuntimeError):
    """Base of everything below."""


class EngineStopped(EngineError):
    """The engine is not running: `start()` it."""


class EngineFailed(EngineError):
    """An exception ended the engine's thread; `__cause__` holds it. `start()` begins anew."""


class StepFailed(EngineError):
    """An exception in a step that a prompt of the call was part of; `__cause__` holds it. The engine goes on.

    All of the call fails with that prompt, also prompts that were in no such step and those that had ended,
    whose samples can no longer be read. Make calls of their own to keep prompts apart.
    """


class QueueFull(EngineError):
    """More requests than `max_queued_requests` would wait; try again later, or with fewer prompts."""


class OutOfMemory(EngineError):
    """The cache does not fit the device; the message gives sizes and a setting that would fit."""
