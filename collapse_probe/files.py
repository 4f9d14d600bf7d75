"""Files and output folders that are written whole or not at all, and never hold a mixture of two runs.

A run fills a folder beside its output folder. One rename puts that in place: as the output folder itself, or as INCOMING inside
the one that is there. From then on the run counts, and whoever reads or writes next finishes what was not moved yet (`settle`).
Files of the run before go first, so that no two runs ever stand side by side. MANIFEST lists what is ours: everything else in
the folder is its owner's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from collapse_probe.errors import OutputError

PARTIAL = ".partial"
MANIFEST, INCOMING = "manifest.json", ".incoming"
STATES = ".state"
"""Where a run keeps its state while it is under way."""
MANIFEST_SCHEMA = "collapse-probe/manifest/1"
DOCUMENTS = ("findings.json", "comparison.json", "interventions.json", "sweep.json", "gallery.json")
PAGE, INDEX, FIGURE_FOLDER, SUBJECT_FOLDER, MADE_BY = "report.html", "index.html", "figures", "subjects", "collapse-probe"
ARRAYS = ("images.npz", "gallery.npz")
TABLES = ("blocks.csv", "comparison.csv", "interventions.csv", "table.csv", "gallery.csv")
NAMES = (*DOCUMENTS, *ARRAYS, *TABLES, "matrices.npz", PAGE, MANIFEST)
TEMPORARY = re.compile(r".*\.tmp-(\d+)-(.*)-[^-]+")


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that then takes its place at `path` in one move, on disk before it is seen.

    Killed at any moment, `path` has the old content or all of the new. Raises OutputError.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}; free space, or choose another folder") from error


def read_document(
    folder: str | Path,
    file: str,
    *,
    schema: str,
    refusal: str,
    command: str,
    check: Callable[[Any, str], None] = lambda content, where: None,
) -> dict[str, Any]:
    """The content of `file` in `folder`, as `command` writes it.

    OutputError where there is none (`folder`, then `refusal`, such as "holds no sweep"), it has another schema, `check(content,
    file)` raises ValueError, or the folder holds files of two runs.
    """
    settle(folder)
    path = Path(folder) / file
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{folder} {refusal} ({error}); expected {file} as {command} writes it") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        came = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise OutputError(f"{path} has schema {came!r:.80}; expected {schema!r}: {command} again")
    try:
        check(content, file)
    except (ValueError, RecursionError) as error:
        why = str(error).removeprefix(f"{file}.")
        raise OutputError(f"{path} is damaged ({why}); {_again(command)}") from error
    _check_run(path, content, command)
    return content


def _again(command: str) -> str:
    return f"take the folder from where it was written, or {command} again"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that JSON can hold")
    return number


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, of JSON types alone, for `read_document`; ValueError for NaN and infinity. Raises OutputError."""
    parts = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items())
    write_whole(path, lambda stream: stream.write(f"{{\n{parts}\n}}\n".encode()))  # indentation takes ten times as long


class Numbers(ABC):
    """Results that live in a folder of their own, which holds the id of their `run`."""

    run: Mapping[str, Any]

    @property
    def states(self) -> tuple[str, ...]:
        """How the names of the states begin that are not needed any more; none of a run that can still go on."""
        return ()

    @abstractmethod
    def write(self, inside: Path) -> None:
        """Write the files into an existing folder, without any guard."""

    def save(self, folder: str | Path) -> Path:
        """Write the files into `folder`, new or there; all of it or nothing."""
        with new_folder(folder, run=self.run.get("id"), states=self.states) as inside:
            self.write(inside)
        return Path(folder)


def write_with_page(target: str | Path, numbers: Numbers, page: Callable[[Any, Path], object]) -> None:
    """Numbers into the folder `target`, then the page that `page(numbers, folder)` makes of them.

    Numbers may have taken hours: where the page fails (or is interrupted) they are kept, and OutputError says how to try again.
    """
    numbers.save(target)
    there, again = f"the numbers are in {target}", f"`collapse-probe report {target}` draws it again"
    try:
        with page_folder(target) as inside:
            page(numbers, inside)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{there}, without their page; {again}") from error
    except Exception as error:
        text = f"{there}, but their page failed ({type(error).__name__}: {error})"
        raise OutputError(f"{text}; {again}") from error


@contextlib.contextmanager
def new_folder(target: str | Path, *, run: str | None = None, states: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields a folder to be filled with the files of `run`, which then take the place of those of the run before in `target`.

    On any error the folder is left as it was. Files that no run wrote stay; states whose names begin as one of `states` go.
    Raises OutputError.
    """
    check_output(target)
    goal = Path(os.path.realpath(target))
    created = _missing(goal.parent)
    goal.parent.mkdir(parents=True, exist_ok=True)
    with _staged(goal, created) as inside:
        yield inside
        write_document(inside / MANIFEST, {"schema": MANIFEST_SCHEMA, "run": run, "numbers": _hashes(inside), "page": {}})
        try:
            _commit(inside, goal)
            _forget_states(goal, states)
        except (OSError, OutputError) as error:
            if not inside.exists():
                raise
            spare = inside.with_name(f"{goal.name}-{inside.name.rpartition('-')[2]}")
            inside.rename(spare)
            raise OutputError(f"{target} does not take the files of this run ({error}); they are whole in {spare}") from error


@contextlib.contextmanager
def page_folder(target: str | Path) -> Iterator[Path]:
    """Yields a folder to be filled with page and figures, which then take the place of those in `target`, whose numbers stay.

    Raises OutputError where another run came there in the meantime.
    """
    settle(target)
    goal = Path(os.path.realpath(target))
    check_writable(target)
    before = _manifest(goal)
    with _staged(goal, []) as inside:
        yield inside
        write_document(inside / MANIFEST, {**(before or _unlisted(goal)), "page": _hashes(inside)})
        _commit(inside, goal, lambda: _manifest(goal) == before)


@contextlib.contextmanager
def _staged(goal: Path, created: list[Path]) -> Iterator[Path]:
    """A folder on the file system of `goal`, beside it where that can be; it and the folders `created` go where work fails."""
    near = goal if goal.exists() else goal.parent
    inside = Path(tempfile.mkdtemp(prefix=_temporary_of_this_run(goal), dir=near))
    try:
        if near == goal:
            with contextlib.suppress(OSError):  # a mount point, or a parent that cannot be written
                inside = inside.rename(goal.parent / inside.name)
        inside.chmod(0o755)
        yield inside
    except BaseException as error:
        if inside.exists():
            shutil.rmtree(inside, ignore_errors=True)
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
        else:  # the files are in their place, or on their way
            settle(goal)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"all files are in {goal}") from error
        if isinstance(error, OSError):
            raise OutputError(f"{goal} cannot be written: {error}; free space, or choose another folder with -o") from error
        raise


def _commit(inside: Path, goal: Path, unchanged: Callable[[], bool] = lambda: True) -> None:
    """Put the whole folder `inside` in its place: one rename."""
    for path in (*inside.rglob("*"), inside):
        _sync(path)
    if not goal.exists():
        inside.rename(goal)
        _sync(goal.parent)
        return
    with _locked(goal):
        _move_in(goal)
        if not unchanged():
            raise OutputError(f"another run came into {goal} in the meantime: run `collapse-probe report {goal}` again")
        _check_free(goal, [*_hashes(inside, empty=True), MANIFEST])
        inside.rename(goal / INCOMING)
        _sync(goal)
        _move_in(goal)


def _forget_states(goal: Path, states: tuple[str, ...]) -> None:
    """Remove the states of the run whose numbers are in place now, which begin so; others stay."""
    for path in (goal / STATES).glob("*"):
        if path.name.startswith(states):
            with contextlib.suppress(OSError):
                path.unlink()
    with contextlib.suppress(OSError):
        (goal / STATES).rmdir()


def settle(folder: str | Path) -> bool:
    """Finish what a run that was stopped left half moved in `folder`: all its files were there. Whether there was any.

    Raises OutputError where this cannot be done.
    """
    goal = Path(folder)
    try:
        if not (goal / INCOMING).is_dir():
            return False
        with _locked(goal):
            _move_in(goal)
    except OSError as error:
        what = f"{folder} holds a run that was stopped while its files took their places, and {error} keeps them from it"
        raise OutputError(f"{what}; make the folder writable, then: collapse-probe report {folder}") from error
    return True


def _move_in(goal: Path) -> None:
    """Move what waits in INCOMING to its place, after the files of the run before are gone; nothing where nothing waits.

    Documents come last and go last. Stopped anywhere, the next call goes on.
    """
    waiting = goal / INCOMING
    if not waiting.is_dir():
        return
    manifest = _manifest(waiting)
    if manifest is not None:  # which moves last
        files = sorted(_files(manifest), key=_documents_last)
        before = sorted(_own(goal), key=_documents_last)
        for name in before:
            if name not in files or (waiting / name).exists():
                (goal / name).unlink(missing_ok=True)
        for folder in sorted({parent for name in before for parent in Path(name).parents} - {Path()}, reverse=True):
            with contextlib.suppress(OSError):  # the owner's files stay, and their folder
                (goal / folder).rmdir()
        for name in files:
            if (waiting / name).exists():
                (goal / name).parent.mkdir(parents=True, exist_ok=True)
                (waiting / name).replace(goal / name)
        (waiting / MANIFEST).replace(goal / MANIFEST)
        _sync(goal)
    shutil.rmtree(waiting)


def _documents_last(name: str) -> tuple[bool, str]:
    return name.endswith(".json"), name


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the system can lock a folder."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Have a file or folder on the disk; not every file system lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None where there is none; OutputError for one that no run wrote."""
    path = folder / MANIFEST
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != MANIFEST_SCHEMA or not isinstance(content["run"], str | None):
            raise ValueError(f"its schema is {content['schema']!r}")
        for name, digest in [*content["numbers"].items(), *content["page"].items()]:
            if not isinstance(digest, str) or Path(name).is_absolute() or ".." in Path(name).parts or name in ("", "."):
                raise ValueError(f"it lists {name!r}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{path} is no list of a run's files ({' '.join(str(error).split())})"
        raise OutputError(f"{why}; choose another folder, or remove what is in {folder}") from error
    return dict(content)


def _files(manifest: Mapping[str, Any]) -> set[str]:
    return {*manifest["numbers"], *manifest["page"]}


def _own(folder: Path) -> set[str]:
    """The files in a folder that a run wrote; of one without a manifest, those with the names of a run's files."""
    manifest = _manifest(folder)
    own = _files(_unlisted(folder) if manifest is None else manifest)
    for name in [name for name in own if name.endswith(f"/{MANIFEST}")]:
        below = name.removesuffix(f"/{MANIFEST}")
        own |= {f"{below}/{each}" for each in _own(folder / below)}
    return own


def _unlisted(folder: Path) -> dict[str, Any]:
    """A manifest for a folder that lost its own: what has the names of a run's files, where a document is among it."""
    document = next((folder / name for name in DOCUMENTS if (folder / name).is_file()), None)
    listed: dict[str, Any] = {"schema": MANIFEST_SCHEMA, "run": None, "numbers": {}, "page": {}}
    if document is None:
        return listed
    drawn = {path for path in (folder / FIGURE_FOLDER).glob("*.*") if path.is_file()}
    pairs = {path for path in drawn if {path.with_suffix(".svg"), path.with_suffix(".png")} <= drawn}  # as they once were
    page = [folder / PAGE, *sorted(pairs | {path for path in drawn if MADE_BY.encode() in path.read_bytes()[:400]})]
    subjects = [path for path in (folder / SUBJECT_FOLDER).glob("*/*") if path.name in NAMES]
    numbers = [*(folder / name for name in NAMES if name != PAGE), *subjects]
    for part, paths in (("numbers", numbers), ("page", page)):
        listed[part] = {path.relative_to(folder).as_posix(): _sha256(path) for path in paths if path.is_file()}
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        listed["run"] = json.loads(document.read_text(encoding="utf-8"))["run"].get("id")
    return listed


def _hashes(folder: Path, *, empty: bool = False) -> dict[str, str]:
    """SHA-256 of every file below `folder` by its path from there, the manifest left out; `empty` leaves the hashes out."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: "" if empty else _sha256(folder / name) for name in names if name != MANIFEST}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_run(path: Path, document: Mapping[str, Any], command: str) -> None:
    """Raise OutputError where the files beside the document at `path` are not those of its run.

    Documents are known by the run's id, which stands in them, other files by their SHA-256. A folder without a manifest is
    taken as it is.
    """
    folder = path.parent
    manifest = _manifest(folder)
    if manifest is None:
        return
    advice = _again(command)
    run = document.get("run")
    if manifest["run"] != (run.get("id") if isinstance(run, dict) else None):
        raise OutputError(f"{folder} holds files of two runs: {path.name} and {MANIFEST} name different ones; {advice}")
    for name in ARRAYS:
        if name not in manifest["numbers"] and (folder / name).exists():
            raise OutputError(f"{folder / name} is of another run than the numbers beside it; remove it, or {advice}")
    for name, digest in manifest["numbers"].items():
        if "/" in name or name in DOCUMENTS:  # folders of their own inside have their own manifest
            continue
        try:
            same = _sha256(folder / name) == digest
        except OSError as error:
            raise OutputError(f"{folder / name} cannot be read ({error.strerror}); {advice}") from error
        if not same:
            raise OutputError(f"{folder / name} is not as this run wrote it: damaged, changed or of another run; {advice}")


def changed_since(folder: Path) -> str:
    """What is known of documents that were changed after their run wrote them, and what to do."""
    numbers = (_manifest(folder) or {"numbers": {}})["numbers"]
    changed = [name for name in DOCUMENTS if name in numbers and _sha256(folder / name) != numbers[name]]
    if changed:
        return f"{changed[0]} was changed after the run wrote it: take it from where it was written"
    return "please report this" if numbers else "the folder has no list of its files: take it from where it was written"


def check_writable(target: str | Path) -> None:
    """Raise OutputError unless a folder can be made (or filled) at `target`; leaves nothing."""
    try:
        goal = Path(os.path.realpath(target))
        if goal.exists() and not goal.is_dir():
            raise OutputError(f"the output {target} is a file; expected a folder, or a path where one can be made")
        created = _missing(goal)
        try:
            goal.mkdir(parents=True, exist_ok=True)
            Path(tempfile.mkdtemp(prefix=_temporary_of_this_run(goal), dir=goal)).rmdir()
        finally:
            for folder in created:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    except (OSError, ValueError) as error:
        raise OutputError(f"the output folder {target} cannot be written ({error}); choose another with -o") from error


def check_output(target: str | Path) -> None:
    """Raise OutputError unless `target` can take the files of a run and loses none that no run wrote; leaves nothing."""
    check_writable(target)
    settle(target)
    goal = Path(os.path.realpath(target))
    if goal.exists():
        _check_free(goal, [*NAMES, f"{FIGURE_FOLDER}/{INCOMING}", f"{SUBJECT_FOLDER}/{INCOMING}"])


def _check_free(goal: Path, names: Iterable[str]) -> None:
    own = {*_own(goal), MANIFEST}
    for name in names:
        path = goal / name
        above = [parent for parent in path.relative_to(goal).parents if parent != Path() and (goal / parent).exists()]
        for parent in above:
            if not (goal / parent).is_dir():
                raise OutputError(f"{goal / parent} is a file; expected a folder there: remove it, or choose another with -o")
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected a file there: remove it, or choose another with -o")
        if name not in own and path.exists():
            raise OutputError(f"{path} is there, and no run wrote it: move it away, or choose another folder with -o")


def _missing(folder: Path) -> list[Path]:
    """The folders at and above `folder` that are not there, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def tidy(target: str | Path) -> list[str]:
    """Finish what a stopped run left in `target` and remove the temporary folders of dead ones; what was done, in words."""
    said = [f"{target}: finished what a run that was stopped had left half done"] if settle(target) else []
    goal = Path(os.path.realpath(target))
    for folder in (goal.parent, goal):
        with contextlib.suppress(OSError):
            left = [path for path in folder.iterdir() if path.name.startswith(_temporary(goal)) and _is_dead(path.name)]
            for path in sorted(left):
                shutil.rmtree(path)
                said.append(f"{path} was left by a run that ended early, and is removed")
    return said


def _temporary(goal: Path) -> str:
    """How the names of temporary folders for `goal` begin."""
    return f".{goal.name[:40]}.tmp-"


def _temporary_of_this_run(goal: Path) -> str:
    """That, with what `_is_dead` knows a process by."""
    return f"{_temporary(goal)}{os.getpid()}-{platform.node()}-"


def _is_dead(name: str) -> bool:
    """Whether a temporary folder, by its name, is of a process of this machine that is no more."""
    match = TEMPORARY.fullmatch(name)
    if match is None or match[2] != platform.node() or os.name == "nt":  # os.kill would end a process there
        return False
    try:
        os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False
