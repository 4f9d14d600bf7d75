"""Reads the shards of a webdataset: tars of samples, each the files of one key, never unpacked and never listed."""

from __future__ import annotations

import contextlib
import glob
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from tarfile import HeaderError, ReadError
from typing import IO, Any

from collapse_probe.data.archives import MAGIC, MOST_BYTES, clean
from collapse_probe.data.readers import FORMATS
from collapse_probe.data.streams.remote import RemoteFile, files_below, matching, public, reaching, without_scheme
from collapse_probe.data.streams.stream import Record, Shards, Wanted
from collapse_probe.errors import DataError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ENDINGS = tuple(suffix[1:] for suffix in " ".join(FORMATS.values()).split())
"""How pictures are called in a sample; where there are several, the first of these counts."""
INFO = ("_info.json", "info.json")  # of timm: the names of the shards of each split
PIPE = "pipe:"


def webdataset_shards(where: str, split: str | None) -> Shards:
    """The shards at a folder, a pattern (`shard-{000..019}.tar`, `*.tar`, several with `::`), a list of shards or one tar.

    Of a folder all tars in it, or those that timm's `_info.json` lists for the split. Raises DataError where there is none.
    """
    urls, notes = _urls(without_scheme(where), split)
    if not urls:
        raise DataError(
            f"there is no shard at {where}; expected a folder of .tar files, or a pattern as shard-{{000..019}}.tar"
        )
    twice = next((url for url in urls if urls.count(url) > 1), None) if len(set(urls)) < len(urls) else None
    if twice is not None:
        raise DataError(f"the shard {twice} is given twice")
    missing = [url for url in urls if _is_local(url) and not Path(url).is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(urls)} shards are not there, the first: {missing[0]}")
    return Shards(_names(urls), partial(_records, tuple(urls)), notes=tuple(notes))


def _urls(where: str, split: str | None) -> tuple[list[str], list[str]]:
    from webdataset.shardlists import expand_urls

    if where.startswith(PIPE) or "::" in where or "{" in where:
        _no_split(where, split)
        return [url for pattern in expand_urls(where) for url in _matches(pattern)], []
    if not _is_local(where) and not where.lower().endswith(TARS) and not glob.has_magic(where):
        with reaching(where):
            return _in_remote_folder(where, split), []
    if not _is_local(where) or glob.has_magic(where):
        _no_split(where, split)
        return _matches(where), []
    path = Path(where).expanduser()
    if path.is_dir():
        return _in_folder(path, split)
    _no_split(where, split)
    if not path.is_file():
        raise DataError(f"there is no shard and no folder of shards {where}")
    if path.name.lower().endswith(TARS):
        return [str(path)], []
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where} is neither a tar nor a list of shards: {error}") from error
    listed = [line for line in lines if line and not line.startswith("#")]
    commands = [line for line in listed if line.startswith(PIPE)]
    if commands:
        raise DataError(f"{where} lists a command ({commands[0][:60]}); only an address that you type yourself may be one")
    return [str(path.parent / line) if _is_local(line) else line for line in listed], []


def _no_split(where: str, split: str | None) -> None:
    if split is not None:
        raise DataError(f"{where} names its shards, so that the split {split!r} cannot be taken; leave --split out")


def _in_folder(folder: Path, split: str | None) -> tuple[list[str], list[str]]:
    info = next((folder / name for name in INFO if (folder / name).is_file()), None)
    if info is not None:
        try:
            splits: dict[str, Any] = json.loads(info.read_text(encoding="utf-8"))["splits"]
            name = split or ("validation" if "validation" in splits else next(iter(splits)))
            listed = [str(folder / each) for each in splits[name]["filenames"]] if name in splits else None
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise DataError(f"{info} does not list the shards of its splits: {type(error).__name__}: {error}") from error
        if listed is None:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
        return listed, [f"the split {name} of {', '.join(splits)}"] if split is None and len(splits) > 1 else []
    inner = folder if split is None else folder / split
    if not inner.is_dir():
        raise DataError(f"{folder} has neither a list of its splits ({INFO[0]}) nor a folder {split!r}; leave --split out")
    found: list[Path] = sorted(
        (path for path in inner.iterdir() if path.name.lower().endswith(TARS)), key=lambda path: _natural(path.name)
    )
    return [str(path) for path in found if not path.name.startswith(".")], []


def _in_remote_folder(address: str, split: str | None) -> list[str]:
    inner = address.rstrip("/") + (f"/{split}" if split else "")
    found = files_below(inner, depth=1)
    return [found[name] for name in sorted(found, key=_natural) if name.lower().endswith(TARS) and "/" not in name]


def _natural(name: str) -> list[int | str]:
    """What sorts 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _is_local(url: str) -> bool:
    return "://" not in url and not url.startswith(PIPE)


def _matches(url: str) -> list[str]:
    if not glob.has_magic(url.partition("?")[0] if not _is_local(url) else url):
        return [str(Path(url).expanduser()) if _is_local(url) else url]
    if not _is_local(url):
        with reaching(url):
            return [url] if url.startswith(PIPE) else matching(url)
    return sorted(glob.glob(str(Path(url).expanduser())))  # noqa: PTH207  # an absolute pattern too


def _names(urls: Sequence[str]) -> tuple[str, ...]:
    """The names of the shards: their stems, as of a tar in a tar; more of their paths where stems repeat."""
    paths = [PurePosixPath(public(url).partition("://")[2] if "://" in url else url) for url in urls]
    stems = [posixpath.basename(str(path)).partition(".")[0] for path in paths]
    if len(set(stems)) == len(stems):
        return tuple(stems)
    common = posixpath.commonpath([path.parent for path in paths]) if len({path.is_absolute() for path in paths}) == 1 else ""
    names = [str(path.relative_to(common)) if common else str(path) for path in paths]
    return tuple(names if len(set(names)) == len(names) else map(public, urls))


class _Header(tarfile.TarInfo):
    """A header that is damaged or cut is an error anywhere; tarfile itself takes it for the end, but for the first one."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            kind = type(error).__name__
            if kind == "EOFHeaderError":  # the end mark
                raise
            if kind == "EmptyHeaderError":
                raise ReadError("it ends without an end mark: it is cut") from error
            raise ReadError(f"the header at byte {tarfile.offset:,} is damaged: {error}") from error


def _records(urls: tuple[str, ...], shard: int, wanted: Wanted) -> Iterator[Record]:
    """The samples of one shard: files that follow each other and share a key, which is the name up to its first dot."""
    from webdataset.tariterators import base_plus_ext

    url, sample, place = urls[shard], _Sample("", False), -1
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_open(url))
        plain = _is_local(url) and url.lower().endswith(".tar")
        tar: Any = stack.enter_context(tarfile.open(fileobj=stream, mode="r:" if plain else "r|*", tarinfo=_Header))
        while (member := tar.next()) is not None:
            tar.members = []  # else it keeps all
            key, ending = base_plus_ext(clean(member.name))
            if member.isdir() or key is None or (key.startswith("__") and key.endswith("__")):
                continue
            if place < 0 or key != sample.key:
                if place >= 0:
                    yield sample.record()
                place += 1
                sample = _Sample(key, wanted(place))
            sample.add(tar, member, ending)
        while rest := tar.fileobj.read(1 << 20):
            if MAGIC in rest:
                raise ReadError("another archive begins behind its end mark (tar -i unpacks both), or it is damaged there")
    if place >= 0:
        yield sample.record()


def _open(url: str) -> IO[bytes]:
    if url.startswith(PIPE):
        from webdataset.gopen import gopen

        stream: IO[bytes] = gopen(url)
        return stream
    if _is_local(url):
        return Path(url).open("rb")
    with reaching(url):
        return RemoteFile(url).open()


class _Sample:
    """The files of one key, as they come; of its pictures the one that counts."""

    def __init__(self, key: str, wanted: bool) -> None:
        self.key, self.wanted, self.endings = key, wanted, list[str]()
        self.label: int | None = None
        self.content: bytes | None = None
        self.picture = self.reason = ""
        self.rank: tuple[bool, int] | None = None

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> None:
        """One more file; the content of a picture, and the class, are read where the sample is wanted."""
        self.endings.append(ending)
        last = ending.lower().rpartition(".")[2]
        if ending.lower() == "cls" and self.wanted and member.isreg():
            text = _content(tar, member).strip()
            self.label = int(text) if text.isdigit() else None
        if last not in ENDINGS:
            return
        rank = ("." in ending, ENDINGS.index(last))
        if self.rank is None or rank < self.rank:
            self.rank, self.picture, self.content, self.reason = rank, f"{self.key}.{ending}", None, ""
            if not member.isreg():
                self.reason = "a link, or no regular file, which cannot be read from a stream"
            elif member.size > MOST_BYTES:
                self.reason = f"a file of more than {MOST_BYTES:,} bytes in an archive"
            elif self.wanted:
                self.content = _content(tar, member)

    def record(self) -> Record:
        """The sample as a record: named as its picture would be if it were unpacked."""
        if self.rank is None:
            return Record(self.key, reason=f"no picture among its files ({', '.join(self.endings[:5])})")
        return Record(self.picture, self.content, self.label, self.reason)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
