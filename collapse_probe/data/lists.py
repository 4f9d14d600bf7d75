"""Finds the pictures that a CSV or a text file lists, with their labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from collapse_probe.data.folders import Sieve, open_file, sift
from collapse_probe.data.readers import SUFFIXES, Pictures, suffix_of, written
from collapse_probe.data.streams.remote import RemoteFile, is_remote, public, without_scheme
from collapse_probe.errors import DataError
from collapse_probe.provenance import escaped

PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path", "name")
LABELS = ("label", "labels", "class", "class_name", "class_id", "target", "targets", "category", "y")
Row = list[str]


def in_list(file: Path | RemoteFile) -> Pictures:
    """The pictures that a text file lists, one a line, in its order; relative paths start at the file's own folder.

    A line is a path or an address, alone or with a label behind a comma, tab, semicolon or blank. Of a first line that names
    columns, one of PATHS and one of LABELS are taken. Labels that are whole numbers are class numbers as they stand, others are
    numbered in their natural order. Files that are not there, that are no pictures or that come twice are left out and counted;
    what lies behind an address is taken by its suffix, and whether it is there shows when it is read. Raises DataError for what
    is no text, and where no line leads to a picture.
    """
    with file.open("rb") as stream:
        begin = stream.read(4096)
        if b"\0" in begin:
            raise DataError(f"{file} is neither a picture, an archive nor a text that lists pictures")
        content = begin + stream.read()
    rows = _rows(content.decode("utf-8-sig", "surrogateescape").splitlines(), file)
    path_at, label_at, notes, header = _columns(rows, None if isinstance(file, RemoteFile) else file.parent)
    rows = rows[header:]
    sieve, labels = Sieve(), dict[str, str]()
    places, seen = [], set()
    for row in rows:
        path = row[path_at].strip() if len(row) > path_at else ""
        name = public(path) if is_remote(path) else os.path.normpath(path) if path else "(an empty path)"
        where = _where(file, path) if path else None
        if where is None:
            sieve.left_out.add(name, "listed, but there is no such file")
        elif name in seen:
            sieve.left_out.add(name, "listed more than once; the first line counts")
        else:
            seen.add(name)
            places.append((name, where))
            labels[name] = row[label_at].strip() if label_at is not None and len(row) > label_at else ""
    sift(places, sieve)
    if not sieve.places:
        reasons = "; ".join(sieve.left_out.notes()[:3]) or "it has no lines"
        raise DataError(f"{file} leads to no image ({reasons}); expected a path a line, relative paths from its own folder on")
    order = {name: place for place, name in enumerate(labels)}
    kept = sorted(sieve.places, key=lambda place: order[place[0]])
    numbers, class_names, more = _numbered([labels[name] for name, _ in kept], label_at is not None)
    return Pictures(
        written(name if is_remote(name) else PurePosixPath(Path(name)).as_posix() for name, _ in kept),
        partial(open_file, tuple(path for _, path in kept)),
        numbers,
        class_names,
        left_out=sieve.left_out,
        notes=(*notes, *more),
    )


def _where(file: Path | RemoteFile, path: str) -> str | None:
    """The path or address that a line leads to; None where there is no such file."""
    if is_remote(path):
        return without_scheme(path)
    if isinstance(file, RemoteFile):
        return file.beside(path)
    return str(file.parent / path) if os.path.lexists(file.parent / path) else None


def _rows(lines: Sequence[str], file: Path | RemoteFile) -> list[Row]:
    """The lines in columns; empty ones and those that begin with # are passed over."""
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    first = lines[0] if lines else ""
    mark = next((mark for mark in ("\t", ",", ";") if mark in first), None)
    if mark is None:
        return [_halves(line) for line in lines]
    try:
        return list(csv.reader(lines, delimiter=mark))
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as a list of pictures: {error}") from error


def _halves(line: str) -> Row:
    """A path, and the label behind its last blank, if that is not a part of the path."""
    words = line.strip().rsplit(None, 1)
    return words if len(words) == 2 and _suffix(words[0]) and not _suffix(words[1]) else [line.strip()]


def _suffix(text: str) -> bool:
    return suffix_of(text.strip()) in SUFFIXES


def _is_file(folder: Path | None, cell: str) -> bool:
    return folder is not None and (folder / cell.strip()).is_file()


def _columns(rows: Sequence[Row], folder: Path | None) -> tuple[int, int | None, list[str], int]:
    """The columns of paths and of labels (or None), notes, and how many lines of head there are."""
    first = [cell.strip() for cell in rows[0]] if rows else []
    pathlike = [at for at, cell in enumerate(first) if _suffix(cell) or (cell and _is_file(folder, cell))]
    if pathlike or len(rows) < 2:
        path = pathlike[0] if pathlike else 0
        others = [at for at in range(len(first)) if at != path]
        label = others[0] if others else None
        said = (
            f"the list has {len(first)} columns without names: column {path + 1} was read as path, {(label or 0) + 1} as label"
        )
        return path, label, [said] if len(others) > 1 else [], 0
    names = [cell.lower() for cell in first]
    known = [names.index(name) for name in PATHS if name in names]
    second = [at for at, cell in enumerate(rows[1]) if _suffix(cell) or _is_file(folder, cell)]
    if not known and not second and len(first) == 1:
        return 0, None, [], 0
    path = known[0] if known else (second or [0])[0]
    label = next((names.index(name) for name in LABELS if name in names and names.index(name) != path), None)
    notes = []
    if label is None and len(first) > 1:
        names = [escaped(cell) for cell in first]
        notes = [f"the list has the columns {', '.join(names)}: none is called label or class, so there are no labels"]
    return path, label, notes, 1


def _numbered(labels: Sequence[str], asked: bool) -> tuple[tuple[int, ...] | None, tuple[str, ...], tuple[str, ...]]:
    """Class numbers, the names of the classes (none where labels are numbers), and notes."""
    from timm.utils.misc import natural_key

    missing = sum(not label for label in labels)
    if missing:
        note = f"{missing:,} of {len(labels):,} listed images have no label, so that none is used"
        return None, (), (note,) if asked else ()
    if all(label.isascii() and label.isdecimal() for label in labels):
        return tuple(map(int, labels)), (), ()
    classes = sorted(set(labels), key=natural_key)
    index = {name: number for number, name in enumerate(classes)}
    return tuple(index[label] for label in labels), written(classes), ()
