"""Pictures that a caller has as Python objects: one tensor, or a data set of (image, label)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from collapse_probe.data.readers import Pictures, Unreadable, written
from collapse_probe.errors import DataError

PIXEL_KEYS = ("pixel_values", "image", "images", "pixels", "img")
LABEL_KEYS = ("labels", "label", "target", "targets")


def of_tensor(pixels: Tensor) -> Pictures:
    """Images made ready, [n, channels, height, width]; their names are numbers, so that their content is identified too."""
    if pixels.ndim != 4 or not pixels.is_floating_point() or not len(pixels):
        raise DataError(f"expected float images [n, channels, height, width], came {pixels.dtype} {list(pixels.shape)}")
    own = pixels.detach().to("cpu").float().clone()
    channels, height, width = own.shape[1:]
    content = hashlib.sha256(own.numpy().tobytes()).hexdigest()
    names = tuple(map(str, range(len(own))))
    shape = (channels, height, width)
    return Pictures(names, partial(_row, own), bits=8, shape=shape, content_sha256=content, from_memory=True)


def _row(pixels: Tensor, index: int) -> Tensor:
    return pixels[index]


def is_dataset(data: Any) -> bool:
    """Whether an object is a data set with numbered images, rather than an iterable of batches."""
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, (list, tuple, Mapping, np.ndarray)):
        return False
    try:
        image = _image_and_label(data[0])[0]
    except Exception:  # the caller's own; the next item may do
        return isinstance(data, Dataset)
    return not (isinstance(image, Tensor) and image.ndim == 4)


def of_dataset(dataset: Any) -> Pictures:
    """A data set whose items are a PIL image or a float tensor [channels, height, width], alone, before a label, or in a dict.

    Tensors are taken as made ready, as a loader's are. Labels are its `targets` (or `labels`, or a column of that name) where
    it has one for every image; else those of the items, as they are read. Raises DataError for other items.
    """
    count = len(dataset)
    if not count:
        raise DataError(f"the data set ({type(dataset).__name__}) is empty")
    first = _first(dataset, count)
    shape = None
    if isinstance(first, Tensor):
        if first.ndim != 3 or not first.is_floating_point():
            came = f"{first.dtype} {list(first.shape)}"
            raise DataError(f"a data set's tensors must be float images [channels, height, width]; came {came}")
        channels, height, width = first.shape
        shape = (channels, height, width)
    elif not isinstance(first, Image.Image):
        came = type(first).__name__
        raise DataError(f"a data set must give PIL images or float tensors, alone, before a label or in a dict; came {came}")
    labels = _labels_of(dataset, count)
    classes = getattr(dataset, "classes", ()) if labels else ()
    names, read = tuple(map(str, range(count))), partial(_item, dataset, shape)
    return Pictures(names, read, labels, written(map(str, classes)), bits=8, shape=shape, from_memory=True)


def _first(dataset: Any, count: int) -> Any:
    """The first image that can be read; DataError where none can."""
    failed: Exception | None = None
    for index in range(count):
        try:
            return _image_and_label(dataset[index])[0]
        except Exception as error:  # the caller's own
            failed = failed or error
    raise DataError(f"no item of the data set can be read, the first: {type(failed).__name__}: {failed}") from failed


def _image_and_label(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image, label = (next((item[key] for key in keys if key in item), None) for keys in (PIXEL_KEYS, LABEL_KEYS))
        return image, label
    if isinstance(item, (tuple, list)) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def whole_number(label: Any) -> int | None:
    """A label as a class number; None for anything else."""
    if isinstance(label, (Tensor, np.ndarray)) and label.ndim == 0:
        label = label.item()
    whole = isinstance(label, (int, np.integer)) and not isinstance(label, bool)
    return int(label) if whole else None


def _item(dataset: Any, shape: tuple[int, int, int] | None, index: int) -> tuple[Any, int | None]:
    image, label = _image_and_label(dataset[index])
    if shape is None and not isinstance(image, Image.Image):
        raise Unreadable(f"the item is a {type(image).__name__}, where others are pictures")
    if shape is not None and (not isinstance(image, Tensor) or tuple(image.shape) != shape):
        came = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise Unreadable(f"the item is {came}, where the first is {list(shape)}")
    return image, whole_number(label)


def _labels_of(dataset: Any, count: int) -> tuple[int, ...] | None:
    """The class number of every item, where the data set holds them beside the items."""
    if isinstance(dataset, Subset):
        whole = _labels_of(dataset.dataset, len(dataset.dataset))  # type: ignore[arg-type]  # sized, as its items are numbered
        return None if whole is None else tuple(whole[index] for index in dataset.indices)
    columns = getattr(dataset, "column_names", None) or ()
    for key in ("targets", "labels", "label"):
        held = dataset[key] if key in columns else getattr(dataset, key, None)
        with contextlib.suppress(TypeError):
            numbers = tuple(map(whole_number, held))  # type: ignore[arg-type]  # nothing to go through: TypeError
            if len(numbers) == count and None not in numbers and min(n for n in numbers if n is not None) >= 0:
                return tuple(n for n in numbers if n is not None)
    return None
