"""From a data address to its pictures: what is there decides how it is read, not how it is called."""

from __future__ import annotations

import glob
import stat
from pathlib import Path

from collapse_probe.data.archives import in_tar, in_zip
from collapse_probe.data.folders import IRREGULAR, in_folder, in_pattern, in_remote_folder, one_picture
from collapse_probe.data.libraries import LIBRARIES, bundled, in_timm
from collapse_probe.data.lists import in_list
from collapse_probe.data.readers import Pictures, is_picture
from collapse_probe.data.streams.remote import RemoteFile, is_folder, is_remote, reaching, without_scheme
from collapse_probe.errors import DataError

EXPECTED = "a folder of images, a picture, a pattern in quotes, a .tar, a .zip, a list of paths, or bundled:photos"
PACKED = {  # how files begin that cannot be read picture by picture
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
}
ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
MAGIC_AT = 257  # of a tar: "ustar" there
BEGIN = 512  # bytes, a tar's first header


def pictures_at(address: str, split: str | None = None) -> Pictures:
    """The pictures at a data address that is no stream, see `open_data`. Raises DataError and UnknownNameError."""
    if not address.strip():
        raise DataError(f"the data address is empty (an unset variable?); expected {EXPECTED}")
    if is_remote(address) and not address.startswith("file://"):
        with reaching(address):
            return in_remote_folder(address, split) if is_folder(address) else _in_file(RemoteFile(address), split)
    address = without_scheme(address)
    path, mode = Path(address), 0
    why: Exception | None = None
    try:
        path = path.expanduser()
        mode = path.stat().st_mode
    except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; no home folder
        why = error
    if stat.S_ISDIR(mode):
        return in_folder(path, split)
    if not mode and address.partition("/")[0] in LIBRARIES:
        return in_timm(address, split)
    if split is not None:
        raise DataError(f"{address} has no splits, so {split!r} cannot be taken; leave --split out")
    if address.startswith("bundled:"):
        return bundled(address.removeprefix("bundled:"))
    if mode and not stat.S_ISREG(mode):
        raise DataError(f"{path} is {IRREGULAR}; expected {EXPECTED}")
    if mode:
        return _in_file(path)
    if not isinstance(why, (FileNotFoundError, NotADirectoryError)):
        raise DataError(f"{address} cannot be opened: {getattr(why, 'strerror', None) or why}")
    if glob.has_magic(address):
        return in_pattern(str(path))
    kind = "tar file" if path.suffix.lower() == ".tar" else "file" if path.suffix else "folder"
    raise DataError(f"there is no {kind} {address}; give {EXPECTED}")


def _in_file(file: Path | RemoteFile, split: str | None = None) -> Pictures:
    """The pictures in one file, by how it begins."""
    if split is not None:
        raise DataError(f"{file} has no splits, so {split!r} cannot be taken; leave --split out")
    try:
        with file.open("rb") as stream:
            begin = stream.read(BEGIN)
    except FileNotFoundError as error:
        raise DataError(f"there is nothing at {file}; expected {EXPECTED}") from error
    except OSError as error:
        raise DataError(f"{file} cannot be opened: {error.strerror or error}") from error
    packed = next((how for mark, how in PACKED.items() if begin.startswith(mark)), None)
    if packed:
        way = f"unpack it (tar -xf {file}) and give the folder, or pack the images into an uncompressed .tar or a .zip"
        raise DataError(f"{file} is {packed}, so that no picture in it can be read by itself; {way}")
    if begin.startswith(ZIP):
        return in_zip(file)
    if begin[MAGIC_AT:].startswith(b"ustar") or file.suffix.lower() == ".tar":
        return in_tar(file)
    if is_picture(begin):
        return one_picture(file)
    if file.suffix.lower() == ".zip":
        raise DataError(f"{file} is no whole zip: it does not begin as one; make it or fetch it again")
    return in_list(file)
