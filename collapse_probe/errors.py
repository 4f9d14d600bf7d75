"""The errors of collapse-probe: each message says what was expected, what came and what to do."""

from __future__ import annotations

from pathlib import Path


class CollapseProbeError(Exception):
    """Base of every error that a user's input can cause; the command line shows its text as one line."""


class UnknownNameError(CollapseProbeError, KeyError):
    """A name that is in no table; the text lists the nearest ones."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class ModelError(CollapseProbeError):
    """A model that cannot be made, or is not what the operation needs."""


class NonFiniteError(ModelError):
    """Weights or activations that are NaN or infinite, from which no number may be taken; `place`: where that is first seen."""

    def __init__(self, text: str, place: str = "") -> None:
        super().__init__(text)
        self.place = place


class CheckpointError(CollapseProbeError):
    """A checkpoint that cannot be read safely, or does not fit the model."""


class DataError(CollapseProbeError):
    """Data that cannot be read, or holds no readable image."""


class CaptureError(CollapseProbeError):
    """Attention that could not be captured, or was captured wrongly."""


class NoAttentionFoundError(CaptureError):
    """The forward pass has no softmax attention that can be captured."""


class StateError(CollapseProbeError):
    """The state of a measurement that is damaged, of another measurement, or has seen an image twice."""


class OutOfTimeError(CollapseProbeError):
    """A run that stopped by itself because its time was over; its state is stored."""


class SettingError(CollapseProbeError, ValueError):
    """A setting outside the values that it may take."""


class PluginError(CollapseProbeError):
    """A plug-in that cannot be loaded, or takes a name that is defined already."""


class OutputError(CollapseProbeError):
    """An output folder that cannot be written or read."""


class ProcessError(CollapseProbeError):
    """Another process of the group failed, died or never came, so that this one cannot end its work."""


class InUseError(OutputError):
    """An output folder in which another run keeps its state."""


class AlarmError(CollapseProbeError):
    """A number that passed the threshold of an alarm while training, or of which that cannot be decided.

    `alarm` is the threshold as it was given, `quantity` the name of the number, `value` what it is (None: undefined), `step`
    where. `block` and `head` are where it is lowest, or highest, as far as it has places (of a pair of blocks, the later one).
    `state` is the file of the newest model for which no alarm held; None where there is none.
    """

    def __init__(
        self,
        text: str,
        *,
        alarm: str,
        quantity: str,
        value: float | None,
        step: int,
        block: int | None = None,
        head: int | None = None,
        state: Path | None = None,
    ) -> None:
        super().__init__(text)
        self.alarm, self.quantity, self.value, self.step = alarm, quantity, value, step
        self.block, self.head, self.state = block, head, state
