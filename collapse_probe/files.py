"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from collapse_probe.errors import OutputError

PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that then takes its place at `path` in one move, on disk before it is seen.

    Killed at any moment, `path` has the old content or all of the new. Raises OutputError.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        with contextlib.suppress(OSError):  # not every file system lets a folder be synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}; free space, or choose another folder") from error


def read_document(folder: str | Path, file: str, *, schema: str, refusal: str, command: str) -> dict[str, Any]:
    """The content of `file` in `folder`, as `command` writes it.

    OutputError where there is none (`folder`, then `refusal`, such as "holds no sweep") or it has another schema.
    """
    path = Path(folder) / file
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder} {refusal} ({error}); expected {file} as {command} writes it") from error
    if content.get("schema") != schema:
        raise OutputError(f"{path} has schema {content.get('schema')!r}; expected {schema!r}: {command} again")
    return content


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, of JSON types alone, for `read_document`; ValueError for NaN and infinity. Raises OutputError."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda stream: stream.write(text.encode()))


class Numbers(ABC):
    """Results that live in a folder of their own."""

    @abstractmethod
    def write(self, inside: Path) -> None:
        """Write the files into an existing folder, without any guard."""

    def save(self, folder: str | Path) -> Path:
        """Write the files into `folder`, new or there; all of it or nothing."""
        with new_folder(folder) as inside:
            self.write(inside)
        return Path(folder)


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yields a folder beside `target` to be filled, then moves it there whole; on any error nothing is left.

    An existing target is replaced file by file, each replacement atomic; files that are not ours stay.
    """
    check_writable(target)
    target = Path(target)
    parent = target.absolute().parent
    created = [p for p in (parent, *parent.parents) if not p.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    inside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    inside.chmod(0o755)
    try:
        yield inside
    except BaseException:
        shutil.rmtree(inside, ignore_errors=True)
        for folder in created:
            folder.rmdir()
        raise
    if not target.exists():
        inside.rename(target)
        return
    for path in sorted(inside.rglob("*")):
        goal = target / path.relative_to(inside)
        if path.is_dir():
            goal.mkdir(exist_ok=True)
        else:
            path.replace(goal)
    shutil.rmtree(inside)


def write_with_page(target: str | Path, numbers: Numbers, page: Callable[[Any, Path], object]) -> None:
    """Numbers and the page that `page(numbers, folder)` makes of them into the folder `target`.

    Numbers may have taken hours: where the page fails (or is interrupted) they are kept, and OutputError says how to try again.
    """
    failed: BaseException | None = None
    with new_folder(target) as inside:
        numbers.write(inside)
        written = set(inside.rglob("*"))
        try:
            page(numbers, inside)
        except BaseException as error:
            failed = error
            for path in sorted(set(inside.rglob("*")) - written, reverse=True):
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
