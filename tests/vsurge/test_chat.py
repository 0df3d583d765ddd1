"""`vsurge chat`: turns, history, limits, and Ctrl-C."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vsurge.cli.chat import Chat

from .small import SMALL

QUESTION = "What is the capital of France?"


@pytest.fixture
def chat(command: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs a chat on the lines that it finds on stdin."""

    def run(*lines: str, options: tuple[str, ...] = SMALL) -> object:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return command("chat", *options)

    return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The messages of every turn, as (role, content), after the answer."""
    turns: list[list[tuple[str, str]]] = []
    answer = Chat._answer

    def record(self: Chat, messages: list[dict[str, str]]) -> None:
        answer(self, messages)
        turns.append([(message["role"], message["content"]) for message in self.messages])

    monkeypatch.setattr(Chat, "_answer", record)
    return turns


def test_a_conversation_is_remembered_until_reset(chat: Callable, seen: list) -> None:
    options = (*SMALL, "--system", "Be brief.", "--max-tokens", "8")
    done = chat(
        QUESTION, "", "Hello", "/reset", "/what is this", "Hello", "/exit", "never read", options=options
    )
    assert done.code == 0
    assert len(seen) == 3
    first, second, third = seen
    system, question = ("system", "Be brief."), ("user", QUESTION)
    assert first[:2] == [system, question]
    assert [role for role, _ in second] == ["system", "user", "assistant", "user", "assistant"]
    assert second[:3] == first
    assert third[:2] == [system, ("user", "Hello")]
    answers = [turn[-1][1] for turn in seen]
    assert done.out == "".join(answer.rstrip("\n") + "\n" for answer in answers)
    assert answers[0].startswith("The capital of France")
    assert "[the conversation begins anew]" in done.err
    assert "[/what: no such command; there are /reset and /exit]" in done.err


def test_a_conversation_that_no_longer_fits_says_so_and_goes_on(chat: Callable, seen: list) -> None:
    done = chat(QUESTION, "word " * 60, QUESTION, "/reset", QUESTION)
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "too long" in line]
    assert "at most 63 leave room for an answer; /reset begins anew" in line
    assert seen[1] == seen[0]  # the message that did not fit is forgotten
    assert done.out.count("The capital of France is Paris.") == 2 + (len(seen[2]) > len(seen[0]))


def test_an_answer_that_reaches_a_limit_is_said_to_be_cut_off(chat: Callable) -> None:
    assert "[cut off: --max-tokens is reached]" in chat(QUESTION, options=(*SMALL, "--max-tokens", "3")).err
    assert (
        "[cut off: the longest conversation is reached]"
        in chat(QUESTION, options=(*SMALL, "--ignore-eos")).err
    )


# A shell's background job ignores SIGINT, and so would its children, the chat among them. And an answer must
# not end before Ctrl-C is pressed, however long that takes.
HEED_CTRL_C = """
import signal, threading
from vsurge.cli import main
from vsurge.cli.chat import Interruptible
from vsurge.runtime.executor import Executor

interrupt, run, interrupted = Interruptible._interrupt, Executor.run, threading.Event()

def interrupt_and_tell(self, *signal_and_frame):
    interrupt(self, *signal_and_frame)
    interrupted.set()

def run_some_tokens(self, plan):
    if plan.kind == "mixed":
        interrupted.clear()
    elif any(chunk.start + 1 == len(chunk.request.prompt_ids) + 40 for chunk in plan.chunks):
        assert interrupted.wait(120)
    return run(self, plan)

Interruptible._interrupt, Executor.run = interrupt_and_tell, run_some_tokens
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(main())
"""


class Terminal:
    """A chat in a process of its own on a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self._terminal, theirs = pty.openpty()
        argv = [sys.executable, "-c", HEED_CTRL_C, "chat", *options]
        self.process = subprocess.Popen(
            argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def read_until(self, text: str, timeout_s: float = 120.0) -> str:
        """What is shown up to and with `text`; fails after the timeout."""
        deadline = time.monotonic() + timeout_s
        while text not in self._unread:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self._unread!r}"
            self._unread += os.read(self._terminal, 65536).decode(errors="replace")
        shown, _, self._unread = self._unread.partition(text)
        return shown + text

    def interrupt_at_the_prompt(self) -> None:
        """Presses Ctrl-C until there is a new prompt, and has a line read, so that nothing is pending then.

        Pressed just before Python waits for a line, it waits too; so it may have to be pressed again.
        """
        self.until_it_works(lambda _: self.process.send_signal(signal.SIGINT), lambda _: "> ")
        self.until_it_works(lambda n: self.type(f"/{n}\n"), lambda n: f"[/{n}: no such command")
        self.read_until("> ")

    def until_it_works(self, attempt: Callable[[int], None], shows: Callable[[int], str]) -> None:
        """Makes numbered attempts until one shows what it should within a second."""
        for n in range(100):
            attempt(n)
            with contextlib.suppress(AssertionError):
                self.read_until(shows(n), timeout_s=1.0)
                return
        raise AssertionError(f"no {shows(0)!r} in {self._unread!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)
        os.close(self._terminal)


@pytest.fixture
def terminal(vsurge_home: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_chat(*options: str) -> Terminal:
        opened.append(Terminal(*options))
        return opened[-1]

    yield open_chat
    for one in opened:
        one.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Callable[..., Terminal]) -> None:
    chat = terminal("--max-length", "256", "--max-batched-tokens", "16", "--ignore-eos")
    chat.read_until("> ")
    chat.type(QUESTION + "\n")
    chat.read_until("The capital of France")
    chat.process.send_signal(signal.SIGINT)
    chat.read_until("[stopped]", timeout_s=30)
    chat.read_until("> ", timeout_s=30)
    chat.interrupt_at_the_prompt()
    chat.type("Hello\n")
    chat.read_until("Hello")
    chat.read_until("\n")
    assert len(chat.read_until(" ", timeout_s=30)) > 0  # it answers again
    chat.process.send_signal(signal.SIGINT)
    chat.read_until("[stopped]", timeout_s=30)
    chat.read_until("> ", timeout_s=30)
    chat.type("\x04")
    assert chat.process.wait(timeout=20) == 0
