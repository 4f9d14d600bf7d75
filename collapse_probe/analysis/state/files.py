"""State files: what a measurement has seen so far, written whole or not at all, taken up again, and brought together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from collapse_probe.data.coverage import Coverage
from collapse_probe.errors import InUseError, OutputError, StateError
from collapse_probe.files import STATES, write_whole

SUFFIX, FOLDER = ".safetensors", STATES
AGAIN = "measure this part again"


@dataclass(frozen=True)
class StateFile:
    """One state file: its path and its manifest, in which `file` says what part of which run it is."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        """`stem` (the run and part), `rank` of `world` processes, `generation` (how often the run was taken up), `complete`."""
        facts: Mapping[str, Any] = self.manifest["file"]
        return facts

    @property
    def share(self) -> str:
        """Which share of the data it is, in words; files of one folder that were made by hand have none in common."""
        part, facts = self.facts.get("part"), self.facts
        whole = f"part {part[0]} of {part[1]}" if part else f"the state {facts['stem']} in {self.path.parent}"
        return whole if facts["world"] == 1 else f"{whole}, process {facts['rank']} of {facts['world']}"

    @property
    def coverage(self) -> Coverage:
        """The places of the images that it has seen."""
        return Coverage.from_json(self.manifest["tally"]["coverage"])

    def read(self) -> dict[str, Any]:
        """The whole state, as `Probe.state_dict` gave it. Raises StateError where the file is damaged."""
        tensors, manifest = _opened(self.path)
        digest = _digest(tensors)
        if digest != manifest["sha256"]:
            raise StateError(f"{self.path} is damaged: its content is not what was written; {AGAIN}")
        return {"manifest": json.dumps(manifest), **tensors}


def write_state(path: Path, state: Mapping[str, Any], **facts: Any) -> None:
    """Write a state, as `Probe.state_dict` gives it, with `facts` of the file. Raises OutputError."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    manifest = {**json.loads(state["manifest"]), "file": facts, "sha256": _digest(tensors)}
    content = safetensors.torch.save(tensors, {"manifest": json.dumps(manifest)})

    def write(stream: IO[bytes]) -> None:
        stream.write(content)

    write_whole(path, write)


def open_state(path: Path) -> StateFile:
    """A state file, of which the manifest alone is read. Raises StateError for anything else."""
    try:
        with safetensors.safe_open(path, framework="pt") as stored:
            manifest: Any = json.loads((stored.metadata() or {})["manifest"])
        if manifest["tally"] is not None and not {"stem", "rank", "world", "generation", "whole", "complete"} <= set(
            manifest["file"]
        ):
            raise KeyError("file")
    except FileNotFoundError as error:
        raise StateError(f"there is no file {path}; expected a state file, as `analyze --part K/N` writes it") from error
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise StateError(f"{path} is no whole state file ({why}); expected one as `analyze --part K/N` writes it") from error
    return StateFile(path, manifest)


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, json.loads(stored.metadata()["manifest"])  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} is no whole state file ({type(error).__name__}: {error}); {AGAIN}") from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def state_files(folder: Path, stem: str) -> list[StateFile]:
    """The state files of the processes of one run in `folder`: of the last time it was taken up as a whole, and later ones.

    When a run is taken up by another number of processes, the first of them writes all that was there before in one file, after
    which the older ones do not count.
    """
    files = [open_state(path) for path in sorted((folder / FOLDER).glob(f"{stem}.*{SUFFIX}"))]
    whole = max((each.facts["generation"] for each in files if each.facts["whole"]), default=0)
    return [each for each in files if each.facts["generation"] >= whole]


def state_path(folder: Path, stem: str, generation: int, rank: int, world: int) -> Path:
    """Where a process keeps its state."""
    return folder / FOLDER / f"{stem}.{generation}.rank-{rank}-of-{world}{SUFFIX}"


@contextlib.contextmanager
def at_work(folder: Path, stem: str, rank: int) -> Iterator[None]:
    """Holds a lock on the states of a run, where the system has locks. Raises InUseError where another process holds it."""
    place = folder / FOLDER
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{place} cannot be made: {error}; free space, or choose another folder with -o") from error
    path = place / f"{stem}.rank-{rank}.lock"
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            who = stream.read().strip() or "another process"
            raise InUseError(f"{folder} is in use: {who} keeps its state there; choose another folder with -o") from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}")
        stream.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def remove_states(folder: Path, stem: str) -> None:
    """Remove the states of a run that is complete, and the folder where nothing else is in it."""
    for path in (folder / FOLDER).glob(f"{stem}.*{SUFFIX}"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (folder / FOLDER).rmdir()


def expanded(paths: Sequence[str | Path]) -> list[StateFile]:
    """State files out of paths of files and folders, those of interrupted runs inside too. Raises StateError where there is
    none.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [*sorted(path.glob(f"*{SUFFIX}")), *sorted((path / FOLDER).glob(f"*{SUFFIX}"))] if path.is_dir() else [path]
        if not inside:
            raise StateError(f"{path} holds no state file ({SUFFIX}), as `analyze --part K/N` writes it")
        found += inside
    files = [open_state(path) for path in dict.fromkeys(found)]
    whole: dict[tuple[Path, str], int] = {}
    for each in files:
        if each.facts["whole"]:
            key = each.path.parent, each.facts["stem"]
            whole[key] = max(whole.get(key, 0), each.facts["generation"])
    return [each for each in files if each.facts["generation"] >= whole.get((each.path.parent, each.facts["stem"]), 0)]
