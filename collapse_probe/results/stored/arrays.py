"""What lies beside the numbers of findings: per-image values, pictures and maps, in npz files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.errors import OutputError
from collapse_probe.statistics.intervals import Array

AGAIN = "take the folder from where it was written, or measure again"


@dataclass(frozen=True)
class Gallery:
    """A few of the images with the attention map of every block, for the report.

    `pictures` uint8 [I, height, width, 3] (the model's own crop), `maps` float64 [I, blocks, rows, columns]
    (attention paid to each patch, mean over heads and over the queries that `query` names) of the blocks numbered `blocks`
    (empty: of all, from 0). `rollouts`, of the same shape, is the same for attention rollout up to each block, from the mean
    over heads, where that was measured.

    `heads` [I, blocks, heads, rows, columns] is the attention of every head by itself, NaN where a block has fewer heads, and
    `patches` [I, blocks, down, along, rows, columns] that of single patches, mean over heads and over the queries of a cell of
    a grid of `down` by `along`. Their rows and columns are fewer than those of `maps` where patches were pooled.
    """

    names: tuple[str, ...]
    pictures: NDArray[np.uint8]
    maps: Array
    query: str
    rollouts: Array | None = None
    blocks: tuple[int, ...] = ()
    heads: Array | None = None
    patches: Array | None = None


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The content of an npz file; empty where there is no such file. OutputError for one that is damaged."""
    if not path.exists():
        return {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {key: np.asarray(stored[key]) for key in stored.files}
    except Exception as error:  # damaged files fail in many ways, an empty one with EOFError
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise OutputError(f"{path} cannot be read as arrays of NumPy ({why}); {AGAIN}") from error
    if strange := [key for key, values in arrays.items() if values.dtype.kind not in "biufU"]:
        raise OutputError(f"{path} holds {strange[0]!r}, which is no array of numbers or names; {AGAIN}")
    return arrays


def write_gallery(path: Path, gallery: Gallery | None, thumbnails: Mapping[str, NDArray[np.uint8]]) -> None:
    """Write gallery.npz, the maps in float32, the thumbnails (all of one size) in one array; no file where there is neither."""
    arrays: dict[str, Any] = {}
    if thumbnails:
        arrays["thumbnail_names"] = np.array(list(thumbnails), dtype=np.str_)
        arrays["thumbnails"] = np.stack(list(thumbnails.values()))
    if gallery is not None:
        arrays |= {"names": np.array(gallery.names, dtype=np.str_), "query": np.array(gallery.query)}
        arrays["blocks"] = np.array(gallery.blocks, dtype=np.int64)
        arrays |= {"pictures": gallery.pictures, "maps": gallery.maps.astype(np.float32)}
        arrays |= {} if gallery.rollouts is None else {"rollouts": gallery.rollouts.astype(np.float32)}
        parts = {"heads": gallery.heads, "patches": gallery.patches}
        arrays |= {key: each.astype(np.float16) for key, each in parts.items() if each is not None}
    if arrays:
        np.savez_compressed(path, **arrays)


def load_gallery(path: Path) -> tuple[Gallery | None, dict[str, NDArray[np.uint8]]]:
    """The gallery (None where there is none) and the thumbnails by name out of gallery.npz, which may not exist.

    OutputError where its arrays do not fit each other.
    """
    stored = load_arrays(path)
    if not _fits(stored):
        came = ", ".join(f"{key} {values.dtype} {list(values.shape)}" for key, values in stored.items())
        raise OutputError(f"{path} is no gallery: its arrays do not fit each other ({came}); {AGAIN}")
    thumbnails = dict(zip(map(str, stored.get("thumbnail_names", ())), stored.get("thumbnails", ()), strict=True))
    if "maps" not in stored:
        return None, thumbnails
    rollouts = stored["rollouts"].astype(np.float64) if "rollouts" in stored else None
    names, maps = tuple(map(str, stored["names"])), stored["maps"].astype(np.float64)
    blocks = tuple(int(block) for block in stored.get("blocks", ()))
    heads, patches = (stored[key].astype(np.float64) if key in stored else None for key in ("heads", "patches"))
    return Gallery(names, stored["pictures"], maps, str(stored["query"]), rollouts, blocks, heads, patches), thumbnails


def _fits(stored: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the arrays of a gallery, and of thumbnails, have the shapes and types of `Gallery`."""

    def pictures(names: str, key: str) -> bool:
        text, seen = stored.get(names), stored.get(key)
        if text is None or seen is None:
            return text is None and seen is None
        shaped = text.ndim == 1 and seen.ndim == 4 and len(text) == len(seen) and seen.shape[3] == 3 and seen.size > 0
        return shaped and text.dtype.kind == "U" and seen.dtype == np.uint8

    if not pictures("thumbnail_names", "thumbnails") or not pictures("names", "pictures"):
        return False
    if ("maps" in stored) != ("pictures" in stored):
        return False
    if "maps" not in stored:
        return not {"rollouts", "heads", "patches"} & set(stored)
    maps, blocks, query = stored["maps"], stored.get("blocks", np.zeros(0, int)), stored.get("query")
    layers = maps.shape[1] if maps.ndim == 4 else 0
    shaped = layers and len(maps) == len(stored["names"]) and stored.get("rollouts", maps).shape == maps.shape
    numbered = blocks.ndim == 1 and blocks.dtype.kind == "i" and len(blocks) in (0, layers)
    parts = [(stored[key], axes) for key, axes in (("heads", 5), ("patches", 6)) if key in stored]
    single = all(each.ndim == axes and each.shape[:2] == maps.shape[:2] and each.dtype.kind == "f" for each, axes in parts)
    finite = single and all(
        values.dtype.kind == "f" and np.isfinite(values).all() for values in (maps, stored.get("rollouts", maps))
    )
    return bool(shaped and numbered and finite and query is not None and query.ndim == 0 and query.dtype.kind == "U")


def load_images(path: Path, images: int) -> dict[str, NDArray[Any]]:
    """The per-image table out of images.npz, which may not exist; OutputError where it is not one row for each of `images`."""
    stored = load_arrays(path)
    names = stored.get("names")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U" or len(names) != images):
        raise OutputError(f"{path} names {list(names.shape)} images, the findings are of {images}; {AGAIN}")
    for key, values in stored.items():
        if values.ndim < 1 or len(values) != images or (key != "names" and values.dtype.kind == "U"):
            raise OutputError(
                f"{path} holds {key!r} {values.dtype} {list(values.shape)}, not a row for each of {images} images; {AGAIN}"
            )
    return stored
