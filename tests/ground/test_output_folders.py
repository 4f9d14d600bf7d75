"""An output folder holds one run, whole: whatever stops the run, whatever was there before, whatever is beside it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from collapse_probe.cli.main import group
from factories import findings_of, synthetic

from collapse_probe.analysis.compare import compare
from collapse_probe.errors import OutputError
from collapse_probe.files import INCOMING, MANIFEST, TEMPORARY, check_output, new_folder, page_folder, tidy, write_with_page
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings

STOPPED_EVERYWHERE = """
import json, os, shutil, sys
from pathlib import Path
from collapse_probe.files import Numbers, page_folder
from collapse_probe.results.{module} import {kind}

first, second, place, page = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "page"

class Copied(Numbers):
    run = {kind}.load(second).run

    def write(self, inside):
        for name, content in files(second).items():
            if name != "manifest.json" and not name.startswith(("report", "figures")):
                (inside / name).parent.mkdir(parents=True, exist_ok=True)
                (inside / name).write_bytes(content)

CALLS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "fsync")

def files(folder):
    return {{p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}}

def stop_at(n):
    done = [0]
    def stopped(real):
        def call(*arguments, **options):
            done[0] += 1
            if done[0] == n:
                os._exit(9)
            return real(*arguments, **options)
        return call
    os.fsync = lambda handle: None
    for name in CALLS:
        setattr(os, name, stopped(getattr(os, name)))

def work():
    if page:
        with page_folder(place) as inside:
            (inside / "report.html").write_text("new page")
            (inside / "figures").mkdir()
            (inside / "figures" / "b.png").write_text("new figure")
    else:
        Copied().save(place)

def whole(n):
    if place.exists():
        shutil.rmtree(place)
    for left in place.parent.glob(".work.tmp-*"):
        shutil.rmtree(left)
    shutil.copytree(first, place)
    child = os.fork()
    if child == 0:
        stop_at(n)
        work()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, seen()

def seen():
    sides = [{{name for name in files(place) if name in all and files(place)[name] == all[name] and name not in same}}
             for all in (old, new)]
    beside = any(name.rpartition("/")[2] != "manifest.json" for name in sides[0]) and bool(sides[1])
    for side, all in zip(sides, (old, new)):
        documents = [name for name in side if name.endswith(".json") and "manifest" not in name]
        others = {{name for name in all if name not in same and not name.endswith(".json")}}
        if documents and not page and side == sides[1] and not others <= side:
            return "a document without its files"
    try:
        {kind}.load(place)
    except Exception as error:
        return f"refused: {{error}}"
    after = files(place)
    return "mixture before it is read" if beside else "old" if after == old else "new" if after == new else "mixture"

old = files(first)
shutil.copytree(first, place)
work()
new = files(place)
same = {{name for name in old if new.get(name) == old[name]}}
outcomes = []
while True:
    code, outcome = whole(len(outcomes) + 1)
    outcomes.append(outcome)
    if code == 0:
        break
print(json.dumps(outcomes))
"""


def run(number):
    """Findings of one run with a gallery."""
    made = synthetic(3 + number)
    images = {"names": np.array(["cat.png", "sea.png"]), "label": np.full(2, number)}
    facts = {"data": {**made.data, "images": 2}, "run": {**made.run, "id": f"run-{number}", "seed": number}}
    return replace(made, **facts, images=images)


def comparison(number):
    values = np.random.default_rng(number).uniform(0.2, 0.8, (2, 6, 3))
    made = compare({f"label {number}": findings_of(*values), "both": findings_of(*values)})
    return replace(made, run={**made.run, "id": f"run-{number}"})


def drawn(numbers, inside):
    (inside / "report.html").write_text(f"page of {numbers.run['id']}")
    (inside / "figures").mkdir()
    (inside / "figures" / f"{numbers.run['id']}.png").write_text("figure")


def files(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(("make", "kind"), [(run, Findings), (comparison, Comparison)], ids=["findings", "comparison"])
@pytest.mark.parametrize("work", ["numbers", "page"])
def test_a_run_that_is_killed_at_any_call_leaves_the_old_run_or_the_new_one(make, kind, work, tmp_path):
    for number in (1, 2):
        write_with_page(tmp_path / str(number), make(number), drawn)
    (tmp_path / "1" / "notes.txt").write_text("mine")
    (tmp_path / "1" / "figures" / "mine.png").write_text("mine")
    script = STOPPED_EVERYWHERE.format(kind=kind.__name__, module=kind.__name__.lower())
    words = [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("1", "2", "work")), work]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    turn = outcomes.index("new")
    assert outcomes == ["old"] * turn + ["new"] * (len(outcomes) - turn)
    assert turn > 5
    assert len(outcomes) - turn > 5


def test_nothing_of_the_run_before_stays_and_everything_else_does(tmp_path):
    place = tmp_path / "out"
    write_with_page(place, comparison(1), drawn)
    with page_folder(place / "subjects" / "both") as inside:
        (inside / "report.html").write_text("page of one subject")
    (place / "notes.txt").write_text("mine")
    (place / "figures" / "mine.png").write_text("mine")
    (place / "subjects" / "mine.txt").write_text("mine")
    run(2).save(place)
    numbers = {"findings.json", "blocks.csv", "matrices.npz", "images.npz", "gallery.npz", MANIFEST}
    assert files(place) == numbers | {"notes.txt", "figures/mine.png", "subjects/mine.txt"}
    findings_of(*np.full((2, 6, 3), 0.5)).save(place)
    assert files(place) == numbers - {"gallery.npz"} | {"notes.txt", "figures/mine.png", "subjects/mine.txt"}


def test_a_page_takes_the_place_of_the_page_alone(tmp_path):
    place = tmp_path / "out"
    write_with_page(place, run(1), drawn)
    before = files(place)
    with page_folder(place) as inside:
        (inside / "report.html").write_text("another")
    assert files(place) == before - {"figures/run-1.png"}
    assert (place / "report.html").read_text() == "another"
    Findings.load(place)


def test_a_page_is_not_put_beside_the_numbers_of_another_run(tmp_path):
    place = run(1).save(tmp_path / "out")
    with pytest.raises(OutputError, match="another run came"), page_folder(place) as inside:  # noqa: PT012
        (inside / "report.html").write_text("page of run 1")
        run(2).save(place)
    assert not (place / "report.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["images.npz", "gallery.npz", "matrices.npz", "blocks.csv", "findings.json", MANIFEST])
def test_a_file_of_another_run_is_refused_by_its_name(name, tmp_path):
    one, other = run(1).save(tmp_path / "one"), run(2).save(tmp_path / "other")
    shutil.copy(other / name, one / name)
    with pytest.raises(OutputError, match=r"two runs|not as this run wrote it") as said:
        Findings.load(one)
    assert name in str(said.value) or "two runs" in str(said.value)
    assert "analyze again" in str(said.value)


@pytest.mark.parametrize("name", ["images.npz", "gallery.npz"])
def test_an_array_that_is_missing_or_too_much_is_refused(name, tmp_path):
    place = run(1).save(tmp_path / "out")
    (place / name).unlink()
    with pytest.raises(OutputError, match=f"{name} cannot be read"):
        Findings.load(place)
    bare = replace(run(1), gallery=None, thumbnails={}).save(tmp_path / "bare")
    shutil.copy(run(2).save(tmp_path / "other") / "gallery.npz", bare)
    with pytest.raises(OutputError, match=r"gallery.npz is of another run"):
        Findings.load(bare)


def test_a_subject_of_another_comparison_is_refused(tmp_path):
    one, two = (replace(run(number), images=run(1).images) for number in (1, 2))
    made = replace(comparison(1), subjects={"a": one, "b": one}, pairs=())
    place = made.save(tmp_path / "out")
    assert list(Comparison.load(place).subjects) == ["a", "b"]
    shutil.rmtree(place / "subjects" / "b")
    two.save(place / "subjects" / "b")
    with pytest.raises(OutputError, match=r"subjects.b is of another run"):
        Comparison.load(place)


def test_a_document_that_was_edited_is_still_its_runs(tmp_path):
    place = run(1).save(tmp_path / "out")
    content = json.loads((place / "findings.json").read_text())
    content["model"]["name"] = "a better name"
    (place / "findings.json").write_text(json.dumps(content))
    assert Findings.load(place).model["name"] == "a better name"


def test_a_folder_without_a_list_is_taken_and_its_next_run_clears_it(tmp_path):
    place = tmp_path / "out"
    write_with_page(place, run(1), drawn)
    (place / MANIFEST).unlink()
    (place / "figures" / "a.png").write_text("old")
    (place / "figures" / "a.svg").write_text("old")
    Findings.load(place)
    with page_folder(place) as inside:
        (inside / "report.html").write_text("page")
    Findings.load(place)
    assert "figures/a.svg" not in files(place)
    (place / MANIFEST).unlink()
    replace(run(2), gallery=None, thumbnails={}).save(place)
    assert files(place) == {"findings.json", "blocks.csv", "matrices.npz", "images.npz", MANIFEST, "figures/run-1.png"}


@pytest.mark.parametrize("link", ["symlink", "dot", "open", "dangling", "trailing"])
def test_the_folder_may_be_a_link_or_the_current_one_or_open(link, tmp_path, monkeypatch):
    real = tmp_path / "real"
    if link != "dangling":
        run(1).save(real)
    target = {"dot": Path(), "open": real, "trailing": f"{real}/"}.get(link, tmp_path / "link")
    if link in ("symlink", "dangling"):
        (tmp_path / "link").symlink_to(real)
    if link == "dot":
        monkeypatch.chdir(real)
    handle = None if link == "dangling" else os.open(real, os.O_RDONLY)
    check_output(target)
    write_with_page(target, run(2), drawn)
    assert Findings.load(target).run["seed"] == 2
    if handle is not None:
        assert "report.html" in os.listdir(handle)  # noqa: PTH208 - the folder is the one that was open
        os.close(handle)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"real", "link"} if link in ("symlink", "dangling") else {"real"})


def test_where_no_folder_can_stand_beside_it_is_filled_inside(tmp_path, monkeypatch):
    place = run(1).save(tmp_path / "out")
    real = Path.rename

    def refuse(self, goal):
        if Path(goal).parent == tmp_path:
            raise OSError(18, "Invalid cross-device link")
        return real(self, goal)

    monkeypatch.setattr(Path, "rename", refuse)
    run(2).save(place)
    assert Findings.load(place).run["seed"] == 2
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: (p / "figures").write_text(""), "figures is a file"),
        (lambda p: (p / "subjects").write_text(""), "subjects is a file"),
        (lambda p: (p / "findings.json").mkdir(), "findings.json is a folder"),
        (lambda p: (p / "report.html").mkdir(), "report.html is a folder"),
        (lambda p: (p / "images.npz").write_text("mine"), "images.npz is there, and no run wrote it"),
        (lambda p: (p / MANIFEST).write_text("{}"), "manifest.json is no list"),
        (lambda p: (p / MANIFEST).mkdir(), "manifest.json is no list"),
    ],
)
def test_what_stands_in_the_way_is_told_before_and_stays(make, said, tmp_path):
    place = tmp_path / "out"
    place.mkdir()
    make(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(OutputError, match=said):
        check_output(place)
    with pytest.raises(OutputError, match=said):
        run(1).save(place)
    assert sorted(place.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["f/out", "f", "a\0b", "x" * 300, "/proc/nothing/out"])
def test_a_folder_that_cannot_be_is_told_in_one_line(target, tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written|is a file"):
        check_output(tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_numbers_that_the_folder_does_not_take_in_the_end_are_kept_beside_it(tmp_path):
    place = run(1).save(tmp_path / "out")
    with pytest.raises(OutputError, match=r"whole in (.*)") as said, new_folder(place, run="run-2") as inside:  # noqa: PT012
        run(2).write(inside)
        (place / "figures").write_text("")
        (inside / "figures").mkdir()
        (inside / "figures" / "a.png").write_text("figure")
    spare = Path(str(said.value).rpartition("whole in ")[2])
    assert Findings.load(spare).run["seed"] == 2
    assert Findings.load(place).run["seed"] == 1


@pytest.mark.parametrize("name", ["/etc/victim", "../victim", "a/../../victim", ""])
def test_a_list_that_names_files_elsewhere_is_refused_and_nothing_is_removed(name, tmp_path):
    place = run(1).save(tmp_path / "out")
    (tmp_path / "victim").write_text("mine")
    content = json.loads((place / MANIFEST).read_text())
    content["page"] = {name: "0" * 64}
    (place / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(OutputError, match=r"manifest.json is no list"):
        run(2).save(place)
    assert (tmp_path / "victim").read_text() == "mine"


def test_what_dead_runs_left_is_removed_and_told_and_what_lives_stays(tmp_path):
    place = run(1).save(tmp_path / "out")
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    host = platform.node()
    dead = tmp_path / f".out.tmp-{child.pid}-{host}-abcd1234"
    others = [
        tmp_path / f".out.tmp-{os.getpid()}-{host}-abcd1234",
        tmp_path / f".out.tmp-{child.pid}-another-host-abcd1234",
        tmp_path / f".other.tmp-{child.pid}-{host}-abcd1234",
        tmp_path / ".out.tmp-notes",
    ]
    for folder in (dead, place / dead.name, *others):
        folder.mkdir()
        (folder / "findings.json").write_text("half")
    said = tidy(place)
    assert [line.partition(" was left by a run")[0] for line in said] == [str(dead), str(place / dead.name)]
    assert not dead.exists()
    assert not (place / dead.name).exists()
    assert all(folder.exists() for folder in others)


def test_a_run_that_another_left_half_moved_is_finished_before_the_next_comes(tmp_path):
    place, left = run(1).save(tmp_path / "out"), run(2).save(tmp_path / "left")
    with new_folder(place, run="run-3") as inside:
        run(3).write(inside)
        left.rename(place / INCOMING)
    assert Findings.load(place).run["seed"] == 3
    assert not (place / INCOMING).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_report_finishes_what_a_stopped_run_left_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("collapse_probe.report.findings.page.write_report", drawn)
    place, other = run(1).save(tmp_path / "out"), run(2).save(tmp_path / "other")
    other.rename(place / INCOMING)
    result = CliRunner().invoke(group, ["report", str(place)], catch_exceptions=False)
    assert "finished what a run that was stopped" in result.stderr
    assert Findings.load(place).run["seed"] == 2
    assert not (place / INCOMING).exists()


def test_a_half_moved_run_in_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    place, other = run(1).save(tmp_path / "out"), run(2).save(tmp_path / "other")
    other.rename(place / INCOMING)

    def refuse(self, goal):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=r"make the folder writable, then: collapse-probe report"):
        Findings.load(place)


def test_what_a_check_leaves_when_it_is_killed_is_known_by_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rmdir", lambda self: None)
    check_output(tmp_path)
    (left,) = tmp_path.iterdir()
    match = TEMPORARY.fullmatch(left.name)
    assert match is not None
    assert match[1] == str(os.getpid())
