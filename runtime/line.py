"""A line to another process: a connection that is never silent for long, unless the other end is gone."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

# Each end says every so many seconds that it is there. Who says nothing for so many has stalled, or its
# machine has vanished, which leaves a connection open.
BEAT_S, SILENCE_S = 2, 20
LAST_WORDS_S = 5.0  # how long what is being sent may hold up the last message


class Line:
    """Messages to and from another process, which are pickled: the other end has to be trusted.

    Args:
        connection: over TCP.
        on_message: called with each message, in a thread of the line's.
        on_loss: called in that thread when nothing more can come, with what the other process did.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        on_message: Callable[[tuple[Any, ...]], None],
        on_loss: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._on_message, self._on_loss = on_message, on_loss
        self._sending = threading.Lock()
        with self._socket() as stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for timeout in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # of each part of a message
                stream.setsockopt(socket.SOL_SOCKET, timeout, struct.pack("@ll", SILENCE_S, 0))
        for task in (self._listen, self._beat):
            threading.Thread(target=task, daemon=True).start()

    def send(self, message: tuple[Any, ...] | None, *, patience_s: float = -1) -> None:
        """Sends a message; None says only that this process is there.

        Args:
            message: anything that can be pickled.
            patience_s: seconds to wait for what another thread is sending; -1 for any time.

        Raises:
            OSError: it cannot be sent, nor can any later one.
        """
        if not self._sending.acquire(timeout=patience_s):
            raise TimeoutError(f"another message has taken more than {patience_s} s")
        try:
            self._connection.send(message)
        except BaseException:
            self._close()  # a part of it may be there, and what came next would be taken for the rest
            raise
        finally:
            self._sending.release()

    def end(self, message: tuple[Any, ...]) -> None:
        """Sends the last message, if it still can, and says that no other comes."""
        with suppress(OSError):
            self.send(message, patience_s=LAST_WORDS_S)
        self._close()

    def _close(self) -> None:
        """In one direction: what the other end sends is still heard."""
        with suppress(OSError), self._socket() as stream:
            stream.shutdown(socket.SHUT_WR)

    def _socket(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self._connection.fileno()))

    def _listen(self) -> None:
        while True:
            try:
                message: tuple[Any, ...] | None = self._connection.recv()
            except BlockingIOError:
                return self._on_loss(f"has not been heard of for {SILENCE_S} s")
            except (EOFError, OSError):
                return self._on_loss("was lost")
            except Exception as error:  # noqa: BLE001  (nobody else would hear of it, and wait for ever)
                return self._on_loss(f"sent what cannot be read: {type(error).__name__}: {error}")
            if message is not None:
                self._on_message(message)

    def _beat(self) -> None:
        done = threading.Event()
        with suppress(OSError):  # the thread that listens hears of it too
            while not done.wait(BEAT_S):
                self.send(None)
