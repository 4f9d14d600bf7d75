"""Reads a data set of the Hugging Face hub, or of its library, from the beginning: its files as shards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from collapse_probe.data.objects import LABEL_KEYS, PIXEL_KEYS, whole_number
from collapse_probe.data.readers import written
from collapse_probe.data.streams.stream import Record, Shards, Wanted
from collapse_probe.errors import DataError

NAME_KEYS = ("__key__", "file_name", "filename", "path", "image_id", "id")
"""Columns that name an image, where the image itself has no path."""
AT_ONCE = 16  # rows
FILES = {".parquet": "parquet", ".arrow": "arrow"}


def hub_shards(name: str, split: str | None) -> Shards:
    """The files of a data set ORG/NAME, of a local folder, or one local parquet file; nothing but their columns is read yet.

    Without a split it is "validation" where there is one, else the only one. Raises DataError where there is no such split, or
    no column of images.
    """
    import datasets

    local = Path(name).expanduser()
    kind = FILES.get(local.suffix.lower()) if local.is_file() else None
    builder = (
        datasets.load_dataset_builder(kind, data_files=str(local))
        if kind
        else datasets.load_dataset_builder(str(local) if local.exists() else name)
    )
    parts: dict[str, Any] = builder.as_streaming_dataset()
    chosen = split or next((key for key in parts if key == "validation" or len(parts) == 1), None)
    if chosen not in parts:
        raise DataError(f"{name} has no split {chosen or 'validation'!r}; it has {', '.join(parts)}: take one with --split")
    stream = parts[str(chosen)]
    features = stream.features or {}
    pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if not pictures:
        raise DataError(f"{name} has no column of images; it has {', '.join(features) or 'no columns that it names'}")
    key = next((key for key in PIXEL_KEYS if key in pictures), pictures[0])
    label = next((key for key in LABEL_KEYS if key in features), None)
    classes = getattr(features[label], "names", None) if label is not None else None
    notes = [f"the split {chosen} of {', '.join(parts)}"] if split is None and len(parts) > 1 else []
    if len(pictures) > 1:
        notes.append(f"the images of column {key!r}; there are those of {', '.join(p for p in pictures if p != key)} too")
    columns = {"image": key, "label": label, "name": next((each for each in NAME_KEYS if each in features), None)}
    raw = stream.cast_column(key, datasets.Image(decode=False))
    root = str(local.resolve()) if local.exists() else ""
    numbers = tuple(f"{shard:05d}" for shard in range(max(stream.num_shards, 1)))
    return Shards(numbers, partial(_records, raw, columns, root), written(classes or ()), tuple(notes))


def _records(stream: Any, columns: dict[str, str | None], root: str, shard: int, wanted: Wanted) -> Iterator[Record]:
    """The rows of one file. A row is named by its image's path, else by a column that names it, else by its number."""
    part = stream.shard(num_shards=stream.num_shards, index=shard) if stream.num_shards > 1 else stream
    for place, row in enumerate(_rows(part)):
        image, label = row[columns["image"]], whole_number(row.get(columns["label"]))
        name = _name(image, row.get(columns["name"]), root, place)
        if image is None or (image.get("bytes") is None and not image.get("path")):
            yield Record(name, reason="there is no picture in it")
        else:
            content = _content(image) if wanted(place) else None
            yield Record(name, content, label if label is not None and label >= 0 else None)


def _rows(part: Any) -> Iterator[dict[str | None, Any]]:
    """The rows, from `iter`: in a loader's process `__iter__` would share the files out by a rule of its own, and lose rows."""
    for columns in part.iter(batch_size=AT_ONCE):
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _name(image: Any, given: Any, root: str, place: int) -> str:
    path = (image or {}).get("path")
    if isinstance(path, str) and path:
        inside = path.removeprefix(f"{root}/") if root else path
        return inside.partition("://")[2].partition("::")[0] or inside
    return str(given) if isinstance(given, (str, int)) and str(given) else f"{place:06d}"


def _content(image: dict[str, Any]) -> bytes:
    content = image.get("bytes")
    if content is None:
        from datasets.utils.file_utils import xopen

        with xopen(image["path"], "rb") as stream:
            content = stream.read()
    return bytes(content)
