"""Disks that are full: one line that says so, the old run whole, nothing left; or the new numbers whole without their page."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

from fuzz_kills import Copied, check_one_run, drawn, files_of, runs_of
from fuzz_trials import Kind

from collapse_probe.errors import OutputError
from collapse_probe.files import write_with_page


@contextlib.contextmanager
def short_files(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: writing more fails in the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mounted(folder: Path, size: int) -> bool:
    """Whether a disk of `size` bytes is now mounted at `folder`; only the superuser can."""
    if os.geteuid():
        return False
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def trial(random: Random, folder: Path, runs: list[Copied]) -> str:
    """One run that finds no room beside another."""
    old, new = random.sample(runs, 2)
    sizes = [len(content) for content in new.files.values()]
    disk = folder / "disk"
    disk.mkdir()
    own = random.random() < 0.5 and mounted(disk, 2**21)
    try:
        place = disk / "out"
        write_with_page(place, old, drawn)
        if own:
            used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
            size = used + 4096 * random.randrange(2 * (sum(sizes) // 4096 + len(sizes)) + 8)
            subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True, capture_output=True)
        error = None
        try:
            with contextlib.nullcontext() if own else short_files(random.randrange(2 * max(sizes))):
                write_with_page(place, new, drawn)
        except OutputError as raised:
            error = raised
        left = [path for path in disk.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial")]
        assert not left, f"left: {left}"
        found = check_one_run(place, old, new)
        page = files_of(place).keys() - (new if found == new.run["id"] else old).files.keys()
        if error is None:
            assert found == new.run["id"]
            assert page
            return "room enough"
        text = str(error)
        assert "\n" not in text
        assert str(disk) in text
        kept = "the numbers are in" in text
        assert found == (new if kept else old).run["id"], text
        assert bool(page) != kept, "a page that is not of these numbers, or none"
        return "new numbers, no page" if kept else "old run"
    finally:
        if own:
            subprocess.run(["umount", str(disk)], check=True)


KIND = Kind(100, runs_of, trial)
