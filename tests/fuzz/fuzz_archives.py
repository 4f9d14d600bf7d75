"""Damaged archives: refused by name, or every file that is whole in them is read as it is or counted as left out.

What is whole is found here by looking for headers at every byte, without tarfile's or zipfile's help.
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from random import Random

import numpy as np
from fuzz_trials import READ, Kind, mutated, refused
from PIL import Image

from collapse_probe.data.images import open_data
from collapse_probe.errors import DataError

Files = list[tuple[str, bytes]]
FILES = b"\x000123467"  # of a tar: files, links, pipes and devices, but no folders


def archives(_: Path) -> list[tuple[str, bytes]]:
    """A suffix and the bytes of archives of every kind."""
    files = {f"{'ab'[i % 2]}/{i}.png": _png(i) for i in range(5)} | {"notes.txt": b"notes", ".hidden.png": _png(9)}
    files |= {f"é/{'long/' * 22}6.png": _png(6)}
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for mode in ("w", "w:gz"):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode=mode, format=form) as tar:
                tar.addfile(_info("a", type=tarfile.DIRTYPE))
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w", format=form) as below:
                    below.addfile(_info("7.png", size=len(_png(7))), io.BytesIO(_png(7)))
                tar.addfile(_info("c.tar", size=len(inner.getvalue())), io.BytesIO(inner.getvalue()))
                for name, content in files.items():
                    tar.addfile(_info(name, size=len(content)), io.BytesIO(content))
                tar.addfile(_info("b/soft.png", type=tarfile.SYMTYPE, linkname="../a/0.png"))
                tar.addfile(_info("b/hard.png", type=tarfile.LNKTYPE, linkname="a/2.png"))
                tar.addfile(_info("b/nothing.png", type=tarfile.SYMTYPE, linkname="gone.png"))
                tar.addfile(_info("b/pipe.png", type=tarfile.FIFOTYPE))
            made.append((".tar.gz" if mode == "w:gz" else ".tar", stream.getvalue()))
    for packed in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", packed) as archive:
            archive.mkdir("a")
            for name, content in files.items():
                archive.writestr(name, content)
        made.append((".zip", stream.getvalue()))
    return made


def _png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5 + seed, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _info(name: str, **facts: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(info, key, value)
    return info


def whole_in_tar(data: bytes) -> Files:
    """Name and content of every file and link whose header fits its checksum and that has all its bytes, wherever it begins."""
    found, at = [], data.find(b"ustar")
    while at >= 0:
        start = at - 257
        block = data[max(start, 0) : start + 512]
        try:
            right = len(block) == 512 and int(block[148:156].split(b"\0")[0], 8) == 256 + sum(block[:148]) + sum(block[156:])
            size = int(block[124:136].strip(b" \0"), 8) if right else 0
        except ValueError:
            right = False
        content = data[start + 512 : start + 512 + size] if right else b""
        if right and block[156:157] in FILES and len(content) == size:
            found.append((block[:100].split(b"\0")[0].decode("utf-8", "replace"), content))
        at = data.find(b"ustar", at + 1)
    return [(name, content) for name, content in found if not name.endswith(".tar")]  # which is its members


def whole_in_zip(data: bytes) -> Files:
    """Name and content of every file with a local header and all of its bytes, whose CRC is right, wherever it begins."""
    found, at = [], data.find(b"PK\3\4")
    while at >= 0:
        header = data[at : at + 30]
        if len(header) == 30:
            flags, how, crc, packed, names, more = struct.unpack("<6xHH4xII4xHH", header)
            start = at + 30 + names + more
            try:
                content = zlib.decompress(data[start : start + packed], -15) if how == 8 else data[start : start + packed]
            except zlib.error:
                content = b"\0damaged"
            if zlib.crc32(content) == crc and not flags & 1:
                found.append((data[at + 30 : at + 30 + names].decode("utf-8", "replace"), content))
        at = data.find(b"PK\3\4", at + 1)
    return [(name, content) for name, content in found if content]


def _changed(random: Random, content: bytes, other: bytes) -> bytes:
    """Damage at any place, at a header, at a member, or two archives in one."""
    marks = [found.start() for found in re.finditer(rb"ustar|PK[\1\3\5][\2\4\6]", content)]
    way = random.randrange(6)
    if way == 0 or not marks:
        return mutated(random, content, other)
    at = random.choice(marks) - (257 if content.find(b"ustar") >= 0 else 0)
    if way == 1:
        return content[:at] + mutated(random, content[at : at + 512], other) + content[at + 512 :]
    if way == 2:
        return content[:at] + content[random.choice((at + 46, at + 512, at + 1024)) :]
    if way == 3:
        return content + other
    if way == 4:
        return content[:at] + content[at : at + random.choice((512, 1024, 1536))] * 2 + content[at + 512 :]
    return content[: random.choice((at, at + 512, random.randrange(len(content))))]


def trial(random: Random, folder: Path, made: list[tuple[str, bytes]]) -> str:
    """One damaged archive."""
    suffix, content = random.choice(made)
    content = _changed(random, content, random.choice([other for same, other in made if same == suffix]))
    file = folder / f"archive{suffix}"
    file.write_bytes(content)
    try:
        images = open_data(file)
    except DataError as error:
        return refused(error, file)
    whole = whole_in_zip(content) if suffix == ".zip" else whole_in_tar(content)
    said = sum(images.left_out.counts.values())
    assert len(images) + said >= len(whole), f"{images.names} read, {images.left_out.counts}, of {[name for name, _ in whole]}"
    contents = [each for _, each in whole]
    for i, name in enumerate(images.names):
        try:
            with images._pictures.open(i) as stream:
                read = stream.read()
        except Exception:  # skipped by name when its turn comes
            continue
        assert read in contents or suffix == ".zip", f"{name} is read otherwise than it stands there"
    return READ


KIND = Kind(2000, archives, trial)
