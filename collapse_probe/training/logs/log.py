"""What a log takes, and how one is opened by its name."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from collapse_probe.errors import SettingError
from collapse_probe.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = {"tensorboard": "TensorBoardLog", "wandb": "WandbLog", "trackio": "TrackioLog", "mlflow": "MlflowLog"}
"""The class of each kind of log, in the module of that name."""
PROJECT = "collapse-probe"


@runtime_checkable
class Log(Protocol):
    """Takes what is known of a training step; names are `group/name`, and steps need not come in order."""

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """A point of each curve."""
        ...

    def image(self, step: int, name: str, pixels_HW3: NDArray[np.uint8]) -> None:
        """A picture, as bytes [height, width, 3]."""
        ...

    def artifact(self, step: int, name: str, folder: Path) -> None:
        """A folder of files, which is copied where the library keeps such things."""
        ...

    def close(self, failed: bool = False) -> None:
        """End what the log itself has begun, as `failed` where the training was."""
        ...


class Logs:
    """Several logs as one."""

    def __init__(self, logs: Sequence[Log] = ()) -> None:
        self.logs = tuple(logs)

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """A point of each curve, in all of them."""
        for log in self.logs:
            log.numbers(step, numbers)

    def image(self, step: int, name: str, pixels_HW3: NDArray[np.uint8]) -> None:
        """A picture, in all of them."""
        for log in self.logs:
            log.image(step, name, pixels_HW3)

    def artifact(self, step: int, name: str, folder: Path) -> None:
        """A folder, in all of them."""
        for log in self.logs:
            log.artifact(step, name, folder)

    def close(self, failed: bool = False) -> None:
        """Close all of them."""
        for log in self.logs:
            log.close(failed)


def library(module: str, package: str, what: str) -> Any:
    """The module that a log writes with; SettingError, with the command that installs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingError(f"{what} needs the package {package} ({error}): pip install {package}") from error


def open_log(kind: str, folder: Path, name: str, settings: Mapping[str, Any]) -> Log:
    """The log of a kind (see KINDS) for a training called `name`, which `settings` describe; its own files lie in `folder`.

    Opened again with the same folder it goes on with the same run. Raises SettingError where the library is missing.
    """
    module = importlib.import_module(f"collapse_probe.training.logs.{kind}")
    log: Log = getattr(module, KINDS[kind]).opened(folder, name, settings)
    return log


def stored_id(folder: Path, kind: str, new: str = "") -> str:
    """The id of the run of a kind of log that was begun in `folder`; else `new`, or one by chance, which is stored there."""
    path = folder / f"{kind}.id"
    if not path.exists():
        write_whole(path, lambda stream: stream.write((new or secrets.token_hex(4)).encode()))
    return path.read_text(encoding="utf-8").strip()
