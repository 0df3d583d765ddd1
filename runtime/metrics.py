"""What an engine and each of its requests tell about themselves. Plain numbers, frozen."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW_S = 10.0  # over which rates and shares are taken


@dataclass(frozen=True)
class RequestMetrics:
    """How one prompt fared, up to the sample that carries this. Times are of a monotonic clock, in seconds.

    Attributes:
        queue_time_s: from submission until it was first given a place in the batch; None before.
        ttft_s: from submission until its first token was read from the device; None before.
        time_between_tokens_s: mean, from the first token to the latest one: their distance over the number of
            tokens after the first. None with fewer than two. Tokens of one step count as read at once.
        e2e_time_s: from submission to its end; None while it goes on.
        num_prompt_tokens: tokens in: the prompt's, after any truncation.
        num_generated_tokens: tokens out.
        num_cached_tokens: of the prompt's, those that were found in the cache when it was first admitted.
        num_preemptions: how often its tokens had to be computed anew, because its pages were given to others,
            a step of theirs failed, or the weights changed.
    """

    queue_time_s: float | None = None
    ttft_s: float | None = None
    time_between_tokens_s: float | None = None
    e2e_time_s: float | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True)
class EngineMetrics:
    """One moment of an engine: all of it is from the same one, so that sums add up.

    The engine's thread takes it at the end of each step, before it hands out the step's samples (who has read
    a sample finds its step in here), and while it has nothing to do once a second until the rates are 0.
    Counts are since the engine was built, through stops and starts. A request here is one completion of one
    prompt.

    Attributes:
        num_requests: taken in: `num_running + num_waiting + num_preempted + num_finished + num_aborted +
            num_timed_out + num_failed`.
        num_running: they have a place in the batch, and pages.
        num_waiting: not yet admitted for the first time.
        num_preempted: they had to give their pages back, and wait to go on.
        num_finished: ended with "stop" or "length".
        num_aborted: ended with "abort".
        num_timed_out: ended with "timeout".
        num_failed: ended with an exception of a step of theirs, or with the engine's thread.
        num_pages: `num_pages_used + num_pages_free + num_pages_cached`.
        num_pages_used: pages that requests own.
        num_pages_free: pages that hold nothing.
        num_pages_cached: pages that nobody owns and that are kept for prefixes to come; taken when free ones
            run out.
        num_steps: steps that were dispatched.
        batch_size: sequences in the latest of them; 0 while none is under way and nothing waits.
        num_prompt_tokens: of the prompts of all requests admitted so far.
        num_cached_tokens: of these, those that were found in the cache.
        num_computed_prompt_tokens: tokens of prompts in steps that were dispatched, and after a preemption
            those of the output so far.
        num_generated_tokens: tokens read from the device and accepted; what a sequence overran is not.
        prefix_hit_rate: `num_cached_tokens / num_prompt_tokens`; 0.0 before the first.
        prompt_tokens_per_second: growth of `num_computed_prompt_tokens` in the last 10 seconds (or since the
            start, if that is less) over these seconds, idle ones included.
        generated_tokens_per_second: the same of `num_generated_tokens`.
        num_preemptions: how often requests had to give their pages back, or begin anew.
        num_compilations: programs compiled, or read from a persistent cache. It stands still while
            the engine serves.
        work_seconds: in which the thread had something to do, since the engine was made.
        device_idle_seconds: of these, those in which no step of this engine may have been on the device: at
            most, from host timestamps.
            Time counts as idle when a step is dispatched while none is unfinished, back to the last moment at
            which one was known not to be (it is looked at after every phase of a step). So it contains what a
            step still ran after the last look, and it cannot see waits inside of a step, between two queued
            ones, or for other users of the device.
        device_idle_share: growth of `device_idle_seconds` in the last 10 seconds over that of `work_seconds`;
            0.0 without work.
    """

    num_requests: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_preempted: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_timed_out: int = 0
    num_failed: int = 0
    num_pages: int = 0
    num_pages_used: int = 0
    num_pages_free: int = 0
    num_pages_cached: int = 0
    num_steps: int = 0
    batch_size: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    prefix_hit_rate: float = 0.0
    prompt_tokens_per_second: float = 0.0
    generated_tokens_per_second: float = 0.0
    num_preemptions: int = 0
    num_compilations: int = 0
    work_seconds: float = 0.0
    device_idle_seconds: float = 0.0
    device_idle_share: float = 0.0
