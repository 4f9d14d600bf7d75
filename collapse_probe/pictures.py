"""Finds the pictures in a folder or a tar file, with their names and classes, and decodes one of them."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image

from collapse_probe.errors import DataError

SPLITS: tuple[tuple[str, ...], ...] = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
    ("test", "testing"),
)


@dataclass(frozen=True)
class Pictures:
    """Names, class labels (or None) and a way to read: `read(i)` gives picture i in RGB or raises.

    `read` can be pickled, so that loader processes can have it. Without labels `class_names` is empty.
    """

    names: tuple[str, ...]
    read: Callable[[int], Image.Image]
    labels: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    bundled: bool = False


def decode(stream: IO[bytes]) -> Image.Image:
    """One picture as RGB, as timm and torchvision do it: convert("RGB"), no rotation by EXIF, alpha dropped.

    One difference: 16-bit greys are scaled to 8 bits, where convert("RGB") would clip nearly all of them to
    white. Raises what Pillow raises for a damaged or truncated picture, and DecompressionBombWarning or
    DecompressionBombError for one of more than Image.MAX_IMAGE_PIXELS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture: Image.Image = Image.open(stream)
        if picture.mode.startswith("I;16"):
            picture = picture.point(lambda value: value / 257).convert("L")
        return picture.convert("RGB")


@dataclass(frozen=True)
class _FolderReader:
    root: Path
    names: tuple[str, ...]

    def __call__(self, index: int) -> Image.Image:
        with (self.root / self.names[index]).open("rb") as stream:
            return decode(stream)


@dataclass(frozen=True)
class _TarReader:
    file: Path
    places: tuple[tuple[int, int], ...]  # offset and length of each picture, in bytes

    def __call__(self, index: int) -> Image.Image:
        offset, length = self.places[index]
        with self.file.open("rb") as stream:
            stream.seek(offset)
            return decode(io.BytesIO(stream.read(length)))


def in_folder(root: Path, split: str | None = None) -> Pictures:
    """The pictures below `root`, sorted by relative path; extensions as timm has them.

    A picture's class is the folder that it lies in; there are labels only if every picture lies in one.
    `split` is a subfolder of that name or of the usual other names. Raises DataError for no folder or no
    picture.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give a folder of images, a .tar, or bundled:photos")
    root = _split_folder(root, split) if split else root
    extensions = _extensions()
    found = [
        Path(folder, file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if PurePosixPath(file).suffix.lower() in extensions
    ]
    if not found:
        raise DataError(f"the folder {root} holds no image ({', '.join(sorted(extensions))})")
    names = tuple(sorted(found))
    return Pictures(names, _FolderReader(root, names), *_classes(names))


def in_tar(file: Path) -> Pictures:
    """The pictures in an uncompressed tar and in tars inside it, sorted by path; classes as in a folder.

    Each is read by its offset with a handle of its own, so that any number of processes may read at once.
    Raises DataError for no file, a damaged or compressed one, or no picture.
    """
    if not file.is_file():
        raise DataError(f"there is no tar file {file}")
    try:
        with file.open("rb") as stream:
            members = dict(_tar_members(stream, "", 0, _extensions()))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"cannot read {file} as an uncompressed tar: {error}") from error
    if not members:
        raise DataError(f"the tar {file} holds no image ({', '.join(sorted(_extensions()))})")
    names = tuple(sorted(members))
    return Pictures(names, _TarReader(file, tuple(members[name] for name in names)), *_classes(names))


def _tar_members(stream: IO[bytes], folder: str, start: int, extensions: set[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Path, and absolute offset and length, of each picture; a tar inside counts as a folder of its stem."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(folder, member.name)
            if not member.isfile():
                continue
            if path.suffix.lower() in extensions:
                yield str(path), (start + member.offset_data, member.size)
            elif path.suffix.lower() == ".tar" and (inner := tar.extractfile(member)):
                yield from _tar_members(inner, str(path.with_suffix("")), start + member.offset_data, extensions)


def _extensions() -> set[str]:
    from timm.data.readers import img_extensions

    known: Any = img_extensions  # untyped
    return set(known.get_img_extensions(as_set=True))


def _split_folder(root: Path, split: str) -> Path:
    same = next((names for names in SPLITS if split in names), (split,))
    for name in (split, *same):
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root} has no folder for the split {split!r}; leave --split out, or name the folder itself")


def _classes(names: Sequence[str]) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Labels by the name of the innermost folder, numbered in timm's order (natural: 2 before 10)."""
    from timm.utils.misc import natural_key

    folders = [PurePosixPath(name).parent.name for name in names]
    if not all(folders):
        return None, ()
    classes = sorted(set(folders), key=natural_key)
    index = {name: i for i, name in enumerate(classes)}
    return tuple(index[folder] for folder in folders), tuple(classes)
