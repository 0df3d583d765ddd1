"""A line says that it is there while nothing else is said, and hears when the other end is not."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import pytest

from vsurge.runtime import line
from vsurge.runtime.line import Line

from .scripted import TIMEOUT_S

Ends = tuple[Connection, Connection]


class End:
    """A line, and what is heard over it."""

    def __init__(self, connection: Connection) -> None:
        self.messages: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.losses: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.line = Line(connection, on_message=self.messages.put, on_loss=self.losses.put)


@pytest.fixture
def make_ends() -> Iterator[Callable[[], Ends]]:
    with ExitStack() as opened:

        def make() -> Ends:
            with Listener(("localhost", 0)) as listener:
                address: Any = listener.address
                there = opened.enter_context(Client(address))
                return opened.enter_context(listener.accept()), there

        yield make


@pytest.fixture
def ends(make_ends: Callable[[], Ends]) -> Ends:
    return make_ends()


def test_a_silence_is_longer_than_several_beats_and_shorter_than_half_a_minute() -> None:
    assert 5 * line.BEAT_S <= line.SILENCE_S < 30


def test_an_idle_line_says_that_it_is_there(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "BEAT_S", 0.01)
    End(ends[0])
    for _ in range(3):
        assert ends[1].poll(TIMEOUT_S)
        assert ends[1].recv() is None


def test_two_idle_ends_hear_no_message_and_no_loss(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "BEAT_S", 0.05)
    monkeypatch.setattr(line, "SILENCE_S", 1)
    both = [End(end) for end in ends]
    time.sleep(1.5)
    assert all(end.messages.empty() and end.losses.empty() for end in both)
    both[0].line.send(("hello",))
    assert both[1].messages.get(timeout=TIMEOUT_S) == ("hello",)


@pytest.mark.parametrize("begun", [b"", b"\x00\x00\x01\x00half a mess"])
def test_who_says_nothing_any_more_is_lost(ends: Ends, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a message or not; its connection stays open."""
    monkeypatch.setattr(line, "SILENCE_S", 1)
    end = End(ends[0])
    with open(ends[1].fileno(), "wb", buffering=0, closefd=False) as stream:
        stream.write(begun)
    assert end.losses.get(timeout=TIMEOUT_S) == "has not been heard of for 1 s"


def test_who_takes_nothing_any_more_does_not_hold_up_who_sends(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "SILENCE_S", 1)
    end = End(ends[0])
    with pytest.raises(BlockingIOError):
        end.line.send((bytes(2**26),))
    with pytest.raises(OSError):  # noqa: PT011  (which one depends on the system)
        end.line.send(("more",))  # it would be taken for the rest of the last one


def test_a_connection_that_closes_is_a_loss_at_once(ends: Ends) -> None:
    end = End(ends[0])
    ends[1].close()
    assert end.losses.get(timeout=TIMEOUT_S) == "was lost"


class Unreadable:
    def __reduce__(self) -> Any:
        return _broken, ()


def _broken() -> None:
    raise ZeroDivisionError("no such thing")


def test_what_cannot_be_read_is_a_loss(ends: Ends) -> None:
    end = End(ends[0])
    ends[1].send(Unreadable())
    assert end.losses.get(timeout=TIMEOUT_S) == "sent what cannot be read: ZeroDivisionError: no such thing"


def test_the_last_message_waits_for_the_one_that_is_being_sent_and_not_for_ever(
    make_ends: Callable[[], Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = map(End, make_ends())
    threading.Thread(target=here.line.send, args=((bytes(2**26),),)).start()
    assert len(there.messages.get(timeout=TIMEOUT_S)[0]) == 2**26
    here.line.end(("last",))
    assert there.messages.get(timeout=TIMEOUT_S) == ("last",)
    assert there.losses.get(timeout=TIMEOUT_S) == "was lost"

    monkeypatch.setattr(line, "LAST_WORDS_S", 0.1)
    stuck, deaf = make_ends()
    end = End(stuck)
    with end.line._sending:
        end.line.end(("last",))
    with pytest.raises(EOFError):
        deaf.recv()
