"""Reads a data set of TensorFlow Datasets from the beginning: its files as shards, its pictures undecoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from collapse_probe.data.objects import LABEL_KEYS, PIXEL_KEYS, whole_number
from collapse_probe.data.readers import written
from collapse_probe.data.streams.stream import Record, Shards, Wanted
from collapse_probe.errors import DataError

NAME_KEYS = ("file_name", "filename", "image/filename", "image_id", "id")


def tensorflow_shards(name: str, split: str | None) -> Shards:
    """The files of a prepared data set by its name; it is downloaded and prepared where it is not.

    Without a split it is "validation" where there is one, else "test", else the only one. Raises DataError where there is no
    such split, or no image among its features.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(name)
    builder.download_and_prepare()
    splits = builder.info.splits
    chosen = split or next((key for key in ("validation", "test", *splits) if key in splits), "validation")
    if chosen not in splits:
        raise DataError(f"tfds/{name} has no split {chosen!r}; it has {', '.join(splits)}: take one with --split")
    features = builder.info.features
    pictures = [key for key in features if isinstance(features[key], tfds.features.Image)]
    key = next((key for key in (*PIXEL_KEYS, *pictures) if key in pictures), None)
    if key is None:
        raise DataError(f"tfds/{name} has no image among its features ({', '.join(features)})")
    label = next((key for key in LABEL_KEYS if key in features), None)
    classes = getattr(features[label], "names", None) if label is not None else None
    columns = {"image": key, "label": label, "name": next((each for each in NAME_KEYS if each in features), None)}
    numbers = tuple(f"{shard:05d}" for shard in range(splits[chosen].num_shards))
    notes = (f"the split {chosen} of {', '.join(splits)}",) if split is None and len(splits) > 1 else ()
    return Shards(numbers, partial(_records, name, chosen, columns), written(classes or ()), notes)


def _records(name: str, split: str, columns: dict[str, Any], shard: int, wanted: Wanted) -> Iterator[Record]:
    """The rows of one file, in its order."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    with contextlib.suppress(RuntimeError):  # it runs already
        tf.config.set_visible_devices([], "GPU")
    part = tfds.core.ReadInstruction(split, from_=shard, to=shard + 1, unit="shard")
    decoders = {columns["image"]: tfds.decode.SkipDecoding()}
    rows = tfds.builder(name).as_dataset(split=part, shuffle_files=False, decoders=decoders)
    for place, row in enumerate(rows.as_numpy_iterator()):
        given = row.get(columns["name"])
        named = given.decode(errors="surrogateescape") if isinstance(given, bytes) else "" if given is None else str(given)
        label = whole_number(row.get(columns["label"]))
        content = bytes(row[columns["image"]]) if wanted(place) else None
        yield Record(named or f"{place:06d}", content, label if label is not None and label >= 0 else None)
