"""When enough images have been read: the decision after every batch, alike in all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.distributed import gathered
from collapse_probe.errors import SettingError
from collapse_probe.statistics.estimates import DIVERSITY, ENTROPY, SIMILARITY, PerImageValues, per_image_values
from collapse_probe.statistics.intervals import Array

FEWEST = 32
"""Images below which no interval is believed."""
WATCHED = (SIMILARITY, DIVERSITY, ENTROPY)
"""The metrics that headline means are read off."""
CAUTION = "looking at the intervals after every batch and stopping at a narrow one makes them slightly too narrow"


class Stopper:
    """Decides after every batch, alike in all processes, whether every headline mean's interval is narrow enough.

    `half_width` is what half of each 95 % interval may be at most, in the number's own unit (nats for the entropy). Numbers
    that are undefined so far are not waited for. A process that has no images left goes on with `drain`, so that all decide
    together. Raises SettingError where none of the metrics `measured` gives a headline mean.
    """

    def __init__(self, half_width: float, measured: Iterable[str], heads: Array | None = None) -> None:
        if not set(WATCHED) & set(measured):
            raise SettingError(
                f"an interval to stop at is one of a headline mean, and no metric that gives one is measured: ask for one of "
                f"{', '.join(WATCHED)}, or leave until_ci out"
            )
        self.half_width, self.heads, self.stopped = half_width, heads, False
        self.values = PerImageValues((), {}, heads)
        self.half_widths: dict[str, float] = {}

    def enough(self, table: Mapping[str, NDArray[Any]]) -> bool:
        """Take the values of the newest images (keys of images.npz); whether to stop."""
        self._take(per_image_values(table, self.heads))
        return self.stopped

    def drain(self) -> None:
        """Keep deciding with the processes that still have images."""
        while not self.stopped and self._take(None):
            pass

    def _take(self, newest: PerImageValues | None) -> bool:
        """Add the newest images of all processes; whether any process had any left."""
        parts = [part for part in gathered(newest) if part is not None]
        filled = [part for part in (self.values, *parts) if len(part)]
        if filled:
            values = {key: np.concatenate([part.values[key] for part in filled]) for key in filled[0].values}
            self.values = PerImageValues(tuple(name for part in filled for name in part.names), values, self.heads)
        self.half_widths = {name: estimate.half_width for name, estimate in self.values.estimates().items()}
        narrow = bool(self.half_widths) and all(width <= self.half_width for width in self.half_widths.values())
        self.stopped = len(self.values) >= FEWEST and narrow
        return bool(parts)

    def facts(self, total: int | None) -> dict[str, Any]:
        """What the findings say of it: after how many of `total` images it stopped, and how wide the intervals then were."""
        used = len(self.values)
        taken = f"{used} images in the order they came in" if total is None else f"{used} of {total} images drawn at random"
        narrow = f"every headline mean's 95 % interval is within ± {self.half_width:g}"
        sentence = f"stopped after {taken}, because {narrow}; {CAUTION}"
        return {
            "until_ci": self.half_width,
            "reached": self.stopped,
            "images": used,
            "of": total,
            "half_widths": self.half_widths,
            "sentence": sentence if self.stopped else f"all {used} images were used, and not {narrow}",
        }
