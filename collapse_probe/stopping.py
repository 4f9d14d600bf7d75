"""Read no more images than the intervals need: in a random order, until every headline mean is known closely enough."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collapse_probe.errors import SettingError
from collapse_probe.headlines import DIVERSITY, ENTROPY, SIMILARITY, Array, Kept, kept_of
from collapse_probe.processes import gathered

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
        self.half_width, self.heads = half_width, heads
        self.kept = Kept((), {}, heads)
        self.stopped = False

    def enough(self, table: Mapping[str, NDArray[Any]]) -> bool:
        """Take what was kept of the newest images (keys of images.npz); whether to stop."""
        self._take(kept_of(table, self.heads))
        return self.stopped

    def drain(self) -> None:
        """Keep deciding with the processes that still have images."""
        while not self.stopped and self._take(None):
            pass

    def widths(self) -> dict[str, float]:
        """Half the length of the interval of every headline mean that is defined so far."""
        return {name: estimate.half_width for name, estimate in self.kept.estimates().items()}

    def _take(self, mine: Kept | None) -> bool:
        """Add everybody's newest images; whether anybody had any left."""
        parts = [part for part in gathered(mine) if part is not None]
        held = [part for part in (self.kept, *parts) if len(part)]
        if held:
            values = {key: np.concatenate([part.values[key] for part in held]) for key in held[0].values}
            self.kept = Kept(tuple(name for part in held for name in part.names), values, self.heads)
        widths = self.widths()
        self.stopped = len(self.kept) >= FEWEST and bool(widths) and all(w <= self.half_width for w in widths.values())
        return bool(parts)

    def facts(self, total: int | None) -> dict[str, Any]:
        """What the findings say of it: after how many of `total` images it stopped, and how wide the intervals then were."""
        used = len(self.kept)
        taken = f"{used} images in the order given" if total is None else f"{used} of {total} images drawn at random"
        wide = f"every headline mean's 95 % interval is within ± {self.half_width:g}"
        reached = self.stopped
        said = f"stopped after {taken}, because {wide}; {CAUTION}"
        if not reached:
            said = f"all {used} images were used, and not {wide}"
        return {
            "until_ci": self.half_width,
            "reached": reached,
            "images": used,
            "of": total,
            "half_widths": self.widths(),
            "sentence": said,
        }
