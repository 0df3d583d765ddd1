"""One engine over the devices of several processes: process 0 decides, the others do the same.

A program that runs on the devices of several processes must be called by each of them, in the same order and
with the same inputs. So process 0, which has the requests, the scheduler and the loop, sends what each step
takes before it runs the step, and so with all else that its executor does.

It does so over a plain TCP connection to each, of the standard library and authenticated with a key of this
run. A message costs some tens of microseconds and no device, which a collective would keep; and a connection
that closes or falls silent (`line`) says that its process has gone or stalled, which the key-value store of
`jax.distributed` would not.
"""
# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

import os
import queue
import secrets
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..model import Model, Params
from .checks import as_integer
from .errors import EngineError
from .following_executor import FollowingExecutor
from .line import Line
from .options import EngineOptions

KEY_BYTES = 32
# jax ends a process whose peer is silent, too, and writes no line that explains it: the lines come first.
HEARTBEAT_TIMEOUT_S = 60
SHUTDOWN_TIMEOUT_S = 20


class Processes:
    """The processes of one engine, as one of them sees them. Made by `join_processes`.

    Use it in a `with` block, in every process: where process 0 leaves it, the others are told to end. Where a
    process is lost or stalls, the others write which one and exit with status 1, whatever they are doing, for
    a step that waits for a lost process cannot be interrupted.

    Attributes:
        process_id: which one this is.
        num_processes: how many there are.
        lock: held by who sends something and does the same, so that the order is the same everywhere.
    """

    def __init__(self, host: str, *, process_id: int, num_processes: int) -> None:
        self.process_id, self.num_processes = process_id, num_processes
        self.lock = threading.RLock()
        self._num_engines = 0
        self._ended: str | None = None  # why nothing more is sent
        self._updated: weakref.ref[Params] | None = None  # what the others have in place of their model's
        self._messages: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._asking = threading.Lock()  # answers do not say to what
        self._lines: dict[int, Line] = {}
        if process_id == 0:
            key = secrets.token_bytes(KEY_BYTES)
            with Listener((host, 0), backlog=num_processes, authkey=key) as listener:
                address: Any = listener.address
                _broadcast(address[1].to_bytes(2, "big") + key)
                connections = _accept(listener, num_processes - 1)
        else:
            sent = _broadcast(bytes(2 + KEY_BYTES))
            connection = Client((host, int.from_bytes(sent[:2], "big")), authkey=sent[2:])
            connection.send(process_id)
            connections = {0: connection}
        for peer, connection in connections.items():
            self._lines[peer] = Line(connection, on_message=self._take, on_loss=partial(self._lose, peer))

    def _take(self, message: tuple[Any, ...]) -> None:
        """What a process sends."""
        if message[1] == "failed":
            self._give_up(message[2])
        if message[1] == "stop":
            self._ended = "process 0 is done"
        self._messages.put(message)

    def _lose(self, peer: int, how: str) -> None:
        """Ends this process when another one is lost before its time."""
        if self._ended is None:
            self._give_up(f"process {peer} of {self.num_processes} {how}")
        self._messages.put((0, "ended"))  # for who waits for its answer

    def _give_up(self, reason: str) -> NoReturn:
        """Ends this process; process 0 tells the others why first."""
        print(f"vsurge: error: {reason}; process {self.process_id} ends too", file=sys.stderr, flush=True)
        if self.process_id == 0:
            self._end("failed", reason)
        os._exit(1)

    def _end(self, *message: Any) -> None:
        for line in list(self._lines.values()):  # they may be in the making
            line.end((0, *message))

    def begin(self, model: Model, options: EngineOptions) -> int:
        """Has the others make an executor with process 0's options; its number.

        Raises:
            ValueError: a process has no device of the model's mesh, or other weights than the model.
        """
        self._check_mesh(model)
        with self.lock:
            if self._updated is not None and self._updated() is not model.params:
                raise ValueError(
                    "model: after update_params the other processes have the new weights only; build with "
                    "the `model` of the engine that was updated last"
                )
            number = self._num_engines
            self._num_engines += 1
            self.tell(number, "begin", options)
        return number

    def tell(self, engine: int, what: str, *arguments: Any) -> None:
        """Has the others' executors do something; hold the lock until it is done here as well.

        Raises:
            EngineError: a process is lost, or the others have been told to end.
        """
        self._tell(dict.fromkeys(self._lines, (engine, what, *arguments)))

    def ask(self, engine: int, what: str, for_each: Mapping[int, Any]) -> None:
        """Has the others' executors do something that needs no order among steps; returns when it is done.

        Args:
            engine: its number.
            what: to do.
            for_each: what each process needs for it.

        Raises:
            EngineError: as `tell`.
        """
        with self._asking:
            self._tell({peer: (engine, what, for_each[peer]) for peer in self._lines})
            for _ in self._lines:
                if self._messages.get()[1] == "ended":
                    raise EngineError(f"the other processes have ended: {self._ended}")

    def _tell(self, messages: Mapping[int, tuple[Any, ...]]) -> None:
        if self._ended is not None:
            raise EngineError(f"the other processes have ended: {self._ended}")
        try:
            for peer, message in messages.items():
                self._lines[peer].send(message)
        except OSError as error:
            raise EngineError("the connection to another process of this engine is closed") from error

    def has_updated(self, params: Params) -> None:
        """Says which weights the others have from now on."""
        self._updated = weakref.ref(params)

    def fail(self, reason: str) -> None:
        """Ends the other processes, which write why; this one goes on to its own end."""
        self._ended = self._ended or reason
        self._end("failed", reason)

    def follow(self, model: Model) -> None:
        """Does on this process's devices what process 0 does, until process 0 is done.

        Args:
            model: the same as process 0's, loaded with the same arguments. After `update_params` of process
                0's engine its weights are given up here; whoever else holds them keeps them in memory.

        Raises:
            EngineError: this is process 0.
            ValueError: a process has no device of the model's mesh.
        """
        if self.process_id == 0:
            raise EngineError("process 0 builds the engine, and follows none; the other processes do")
        self._check_mesh(model)
        executors: dict[int, FollowingExecutor] = {}
        while True:
            engine, what, *arguments = self._messages.get()
            if what == "stop":
                return
            if what == "begin":
                executors[engine] = FollowingExecutor(model, *arguments)
                continue
            executors[engine].do(what, arguments)
            if what == "place":
                self._lines[0].send((engine, "done"))
            elif what == "update":  # and the old ones go
                model = replace(model, params=executors[engine].params)

    def _check_mesh(self, model: Model) -> None:
        has_devices = {device.process_index for device in model.mesh.devices.flat}
        if len(has_devices) < self.num_processes:
            raise ValueError(
                f"model: its mesh of {model.mesh.size} devices lies in process {sorted(has_devices)} of "
                f"{self.num_processes}; each must have a part, there are {jax.device_count()} devices"
            )

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Process 0 lets the others end: as it does itself, well or with an error."""
        if kind is not None:
            self.fail(f"process {self.process_id} of {self.num_processes} failed: {kind.__name__}: {error}")
        elif self.process_id == 0:
            self._ended = "the block of join_processes was left"
            self._end("stop")
        if kind is None:
            jax.distributed.shutdown()


def join_processes(coordinator: str, *, process_id: int, num_processes: int) -> Processes:
    """Makes this process one of several that run an engine together; each calls it, before it uses a device.

    Returns once all are there. Afterwards `jax.devices()` are those of all processes. Where one is lost or
    stalls, all the others end at once, process 0 and whatever else it does among them (see `Processes`).

    Args:
        coordinator: "HOST:PORT", where process 0 can be reached by the others; the port must be free there.
            Another port on the same host is chosen for the steps' inputs.
        process_id: which one this is, from 0.
        num_processes: how many there are, at least 2.

    Raises:
        ValueError, TypeError: an argument out of range, or not the number that jax has for this process.
        RuntimeError: jax has used a device already, or not all processes came within five minutes.
    """
    num_processes = as_integer("num_processes", num_processes, 2)
    process_id = as_integer("process_id", process_id, 0)
    if process_id >= num_processes:
        raise ValueError(f"process_id={process_id}: must be less than num_processes={num_processes}")
    if not isinstance(coordinator, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"coordinator={coordinator!r}: must be a string, HOST:PORT")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(f"coordinator={coordinator!r}: must be HOST:PORT, like 10.0.0.1:8476")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )
    if jax.process_index() != process_id:  # a TPU numbers its machines itself
        raise ValueError(
            f"process_id={process_id}: jax numbers this process {jax.process_index()}; give that"
        )
    return Processes(host.strip("[]"), process_id=process_id, num_processes=num_processes)


def _broadcast(data: bytes) -> bytes:
    """What process 0 passes, in every process."""
    array: Any = multihost_utils.broadcast_one_to_all(np.frombuffer(data, np.uint8))
    return bytes(np.asarray(array))


def _accept(listener: Listener, count: int) -> dict[int, Connection]:
    """Connections from so many processes that have the key."""
    connections: dict[int, Connection] = {}
    while len(connections) < count:
        try:
            connection = listener.accept()
        except (AuthenticationError, EOFError, ConnectionError):  # somebody else
            continue
        connections[connection.recv()] = connection
    return connections
