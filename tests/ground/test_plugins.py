"""Plug-ins: a user's own package or file brings a metric, a fix and a source, and a broken one stops nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from collapse_probe.errors import PluginError, UnknownNameError
from collapse_probe.registry import Registry, load_plugin

METRIC = '''
from collapse_probe.metrics.token_metric import DepthMetric
from collapse_probe.registry import METRICS


class LargestToken(DepthMetric):
    """The largest absolute entry of the tokens."""

    name = "largest-token"
    summary = "the largest absolute entry of the patch tokens"
    collapsed = None
    quantities = ("largest",)
    quantity = "largest"
    defaults = {"prefix": False}

    @property
    def definition(self):
        return f"max |x| over {self.which_tokens()}"

    def numbers(self, tokens_BND):
        return {"largest": tokens_BND.abs().amax((1, 2))}


METRICS.add(LargestToken.name, LargestToken)
'''
FIX = '''
from dataclasses import dataclass

from collapse_probe.models.fixes.base import Fix
from collapse_probe.registry import FIXES


@dataclass(frozen=True)
class HalfMap(Fix):
    """Halves what every map gives."""

    share: float = 1.0

    name = "half-map"
    summary = "multiplies every map by a number"
    source = "a test"
    neutral = {"share": 1.0}

    def weights(self, weights_BHNN, site):
        return self.share * weights_BHNN


FIXES.add(HalfMap.name, HalfMap)
'''
SOURCE = """
from collapse_probe.data.preprocessing import of_module
from collapse_probe.models.loading import Blueprint
from collapse_probe.models.vit import ViT, ViTSettings
from collapse_probe.registry import SOURCES


class Garden:
    def names(self, pattern="*"):
        return ["rose"]

    def has(self, name):
        return name == "rose"

    def blueprint(self, request):
        settings = ViTSettings(image_size=32, patch_size=8, depth=3, width=32, heads=4, classes=5)
        return Blueprint(request.name, lambda trained: ViT(settings), lambda model: of_module(model, 32))


SOURCES.add("garden", Garden())
"""
ENTRY_POINTS = """
[collapse_probe.metrics]
any-name = bouquet.metric
[collapse_probe.fixes]
any-name = bouquet.fix
[collapse_probe.sources]
any-name = bouquet.source
"""
BROKEN = "[collapse_probe.metrics]\nwilted = bouquet.wilted\n[collapse_probe.fixes]\nnowhere = bouquet.nowhere\n"
PROGRAM = """
import sys
from collapse_probe.cli.main import main
for words in {commands!r}:
    print("$", *words, flush=True)
    try:
        main(words)
    except SystemExit as stop:
        print("code", stop.code, flush=True)
"""


@pytest.fixture
def site(tmp_path):
    """A folder as pip would leave it: a package with its modules, and its entry points beside it."""
    folder = tmp_path / "site"
    (folder / "bouquet").mkdir(parents=True)
    for name, text in {"__init__": "", "metric": METRIC, "fix": FIX, "source": SOURCE, "wilted": "1 / 0"}.items():
        (folder / "bouquet" / f"{name}.py").write_text(text)
    return folder


def install(site, entry_points, name="bouquet"):
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def run_program(folder, *commands, path=None):
    """Exit codes of the commands, run one after the other in a new process, with its stdout and stderr."""
    code = PROGRAM.format(commands=[[str(word) for word in words] for words in commands])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if path is None else {"PYTHONPATH": str(path)})}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [int(found) for found in re.findall(r"^code (\d+)$", done.stdout, re.M)], done.stdout, done.stderr


def test_an_installed_package_brings_a_metric_a_fix_and_a_source(site, photos, tmp_path):
    install(site, ENTRY_POINTS)
    analyze = [
        "analyze",
        "-m",
        "garden:rose",
        "--no-pretrained",
        "--data",
        photos,
        "--null-images",
        "0",
        "--metric",
        "largest-token",
    ]
    lists = [["ls", "metrics", "largest"], ["ls", "fixes", "half"], ["ls", "models", "garden:*"]]
    runs = [[*analyze, "-o", "out"], [*analyze, "--fix", "half-map:share=0.5", "-o", "fixed"]]
    codes, out, err = run_program(tmp_path, *lists, *runs, path=site)
    assert codes == [0] * 5, err
    for line in (
        "largest-token  the largest absolute entry of the patch tokens",
        "half-map  multiplies every map by a number",
        "garden:rose",
    ):
        assert f"\n{line}\n" in out
    plain, fixed = (json.loads((tmp_path / name / "findings.json").read_text()) for name in ("out", "fixed"))
    assert len(plain["metrics"]["largest-token"]["values"]) == 4
    assert plain["metrics"]["largest-token"]["values"][0] == fixed["metrics"]["largest-token"]["values"][0]
    assert plain["metrics"]["largest-token"]["values"][1] != fixed["metrics"]["largest-token"]["values"][1]
    assert "max |x| over" in (tmp_path / "out" / "report.html").read_text()
    assert "half-map" in fixed["model"]["name"]


def test_a_broken_package_is_named_once_and_stops_nothing(site, photos, tmp_path):
    install(site, BROKEN)
    analyze = [
        "analyze",
        "-m",
        "timm:vit_tiny_patch16_224",
        "--no-pretrained",
        "--data",
        photos,
        "--metric",
        "patch-diversity",
        "-o",
        "out",
    ]
    words = [*analyze, "--img-size", "32", "--model-kwargs", "depth=2", "--null-images", "0", "-q"]
    codes, out, err = run_program(
        tmp_path, ["ls", "metrics"], ["ls", "presets"], ["ls", "metrics"], ["ls", "fixes"], words, path=site
    )
    assert codes == [0] * 5, err
    assert "token-norm" in out
    assert err.count("the plug-in 'wilted' (bouquet.wilted, of collapse_probe.metrics) is left out: ZeroDivisionError") == 1
    assert err.count("the plug-in 'nowhere' (bouquet.nowhere, of collapse_probe.fixes) is left out: ModuleNotFoundError") == 1


def test_a_file_and_a_module_given_with_plugin(site, photos, tmp_path):
    (tmp_path / "mine.py").write_text(METRIC)
    (tmp_path / "ours.py").write_text("import collapse_probe.registry\n" + FIX)
    stolen = METRIC.replace('name = "largest-token"', 'name = "token-norm"')
    (tmp_path / "stolen.py").write_text(stolen)
    nameless = FIX.replace("half-map", "no-map")
    (tmp_path / "nameless.py").write_text(nameless.replace('    summary = "multiplies every map by a number"\n', ""))
    (tmp_path / "wilted.py").write_text("1 / 0")
    plugins = [
        ["ls", "metrics", "largest", "--plugin", "mine.py"],
        ["ls", "fixes", "half", "--plugin", "ours", "--plugin", "mine.py"],
    ]
    failing = [
        ["ls", "metrics", "--plugin", name] for name in ("stolen.py", "nameless.py", "wilted.py", "absent.py", "no.such.module")
    ]
    codes, out, err = run_program(tmp_path, *plugins, *failing)
    assert codes == [0, 0, 1, 1, 1, 1, 1], err
    assert "\nlargest-token  the largest" in out
    assert "\nhalf-map  multiplies" in out
    said = err.splitlines()
    assert len(said) == 5, err
    assert all(line.startswith("error: the plug-in ") for line in said)
    assert (
        "the metric 'token-norm' is defined in collapse_probe.metrics.tokens.token_norm already; choose another name" in said[0]
    )
    assert "needs the attribute summary" in said[1]
    assert "ZeroDivisionError: division by zero" in said[2]
    assert "FileNotFoundError" in said[3]
    assert "No module named 'no'" in said[4]


def add_from(module, registry, name, entry):
    """Enter something as a module of that name would."""
    caller = ModuleType(module)
    caller.registry, caller.entry = registry, entry
    exec(f"registry.add({name!r}, entry)", vars(caller))


@pytest.fixture
def registry():
    return Registry("recipe", "collapse_probe.training.recipes")


def test_a_cell_that_is_run_again_replaces_its_entry(registry):
    for module in ("__main__", "my_module"):
        add_from(module, registry, module, 1)
        add_from(module, registry, module, 2)
        assert registry[module] == 2
    add_from("my_module", registry, "__main__", 3)
    assert registry["__main__"] == 3


def test_a_name_of_another_module_is_refused(registry):
    add_from("collapse_probe.training.recipes.mine", registry, "taken", 1)
    for module in ("other", "__main__"):
        with pytest.raises(PluginError, match=r"'taken' is defined in collapse_probe.training.recipes.mine already"):
            add_from(module, registry, "taken", 2)
    assert registry["taken"] == 1


def test_a_name_of_ours_is_taken_before_anything_was_looked_up():
    code = (
        "from collapse_probe.registry import RECIPES, PluginError\n"
        "try:\n    RECIPES.add('digits-mhsa', print)\nexcept PluginError:\n    pass\nelse:\n    raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_family_is_imported_once(registry, monkeypatch):
    assert len(registry) == 0  # its files are entered in RECIPES
    monkeypatch.setattr("pkgutil.walk_packages", lambda *_: pytest.fail("walked again"))
    assert list(registry) == []
    with pytest.raises(UnknownNameError, match="no recipe called 'x'"):
        registry["x"]


def test_completion_shows_the_public_names_alone():
    code = "import collapse_probe as cp\ncp.Monitor, cp.sweep\nassert dir(cp) == sorted(cp.__all__), dir(cp)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parent)


def test_a_folder_without_code_is_no_plug_in(tmp_path, monkeypatch):
    (tmp_path / "holiday_pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match="it is a folder without"):
        load_plugin("holiday_pictures")
