"""What a monitor and a training log is read back, from the real libraries, without a network."""

from __future__ import annotations

import importlib.util
import json
import math
import sqlite3
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_monitor import QUICK, pixels, same_state, tiny, trained

from collapse_probe.errors import AlarmError, SettingError
from collapse_probe.results.findings import Findings
from collapse_probe.training.logs.log import KINDS, Log, Logs, open_log, stored_id
from collapse_probe.training.monitor import Monitor
from collapse_probe.training.monitor import pixels as pixels_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's libraries
HEATMAP = "collapse/attention-similarity"
PACKAGES = {"tensorboard": "torch.utils.tensorboard", **{kind: kind for kind in KINDS if kind != "tensorboard"}}


class Reader:
    """What lies on the disk after a log was closed: curves as {name: {step: value}}, images as {name: {step: pixels}}."""

    def __init__(self, root):
        self.root = root

    def tensorboard(self):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.root / "logs"), size_guidance={"scalars": 0, "images": 0})
        events.Reload()
        curves = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        decoded = {
            tag: {e.step: picture(e.encoded_image_string) for e in events.Images(tag)} for tag in events.Tags()["images"]
        }
        return curves, decoded

    def wandb(self):
        curves, images = {}, {}
        for file, row in wandb_history(self.root):
            step = row.pop("collapse_probe/step")
            for name, value in row.items():
                if isinstance(value, dict) and value["_type"] == "image-file":
                    images.setdefault(name, {})[step] = picture((file.parent / "files" / value["path"]).read_bytes())
                elif not name.startswith("_"):
                    curves.setdefault(name, {})[step] = value
        return curves, images

    def trackio(self):
        curves, images = {}, {}
        with sqlite3.connect(self.root / "trackio" / "collapse-probe.db") as table:
            rows = table.execute("select run_name, step, metrics from metrics").fetchall()
        assert len({name for name, *_ in rows}) == 1
        for _, step, content in rows:
            for name, value in json.loads(content).items():
                if isinstance(value, dict):
                    file = self.root / "trackio" / "media" / value["file_path"]
                    images.setdefault(name, {})[step] = picture(file.read_bytes())
                else:
                    curves.setdefault(name, {})[step] = value
        return curves, images

    def mlflow(self):
        client, run = self.mlflow_run()
        curves = {
            name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in run.data.metrics
        }
        images = {}
        for file in (Path(run.info.artifact_uri.removeprefix("file://")) / "images").glob("*.png"):
            name, _, step, *_ = file.name.split("+")
            images.setdefault(name.replace("~", "/").replace("similarity.", "similarity@"), {})[int(step)] = picture(
                file.read_bytes()
            )
        return curves, images

    def mlflow_run(self):
        import mlflow

        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name("collapse-probe")
        (run,) = client.search_runs([experiment.experiment_id])
        return client, run


def picture(content):
    import io

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def wandb_history(root):
    """The rows of the histories in W&B's files, each with its file."""
    import wandb
    from wandb.proto import wandb_internal_pb2 as protocol

    wandb.teardown()  # its own process has written all then
    for file in sorted(root.rglob("run-*.wandb")):
        for content in leveldb_records(file.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(content)
            row = {}
            for item in record.history.item:
                name, *below = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                row[name] = {**row.get(name, {}), below[0]: value} if below else value
            if row:
                yield file, row


def leveldb_records(content):
    """The records of a file of W&B: LevelDB's log format behind a header of seven bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0:
            break
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """All that these libraries write lies in the test's folder, and none of them looks for a server."""
    for name, value in {
        **{"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": tmp_path, "WANDB_CACHE_DIR": tmp_path / "cache"},
        **{"WANDB_DATA_DIR": tmp_path / "data", "WANDB_CONFIG_DIR": tmp_path / "config", "HF_HUB_OFFLINE": "1"},
        **{"TRACKIO_DIR": tmp_path / "trackio", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"},
        **{"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "HTTPS_PROXY": "http://127.0.0.1:9"},
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads its folder when it is imported
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # as W&B does its own
    return tmp_path


@pytest.fixture(params=list(KINDS))
def kind(request, offline):
    pytest.importorskip(PACKAGES[request.param].partition(".")[0] if request.param != "tensorboard" else "tensorboard")
    return request.param


def close_to(value):
    return pytest.approx(value, rel=1e-6, abs=1e-9)  # TensorBoard holds float32


def test_what_a_monitor_logs_is_read_back_with_its_heatmaps(kind, offline):
    log = open_log(kind, offline / "logs", "a-run", {"lr": 0.1})
    assert isinstance(log, Log)
    monitor = Monitor(pixels(), every=2, metrics=QUICK, folder=offline / "watch", log=log)
    model = tiny()
    found = {step: monitor.step(model, step) for step in (0, 2)}
    log.close()
    curves, images = getattr(Reader(offline), kind)()
    for step, findings in found.items():
        for name, value in findings.summary.items():
            if value is not None:
                assert curves[f"collapse/{name}"][step] == close_to(value), name
        assert np.array_equal(images[HEATMAP][step], pixels_of(findings.plot("attention-similarity")))
    assert {name for name in curves if name.startswith("collapse/")} == {
        f"collapse/{name}" for name, value in found[0].summary.items() if value is not None
    }
    assert set(images) == {HEATMAP}
    assert images[HEATMAP][0].std() > 5


def test_a_log_leaves_the_training_as_it_was(offline):
    pytest.importorskip("tensorboard")
    log = open_log("tensorboard", offline / "logs", "a-run", {})
    assert same_state(trained(Monitor(pixels(), every=2, metrics=QUICK, log=log)), trained())
    log.close()


def test_a_training_logs_curves_and_heatmaps_and_goes_on_in_the_same_run(kind, offline, run):
    words = ("train", "digits-quick", "--set", "depth=2 width=16 heads=2 batch_size=8 monitor_images=6 log_every=1")
    words = (*words, "--steps", "6", "--monitor-every", "3", "-o", "out", "--log", kind)
    code, out, err = run(*words, "--stop-after", "3")
    assert code == 0, err
    code, out, err = run(*words, "--resume")
    assert code == 0, err
    assert out.count("\n") == 2  # what a library prints is not on stdout
    (offline / "logs").symlink_to(offline / "out" / "logs")
    curves, images = getattr(Reader(offline), kind)()
    assert sorted(curves["train/total"]) == [1, 2, 3, 4, 5, 6]
    account = json.loads((offline / "out" / "training.json").read_text())
    assert curves["validation/accuracy"] == {6: close_to(account["accuracy"])}
    measured = {step: Findings.load(offline / "out" / "monitor" / f"step-{step:07d}") for step in (0, 3, 6)}
    share = {step: close_to(findings.summary["attention_entropy_share"]) for step, findings in measured.items()}
    assert curves["collapse/attention_entropy_share"] == share
    assert sorted(images[HEATMAP]) == [0, 3, 6]
    assert set(images) == {f"{HEATMAP}{end}" for end in ("", "@row", "@centred")} | {"collapse/feature-similarity"}


def test_a_folder_of_findings_is_an_artifact(kind, offline):
    log = open_log(kind, offline / "logs", "a-run", {})
    findings = Monitor(pixels(), every=1, metrics=QUICK, folder=offline / "watch", log=log).step(tiny(), 4)
    log.close()
    copies = [file for file in offline.rglob("*") if file.is_file() and "watch" not in file.parts]
    expected = (offline / "watch" / "step-0000004" / "findings.json").read_bytes()
    assert json.loads(expected)["summary"]["images"] == findings.summary["images"]
    found = [file for file in copies if file.stat().st_size == len(expected) and file.read_bytes() == expected]
    assert bool(found) == (kind != "tensorboard")


def test_mlflow_says_how_a_training_ended(offline, run):
    pytest.importorskip("mlflow")
    words = ("train", "digits-quick", "--set", "depth=2 width=16 heads=2 monitor_images=6", "--steps", "2")
    code, _, err = run(*words, "--monitor-every", "1", "-o", "out", "--log", "mlflow", "--alarm", "images > 3")
    assert code == 3, err
    client, ended = Reader(offline).mlflow_run()
    assert ended.info.status == "FAILED"
    assert ended.data.metrics["collapse/images"] == 6
    assert "settings.json" in [each.path for each in client.list_artifacts(ended.info.run_id)]


def test_a_run_of_ones_own_stays_open_and_keeps_all_points(offline):
    wandb = pytest.importorskip("wandb")
    from collapse_probe.training.logs.wandb import WandbLog

    mine = wandb.init(project="mine", dir=str(offline))
    mine.log({"loss": 1.0}, step=1000)
    log = WandbLog(mine)
    log.numbers(7, {"collapse/images": 6.0})
    log.close()
    mine.log({"loss": 0.5}, step=1001)
    mine.finish()
    rows = [row for _, row in wandb_history(offline)]
    assert [row["loss"] for row in rows if "loss" in row] == [1.0, 0.5]
    (ours,) = [row for row in rows if "collapse/images" in row]
    assert (ours["collapse/images"], ours["collapse_probe/step"]) == (6.0, 7)


@pytest.mark.parametrize("kind", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_a_missing_library_is_told_with_the_command_that_installs_it(kind, tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    with pytest.raises(SettingError, match=f"needs the package {kind} .*pip install {kind}$"):
        open_log(kind, tmp_path, "x", {})
    assert list(tmp_path.iterdir()) == []
    code, _, err = run("train", "digits-quick", "--steps", "1", "-o", "out", "--log", kind)
    assert code == 1
    assert f"pip install {kind}" in err.splitlines()[-1]


def test_without_tensorboard_a_training_that_did_not_ask_for_it_goes_on(tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = run("train", "digits-quick", "--steps", "1", "--set", "depth=1 width=16 heads=2", "-o", "out")
    assert code == 0, err
    assert not (tmp_path / "out" / "logs").exists()


class Listed:
    """A log of one's own: any object with the four methods."""

    def __init__(self):
        self.rows, self.images, self.folders, self.ends = {}, {}, [], []

    def numbers(self, step, numbers):
        self.rows[step] = dict(numbers)

    def image(self, step, name, pixels_HW3):
        self.images[step, name] = pixels_HW3

    def artifact(self, step, name, folder):
        self.folders.append((step, name, folder))

    def close(self, failed=False):
        self.ends.append(failed)


def test_a_log_of_ones_own_takes_the_same_also_of_the_step_of_an_alarm(tmp_path):
    one, other = Listed(), Listed()
    monitor = Monitor(
        pixels(), every=1, metrics=QUICK, folder=tmp_path, log=Logs([one, other]), alarm="patch_diversity_last > -1"
    )
    with pytest.raises(AlarmError):
        monitor.step(tiny(), 0)
    assert one.rows == other.rows
    assert one.rows[0]["collapse/images"] == 6.0
    assert not any(math.isnan(value) for value in one.rows[0].values())
    assert one.folders == [(0, "findings", tmp_path / "step-0000000")]
    picture_of = one.images[0, HEATMAP]
    assert (picture_of.dtype, picture_of.shape[2]) == (np.uint8, 3)


def test_a_model_that_is_not_finite_is_logged_as_such():
    log, model = Listed(), tiny()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = torch.nan
    assert Monitor(pixels(), every=1, metrics=QUICK, log=log).step(model, 3) is None
    assert log.rows == {3: {"collapse/nonfinite": 1.0}}
    assert log.images == {}


def test_an_id_is_of_one_folder_and_stays(tmp_path):
    first = stored_id(tmp_path / "a", "trackio")
    assert stored_id(tmp_path / "a", "trackio") == first != stored_id(tmp_path / "b", "trackio")
    assert stored_id(tmp_path / "a", "mlflow", "given") == "given"


def test_every_kind_has_its_file():
    for kind in KINDS:
        assert importlib.util.find_spec(f"collapse_probe.training.logs.{kind}") is not None
