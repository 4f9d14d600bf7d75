"""Parts of a measurement, state files and runs that are taken up: equal to one pass, or refused by the first difference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_probe import assert_same

import collapse_probe as cp
from collapse_probe.analysis.measurement import RunSettings
from collapse_probe.analysis.merge import measure_part
from collapse_probe.analysis.state.files import open_state, state_path
from collapse_probe.analysis.state.keeper import Saving, saving_of
from collapse_probe.data.images import open_data
from collapse_probe.errors import NonFiniteError, OutOfTimeError, OutputError, SettingError, StateError
from collapse_probe.models.loading import resolve

ARCH = {"model_kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 2}, "pretrained": False, "img_size": 32}
SETTINGS = RunSettings(
    metrics=("attention-similarity", "patch-diversity", "similar-blocks"), null_images=4, device="cpu", batch_size=4
)
IMAGES = 22


def subject(seed=0):
    return resolve("timm:vit_tiny_patch16_224", seed=seed, **ARCH)


def digits(count=IMAGES):
    return open_data("bundled:digits", limit=count)


def part(folder, number, of=3, *, settings=SETTINGS, images=None, seed=0):
    return measure_part(subject(seed), images or digits(), settings, (number, of), Saving(folder))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    return [part(folder, number, settings=replace(SETTINGS, batch_size=number + 1)) for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def whole():
    from collapse_probe.analysis.analyze import measure

    return measure(subject(), digits(), SETTINGS)


def without_batch_size(findings):
    return replace(findings, run={key: value for key, value in findings.run.items() if key != "batch_size"})


def test_parts_in_any_order_are_the_whole(three, whole):
    for files in (three, three[::-1], [three[1], three[0], three[2]]):
        assert_same(without_batch_size(whole), without_batch_size(cp.merge(files)))
    assert_same(without_batch_size(whole), without_batch_size(cp.merge([three[0].parent])))


def test_a_part_is_every_nth_image_in_one_file(three):
    names = digits().names
    for number, file in enumerate(three, start=1):
        state = open_state(file).read()
        own = bytes(state["records/names"].numpy()).decode().split()
        assert sorted(own) == sorted(names[number - 1 :: 3])
        assert not (file.parent / ".state").exists()


def test_missing_parts_are_refused_or_said(three):
    with pytest.raises(StateError, match=r"part 2 of 3 is missing \(15 of 22 images are there\).*--allow-missing"):
        cp.merge([three[0], three[2]])
    found = cp.merge([three[0], three[2]], allow_missing=True)
    assert found.data["partial"] == {"read": 15, "of": 22, "why": "part 2 of 3 is missing"}
    assert found.answer["sentences"][0].startswith("Partial: 15 of 22 (68.2 %) images")
    assert found.run["notes"][0].startswith("Partial: ")


def test_a_partial_folder_opens_and_its_page_says_so(three, tmp_path):
    from collapse_probe.report.findings.page import render

    found = cp.Findings.load(cp.merge([three[0]], allow_missing=True).save(tmp_path / "out"))
    assert found.data["partial"]["read"] == 8
    assert "Partial: 8 of 22 (36.4 %) images of the data were read" in render(found)


class TestRefused:
    def test_a_part_given_twice(self, three, tmp_path):
        copied = shutil.copy(three[1], tmp_path / "copy.safetensors")
        with pytest.raises(StateError, match=r"are both part 2 of 3: give each once"):
            cp.merge([*three, copied])
        found = cp.merge([*three, three[1]])  # the same file twice is the same file
        assert found.summary["images"] == IMAGES

    def test_overlapping_shares(self, three, tmp_path):
        other = part(tmp_path, 1, 2)
        with pytest.raises(StateError, match=r"have both seen image number 0"):
            cp.merge([three[0], other])

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"seed": 1}, r"the weights \(SHA-256\): "),
            ({"images": 23}, "the number of images in the data: 22 and 23"),
            ({"settings": replace(SETTINGS, null_images=5)}, "the number of null images: 4 and 5"),
            ({"settings": replace(SETTINGS, metrics=("patch-diversity",))}, "the metrics: "),
            ({"settings": replace(SETTINGS, amp=True)}, "the precision: "),
            ({"settings": replace(SETTINGS, seed=4)}, "the seed: "),
        ],
    )
    def test_another_measurement(self, three, tmp_path, options, says):
        if "images" in options:
            options = {**options, "images": digits(options["images"])}
        other = part(tmp_path, 2, **options)
        with pytest.raises(StateError, match=rf"part-1-of-3.*{says}"):
            cp.merge([three[0], other])

    def test_data_that_changed_between_parts(self, tmp_path):
        from factories import noise_by_class

        (tmp_path / "images").mkdir()
        folder = noise_by_class(tmp_path / "images", count=6, side=32)
        first = part(tmp_path / "a", 1, 2, images=open_data(str(folder)))
        picture = sorted(folder.rglob("*.png"))[0]
        picture.rename(picture.with_name("other.png"))
        second = part(tmp_path / "b", 2, 2, images=open_data(str(folder)))
        with pytest.raises(StateError, match="the listing of the data"):
            cp.merge([first, second])

    def test_files_that_are_cut_or_changed(self, three, tmp_path):
        content = three[0].read_bytes()
        for name, bad in {
            "cut": content[: len(content) // 2],
            "nothing": b"",
            "other": b"not a state" * 100,
            "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        }.items():
            file = tmp_path / f"{name}.safetensors"
            file.write_bytes(bad)
            with pytest.raises(StateError, match=rf"{name}\.safetensors is (no whole state file|damaged)"):
                cp.merge([file, *three[1:]])
        with pytest.raises(StateError, match="there is no file"):
            cp.merge([tmp_path / "none.safetensors"])
        with pytest.raises(StateError, match="holds no state file"):
            cp.merge([tmp_path / ".."])

    def test_an_older_definition(self, three, tmp_path):
        import safetensors.torch

        state = open_state(three[1]).read()
        manifest = json.loads(state.pop("manifest"))
        manifest["identity"]["the definition of patch-diversity"] = "another"
        file = tmp_path / "older.safetensors"
        file.write_bytes(safetensors.torch.save(state, {"manifest": json.dumps(manifest)}))
        with pytest.raises(StateError, match="the definition of patch-diversity: "):
            cp.merge([three[0], file])

    def test_settings_that_look_at_all_images(self, tmp_path):
        with pytest.raises(SettingError, match="until_ci looks at all images"):
            part(tmp_path, 1, settings=replace(SETTINGS, until_ci=0.1))
        with pytest.raises(SettingError, match="part K of N"):
            part(tmp_path, 4)


def test_a_finished_part_of_another_measurement_is_not_overwritten(tmp_path):
    file = part(tmp_path, 1)
    before = file.read_bytes()
    with pytest.raises(StateError, match=r"part-1-of-3.* is of another measurement: the weights .*move it away"):
        part(tmp_path, 1, seed=1)
    assert file.read_bytes() == before
    lines = []
    again = measure_part(subject(), digits(), SETTINGS, (1, 3), Saving(tmp_path, resume=True), report=lines.append)
    assert (again, file.read_bytes(), lines[-1]) == (file, before, f"{file} is complete already")
    file.write_bytes(before[:1000])
    part(tmp_path, 1)
    assert open_state(file).facts["read"] == 8


def test_results_leave_the_states_of_others(tmp_path, whole):
    states = tmp_path / "out" / ".state"
    states.mkdir(parents=True)
    for name in ("run.1.rank-0-of-1", "part-1-of-2.1.rank-0-of-1", "subject-0-all.1.rank-0-of-1"):
        (states / f"{name}.safetensors").write_bytes(b"")
    whole.save(tmp_path / "out")
    assert sorted(path.name[:4] for path in states.iterdir()) == ["part", "subj"]


def test_a_model_that_cannot_be_made_again_leaves_out_the_twin_alone(three, tmp_path, whole):
    import safetensors.torch

    files = []
    for i, file in enumerate(three):
        state = open_state(file).read()
        manifest = json.loads(state.pop("manifest"))
        manifest["request"]["address"] = "import:no_such_package:model"
        files.append(tmp_path / f"{i}.safetensors")
        files[-1].write_bytes(safetensors.torch.save(state, {"manifest": json.dumps(manifest)}))
    found = cp.merge(files)
    nulls = found.metrics["attention-similarity"].nulls
    assert "no_such_package" in nulls.reasons["untrained"]
    np.testing.assert_allclose(found.metrics["patch-diversity"].values, whole.metrics["patch-diversity"].values, rtol=1e-12)


def broken_off(folder, after, **options):
    """A run that is broken off after some images."""

    def progress(done, skipped):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"--resume goes on with it"):
        run(folder, progress=progress, **options)


def run(folder, settings=SETTINGS, progress=None, resume=False, images=None, seed=0, report=None, **options):
    from collapse_probe.analysis.analyze import measure

    saving = saving_of(folder, resume=resume, **options)
    return measure(
        subject(seed), digits() if images is None else images, settings, progress=progress, saving=saving, report=report
    )


def test_a_run_that_is_broken_off_goes_on_and_says_the_same_to_the_bit(tmp_path, whole):
    broken_off(tmp_path / "out", 8)
    broken_off(tmp_path / "out", 16, resume=True)
    lines = []
    found = run(tmp_path / "out", resume=True, report=lines.append)
    assert any("16 images were read before" in line for line in lines)
    assert_same(whole, found, within=0)
    found.save(tmp_path / "out")
    assert not (tmp_path / "out" / ".state").exists()


def test_another_batch_size_goes_on(tmp_path, whole):
    broken_off(tmp_path / "out", 8)
    found = run(tmp_path / "out", settings=replace(SETTINGS, batch_size=7), resume=True)
    assert_same(without_batch_size(whole), without_batch_size(found))


def test_a_run_is_stored_in_between_and_after_its_time(tmp_path, whole):
    lines = []
    with pytest.raises(OutOfTimeError, match=r"time \(0 s\) is over; the state after 4 images is in"):
        run(tmp_path / "out", most_seconds=0.0, report=lines.append)
    (file,) = (tmp_path / "out" / ".state").glob("*.safetensors")
    assert open_state(file).facts["read"] == 4
    with pytest.raises(OutputError, match="holds the state of a run that was stopped after 4 images"):
        run(tmp_path / "out")
    assert_same(whole, run(tmp_path / "out", resume=True))


def test_what_was_stored_can_be_reported(tmp_path, whole):
    broken_off(tmp_path / "out", 8)
    with pytest.raises(StateError, match=r"is of a run that was stopped \(8 of 22 images are there\)"):
        cp.merge([tmp_path / "out"])
    found = cp.merge([tmp_path / "out"], allow_missing=True)
    assert (found.summary["images"], found.data["partial"]["read"]) == (8, 8)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 1}, r"the weights \(SHA-256\): "),
        ({"settings": replace(SETTINGS, metrics=("token-norm",))}, "the metrics: "),
        ({"images": 21}, "the number of images in the data: "),
    ],
)
def test_the_state_of_another_run_is_not_taken_up(tmp_path, options, says):
    broken_off(tmp_path / "out", 8)
    if "images" in options:
        options = {"images": digits(options["images"])}
    with pytest.raises(StateError, match=rf"cannot be taken up: .*{says}"):
        run(tmp_path / "out", resume=True, **options)
    assert len(list((tmp_path / "out" / ".state").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("fixes", "settings", "says"),
    [
        (("temperature:tau=0.5",), SETTINGS, r"the fixes: .*0\.5.* and \[\]"),
        ((), replace(SETTINGS, until_ci=1.0), "the order of the images: random"),
    ],
)
def test_what_no_weight_shows_is_not_taken_up(tmp_path, fixes, settings, says):
    from collapse_probe.analysis.analyze import measure

    broken_off(tmp_path / "out", 8)
    other = resolve("timm:vit_tiny_patch16_224", fixes, seed=0, **ARCH)
    with pytest.raises(StateError, match=rf"cannot be taken up: .*{says}"):
        measure(other, digits(), settings, saving=saving_of(tmp_path / "out", resume=True))


def test_other_pictures_of_the_same_names_are_not_taken_up(tmp_path):
    for folder, seed in (("one", 0), ("other", 1)):
        (tmp_path / folder).mkdir()
        for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i:02}.png")
    broken_off(tmp_path / "out", 8, images=open_data(str(tmp_path / "one")))
    shutil.move(tmp_path / "one", tmp_path / "moved")
    with pytest.raises(StateError, match=r"the content of some images .*: "):
        run(tmp_path / "out", images=open_data(str(tmp_path / "other")), resume=True)
    assert run(tmp_path / "out", images=open_data(str(tmp_path / "moved")), resume=True).summary["images"] == 20


def test_what_is_reported_of_a_stopped_run_leaves_its_state(tmp_path, whole):
    broken_off(tmp_path / "out", 8)
    cp.merge([tmp_path / "out"], allow_missing=True).save(tmp_path / "out")
    found = run(tmp_path / "out", resume=True)
    assert_same(whole, found, within=0)
    found.save(tmp_path / "out")
    assert not (tmp_path / "out" / ".state").exists()


def test_more_parts_than_images(tmp_path):
    few = digits(2)
    files = [part(tmp_path, number, images=few) for number in (1, 2, 3)]
    assert cp.merge(files).summary["images"] == 2
    with pytest.raises(StateError, match=r"parts? .* missing|images are missing"):
        cp.merge(files[1:])


def test_a_state_that_was_cut_short_is_named(tmp_path):
    broken_off(tmp_path / "out", 8)
    (file,) = (tmp_path / "out" / ".state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(StateError, match=f"{file.name} is no whole state file"):
        run(tmp_path / "out", resume=True)


def test_two_runs_in_one_folder(tmp_path):
    from collapse_probe.analysis.state.files import at_work

    with at_work(tmp_path / "out", "run", 0), pytest.raises(OutputError, match="is in use: process"):
        run(tmp_path / "out", every=0.0)


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch, whole):
    from collapse_probe.analysis.state import keeper

    def full(*args, **kwargs):
        raise OutputError("No space left on device")

    monkeypatch.setattr(keeper, "write_state", full)
    lines = []
    found = run(tmp_path / "out", every=0.0, report=lines.append)
    assert len([line for line in lines if "No space left" in line]) == 1
    assert_same(whole, found)


def test_a_batch_that_is_not_finite_keeps_what_came_before(tmp_path):
    pixels = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels[6, 0, 0, 0] = torch.nan
    lines = []
    with pytest.raises(NonFiniteError, match="first of 6"):
        run(tmp_path / "out", images=pixels, report=lines.append)
    assert any("the state after 4 images is in" in line for line in lines)
    found = run(tmp_path / "out", images=pixels, settings=replace(SETTINGS, on_nonfinite="skip"), resume=True)
    assert found.summary["images"] == 9
    assert [each["name"] for each in found.data["skipped"]] == ["6"]


def test_other_numbers_of_processes_leave_one_whole_state(tmp_path, whole, monkeypatch):
    """As if three processes had been broken off, each with its own file, and one went on."""
    from collapse_probe.analysis import analyze
    from collapse_probe.analysis.probe import Probe
    from collapse_probe.analysis.state.files import write_state
    from collapse_probe.data.images import batches

    images = digits()
    for rank in range(3):
        own = subject()
        probe = Probe.over(own, images, SETTINGS)
        for batch in list(batches(images, own.preprocess, batch_size=2, rank=rank, world=3))[: rank + 1]:
            probe.measurement.update(batch)
        facts = {
            "stem": "run",
            "generation": 1,
            "rank": rank,
            "world": 3,
            "whole": False,
            "complete": False,
            "read": probe.read,
        }
        write_state(state_path(tmp_path / "out", "run", 1, rank, 3), probe.state_dict(), **facts)
    assert analyze.measure is not None
    broken_off(tmp_path / "out", 16, resume=True)
    (file,) = (tmp_path / "out" / ".state").glob("*.safetensors")
    assert (open_state(file).facts["generation"], open_state(file).facts["whole"]) == (2, True)
    broken_off(tmp_path / "out", 20, resume=True)
    assert open_state(file).facts["whole"]  # else files of before, which a kill may leave, would count beside it
    assert_same(without_batch_size(whole), without_batch_size(run(tmp_path / "out", resume=True)))


def test_paths_of_states_hold_what_they_are_of():
    assert state_path(Path("out"), "run", 2, 1, 4) == Path("out/.state/run.2.rank-1-of-4.safetensors")


def test_interventions_that_are_broken_off_count_every_image_once(tmp_path, monkeypatch):
    from collapse_probe.analysis.state.passes import Answers, MapSums

    def intervened(fixes=(), **options):
        model = resolve("timm:vit_tiny_patch16_224", fixes, seed=0, **ARCH)
        return cp.intervene(model, digits(), ("mean", "uniform"), device="cpu", batch_size=4, **options)

    def stopped(done, skipped):
        if done >= 8:
            raise KeyboardInterrupt

    folder, states = tmp_path / "out", tmp_path / "out" / ".state"
    for owner, method in ((MapSums, "add_maps"), (Answers, "take")):
        with monkeypatch.context() as broken:
            broken.setattr(owner, method, lambda *_: 1 / 0)  # while it adds the first batch
            with pytest.raises(ZeroDivisionError):
                intervened(save_to=folder)
        assert not list(states.glob("*.safetensors"))
    with pytest.raises(KeyboardInterrupt, match="the state after 8 images"):
        intervened(save_to=folder, progress=stopped)
    with pytest.raises(StateError, match="what is asked: "):
        intervened(("temperature:tau=0.5",), save_to=folder, resume=True)
    found, whole = intervened(save_to=folder, resume=True), intervened()
    assert (found.plain, found.single, found.cumulative) == (whole.plain, whole.single, whole.cumulative)
    assert len(found.images["names"]) == IMAGES


def test_a_process_of_a_stream_that_stored_nothing_is_missed(tmp_path):
    """The length of a stream is unknown, so that only the processes tell that something is missing."""
    from collapse_probe.analysis.probe import Probe
    from collapse_probe.analysis.state.files import write_state
    from collapse_probe.data.images import batches

    images, paths = digits(), [state_path(tmp_path, "run", 1, rank, 2) for rank in range(2)]
    for rank, path in enumerate(paths):
        own = subject()
        probe = Probe.over(own, images, SETTINGS)
        for batch in batches(images, own.preprocess, batch_size=4, rank=rank, world=2):
            probe.measurement.update(batch)
        state = probe.state_dict()
        manifest = json.loads(state["manifest"])
        manifest["source"]["total"] = manifest["identity"]["the number of images in the data"] = None
        facts = {"stem": "run", "generation": 1, "rank": rank, "world": 2, "whole": False, "complete": True, "read": probe.read}
        write_state(path, {**state, "manifest": json.dumps(manifest)}, **facts)
    assert cp.merge(paths).data.get("partial") is None
    paths[1].unlink()
    with pytest.raises(StateError, match="is of a run that was stopped"):
        cp.merge(paths[:1])
    assert cp.merge(paths[:1], allow_missing=True).data["partial"]["read"] == 11
