"""Finds the pictures in a folder, behind a pattern of files, and in one file: every real file once, and nothing unsaid."""

from __future__ import annotations

import glob
import itertools
import os
import stat
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from collapse_probe.data.readers import (
    HEAD,
    HIDDEN,
    SUFFIXES,
    LeftOut,
    Pictures,
    classes_of,
    is_hidden,
    is_picture,
    no_picture,
    suffix_of,
    written,
)
from collapse_probe.data.streams.remote import RemoteFile, files_below, is_folder, is_remote, public
from collapse_probe.errors import DataError
from collapse_probe.provenance import escaped

SPLITS: tuple[tuple[str, ...], ...] = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
    ("test", "testing"),
)
ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet: a file name and its class a line
IRREGULAR = "no regular file, but a pipe, a socket or a device"
Place = tuple[str, str]
"""A name, and the path to open."""


def open_file(paths: Sequence[str], index: int) -> IO[bytes]:
    """The file of a picture, by its path or its address."""
    path = paths[index]
    return RemoteFile(path).open() if is_remote(path) else Path(path).open("rb")


def kind_of_error(error: OSError) -> str:
    """Why a file or folder cannot be opened, the same words for every name."""
    return f"cannot be opened ({error.strerror or type(error).__name__})"


class Sieve:
    """Keeps the pictures among files, each real file once, and counts what it leaves out.

    Links must come after all files. A hard link is a file of its own: nothing tells which name is the first.
    """

    def __init__(self) -> None:
        self.left_out = LeftOut()
        self.places: list[Place] = []
        self.annotations: list[Place] = []
        self.hard_links = 0
        self._files: set[object] = set()

    def file(self, name: str, path: str, status: os.stat_result) -> None:
        """One file that is no link."""
        if not stat.S_ISREG(status.st_mode):
            self.left_out.add(name, IRREGULAR)
            return
        again = _identity(status) in self._files
        if again and status.st_nlink < 2:
            self.left_out.add(name, "a file that is read already, through a link")
            return
        if self._picture(name, path, status):
            self.hard_links += again

    def remote(self, name: str, address: str) -> None:
        """One file behind an address, which is not opened to look: its suffix decides."""
        if any(map(is_hidden, name.split("/"))):
            self.left_out.add(name, HIDDEN)
        elif suffix_of(name) in SUFFIXES:
            self.places.append((name, address))
        else:
            self.left_out.add(name, no_picture(name))

    def link(self, name: str, path: str) -> None:
        """One link to a file, or to nothing."""
        try:
            status = Path(path).stat()
        except FileNotFoundError:
            self.left_out.add(name, "a link to nothing")
        except OSError as error:
            self.left_out.add(name, kind_of_error(error))
        else:
            if _identity(status) in self._files:
                self.left_out.add(name, "a link to a file that is read already")
            elif not stat.S_ISREG(status.st_mode):
                self.left_out.add(name, IRREGULAR)
            else:
                self._picture(name, path, status)

    def _picture(self, name: str, path: str, status: os.stat_result) -> bool:
        self._files.add(_identity(status))
        if name.rpartition("/")[2] == ANNOTATIONS:
            self.annotations.append((name, path))
            return False
        if suffix_of(name) not in SUFFIXES:
            try:
                with Path(path).open("rb") as stream:
                    known = is_picture(stream.read(HEAD))
            except OSError as error:
                self.left_out.add(name, kind_of_error(error))
                return False
            if not known:
                self.left_out.add(name, no_picture(name))
                return False
        self.places.append((name, path))
        return True

    def pictures(self) -> Pictures:
        """The pictures, sorted by name, with their classes."""
        names = written(sorted(name for name, _ in self.places))
        paths = tuple(path for _, path in sorted(self.places))
        labels, class_names, notes = classes_of(names, self._annotated())
        if self.hard_links:
            notes += (f"{self.hard_links:,} names are hard links to a file that another name stands for; each is an image",)
        return Pictures(names, partial(open_file, paths), labels, class_names, left_out=self.left_out, notes=notes)

    def _annotated(self) -> dict[str, str]:
        """The classes that Tiny-ImageNet's files of annotations give, by the pictures' names."""
        classes: dict[str, str] = {}
        for name, path in self.annotations:
            folder = PurePosixPath(name).parent
            try:
                lines = Path(path).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            except OSError:
                continue
            rows = [line.split("\t") for line in lines]
            classes |= {escaped(str(folder / "images" / row[0])): row[1] for row in rows if len(row) > 1}
        return classes


def walk(root: Path, sieve: Sieve) -> None:
    """Give the sieve every file below `root`, also through links, but no folder twice, none above it and no hidden one."""
    seen: set[object] = {_identity(root.stat())}
    folders: list[Place] = [("", str(root))]
    links_to_folders: list[Place] = []
    links: list[Place] = []
    while folders or links_to_folders:
        if not folders:  # links wait until all real folders are read
            name, path = links_to_folders.pop(0)
            reason = _no_way(Path(path), seen)
            if reason:
                sieve.left_out.add(f"{name}/", reason)
            else:
                folders.append((name, path))
            continue
        name, path = folders.pop()
        try:
            with os.scandir(path) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            sieve.left_out.add(f"{name or '.'}/", f"a folder that {kind_of_error(error)}")
            continue
        for entry in entries:
            inner = f"{name}/{entry.name}" if name else entry.name
            if is_hidden(entry.name):
                sieve.left_out.add(inner + "/" * entry.is_dir(follow_symlinks=False), HIDDEN)
            elif entry.is_symlink():
                (links_to_folders if _leads_to_folder(entry) else links).append((inner, entry.path))
            else:
                try:
                    status = entry.stat(follow_symlinks=False)
                    if not status.st_ino:  # Windows leaves the number out of a listing
                        status = Path(entry.path).lstat()
                except OSError as error:
                    sieve.left_out.add(inner, kind_of_error(error))
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    sieve.file(inner, entry.path, status)
                elif _identity(status) in seen:
                    sieve.left_out.add(f"{inner}/", "a folder that is read already, through a link")
                else:
                    seen.add(_identity(status))
                    folders.append((inner, entry.path))
    for name, path in sorted(links):
        sieve.link(name, path)


def _identity(status: os.stat_result) -> object:
    """What is the same for two names of one file; of a file system that does not number its files, never."""
    return (status.st_dev, status.st_ino) if status.st_ino else object()


def _leads_to_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:  # a circle, or a folder without permission on the way
        return False


def _no_way(link: Path, seen: set[object]) -> str:
    """Why a link to a folder is not followed; empty, and the folder among those seen, where it is."""
    target, here = os.path.realpath(link), os.path.realpath(link.parent)
    if f"{here}{os.sep}".startswith(f"{target.rstrip(os.sep)}{os.sep}"):
        return "a link to a folder above it"
    identity = _identity(link.stat())
    if identity in seen:
        return "a link to a folder that is read already"
    seen.add(identity)
    return ""


def in_folder(root: Path, split: str | None = None) -> Pictures:
    """The pictures below `root`, sorted by relative path: of FORMATS by their suffix, or by how the file begins.

    A picture's class is the folder that it lies in, see `classes_of`. `split` is a subfolder of that name or of the usual other
    names. Raises DataError for no folder or no picture.
    """
    if split:
        names = (split, *next((same for same in SPLITS if split in same), ()))
        inner = next((root / name for name in names if (root / name).is_dir()), None)
        if inner is None:
            raise DataError(f"{root} has no folder for the split {split!r}; leave --split out, or name the folder itself")
        root = inner
    sieve = Sieve()
    walk(root, sieve)
    return _some(sieve, f"the folder {root}")


def _some(sieve: Sieve, where: str) -> Pictures:
    if not sieve.places:
        raise DataError(f"{where} holds no image{first_reasons(sieve.left_out)}")
    return sieve.pictures()


def first_reasons(left_out: LeftOut) -> str:
    """What there was instead of pictures, for a message; the suffixes that are read where there was nothing."""
    notes = left_out.notes()
    if not notes:
        return f" ({', '.join(sorted(SUFFIXES))})"
    return f": {'; '.join(notes[:3])}" + f"; and {len(notes) - 3} more reasons" * (len(notes) > 3)


def in_pattern(pattern: str) -> Pictures:
    """The pictures among the files that match a pattern, named from its first folder without a wildcard on.

    Raises DataError where there is none.
    """
    parts = Path(pattern).parts
    base = str(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts)))
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  # Path.glob takes hidden files too
    if not matches:
        raise DataError(f"no file matches {pattern}; in quotes, * stands for a part of a name and ** for any folders")
    sieve = Sieve()
    sift(((os.path.relpath(path, base), path) for path in matches), sieve)
    return _some(sieve, f"what matches {pattern}")


def sift(places: Iterable[Place], sieve: Sieve) -> None:
    """Give the sieve these files, links last; folders among them are left out. A path may be an address."""
    links = []
    for name, path in places:
        if is_remote(path):
            sieve.remote(name, path)
            continue
        try:
            status, is_folder = Path(path).lstat(), Path(path).is_dir()
        except OSError as error:
            sieve.left_out.add(name, kind_of_error(error))
            continue
        if is_folder:
            sieve.left_out.add(f"{name}/", "a folder, where files are asked for")
        elif stat.S_ISLNK(status.st_mode):
            links.append((name, path))
        else:
            sieve.file(name, path, status)
    for name, path in links:
        sieve.link(name, path)


def one_picture(file: Path | RemoteFile) -> Pictures:
    """One file that is a picture, without a label."""
    path = file.address if isinstance(file, RemoteFile) else str(file)
    return Pictures(written([file.name]), partial(open_file, (path,)))


def in_remote_folder(address: str, split: str | None = None) -> Pictures:
    """The pictures below a folder behind an address, as in a local one, but by their suffix alone: no file is opened to look.

    Raises DataError for no picture.
    """
    address = address.rstrip("/")
    if split:
        names = (split, *next((same for same in SPLITS if split in same), ()))
        inner = next((f"{address}/{name}" for name in names if is_folder(f"{address}/{name}")), None)
        if inner is None:
            raise DataError(f"{public(address)} has no folder for the split {split!r}; leave --split out")
        address = inner
    sieve = Sieve()
    for name, path in files_below(address).items():
        sieve.remote(name, path)
    return _some(sieve, f"the folder {public(address)}")
