"""Runs that are killed while an output folder takes their files: afterwards it holds the old run or the new one, whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import fuzz_commands
from fuzz_commands import without_figures
from fuzz_findings import KINDS
from fuzz_trials import REFUSED, Kind

from collapse_probe.errors import OutputError
from collapse_probe.files import MANIFEST, Numbers, settle, tidy, write_with_page
from collapse_probe.results.findings import Findings

CALLS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "fsync", "open", "link", "symlink")
MOST_CALLS = 160
OWN = "notes.txt"  # of the folder's owner
STOPPED = 9
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALLED = 0.2  # of the trials: an analysis that is signalled, rather than a folder whose n-th call is the last
Files = dict[str, bytes]


@dataclass(frozen=True)
class Copied(Numbers):
    """Results that are written as they were before, byte by byte."""

    kind: Any
    files: Files
    run: dict[str, Any]

    def write(self, inside: Path) -> None:
        """Write the files."""
        for name, content in self.files.items():
            (inside / name).parent.mkdir(parents=True, exist_ok=True)
            (inside / name).write_bytes(content)


def drawn(numbers: Any, inside: Path) -> None:
    """A page with two figures that say whose they are."""
    text = f"of {numbers.run['id']}\n" * 400
    (inside / "report.html").write_text(text)
    (inside / "figures").mkdir()
    for name in ("a", numbers.run["id"]):
        (inside / "figures" / f"{name}.png").write_text(text)


def files_of(place: Path) -> Files:
    """The content of every file by its name, without the owner's and those that list others."""
    names = [path for path in place.rglob("*") if path.is_file() and path.name not in (OWN, MANIFEST)]
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in names}


def runs_of(place: Path) -> list[Copied]:
    """Two runs of every kind."""
    runs = []
    for name, (make, kind) in KINDS.items():
        for number in (1, 2):
            made = make()
            made = replace(made, run={**made.run, "id": f"{name}-{number}"})
            runs.append(Copied(kind, files_of(made.save(place / made.run["id"])), made.run))
    return runs


def check_whole(place: Path) -> dict[str, Any]:
    """Raise AssertionError unless the folder holds exactly the files that its list names, as they were; returns the list."""
    listed: dict[str, Any] = json.loads((place / MANIFEST).read_text())
    hashes = {**listed["numbers"], **listed["page"]}
    here = {name: hashlib.sha256(content).hexdigest() for name, content in files_of(place).items()}
    below = {name for name in hashes if name.endswith(f"/{MANIFEST}")}
    assert here == {name: digest for name, digest in hashes.items() if name not in below}, "a mixture"
    return listed


def check_one_run(place: Path, *runs: Copied) -> str:
    """The id of the one of these runs that the folder holds, whole; or REFUSED."""
    refusal = ""
    try:
        settle(place)
        (kind,) = {run.kind for run in runs if any("/" not in name and (place / name).exists() for name in _documents(run))}
        kind.load(place)
    except OutputError as error:
        refusal = str(error)
    if refusal:
        assert "again" in refusal or "remove" in refusal, f"does not say what to do: {refusal}"
        return REFUSED
    here, found = files_of(place), check_whole(place)["run"]
    (run,) = [run for run in runs if run.run["id"] == found]
    page = {name: content for name, content in here.items() if name not in run.files}
    assert {name: here.get(name) for name in run.files} == run.files, "numbers of another run"
    assert all(run.run["id"].encode() in content for content in page.values()), "a page of another run"
    return str(found)


def _documents(run: Copied) -> list[str]:
    return [name for name in run.files if name in KINDS]


def check_clean(place: Path, new: Numbers) -> None:
    """Raise AssertionError where the next run leaves anything hidden, or is not whole."""
    tidy(place)
    write_with_page(place, new, drawn)
    check_whole(place)
    left = [path for path in place.parent.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]
    assert not left, f"left: {left}"
    assert sorted(path.name for path in place.parent.iterdir()) == ["out"]


def _stop_at(random: Random) -> None:
    """End this process at its n-th call that changes or opens a file: before it, or after it."""
    last, after, done = random.randrange(1, MOST_CALLS), random.random() < 0.5, [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == last and not after:
                os._exit(STOPPED)
            value = real(*arguments, **options)
            if done[0] == last:
                os._exit(STOPPED)
            return value

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    io.open = counted(io.open)  # type: ignore[assignment]


def _in_child(work: Callable[[], object]) -> int:
    """The process id of a child that does the work and ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    return child


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stopped_commit(random: Random, folder: Path, runs: list[Copied]) -> str:
    """A run comes into a folder of another and dies at some call; sometimes so does the next that reads it."""
    old, new, third = random.sample(runs, 3)
    place = folder / "out"
    write_with_page(place, old, drawn)
    (place / OWN).write_text("mine")

    def work() -> None:
        _stop_at(random)
        write_with_page(place, new, drawn)

    code = _ended(_in_child(work))
    assert code in (0, STOPPED), f"exit code {code}"
    while random.random() < 0.4:

        def settled() -> None:
            _stop_at(random)
            settle(place)

        assert _ended(_in_child(settled)) in (0, STOPPED)
    found = check_one_run(place, old, new)
    assert code or found == new.run["id"], "a run that ended is not there"
    assert (place / OWN).read_text() == "mine"
    check_clean(place, third)
    return "refused" if found == REFUSED else "old" if found == old.run["id"] else "new"


def signalled_analysis(random: Random, folder: Path, place: Path, seconds: float, run: Copied) -> str:
    """An analysis over a folder of another run is signalled at some time."""
    out, said = folder / "out", folder.parent / f"{folder.name}.txt"
    shutil.copytree(place / "results", out)
    before = check_whole(out)["run"]

    def work() -> None:
        with said.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(handle, "w"), write_through=True) for handle in (1, 2))
        words = [word for word in fuzz_commands.BASES["analyze"] if word != "--json=full"]
        fuzz_commands.main(
            ["analyze", *(str(place / word) if word == "photos" else word for word in words), "-o", str(out), "-q"]
        )

    child, kind = _in_child(work), random.choice(SIGNALS)
    time.sleep(random.uniform(0, seconds))
    os.kill(child, kind)
    code, text = _ended(child), said.read_text() if said.exists() else ""
    assert "Traceback" not in text, text[-1500:]
    if code not in (0, -kind):
        assert code == 128 + kind, f"exit code {code} after {kind.name}: {text[-500:]}"
        assert len([line for line in text.splitlines() if line.startswith("interrupted")]) == 1, text[-500:]
    settle(out)
    Findings.load(out)
    found = check_whole(out)["run"]
    assert code or found != before, "a run that ended is not there"
    check_clean(out, run)
    return f"{kind.name}: {'old' if found == before else 'new'}"


def prepare(place: Path) -> tuple[Path, float, list[Copied]]:
    """What an analysis needs, the seconds that one takes, and runs."""
    fuzz_commands.prepare(place)
    start = time.monotonic()
    with without_figures():  # a second time, without what is only read once
        assert fuzz_commands.said_of(*fuzz_commands.analysis_of(place), "-o", place / "results").code == 0
    return place, time.monotonic() - start, runs_of(place)


def trial(random: Random, folder: Path, made: tuple[Path, float, list[Copied]]) -> str:
    """One run that is stopped."""
    place, seconds, runs = made
    if random.random() >= SIGNALLED:
        return stopped_commit(random, folder, runs)
    with without_figures():
        return signalled_analysis(random, folder, place, seconds * 1.2, random.choice(runs))


KIND = Kind(300, prepare, trial, seconds=60)
