"""Files behind addresses (s3://, gs://, hf://, https://, memory://), which the library fsspec opens and lists."""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from collapse_probe.errors import DataError
from collapse_probe.provenance import escaped

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
BLOCK = 1 << 16  # bytes that are fetched at least, where a file is read in places
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs"}
PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "ssh": "paramiko", "sftp": "paramiko", "webhdfs": "requests"}


def is_remote(address: str) -> bool:
    """Whether this is an address of fsspec rather than a path."""
    return ADDRESS.match(address) is not None


def without_scheme(address: str) -> str:
    """An address file:// as the path that it is; any other as it stands."""
    return url2pathname(urlsplit(address).path) if address.startswith("file://") else address


def public(address: str) -> str:
    """An address as it may be stored and shown: without a user's name, password or signature.

    >>> public("https://me:secret@host/a.tar?signature=x"), public("photos/a?.jpg")
    ('https://host/a.tar', 'photos/a?.jpg')
    """
    if not is_remote(address):
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("?")[0].partition("/")
    return escaped(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
    """Turns what fsspec and its file systems raise into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        package = PACKAGES.get(address.partition("://")[0], "")
        way = f"pip install {package}" if package else f"install what it names ({error})"
        raise DataError(f"{public(address)} needs a package that is not installed; {way}") from error
    except FileNotFoundError as error:
        raise DataError(f"there is nothing at {public(address)}") from error
    except Exception as error:  # each file system has errors of its own
        why = escaped(" ".join(str(error).split()))[:200].replace(address, public(address))
        way = "; a public bucket needs FSSPEC_S3_ANON=true" if type(error).__name__ == "NoCredentialsError" else ""
        raise DataError(f"{public(address)} cannot be read ({type(error).__name__}: {why}){way}") from error


def _system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path there; made anew in every process."""
    from fsspec.core import url_to_fs

    system, path = url_to_fs(address)
    return system, path


@dataclass(frozen=True)
class RemoteFile:
    """One file behind an address; as a text that address as it may be shown."""

    address: str

    def __str__(self) -> str:
        return public(self.address)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return posixpath.basename(public(self.address))

    @property
    def suffix(self) -> str:
        """The suffix of its name."""
        return posixpath.splitext(self.name)[1]

    def beside(self, path: str) -> str:
        """The address of another file, by its path from this one's folder."""
        base = self.address.partition("?")[0].rpartition("/")[0]
        scheme, _, rest = base.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, path))}"

    def open(self, mode: str = "rb", places: bool = False) -> IO[bytes]:
        """The file, to be read from its beginning on; or in `places`, of which little more than asked for is fetched.

        Raises what the file system raises; there, for a server that gives no parts of files, a ValueError that says so.
        """
        system, path = _system(self.address)
        stream: IO[bytes] = system.open(path, mode, **({"block_size": BLOCK} if places else {}))
        return stream


def is_folder(address: str) -> bool:
    """Whether an address is that of a folder; on the web only where it has no suffix, for everything is a page there."""
    system, path = _system(address)
    if address.startswith(("http://", "https://")) and posixpath.splitext(posixpath.basename(path.rstrip("/")))[1]:
        return False
    return bool(system.isdir(path))


def files_below(address: str, depth: int | None = None) -> dict[str, str]:
    """The addresses of all files below a folder (`depth` 1: in it) by their relative paths, sorted."""
    system, root = _system(address)
    root = root.rstrip("/")
    found = system.find(root, maxdepth=depth)
    names = {str(path).removeprefix(f"{root}/").lstrip("/"): system.unstrip_protocol(path) for path in found}
    return dict(sorted(names.items()))


def matching(pattern: str) -> list[str]:
    """The addresses that match a pattern, sorted."""
    system, path = _system(pattern)
    return sorted(system.unstrip_protocol(each) for each in system.glob(path))
