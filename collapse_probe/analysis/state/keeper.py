"""Keeps the state of a measurement on disk while it runs, and takes up what an earlier run left there."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from collapse_probe.analysis.state.files import (
    FOLDER,
    StateFile,
    at_work,
    remove_states,
    state_files,
    state_path,
    write_state,
)
from collapse_probe.data.coverage import Coverage
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import InUseError, OutOfTimeError, OutputError, SettingError, StateError

SAVE_EVERY = 300.0
"""Seconds between two states on disk."""


class Storable(Protocol):
    """What can be kept: a Probe, or anything with a state that adds."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, and the text "manifest"."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take over a state."""

    def merge(self, other: Mapping[str, Any], /) -> None:
        """Add a state."""

    @property
    def read(self) -> int:
        """How many images were read."""

    @property
    def images(self) -> int:
        """How many of them were measured."""


@dataclass(frozen=True)
class Saving:
    """Where the states of a run lie (`folder`), how many seconds lie between two (`every`), after how many seconds the run
    stops by itself (`most_seconds`, from `started` on), and whether it takes up what is there (`resume`). `stem` names the
    run, or a part of it.
    """

    folder: Path
    every: float = SAVE_EVERY
    most_seconds: float | None = None
    resume: bool = False
    stem: str = "run"
    started: float = 0.0

    def of(self, stem: str) -> Saving:
        """The same for another part of the run."""
        return replace(self, stem=stem)


def saving_of(
    folder: str | Path | None, every: float = SAVE_EVERY, most_seconds: float | None = None, resume: bool = False
) -> Saving | None:
    """How a run that started now stores its state; None without a folder. Raises SettingError for times below 0."""
    for what, seconds in (("save_every", every), ("max_time", most_seconds)):
        if seconds is not None and not seconds >= 0:
            raise SettingError(f"{what} is a number of seconds from 0 up, not {seconds}")
    if folder is None:
        if resume:
            raise SettingError("resume needs the folder with the state of the run before: give save_to")
        return None
    return Saving(Path(folder), every, most_seconds, resume, started=time.monotonic())


class Keeper:
    """Stores a measurement's state now and then; without a `saving` it does nothing."""

    def __init__(self, saving: Saving | None, say: Callable[[str], None]) -> None:
        self.saving, self.say = saving, say
        self.rank, self.world = rank_and_world()
        self.generation, self.whole = 1, False
        self._saved = time.monotonic()
        self._lock, self._held = contextlib.ExitStack(), False
        self._warned = False

    def take_up(self, measured: Storable) -> Coverage | None:
        """Put what an earlier run left into `measured`, of several processes each its own, and say which images were read by
        all. Raises StateError where that is of another measurement, OutputError where something is there that was not asked
        for.
        """
        if self.saving is None:
            return None
        folder, stem = self.saving.folder, self.saving.stem
        files = gathered(state_files(folder, stem) if self.rank == 0 else [])[0]
        if files and not self.saving.resume:
            read = sum(each.facts["read"] for each in files)
            raise OutputError(
                f"{folder} holds the state of a run that was stopped after {read:,} images: go on with it (--resume), "
                f"or remove {folder / FOLDER}"
            )
        if not files:
            return None
        self._begin()
        self.generation = max(each.facts["generation"] for each in files)
        same = {(each.facts["world"], each.facts["generation"]) for each in files} == {(self.world, self.generation)}
        done = Coverage()
        for each in files:
            done.merge(each.coverage)
            if each.facts["rank"] == self.rank if same else self.rank == 0:
                self.whole = bool(each.facts["whole"])
                try:
                    measured.merge(each.read())
                except StateError as error:
                    raise StateError(f"{each.path} cannot be taken up: {error}") from error
        if not same:
            self._start_anew(measured, files)
        self.say(f"going on with the state in {folder / FOLDER}: {len(done):,} images were read before")
        return done

    def _start_anew(self, measured: Storable, files: Sequence[StateFile]) -> None:
        """Store what other numbers of processes left, which the first process holds now, in one file, and remove theirs."""
        self.generation, self.whole = self.generation + 1, self.rank == 0
        if self.whole:
            self.save(measured)
            for each in files:
                each.path.unlink(missing_ok=True)
        gathered(None)

    def after_batch(self, measured: Storable) -> None:
        """Store the state where it is time. Raises OutOfTimeError where the run's own time is over."""
        saving = self.saving
        if saving is None:
            return
        now = time.monotonic()
        if now - self._saved >= saving.every:
            try:
                self.save(measured)
            except InUseError:
                raise
            except OutputError as error:
                if not self._warned:
                    self.say(f"the state cannot be stored ({error}); the run goes on, and the state before stays")
                self._warned = True
                self._saved = now
        if saving.most_seconds is not None and now - saving.started >= saving.most_seconds:
            raise OutOfTimeError(f"the run's time ({saving.most_seconds:g} s) is over")

    def all_read(self, measured: Storable) -> None:
        """Store the state of a run that takes long once more, as that of a process that has read all its images."""
        saving = self.saving
        if saving is not None and (self._held or time.monotonic() - saving.started >= saving.every):
            with contextlib.suppress(OutputError):  # which was said before
                self.save(measured, complete=True)

    def save(self, measured: Storable, complete: bool = False) -> Path:
        """Store the state now."""
        assert self.saving is not None
        self._begin()
        saving = self.saving
        path = state_path(saving.folder, saving.stem, self.generation, self.rank, self.world)
        facts = {"stem": saving.stem, "generation": self.generation, "rank": self.rank, "world": self.world}
        write_state(path, measured.state_dict(), **facts, whole=self.whole, complete=complete, read=measured.read)
        self._saved = time.monotonic()
        return path

    @contextlib.contextmanager
    def watching(self, measured: Storable) -> Iterator[None]:
        """Stores the state where the work inside is broken off, and says so."""
        try:
            yield
        except BaseException as error:
            if self.saving is not None and measured.images:
                self._save_last(measured, error)
            raise
        finally:
            self._lock.close()

    def _save_last(self, measured: Storable, error: BaseException) -> None:
        try:
            path = self.save(measured)
        except (OutputError, StateError) as problem:
            self.say(f"the state could not be stored: {problem}")
            return
        said = f"the state after {measured.read:,} images is in {path}; --resume goes on with it"
        if isinstance(error, (KeyboardInterrupt, OutOfTimeError)) and len(error.args) <= 1:
            error.args = ("; ".join([*map(str, error.args), said]),)
        else:
            self.say(said)

    def done(self) -> None:
        """The results are written: the state is not needed any more."""
        if self.saving is not None and self.rank == 0:
            remove_states(self.saving.folder, self.saving.stem)

    def _begin(self) -> None:
        if self.saving is not None and not self._held:
            self._lock.enter_context(at_work(self.saving.folder, self.saving.stem, self.rank))
            self._held = True


def all_in_time(over: OutOfTimeError | None) -> None:
    """Wait for all processes; raise OutOfTimeError in all of them where one ran out of time."""
    stopped = next((error for error in gathered(over) if error is not None), None)
    if stopped is not None:
        raise stopped


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Inside, a signal that would end the run (Ctrl-C, SIGTERM, SIGHUP, the end of another process) waits until the block is
    left; a second one does not.

    In other threads than the main one, and for signals that are ignored, nothing changes.
    """
    before: dict[int, Any] = {}
    came: list[int] = []

    def wait(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not the main thread
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGURG"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            harmless = (signal.SIG_IGN, None, *((signal.SIG_DFL,) if name == "SIGURG" else ()))
            if number is not None and signal.getsignal(number) not in harmless:
                before[number] = signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])
