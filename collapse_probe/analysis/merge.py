"""Measurements in parts: one of several shares of the data becomes a state file, and all of them together become findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from collapse_probe.analysis.analyze import read_all
from collapse_probe.analysis.measurement import Images, Progress, Report, RunSettings
from collapse_probe.analysis.probe import Probe
from collapse_probe.analysis.state.files import SUFFIX, StateFile, expanded, open_state, remove_states, write_state
from collapse_probe.analysis.state.keeper import SAVE_EVERY, Saving, saving_of
from collapse_probe.analysis.state.manifest import first_difference, tensors_of
from collapse_probe.analysis.state.records import BY_CONTENT
from collapse_probe.data.images import images_from
from collapse_probe.distributed import gathered, rank_and_world
from collapse_probe.errors import SettingError, StateError
from collapse_probe.models.loading import Subject
from collapse_probe.results.findings import Findings

Part = tuple[int, int]
MOST_NAMED = 6


def check_part(part: Part, settings: RunSettings) -> None:
    """Raise SettingError for a part that there is not, and for settings that look at all parts together."""
    number, of = part
    if not 1 <= number <= of:
        raise SettingError(f"expected part K of N with K from 1 to N, not {number} of {of}")
    if settings.until_ci is not None and of > 1:
        raise SettingError("until_ci looks at all images together, and a part sees its own alone: leave one of them out")


def analyze_part(
    subject: Subject,
    images: Images,
    part: Part,
    folder: str | Path,
    *,
    save_every: float = SAVE_EVERY,
    max_time: float | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    report: Report | None = None,
    **settings: Any,
) -> Path:
    """`measure_part` into `folder`, with the arguments of `analyze`."""
    saving = saving_of(folder, save_every, max_time, resume)
    assert saving is not None
    return measure_part(subject, images, RunSettings(**settings), part, saving, progress=progress, report=report)


def measure_part(
    subject: Subject,
    images: Images,
    settings: RunSettings,
    part: Part,
    saving: Saving,
    *,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Path:
    """Measure part K of N of the images, every N-th, into a state file in the folder of `saving`; its path.

    No untrained copy is measured: `merge` does that once. See `analyze`.
    """
    check_part(part, settings)
    stem, say = f"part-{part[0]}-of-{part[1]}", report or (lambda text: None)
    path = saving.folder / f"{stem}{SUFFIX}"
    saving = replace(saving, stem=stem)

    def check_before(probe: Probe) -> bool:
        """Whether the part is there already; StateError where that is one of another measurement."""
        before = _whole(path)
        difference = "" if before is None else first_difference(probe.identity(), before.manifest["identity"])
        if difference:
            raise StateError(f"{path} is of another measurement: {difference}; move it away, or choose another folder (-o)")
        return saving.resume and before is not None

    begun = Probe.over(subject, images_from(images), settings)
    if any(gathered(check_before(begun))):
        say(f"{path} is complete already")
        return path
    probe, _ = read_all(subject, images, settings, progress=progress, say=say, saving=saving, part=part, begun=begun)
    if part[1] == 1:  # of several, one may have no image
        probe.measurement.check_some()
    if rank_and_world()[0] == 0:
        facts = {"stem": stem, "generation": 1, "rank": 0, "world": 1, "whole": True, "complete": True, "read": probe.read}
        write_state(path, probe.state_dict(), **facts, part=list(part))
        remove_states(saving.folder, stem)
    return path


def _whole(path: Path) -> StateFile | None:
    """The state file at a path; None where there is none, or a damaged one, which is to be made anew."""
    try:
        return open_state(path) if path.exists() else None
    except StateError:
        return None


def merge(
    paths: Sequence[str | Path],
    *,
    allow_missing: bool = False,
    device: str = "auto",
    command: str = "",
    report: Report | None = None,
) -> Findings:
    """The findings of all images that the state files at `paths` (files, or folders of them) have seen.

    They equal those of one run over all of them. Untrained copies are measured here, once, on the sample of images that the
    files hold. Raises StateError that names the first difference for states of other models, weights, data, settings or
    definitions, for images seen twice, for damaged files, and for missing parts unless `allow_missing`, which the findings
    then say.
    """
    say = report or (lambda text: None)
    files = sorted(expanded(paths), key=lambda each: (each.facts["stem"], each.facts["rank"], str(each.path)))
    files = [each for each in files if each.manifest["tally"] is not None]
    if not files:
        raise StateError("the state files hold no images")
    first = files[0]
    for place, other in enumerate(files[1:], start=1):
        if difference := first_difference(first.manifest["identity"], other.manifest["identity"]):
            raise StateError(f"{first.path} and {other.path} are not of one measurement: {difference}")
        for before in files[:place]:
            if before.share == other.share:
                raise StateError(f"{before.path} and {other.path} are both {before.share}: give each once")
            if (number := before.coverage.overlap(other.coverage)) is not None:
                raise StateError(
                    f"{before.path} and {other.path} have both seen image number {number}, and no image may count twice"
                )
    probe = Probe.stored(first.manifest, device, command)
    for each in files:
        state = each.read()
        part = probe.measurement.loaded(tensors_of(state), each.manifest["tally"])
        if twice := probe.measurement.tally.overlap(part, BY_CONTENT):
            raise StateError(f"{each.path} and another file have both seen {twice}, and no image may count twice")
        probe.measurement.tally.merge(part)
    say(f"{probe.images:,} images in {len(files)} state files")
    missing = missing_parts(files, probe)
    if missing and not allow_missing:
        count = "" if probe.total is None else f" ({probe.read:,} of {probe.total:,} images are there)"
        raise StateError(f"{missing}{count}; measure what is missing, or report what there is (--allow-missing)")
    probe.tell(first.manifest["run"], missing)
    return probe.conclude(say)


def _alone(one: StateFile, files: Sequence[StateFile]) -> bool:
    """Whether other processes of its run have stored nothing."""
    run = [each for each in files if (each.path.parent, each.facts["stem"]) == (one.path.parent, one.facts["stem"])]
    return len({each.facts["rank"] for each in run}) < int(one.facts["world"])


def missing_parts(files: Sequence[StateFile], probe: Probe) -> str:
    """What is missing for the whole of the data, in words; empty where nothing is."""
    parts = [each.facts.get("part") or [1, 1] for each in files]
    of = max(n for _, n in parts)
    absent = sorted({*range(1, of + 1)} - {k for k, n in parts if n == of})
    total, read = probe.total, probe.read
    broken = [str(each.path) for each in files if not each.facts["complete"] or _alone(each, files)]
    if total is not None and read >= total:
        return ""
    if absent:
        named = ", ".join(map(str, absent[:MOST_NAMED])) + (" …" if len(absent) > MOST_NAMED else "")
        plural = len(absent) > 1
        return f"part{'s' * plural} {named} of {of} {'are' if plural else 'is'} missing"
    if broken:
        return f"{broken[0]} is of a run that was stopped"
    return "images are missing" if total is not None else ""
