"""The same measurement of many models on the same images, one folder a model, resumable: what a gallery is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from collapse_probe import __version__
from collapse_probe.analysis.analyze import analyze
from collapse_probe.analysis.measurement import DEFAULT_METRICS
from collapse_probe.analysis.state.files import remove_states
from collapse_probe.data.images import ImageSet
from collapse_probe.distributed import rank_and_world
from collapse_probe.errors import OutOfTimeError, OutputError, SettingError
from collapse_probe.files import PAGE, write_with_page
from collapse_probe.models.loading import resolve
from collapse_probe.provenance import names_sha256, stamp
from collapse_probe.results.overview.display import draw_page
from collapse_probe.results.survey import FAILED, FILE, FINISHED, MODELS, SINK, Survey, SurveyRow, row_of

METRICS = (*DEFAULT_METRICS, SINK)
"""What every model of a gallery is measured by."""


@dataclass(frozen=True)
class Entry:
    """A model of the list: its label, its address, and arguments of `resolve`."""

    label: str
    address: str
    how: Mapping[str, Any] = field(default_factory=dict)


def survey(
    entries: Sequence[Entry],
    images: ImageSet,
    folder: str | Path,
    *,
    command: str = "",
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
    **settings: Any,
) -> Survey:
    """Measure every model on `images` and write its findings and page into a folder of its own below `folder`.

    Called again with the same folder, models that were measured with the same settings on the same images are kept, one that
    was stopped goes on, and one that failed is tried again. `settings` are arguments of `analyze`; `progress(label)` gives the
    callback of a model. A model that fails does not stop the others, except in several processes, which would part. Raises
    SettingError where two entries have one label, OutputError where `folder` cannot be written.
    """
    folder, first = Path(folder), rank_and_world()[0] == 0
    folders = folders_of(entries)
    before = _measured_before(folder, say)
    data = {"address": images.address, "images": len(images), "listing": listing(images)}
    facts = {"command": command, **stamp()}
    asked = [
        SurveyRow(label=each.label, conditions=conditions(each, data, settings), folder=folders[each.label]) for each in entries
    ]
    rows = [_kept(row, before.get(row.folder), folder) or row for row in asked]

    def write() -> Survey:
        whole = Survey(tuple(rows), data, facts)
        if first:
            write_with_page(folder, whole, draw_page)
        return whole

    whole = write()  # an interrupted run leaves what it kept, and of what its states are
    for at, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        if row.status == FINISHED:
            say(f"{row.label}: measured before, kept")
            continue
        target, old = folder / row.folder, before.get(row.folder)
        if first and (old is None or old.conditions != row.conditions):
            remove_states(target, "run")  # of another measurement
        target.parent.mkdir(parents=True, exist_ok=True)
        say(f"{row.label} ({at + 1} of {len(rows)})")
        try:
            subject = resolve(entry.address, seed=settings.get("seed", 0), **entry.how)
            follow = None if progress is None else progress(entry.label)
            again: dict[str, Any] = {"save_to": target, "resume": True, "report": say, "command": command, "progress": follow}
            findings = analyze(subject, images, metrics=METRICS, **again, **settings)
            if first:
                write_with_page(target, findings, draw_page)
            rows[at] = row_of(findings, row.label, row.conditions, row.folder)
        except (OutOfTimeError, KeyboardInterrupt):
            raise
        except Exception as error:  # of any kind: the other models are still to be measured
            if rank_and_world()[1] > 1:
                raise
            rows[at] = replace(row, status=FAILED, reason=" ".join(f"{type(error).__name__}: {error}".split()))
            say(f"{row.label} failed: {rows[at].reason}")
        whole = write()
    return whole


def _measured_before(folder: Path, say: Callable[[str], None]) -> dict[str, SurveyRow]:
    """The rows of the run before, by their folder; none where their file is damaged or of another version."""
    if not (folder / FILE).is_file():
        return {}
    try:
        return {row.folder: row for row in Survey.load(folder).rows}
    except OutputError as error:
        say(f"every model is measured again, for what was measured before cannot be read: {error}")
        return {}


def _kept(row: SurveyRow, old: SurveyRow | None, folder: Path) -> SurveyRow | None:
    """The row of the run before, where it is of the same model, measured alike, and its findings and page are there."""
    same = old is not None and (old.label, old.status, old.conditions) == (row.label, FINISHED, row.conditions)
    return old if same and all((folder / row.folder / name).is_file() for name in ("findings.json", PAGE)) else None


def folders_of(entries: Sequence[Entry]) -> dict[str, str]:
    """A folder for each label, of its letters and digits, another for each on every system; SettingError for a label that
    comes twice.
    """
    folders: dict[str, str] = {}
    for entry in entries:
        if entry.label in folders:
            raise SettingError(f"the list names {entry.label!r} twice; give one of them another label: LABEL = ADDRESS")
        name = re.sub(r"[^0-9A-Za-z._-]+", "-", entry.label).strip("-.") or "model"
        while f"{MODELS}/{name}".lower() in map(str.lower, folders.values()):
            name += "_"
        folders[entry.label] = f"{MODELS}/{name}"
    return folders


def listing(images: ImageSet) -> str:
    """What tells these images from others: their names, labels and limit, and the content or files where these are known."""
    content = images.content_sha256 or f"{images.sample_sha256} {images.files_sha256()}"
    return names_sha256([*images.names, f"{images.labels} {images.max_pixels}", content])


def conditions(entry: Entry, data: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that the numbers of a model depend on, as JSON types."""
    files: dict[str, list[int]] = {}
    for name in (entry.how.get("checkpoint"), entry.address.partition(":")[2], entry.address):
        path = Path(str(name or ""))
        inside = [path] if path.is_file() else sorted(path.glob("*")) if name and path.is_dir() else []
        files |= {str(each): [each.stat().st_size, each.stat().st_mtime_ns] for each in inside if each.is_file()}
    passing = {key: value for key, value in settings.items() if key not in ("workers", "save_every", "max_time")}
    how = {key: str(value) for key, value in entry.how.items() if value not in (None, False, {}, ())}
    return {
        "version": __version__,
        "model": entry.address,
        "how": how,
        "files": files,
        "data": data["listing"],
        "metrics": list(METRICS),
        "settings": {key: str(value) for key, value in passing.items()},
    }
