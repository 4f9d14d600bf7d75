"""Finds the pictures in a tar or a zip, which is never unpacked, and reads them where they lie."""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import posixpath
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, Generic, TypeVar

from collapse_probe.data.folders import first_reasons
from collapse_probe.data.readers import (
    HEAD,
    HIDDEN,
    SUFFIXES,
    LeftOut,
    Pictures,
    Unreadable,
    classes_of,
    is_hidden,
    is_picture,
    no_picture,
    suffix_of,
    written,
)
from collapse_probe.data.streams.remote import RemoteFile
from collapse_probe.errors import DataError

MOST_BYTES = 2**30  # of one picture in an archive, unpacked
REPLACED = "replaced by another file of the same name in the archive"
MOST_LINKS = 40  # that lead from one to the next, as in Linux
BLOCK = tarfile.BLOCKSIZE
MAGIC = b"ustar"  # in every header of a tar since 1988
LOCAL = b"PK\3\4"  # before every file in a zip, of a header of LOCAL_SIZE bytes and a name
LOCAL_SIZE = 30
File = Path | RemoteFile
Part = tuple[int, int, int]
"""A part of a file in a tar: where in the file it begins, how many bytes, where they lie in the archive."""
TarPlace = tuple[int, tuple[Part, ...]]
"""The bytes of a file in a tar, and its parts: one, or several of a sparse file; what is in none is zero."""
P = TypeVar("P")


@dataclass
class Members(Generic[P]):
    """The files and links of one archive by name, as they come; of those with one name the last counts, as in unpacking."""

    left_out: LeftOut
    files: dict[str, P]
    links: dict[str, str]
    hard: set[str]

    @classmethod
    def none(cls, left_out: LeftOut) -> Members[P]:
        """No member yet."""
        return cls(left_out, {}, {}, set())

    def add(self, name: str, place: P | None = None, target: str | None = None, hard: bool = False) -> None:
        """A file at a place, or a link to a target, which is a path in the archive."""
        if name in self.files or name in self.links:
            self.left_out.add(name, REPLACED)
        self.files.pop(name, None)
        self.links.pop(name, None)
        self.hard.discard(name)
        if target is not None:
            self.links[name] = target
            self.hard |= {name} if hard else set()
        elif place is not None:
            self.files[name] = place

    def pictures(self, head: Callable[[P], bytes]) -> dict[str, P]:
        """The places of the pictures by name: each file once, besides hard links, which are names of their own.

        `head` gives the first bytes of the file at a place.
        """
        found = {name: place for name, place in self.files.items() if self._wanted(name, place, head)}
        taken = set(map(id, found.values()))
        for name in sorted(self.links):
            place = self._followed(name)
            if place is None:
                target = f"{self.links[name]}/"
                inside = any(other.startswith(target) for other in self.files)
                self.left_out.add(
                    name, "a link to a folder that is read already" if inside else "a link to nothing in the archive"
                )
            elif id(place) in taken and name not in self.hard:
                self.left_out.add(name, "a link to a file that is read already")
            elif self._wanted(name, place, head):
                taken.add(id(place))
                found[name] = place
        return found

    def _followed(self, name: str) -> P | None:
        for _ in range(MOST_LINKS):
            if name not in self.links:
                break
            name = self.links[name]
        return self.files.get(name)

    def _wanted(self, name: str, place: P, head: Callable[[P], bytes]) -> bool:
        if any(map(is_hidden, name.split("/"))):
            self.left_out.add(name, HIDDEN)
            return False
        if suffix_of(name) in SUFFIXES or is_picture(head(place)):
            return True
        self.left_out.add(name, no_picture(name))
        return False


def clean(name: str) -> str:
    """The name of a member: relative, whatever it says, and nothing but a name."""
    return posixpath.normpath(name).lstrip("/")


def _collected(places: Mapping[str, Any], left_out: LeftOut, kind: str, file: File, read: Callable[..., IO[bytes]]) -> Pictures:
    if not places:
        raise DataError(f"the {kind} {file} holds no image{first_reasons(left_out)}")
    sorted_places = dict(sorted(places.items()))
    names = written(sorted_places)
    labels, class_names, notes = classes_of(names)
    opener = partial(read, file, tuple(sorted_places.values()))
    return Pictures(names, opener, labels, class_names, left_out=left_out, notes=notes)


def in_tar(file: File) -> Pictures:
    """The pictures in an uncompressed tar and in tars inside it, sorted by path; classes as in a folder.

    Raises DataError for a damaged or cut one (headers that do not fit their checksum, members or an end mark that are missing)
    and for one without a picture.
    """
    left_out = LeftOut()
    try:
        with _opened(file) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            places = _in_tar(stream, size, 0, "", left_out)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    except DataError as error:
        raise DataError(f"cannot read {file} as an uncompressed tar: {error}; make it or fetch it again") from error
    return _collected(places, left_out, "tar", file, _open_in_tar)


def _in_tar(stream: IO[bytes], size: int, start: int, folder: str, left_out: LeftOut) -> dict[str, TarPlace]:
    """Paths and places of the pictures in the tar in `stream`, which begins at `start` of the file; DataError if it is damaged.

    A tar inside counts as a folder of its stem.
    """
    members = Members[TarPlace].none(left_out)
    inner: dict[str, TarPlace] = {}
    with _damage_told(), tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as tar:
        before = -1
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= before:
                raise DataError(f"the header at byte {before} has an impossible size")
            before = tar.offset
            path = str(PurePosixPath(folder, clean(member.name)))
            if member.isdir():
                continue
            if member.islnk() or member.issym():
                target = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(member.name), member.linkname)
                members.add(path, target=str(PurePosixPath(folder, clean(target))), hard=member.islnk())
            elif not member.isfile():
                left_out.add(path, "no regular file, but a pipe, a socket or a device")
            elif member.size > MOST_BYTES and not path.lower().endswith(".tar"):
                left_out.add(path, f"a file of more than {MOST_BYTES:,} bytes in an archive")
            elif not path.lower().endswith(".tar") or any(map(is_hidden, path.split("/"))):
                members.add(path, place=(member.size, _parts(member, start)))
            elif member.issparse():
                left_out.add(path, "a sparse archive in an archive")
            elif content := tar.extractfile(member):
                inside = str(PurePosixPath(path).with_suffix(""))
                found = _in_tar(content, member.size, start + member.offset_data, inside, left_out)
                _count_replaced(inner, found, left_out)
                inner |= found
        _check_end(stream, tar.offset, size, left_out, folder)

    with _damage_told():
        own = members.pictures(lambda place: _content(stream, place, HEAD, start))
    _count_replaced(inner, own, left_out)
    return {**inner, **own}


def _count_replaced(earlier: Collection[str], later: Collection[str], left_out: LeftOut) -> None:
    for name in sorted(set(earlier) & set(later)):
        left_out.add(name, REPLACED)


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    """What tarfile raises for a damaged archive becomes a DataError."""
    try:
        yield
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, Unreadable) as error:
        raise DataError(" ".join(str(error).split()) or type(error).__name__) from error


def _check_end(stream: IO[bytes], end: int, size: int, left_out: LeftOut, folder: str) -> None:
    """Nothing if the block at `end`, after the last member, is the end mark; DataError if it is missing or a damaged header."""
    stream.seek(end)
    block = stream.read(BLOCK)
    if len(block) < BLOCK:
        raise DataError(f"it ends at byte {size:,} without an end mark: it is cut")
    if block.strip(b"\0"):
        raise DataError(f"the header at byte {end:,} is damaged")
    while block and not block.strip(b"\0"):
        block = stream.read(BLOCK)
    more = bool(block) and _is_header(block)
    if block and not more:
        left_out.add(f"{folder or '.'}/", "bytes behind the end mark of a tar")
    while block and not more:
        more = MAGIC in block
        part = stream.read(1 << 20)
        block = block[-len(MAGIC) :] + part if part else b""
    if more:
        what = "another archive begins behind its end mark (tar -i unpacks both)"
        raise DataError(f"{what}, or a damaged member looks like that mark")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _parts(member: tarfile.TarInfo, start: int) -> tuple[Part, ...]:
    if not member.issparse():
        return ((0, member.size, start + member.offset_data),)
    parts, at = [], start + member.offset_data
    sparse: Any = member.sparse  # typed as a number
    for offset, length in sparse:
        parts.append((offset, length, at))
        at += length
    return tuple(parts)


def _content(stream: IO[bytes], place: TarPlace, most: int, start: int = 0) -> bytes:
    """The first `most` bytes of a file in a tar."""
    size = min(place[0], most)
    content = bytearray(size)
    for offset, length, at in place[1]:
        wanted = min(length, size - offset)
        if wanted > 0:
            stream.seek(at - start)
            part = stream.read(wanted)
            if len(part) < wanted:
                raise Unreadable("the archive ends inside it")
            content[offset : offset + wanted] = part
    return bytes(content)


def _open_in_tar(file: File, places: tuple[TarPlace, ...], index: int) -> IO[bytes]:
    """A picture's bytes, through a handle of its own: any number of processes may read at once."""
    with _opened(file) as stream:
        return io.BytesIO(_content(stream, places[index], MOST_BYTES))


def _opened(file: File) -> IO[bytes]:
    return file.open("rb", places=True) if isinstance(file, RemoteFile) else file.open("rb")


def in_zip(file: File) -> Pictures:
    """The pictures in a zip, sorted by path; classes as in a folder. Encrypted files and links to nothing are left out.

    Raises DataError for a damaged one, and for one without a picture.
    """
    left_out = LeftOut()
    members = Members[zipfile.ZipInfo].none(left_out)
    try:
        with _zipped(file) as archive:
            for member in archive.infolist():
                _add_member(archive, member, members)
            _count_unlisted(archive, left_out)
            places = members.pictures(lambda member: _head(archive, member))
    except NotImplementedError as error:
        raise DataError(f"{file} is packed in a way that Python cannot unpack: {error}; unpack it, or pack it again") from error
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DataError(f"{file} is no whole zip: {error}; make it or fetch it again") from error
    return _collected(places, left_out, "zip", file, _open_in_zip)


def _add_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, members: Members[zipfile.ZipInfo]) -> None:
    name = member.filename
    if member.create_system == 0 and "/" not in name:  # some programs on Windows write their own separator
        name = name.replace("\\", "/")
    path, mode = clean(name), member.external_attr >> 16
    if name.endswith("/"):
        if member.file_size:
            members.left_out.add(f"{path}/", "a folder by its name, with the bytes of a file: its name is damaged")
    elif member.flag_bits & 1:
        members.left_out.add(path, "encrypted")
    elif member.file_size > MOST_BYTES:
        members.left_out.add(path, f"a file of more than {MOST_BYTES:,} bytes in an archive")
    elif stat.S_ISLNK(mode):
        target = os.fsdecode(_head(archive, member, 4096))
        members.add(path, target=clean(posixpath.join(posixpath.dirname(path), target)))
    else:
        members.add(path, place=member)


def _count_unlisted(archive: zipfile.ZipFile, left_out: LeftOut) -> None:
    """Count files that lie between those in the list of a zip: its list is cut, or it is several zips in one."""
    gaps, at = [], 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        gaps.append((at, member.header_offset))
        name = member.orig_filename.encode() if member.flag_bits & 0x800 else member.orig_filename
        at = member.header_offset + LOCAL_SIZE + len(name) + len(member.extra) + member.compress_size
    gaps = [(start, end) for start, end in (*gaps, (at, archive.start_dir)) if end - start > LOCAL_SIZE]
    if not gaps or archive.fp is None:
        return
    for start, end in gaps:
        with _bytes_of(archive.fp, end) as content:
            while (start := content.find(LOCAL, start, end) + 1) > 0:
                left_out.add(f"byte {start - 1:,}", "a file in the zip that its list of files does not name")


@contextlib.contextmanager
def _bytes_of(stream: IO[bytes], end: int) -> Iterator[mmap.mmap | bytes]:
    """The bytes of a file up to `end`: of a local one where they lie."""
    if isinstance(stream, io.BufferedReader):
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield content
    else:
        stream.seek(0)
        yield stream.read(end)


def _head(archive: zipfile.ZipFile, member: zipfile.ZipInfo, count: int = HEAD) -> bytes:
    """The first bytes of a file in a zip; none where it is damaged or packed in an unknown way."""
    try:
        with archive.open(member) as stream:
            return stream.read(count)
    except Exception:  # each way of packing has errors of its own
        return b""


def _open_in_zip(file: File, places: tuple[zipfile.ZipInfo, ...], index: int) -> IO[bytes]:
    """A picture's bytes; of a file that does not begin as a picture nothing more is unpacked."""
    with _zip(file, os.getpid()).open(places[index]) as stream:
        head = stream.read(HEAD)
        if not is_picture(head):
            raise Unreadable("it does not begin as a picture of a format that is read")
        return io.BytesIO(head + stream.read(MOST_BYTES))


@functools.lru_cache(maxsize=4)
def _zip(file: File, process: int) -> zipfile.ZipFile:
    """The archive, opened once in each process: its list of files is long, and a handle cannot be shared."""
    return _zipped(file)


def _zipped(file: File) -> zipfile.ZipFile:
    return zipfile.ZipFile(file.open("rb", places=True) if isinstance(file, RemoteFile) else file)
