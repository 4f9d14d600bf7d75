"""Write a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from collapse_probe.errors import OutputError


class Numbers(Protocol):
    """What a run found and can write into an existing folder."""

    def write(self, inside: Path) -> None:
        """Write the files."""


class new_folder:
    """A context manager: fill a folder beside `target`, then move it there whole; on any error nothing is left.

    An existing target is replaced file by file, each replacement atomic; files that are not ours stay.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = Path(target)

    def __enter__(self) -> Path:
        check_writable(self.target)
        parent = self.target.absolute().parent
        self.created = [p for p in (parent, *parent.parents) if not p.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self.inside = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=parent))
        self.inside.chmod(0o755)
        return self.inside

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self.inside, ignore_errors=True)
            for folder in self.created:
                folder.rmdir()
        elif not self.target.exists():
            self.inside.rename(self.target)
        else:
            for path in sorted(self.inside.rglob("*")):
                goal = self.target / path.relative_to(self.inside)
                if path.is_dir():
                    goal.mkdir(exist_ok=True)
                else:
                    path.replace(goal)
            shutil.rmtree(self.inside)


def write_with_page(target: str | Path, numbers: Numbers, page: Callable[[Any, Path], object]) -> None:
    """Numbers and the page that `page(numbers, folder)` makes of them into the folder `target`.

    Numbers may have taken hours: where the page fails (or is interrupted) they are kept, and OutputError says how to try again.
    """
    failed: BaseException | None = None
    with new_folder(target) as inside:
        numbers.write(inside)
        held = set(inside.rglob("*"))
        try:
            page(numbers, inside)
        except BaseException as error:
            failed = error
            for path in sorted(set(inside.rglob("*")) - held, reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    again = f"`collapse-probe report {target}` draws it again"
    if isinstance(failed, KeyboardInterrupt):
        raise KeyboardInterrupt(f"the numbers are in {target}, without their page; {again}") from failed
    if isinstance(failed, Exception):
        text = f"the numbers are in {target}, but their page failed ({type(failed).__name__}: {failed})"
        raise OutputError(f"{text}; {again}") from failed
    if failed is not None:
        raise failed


def check_writable(target: str | Path) -> None:
    """Raise OutputError unless a folder can be made (or filled) at `target`; makes nothing."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"the output {target} is a file; expected a folder, or a path where one can be made")
    nearest = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"the output folder {target} cannot be written ({nearest} refuses); choose another with -o")
