"""What a metric of attention maps over tokens is: windows, pools and channels have none."""

from __future__ import annotations

from collapse_probe.measure import Metric, no_token_maps


class MapMetric(Metric):
    """A metric that compares maps token by token, at `weights` (what multiplies V) or at `@probs`; see `Metric`."""

    defaults = {"point": "weights"}  # noqa: RUF012
    variants = {"probs": {"point": "probs"}}  # noqa: RUF012

    def inapplicable(self) -> str:
        """Windowed, pooled and channel attention has no map over the image's tokens."""
        return no_token_maps(self.plan)
