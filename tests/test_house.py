"""The rules of the house: which way imports go, what files may be called, how light the front door is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        "attention",
        "bundled_models",
        "captions",
        "cost",
        "drawing",
        "errors",
        "evidence",
        "geometry",
        "layouts",
        "processes",
        "provenance",
        "rollout",
        "sketches",
        "statistics",
        "subject",
        "training_log",
    },
    {"documents", "settings"},
    {
        "alignment",
        "anatomy",
        "answers",
        "blueprint",
        "checkpoints",
        "family",
        "fix",
        "folders",
        "headlines",
        "heatmaps",
        "hub",
        "kernels",
        "paired",
        "pictures",
        "preprocessing",
        "recalibration",
        "run_state",
        "sockets",
        "spectra",
        "stand_ins",
        "storing",
        "thresholds",
        "trace",
        "uniformity",
        "verdict_rules",
    },
    {
        "attention_families",
        "bundled_pictures",
        "classes",
        "convergence",
        "devices",
        "effects",
        "extremes",
        "findings",
        "fixes",
        "hearing",
        "likeness",
        "matrices",
        "mounting",
        "overhearing",
        "patch_grid",
        "preset",
        "softmaxes",
        "sums",
        "timm_pictures",
        "token_families",
        "weight_families",
    },
    {
        "agreement",
        "data",
        "ear",
        "families",
        "gallery",
        "grafting",
        "held_numbers",
        "matrix_roles",
        "measure",
        "minibatches",
        "orders",
        "outlier_places",
        "overlay",
        "permutation",
        "presets",
        "readings",
        "summary",
        "validation",
        "vit",
        "words",
    },
    {
        "colophon",
        "curves",
        "deepvit",
        "facts",
        "head_means",
        "image_spread",
        "nulls",
        "planning",
        "quantities",
        "splitting",
        "stopping",
        "sureness",
        "tables",
        "weight_curves",
    },
    {
        "architecture",
        "depthwise",
        "family_figures",
        "map_metric",
        "outcomes",
        "preset_tables",
        "products",
        "ratio_tables",
        "showing",
        "sureness_tables",
        "weight_metric",
    },
    {"both_ends", "convergence_figure", "recipe", "sections", "trained", "unasked"},
    {"mixing", "sources", "sweep_grid", "training_data", "verdict"},
    {"capture", "figures", "metrics", "remedied", "sweep_results"},
    {
        "counting",
        "cross_cka",
        "lineup",
        "one_pass",
        "page",
        "penalty",
        "replacing",
        "sweep_answers",
        "weight_analysis",
    },
    {"analysis", "pairing", "penalties"},
    {"intervention_answers", "monitoring", "penalty_presets", "replaced_runs", "sentences", "side_by_side", "weight_contrast"},
    {"adapters", "colours", "comparison", "contrast", "contrast_tables", "intervention"},
    {
        "contrast_counts",
        "contrast_curves",
        "contrast_gallery",
        "contrast_heatmaps",
        "intervention_figures",
        "sweep_figures",
    },
    {"contrast_figures"},
    {"comparison_page", "intervention_page", "sweep_page"},
    {"lesson", "recipes"},
    {"learner"},
    {"training_run"},
    {"forecast", "training"},
    {"sweep_cell"},
    {"bundling", "sweeping"},
    {"demonstration"},
    {"story"},
    {"cli"},
]
FORBIDDEN = {"utils", "helpers", "common", "core", "misc"}
LONGEST_FILE = 300
HEAVY = ("torch", "timm", "torchvision", "matplotlib", "pandas", "numpy", "scipy")


def modules():
    files = list((ROOT / "collapse_probe").rglob("*.py")) + list((ROOT / "cli").glob("*.py"))
    return sorted(p for p in files if "__pycache__" not in p.parts)


def room(path):
    """The room that a file stands in: a flat file, or its family's folder."""
    relative = path.relative_to(ROOT)
    return "cli" if relative.parts[0] == "cli" else relative.parts[1].removesuffix(".py")


def imported_rooms(path):
    """Rooms that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "collapse_probe" else [f"collapse_probe.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("collapse_probe.")}
    return found - {"__version__", "bundled"}


FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    here = room(path)
    if here in ("__init__", "__main__", "bundled"):
        return
    assert here in FLOOR_OF, f"{here} stands on no floor"
    for other in imported_rooms(path) - {here}:
        assert other in FLOOR_OF, f"{path} imports {other}, which stands on no floor"
        assert FLOOR_OF[other] < FLOOR_OF[here], f"{here} imports {other}, which is not below it"


@pytest.mark.parametrize("family", ["metrics", "fixes", "penalties", "presets", "recipes", "sources"])
def test_files_of_one_family_do_not_import_each_other(family):
    files = [p for p in (ROOT / "collapse_probe" / family).rglob("*.py") if p.name != "__init__.py"]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.startswith(f"collapse_probe.{family}."), f"{path} imports {node.module}"


def test_no_room_without_a_subject():
    names = {p.stem for p in ROOT.rglob("*.py") if ".venv" not in p.parts} | {
        p.name for p in (ROOT / "collapse_probe").iterdir()
    }
    assert not names & FORBIDDEN


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_say_why_they_exist(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    assert ast.get_docstring(ast.parse(text)), "no sentence on why the file exists"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_does_not_print(path):
    calls = [
        n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    ]
    assert "print" not in calls


def fresh(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)


@pytest.mark.parametrize(
    "front_door",
    [
        "import collapse_probe",
        "import collapse_probe.cli.main as m\ntry:\n    m.main(['--help'])\nexcept SystemExit:\n    pass",
    ],
)
def test_the_front_door_is_light(front_door):
    look = "loaded = [n for n in heavy if n in sys.modules]\nsys.exit(str(loaded) if loaded else 0)"
    code = f"{front_door}\nimport sys\nheavy = {HEAVY!r}\n{look}"
    fresh(code)


def test_public_names():
    import collapse_probe

    for name in collapse_probe.__all__:
        assert getattr(collapse_probe, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        collapse_probe.nonsense  # noqa: B018


MODEL = "-m --model --checkpoint --partial --pretrained --model-kwargs --img-size"
RUN = "-b --batch-size -j --workers --device --amp --amp-dtype --seed --metric --null-images"
GIVEN = "--fix --fix-blocks --data --split --limit"
TALK = "--config -v --verbose -q --quiet -h --help"
KEPT = f"-o --output --json --fail-on {TALK}"
TRAINED = "--fix --penalty --set --seed --steps --device -j --workers --monitor-every --stop-after"
FLAGS = {
    "analyze": f"{MODEL} {GIVEN} {RUN} --null-seeds --until-ci --level --preset --recalibrate-bn {KEPT}",
    "compare": f"{MODEL} {GIVEN} {RUN} --recalibrate-bn --cka {KEPT}".replace(" --checkpoint", ""),
    "intervene": f"{MODEL} {GIVEN} {RUN} --recalibrate-bn --replace --blocks {KEPT}".replace(" --metric --null-images", ""),
    "report": TALK,
    "doctor": f"{MODEL} --device --seed --json {TALK}",
    "ls": TALK,
    "demo": f"-o --output {TALK}",
    "sweep": f"--vary --seeds --set --steps --data --val-data --eval-data --limit --null-images -o --output --device --amp "
    f"--amp-dtype --jobs --dry-run --json {TALK}",
    "train": f"--data --val-data {TRAINED} --amp --amp-dtype --resume --dry-run -o --output {TALK}",
}


@pytest.mark.parametrize("name", FLAGS)
def test_command_line_flags_are_frozen(name):
    import click
    from collapse_probe.cli.main import group

    command = group.get_command(click.Context(group), name)
    found = {flag for p in command.params for flag in p.opts if flag.startswith("-")} | {"-h", "--help"}
    assert found == set(FLAGS[name].split())
