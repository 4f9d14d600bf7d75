"""The rules of the house: which package may import which, how light the front door is, which flags there are."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "collapse_probe"
MAY_IMPORT = {
    "statistics": "",
    "data": "",
    "capture": "",
    "models": "data",
    "results": "statistics",
    "metrics": "capture statistics results",
    "report": "results statistics",
    "analysis": "data models capture metrics results statistics",
    "training": "data models capture metrics results statistics analysis",
}
GROUND = {path.stem for path in PACKAGE.glob("*.py")} | {"processes"}
FAMILIES = {  # folders with one file a thing
    "cli",
    "metrics/attention",
    "metrics/tokens",
    "metrics/weights",
    "models/fixes",
    "models/sources",
    "training/logs",
    "training/penalties",
    "training/recipes",
}
FORBIDDEN = {"utils", "helpers", "common", "core", "misc"}
LONGEST_FILE = 500
HEAVY = ("torch", "timm", "torchvision", "matplotlib", "pandas", "numpy", "scipy")
BESIDE_TORCH = (  # what only one step of a run needs, and is imported there
    *("scipy.optimize", "scipy.stats", "matplotlib", "seaborn", "pandas", "jinja2", "sklearn", "skimage"),
    *("torchmetrics", "transformers", "accelerate", "datasets", "webdataset", "fsspec", "tensorboard", "lightning"),
    *("wandb", "trackio", "mlflow"),
)

LOGGED = ("wandb", "trackio", "mlflow", "matplotlib", "torch.utils.tensorboard", "accelerate", "lightning")


def modules():
    return sorted(p for p in [*PACKAGE.rglob("*.py"), *(ROOT / "cli").glob("*.py")] if "__pycache__" not in p.parts)


def imports(path):
    """The modules of this project that a file imports, also inside functions: `results.findings`, `errors`, …"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("collapse_probe.") for name in found if name.startswith("collapse_probe.")}


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: str(p.relative_to(ROOT)))


def inside(paths):
    return [p for p in paths if p.is_relative_to(PACKAGE) and p.name not in ("__init__.py", "__main__.py")]


@each(inside(modules()))
def test_packages_import_only_what_lies_below(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = GROUND if here in GROUND else GROUND | {here} | set(MAY_IMPORT[here].split())
    assert {name.split(".")[0] for name in imports(path)} - {"__version__"} <= allowed


def test_no_package_has_a_circle_of_imports():
    files = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in inside(modules())}
    below = {name: imports(path) & set(files) for name, path in files.items()}
    while leaves := [name for name, others in below.items() if not others]:
        for leaf in leaves:
            del below[leaf]
        below = {name: others - set(leaves) for name, others in below.items()}
    assert not below, f"these files import one another in a circle, or one of the circle: {below}"


@pytest.mark.parametrize("family", sorted(FAMILIES - {"cli"}))
def test_files_of_one_family_do_not_import_each_other(family):
    place = family.replace("/", ".")
    bases = {"base", "presets", "apply", "log"}
    for path in (PACKAGE / family).glob("*.py"):
        others = {name.split(".")[len(place.split("."))] for name in imports(path) if name.startswith(f"{place}.")}
        assert path.stem in bases or others - bases <= set(), f"{path} imports {others}"


def test_folders_can_be_read_at_a_glance():
    for folder in {path.parent for path in modules()}:
        if str(folder.relative_to(PACKAGE) if folder.is_relative_to(PACKAGE) else folder.name) not in FAMILIES:
            assert len([p for p in folder.glob("*.py") if not p.name.startswith("__")]) <= 12, f"{folder} is crowded"


def test_no_room_without_a_subject():
    names = {p.stem for p in ROOT.rglob("*.py") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)} | {
        p.name for p in PACKAGE.rglob("*") if p.is_dir()
    }
    assert not names & FORBIDDEN


@each(modules())
def test_files_have_one_subject_and_say_why_they_exist(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert ast.get_docstring(ast.parse(text)), "no sentence on why the file exists"


@each(modules())
def test_the_library_does_not_print(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)]


def test_every_package_is_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'"([^"]+)"', text.split("\npackages = [")[1].split("]")[0])
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {"collapse_probe.cli"}


def loads_none_of(code, heavy):
    look = "loaded = [n for n in heavy if n in sys.modules]\nsys.exit(str(loaded) if loaded else 0)"
    words = [sys.executable, "-c", f"{code}\nimport sys\nheavy = {heavy!r}\n{look}"]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)


def command(*words):
    return f"import collapse_probe.cli.main as m\ntry:\n    m.main({[*words]})\nexcept SystemExit:\n    pass"


ANALYSIS = """
import timm, torch, collapse_probe as cp
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=24).eval()
cp.analyze(model, torch.randn(8, 3, 32, 32), null_images=2)
"""
NOWHERE = ("--data", "/no/such/folder", "-q")  # which is found out after all that a command imports before its first output


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import collapse_probe", HEAVY),
        ("import collapse_probe.training.monitor, collapse_probe.training.trainer", LOGGED),
        (command("--help"), HEAVY),
        (command("analyze", "--help"), HEAVY),
        *((command("ls", kind), HEAVY) for kind in ("models", "metrics", "presets", "fixes", "penalties", "recipes", "data")),
        ("import collapse_probe.results.findings", ("torch", "matplotlib", "pandas", "collapse_probe.report")),
        ("import collapse_probe.report.findings.page", ("torch", "timm", "torchvision")),
        ("import collapse_probe.report.comparison.page", ("torch", "timm", "torchvision")),
        ("import collapse_probe.report.intervention.page", ("torch", "timm", "torchvision")),
        ("import collapse_probe.report.sweep.page", ("torch", "timm", "torchvision")),
        ("import collapse_probe.analysis.analyze", BESIDE_TORCH),
        ("import collapse_probe.analysis.compare, collapse_probe.analysis.intervene", BESIDE_TORCH),
        (ANALYSIS, tuple(name for name in BESIDE_TORCH if name != "scipy.optimize")),
        (command("analyze", "-m", "vit_b_32", *NOWHERE), BESIDE_TORCH),
        (command("intervene", "-m", "vit_b_32", *NOWHERE), BESIDE_TORCH),
        (command("compare", "vit_b_32", "vit_s_16", *NOWHERE), BESIDE_TORCH),
    ],
    ids=[
        *("front door", "training", "help", "help of analyze"),
        *("ls models", "ls metrics", "ls presets", "ls fixes", "ls penalties", "ls recipes", "ls data"),
        "results, which name what draws them",
        *("findings page", "comparison page", "intervention page", "sweep page"),
        *("analysis", "comparison and intervention", "a whole analysis"),
        *("analyze before its first output", "intervene before its first output"),
        "compare before its first output",
    ],
)
def test_an_import_loads_no_more_than_it_needs(code, heavy):
    loads_none_of(code, heavy)


def test_public_names():
    import collapse_probe

    for name in collapse_probe.__all__:
        assert getattr(collapse_probe, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        collapse_probe.nonsense  # noqa: B018


MODEL = "-m --model --checkpoint --checkpoint-key --partial --pretrained --model-kwargs --img-size --blocks-pattern"
TALK = "--config -v --verbose -q --quiet -h --help"
PLUGIN = f"--plugin {TALK}"
RUN = "-b --batch-size -j --workers --device --amp --amp-dtype --seed --on-nonfinite"
MEASURED = "--metric --null-images"
GIVEN = "--fix --fix-blocks --data --split --limit --max-pixels"
SAVED = "--save-every --max-time --resume"
KEPT = f"-o --output --json --no-page --fail-on --junit {PLUGIN}"
TRAINED = "--fix --penalty --set --seed --steps --device -j --workers --monitor-every --alarm --log --stop-after"
FLAGS = {
    "analyze": f"{MODEL} {GIVEN} {RUN} {MEASURED} --null-seeds --until-ci --level --preset --recalibrate-bn --part --records "
    f"{SAVED} {KEPT}",
    "compare": f"{MODEL} {GIVEN} {RUN} {MEASURED} --recalibrate-bn --cka --gram-drift --records {SAVED} {KEPT}".replace(
        " --checkpoint ", " "
    ),
    "intervene": f"{MODEL} {GIVEN} {RUN} --recalibrate-bn --replace --drop --prefix --sinks --window --keep --export "
    f"--blocks {SAVED} {KEPT}",
    "gallery": f"--data --split --limit --max-pixels {RUN} --null-images -o --output {PLUGIN}",
    "merge": f"--allow-missing --device {KEPT}",
    "report": f"--figures --style {TALK}",
    "cite": TALK,
    "doctor": f"{MODEL} --device --seed --json {PLUGIN}",
    "ls": PLUGIN,
    "demo": f"-o --output {TALK}",
    "sweep": f"--vary --seeds --set --steps --data --val-data --eval-data --limit --null-images -o --output --device --amp "
    f"--amp-dtype --jobs --dry-run --json --no-page {PLUGIN}",
    "train": f"--data --val-data {TRAINED} --amp --amp-dtype --resume --dry-run -o --output {PLUGIN}",
}


@pytest.mark.parametrize("name", FLAGS)
def test_command_line_flags_are_frozen(name):
    import click
    from collapse_probe.cli.main import group

    command = group.get_command(click.Context(group), name)
    found = {flag for p in command.params for flag in p.opts if flag.startswith("-")} | {"-h", "--help"}
    assert found == set(FLAGS[name].split())
