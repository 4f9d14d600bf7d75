"""Who of a group of processes has failed, was killed or is gone with its machine, told to all others at once.

Every process keeps a connection to the first one for this alone. The kernel closes the connection of a process that ends,
whatever ended it, and probes a machine that is silent. So a process that is only slow (it computes, waits for a disk, or is
stopped by a debugger) is never taken for a dead one, and no clock is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from collapse_probe.errors import CollapseProbeError, ProcessError
from collapse_probe.processes.launchers import Launch

JOIN_SECONDS = 300.0
PROBES = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 25_000}
"""A machine that answers nothing for 25 s is gone."""
PROMPT, STUCK, SAVING, CLOSING = 5.0, 25.0, 300.0, 15.0
"""Seconds: until work that does not look up is interrupted; until a process that cannot be interrupted is ended; what it may
take to save its state; to leave the group.
"""
NUDGE = getattr(signal, "SIGURG", None)
"""The signal that wakes the main thread: of no consequence where nobody handles it. Windows has none."""


class Interruption(KeyboardInterrupt):
    """Raised in the middle of work that did not look up (see `Peers.check`) when another process had failed."""


@dataclass(frozen=True)
class Failure:
    """Why the group cannot go on; `interrupted` where a process was asked to end (Ctrl-C, SIGTERM)."""

    text: str
    interrupted: bool = False


class Peers:
    """The other processes of a group, from joining to leaving it.

    `post` and `look` write and read a value that all processes share under a name (None while there is none). Raises
    ProcessError where some do not come within JOIN_SECONDS.
    """

    def __init__(self, launch: Launch, post: Callable[[str, str], None], look: Callable[[str], str | None]) -> None:
        self.launch = launch
        self.failure: Failure | None = None
        self._known, self._raised, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._over, self._empty = threading.Event(), threading.Event()
        self._done = False
        self._handlers: dict[int, Any] = {}
        self._links: dict[socket.socket, str] = {}  # to whom each connection leads
        self.name = f"rank {launch.rank} of {launch.world} (on {platform.node()}, process {os.getpid()})"
        if launch.rank == 0:
            self._gather(post)
        else:
            self._greet(look)
        watch = self._watch_all if launch.rank == 0 else self._watch_first
        self._thread = threading.Thread(target=watch, name="peers", daemon=True)
        self._thread.start()
        if NUDGE is not None and threading.current_thread() is threading.main_thread():
            self._handlers[NUDGE] = signal.signal(NUDGE, self._interrupt)

    def _gather(self, post: Callable[[str, str], None]) -> None:
        """Accept a connection of every other process."""
        token, launch, until = secrets.token_hex(16), self.launch, time.monotonic() + JOIN_SECONDS
        missing = set(range(1, launch.world))
        with _server(launch.world) as server:
            post("peers", json.dumps({"port": server.getsockname()[1], "token": token, "name": self.name}))
            while missing:
                if time.monotonic() > until:
                    raise ProcessError(not_there(launch, sorted(missing)))
                with contextlib.suppress(OSError, ValueError, KeyError):  # a stranger, or a process that is gone again
                    link, _ = server.accept()
                    link.settimeout(10)
                    card = json.loads(_line(link))
                    if secrets.compare_digest(card["token"], token):
                        missing.remove(card["rank"])
                        self._links[_ready(link)] = card["name"]

    def _greet(self, look: Callable[[str], str | None]) -> None:
        """Connect to the first process."""
        launch, until = self.launch, time.monotonic() + JOIN_SECONDS
        while (content := look("peers")) is None:
            if time.monotonic() > until:
                raise ProcessError(not_there(launch, [0]))
            time.sleep(0.1)
        first = json.loads(content)
        try:
            link = socket.create_connection((launch.host, first["port"]), timeout=30)
        except OSError as error:
            raise ProcessError(
                f"{self.name} cannot reach {first['name']} at {launch.host}, port {first['port']} ({error}); the machines of a "
                "group must be able to connect to one another's ports"
            ) from error
        card = {"token": first["token"], "rank": launch.rank, "name": self.name}
        link.sendall(json.dumps(card).encode() + b"\n")
        self._links[_ready(link)] = first["name"]

    def _watch_all(self) -> None:
        """In the first process: until every other one is done, or the first failure, which all are told."""
        with selectors.DefaultSelector() as selector:
            said = dict.fromkeys(self._links, b"")
            for each in said:
                selector.register(each, selectors.EVENT_READ)
            while said:
                for key, _ in selector.select():
                    link: Any = key.fileobj
                    content = _received(link)
                    said[link] += content
                    if content:
                        continue
                    selector.unregister(link)
                    last = said.pop(link)
                    if last == b"done\n":
                        link.close()
                        continue
                    failure = _failure(last, self._links[link])
                    self._tell(failure)
                    self._fail(failure)
                    return
        self._empty.set()

    def _watch_first(self) -> None:
        """In every other process: until a failure is told, or the first process is gone."""
        [(link, name)] = self._links.items()
        content = b""
        while not content.endswith(b"\n") and (more := _received(link)):
            content += more
        if not self._done:
            self._fail(_failure(content, name))

    def _tell(self, failure: Failure) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.sendall(json.dumps(asdict(failure)).encode() + b"\n")

    def _fail(self, failure: Failure) -> None:
        """Have the main thread end: at its next `check`, else by an exception wherever it is, else with the process."""
        self.failure = failure
        self._known.set()
        if not self._raised.wait(PROMPT) and NUDGE in self._handlers:
            signal.pthread_kill(threading.main_thread().ident or 0, NUDGE)
        if not self._raised.wait(STUCK) or not self._leaving.wait(SAVING):
            _end(failure.text)

    def check(self) -> None:
        """Raise ProcessError where another process has failed."""
        if self.failure is not None:
            self._begin_to_end()
            raise ProcessError(self.failure.text)

    def _interrupt(self, number: int, frame: object) -> None:
        if self.failure is not None and not self._raised.is_set():
            self._begin_to_end()
            raise Interruption(self.failure.text)

    def _begin_to_end(self) -> None:
        """Let nothing disturb the main thread while it saves its work: torchrun now sends SIGTERM."""
        if threading.current_thread() is threading.main_thread() and not self._raised.is_set():
            self._raised.set()
            self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def explain(self, error: BaseException) -> None:
        """Raise ProcessError where `error`, raised by a collective operation, comes of another process that has failed."""
        self._known.wait(PROBES["TCP_USER_TIMEOUT"] / 1000)
        if self.failure is not None:
            self._begin_to_end()
            raise ProcessError(self.failure.text) from error

    def leave(self, error: BaseException | None) -> None:
        """Tell the others how this process ended its work. Raises ProcessError where it was another's failure that ended it.

        The first process stays until all others have left.
        """
        interrupted = _comes_of_an_interrupt(error)
        if interrupted:
            self._known.wait(2)  # torchrun ends all processes when one has failed
        own = isinstance(error, CollapseProbeError)
        if self.failure is None and error is not None and not _is_exit(error, interrupted):
            why = "was interrupted" if interrupted else f"failed: {_sentence(error)}"
            failure = Failure(f"{self.name} {why}", interrupted)
            self._leave_with(json.dumps(asdict(failure)).encode() + b"\n", failure)
        elif self.failure is None:
            self._leave_with(b"done\n", None)
        failure_of_another = self.failure
        if failure_of_another is not None and not own and not (interrupted and failure_of_another.interrupted):
            self._begin_to_end()
            raise ProcessError(failure_of_another.text) from error

    def _leave_with(self, content: bytes, failure: Failure | None) -> None:
        self._done = True
        if self.launch.rank > 0:
            for link in self._links:
                with contextlib.suppress(OSError):
                    link.sendall(content)
                    link.shutdown(socket.SHUT_WR)
        elif failure is not None:
            self._tell(failure)
        else:
            while not self._empty.wait(0.2) and self.failure is None:
                pass

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Inside the `with` the group is left; a process that hangs there is ended."""
        self._raised.set()
        self._leaving.set()
        threading.Thread(target=self._end_unless_over, name="peers, closing", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()
            for link in self._links:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
            self._thread.join(2)
            for link in self._links:
                link.close()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _end_unless_over(self) -> None:
        if not self._over.wait(CLOSING):
            _end(f"{self.name} hangs while it leaves the group" if self.failure is None else self.failure.text)


def _server(world: int) -> socket.socket:
    """A socket that listens on a free port of every interface."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return _patient(socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world))
    return _patient(socket.create_server(("", 0), backlog=world))


def _patient(server: socket.socket) -> socket.socket:
    server.settimeout(0.5)
    return server


def _line(link: socket.socket) -> bytes:
    """The first line that comes, of a kilobyte at most."""
    content = b""
    while not content.endswith(b"\n") and len(content) < 1024 and (more := link.recv(1024)):
        content += more
    return content


def _ready(link: socket.socket) -> socket.socket:
    """The connection without a time limit, but with probes of the machine at its other end."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link


def _received(link: socket.socket) -> bytes:
    """What has come; nothing where the connection is closed or broken."""
    try:
        return link.recv(1 << 16)
    except OSError:
        return b""


def _failure(content: bytes, name: str) -> Failure:
    """What a process said last, or that it is gone."""
    if content.endswith(b"\n"):
        return Failure(**json.loads(content))
    return Failure(f"{name} is gone: it was killed (out of memory?), crashed, or its machine cannot be reached any more")


def _sentence(error: BaseException) -> str:
    """The kind and the text of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"


def _is_exit(error: BaseException, interrupted: bool) -> bool:
    """Whether the program has come to its end with an exit code (click's Exit, or SystemExit)."""
    return not interrupted and type(error).__name__ in ("Exit", "SystemExit")


def _comes_of_an_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C or a signal from outside ended the work."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None and not isinstance(error, Interruption)


def not_there(launch: Launch, missing: list[int]) -> str:
    ranks = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    unset = {"srun": "SLURM_PROCID", "mpirun": "OMPI_COMM_WORLD_RANK"}.get(launch.launcher, "RANK and WORLD_SIZE")
    return (
        f"rank {launch.rank} of {launch.world} waited {JOIN_SECONDS:.0f} s at {launch.host}, port {launch.port}, for rank "
        f"{ranks}: start all {launch.world} processes ({launch.launcher}), with one MASTER_ADDR and MASTER_PORT; or unset "
        f"{unset}, and this process works alone"
    )


def _end(text: str) -> None:
    """End this process, which cannot end itself."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
    os._exit(1)
