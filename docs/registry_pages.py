"""Pages of the reference that are made from the tables themselves: metrics, fixes, penalties, presets, commands, glossary.

As a Sphinx extension it writes them before the site is built, and shows formulas as MathML, which needs no script.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli.main import COMMANDS, group
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from collapse_probe.metrics.metric import FAILURE_TYPES, Metric
from collapse_probe.registry import FIXES, METRICS, PENALTIES, PRESETS
from collapse_probe.results.citing.references import FIXES as OF_FIXES
from collapse_probe.results.citing.references import METRICS as OF_METRICS
from collapse_probe.results.citing.references import REFERENCES
from collapse_probe.results.findings import MetricResult
from collapse_probe.results.glossary import GLOSSARY
from collapse_probe.training.penalties.presets import PRESETS as PENALTY_PRESETS

HERE = Path(__file__).parent
LEVELS = {
    "attention": "Metrics of attention maps",
    "tokens": "Metrics of tokens",
    "weights": "Metrics of weight matrices",
    "other": "Other metrics",
}
CHANCE = {
    "untrained": "an untrained copy of the model",
    "other_token": "other tokens (the chance level)",
    "other_image": "other images",
    "other_head": "other heads",
    "other_key": "other keys",
    "kappa": "κ",
}
DIRECTIONS = {"high": "high values are the collapsed end", "low": "low values are the collapsed end"}
NO_DIRECTION = "no end is a failure by itself"
ONE_KEY = "the end of a single key is the failure, the uniform end is not"


def measured() -> Mapping[str, MetricResult]:
    """What a run gives for every plain metric: the chance levels of each, with the reasons for those that it does not have."""
    from collapse_probe.analysis.analyze import analyze

    return analyze("ours:digits-mhsa", "bundled:digits", metrics=tuple(METRICS), limit=16, null_images=16).metrics


def metric_page(results: Mapping[str, MetricResult]) -> str:
    """All metrics, level by level."""
    parts = [
        "# Metrics",
        "Made from the metrics themselves. A variant is asked for by its suffix: `--metric attention-similarity@row`. "
        "Definitions are those of the plain metric; the findings of a run hold the one that was used.",
        failures("Which failure types a metric sees"),
    ]
    for level, title in LEVELS.items():
        kinds = [kind for kind in METRICS.values() if kind.level == level]
        if kinds:
            parts += [f"## {title}", *(metric_section(kind, results[kind.name]) for kind in kinds)]
    return "\n\n".join(parts) + "\n"


def failures(title: str) -> str:
    """The failure types, each with the metrics that see it."""
    rows = [
        f"| {text} | {named(n for n, kind in METRICS.items() if key in kind.failure_types)} |"
        for key, text in FAILURE_TYPES.items()
    ]
    none = named(name for name, kind in METRICS.items() if not kind.failure_types)
    return "\n".join([f"| {title} | |", "|---|---|", *rows, f"| none of these by itself | {none} |"])


def metric_section(kind: type[Metric], result: MetricResult) -> str:
    """One metric: what it sees, formula, definition, and the facts that a reader asks for."""
    variants = ", ".join(f"`@{suffix}` ({variant.panel or suffix})" for suffix, variant in kind.variants.items())
    facts = {
        "Range": kind.value_range,
        "Direction": DIRECTIONS.get(str(kind.collapsed), ONE_KEY if "entropy" in kind.failure_types else NO_DIRECTION),
        "Compared with": chance_levels(result),
        "Failure type": "; ".join(FAILURE_TYPES[key] for key in kind.failure_types) or "none of the three by itself",
        "Source": kind.source,
        "Traps": kind.traps,
        "What it does not say": kind.limits,
        "Unit, axes": f"{kind.unit}; {' × '.join(result.dims)}",
        "Variants": variants or "none",
    }
    return "\n\n".join(
        [
            f"### {kind.name}",
            sentence(kind.summary),
            f"```{{math}}\n{kind.formula}\n```",
            f"**Definition.** {plain(result.definition)}",
            *(f"**{name}.** {plain(text)}" for name, text in facts.items()),
        ]
    )


def chance_levels(result: MetricResult) -> str:
    """What the values are compared with, and why one of these is missing."""
    nulls = result.nulls
    if nulls is None:
        return ""
    missing = {name: reason for name, reason in nulls.reasons.items() if name in CHANCE and nulls.values.get(name) is None}
    there = [text for name, text in CHANCE.items() if name in nulls.values and name not in missing]
    without = [f"not with {CHANCE[name]}: {reason}" for name, reason in missing.items()]
    return "; ".join([", ".join(there) or "nothing", *without])


def fix_page() -> str:
    """All fixes."""
    parts = ["# Fixes", "Put into a model with `--fix NAME` or `--fix NAME:setting=value`, and trained with the same option."]
    for name, kind in FIXES.items():
        neutral = "none" if kind.neutral is None else settings(kind.neutral) or "always"
        facts = {
            "Source": kind.source,
            "Set against": "; ".join(FAILURE_TYPES[key] for key in kind.failure_types)
            or "none of the three failure types by itself",
            "Settings": fields(kind),
            "Neutral setting": neutral,
            "Acts on": {"attention": "attention", "block": "the block", "model": "the whole model", "modules": "layers"}[
                kind.home
            ],
        }
        parts += [
            f"## {name}",
            sentence(kind.summary),
            documented(kind),
            *(f"**{key}.** {text}" for key, text in facts.items()),
        ]
    return "\n\n".join(parts) + "\n"


def penalty_page() -> str:
    """All penalties, and what published code trains with."""
    parts = ["# Penalties", "Added to the loss with `collapse-probe train RECIPE --penalty NAME=COEFFICIENT`."]
    for name, kind in PENALTIES.items():
        seen = [FAILURE_TYPES[key] for key in METRICS[kind.metric].failure_types]
        facts = {
            "Source": kind.source,
            "Moves": f"[{kind.metric}](metrics.md#{kind.metric}), {kind.direction}",
            "Failure type of that metric": "; ".join(seen) or "none of the three by itself",
            "Computed from": ", ".join(kind.needs),
            "Settings": fields(kind),
        }
        parts += [
            f"## {name}",
            sentence(kind.summary),
            documented(kind),
            *(f"**{key}.** {text}" for key, text in facts.items()),
        ]
    parts += ["## What published code trains with", "| preset | penalty | settings | coefficient |\n|---|---|---|---|"]
    rows = [
        f"| {preset} | {name} | {settings(chosen)} | {weight:g} |"
        for preset, terms in PENALTY_PRESETS.items()
        for name, (chosen, weight) in terms.items()
    ]
    parts[-1] += "\n" + "\n".join(rows)
    return "\n\n".join(parts) + "\n"


def preset_page() -> str:
    """All presets with every choice and after whom it is made."""
    parts = [
        "# Presets",
        "The metrics of one paper with every choice fixed: `--preset NAME`. Each follows the paper, its code or our reading.",
    ]
    for name, preset in PRESETS.items():
        rows = "\n".join(f"| {choice.choice} | {plain(choice.value)} | {choice.follows} |" for choice in preset.choices)
        parts += [
            f"## {name}",
            sentence(preset.summary),
            f"**Paper.** {preset.paper}. **Code.** {preset.code}. **Version** {preset.version}, which follows the "
            f"{preset.follows} where the two differ.",
            f"**Metrics.** {named(preset.metrics)}",
            f"| choice | here | follows |\n|---|---|---|\n{rows}",
        ]
    return "\n\n".join(parts) + "\n"


def command_page() -> str:
    """The help of every command."""
    parts = ["# Commands"]
    for name in COMMANDS:
        context = click.Context(group, info_name="collapse-probe", max_content_width=100, terminal_width=100)
        command = group.get_command(context, name)
        assert command is not None
        text = command.get_help(click.Context(command, parent=context, info_name=name))
        parts += [f"## {name}", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def glossary_page() -> str:
    """The words."""
    return "# Glossary\n\n" + "\n\n".join(f"**{term.word}**\n: {plain(term.means)}" for term in GLOSSARY) + "\n"


def notebook_page(names: list[str]) -> str:
    """The notebooks, shown with the outputs that they hold."""
    listed = "\n".join(names)
    body = f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```" if names else "There are none in this version."
    return f"# Notebooks\n\nThey need no network, and lie in `notebooks/`.\n\n{body}\n"


def reference_page() -> str:
    """The publications, what here follows each, and their BibTeX."""
    parts = ["# References", "`collapse-probe cite DIR` prints those that a run used, with a paragraph on how it was measured."]
    for each in REFERENCES:
        users = named(name for table in (OF_METRICS, OF_FIXES) for name, keys in table.items() if each.key in keys)
        link = f" [arXiv {each.arxiv}](https://arxiv.org/abs/{each.arxiv})" if each.arxiv else ""
        parts += [f"## {each.short}", f"*{plain(each.title)}*.{link}", *([f"Here: {users}."] if users else [])]
        parts.append(f"```bibtex\n{each.bibtex}\n```")
    return "\n\n".join(parts) + "\n"


def sentence(text: str) -> str:
    """A line of a listing as a sentence."""
    return plain(text[:1].upper() + text[1:].rstrip(".") + ".")


def plain(text: str) -> str:
    """Text in which Markdown sees no markup: of a formula in plain letters and signs."""
    return re.sub(r"([\\*_<>\[\]|#^~])", r"\\\1", text)


def documented(kind: type) -> str:
    """The docstring of a class, with code in backquotes left as it is."""
    pieces = re.split(r"(`[^`]+`)", inspect.getdoc(kind) or "")
    return "".join(piece if piece.startswith("`") else plain(piece) for piece in pieces)


def fields(kind: Any) -> str:
    """The settings of a dataclass with their defaults."""
    return settings({field.name: field.default for field in dataclasses.fields(kind)}) or "none"


def settings(values: Mapping[str, Any]) -> str:
    """Settings as code."""
    return ", ".join(f"`{name}={value!r}`" for name, value in values.items())


def named(names: Any) -> str:
    """Names as code."""
    return ", ".join(f"`{name}`" for name in names)


def pages() -> Iterator[tuple[str, str]]:
    """The name and text of every page of the reference."""
    yield "metrics.md", metric_page(measured())
    yield "fixes.md", fix_page()
    yield "penalties.md", penalty_page()
    yield "presets.md", preset_page()
    yield "commands.md", command_page()
    yield "glossary.md", glossary_page()
    yield "references.md", reference_page()


def write_pages(app: Any) -> None:
    """Write the reference, and fetch the notebooks from beside the folder of documentation."""
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    for name, text in pages():
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
            (folder / name).write_text(text, encoding="utf-8")
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    (HERE / "notebooks").mkdir()
    notebooks = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        shutil.copy(notebook, HERE / "notebooks" / notebook.name)
    (HERE / "notebooks" / "index.md").write_text(notebook_page([notebook.stem for notebook in notebooks]), encoding="utf-8")


def show_formula(translator: Any, node: nodes.Element) -> None:
    """A formula as MathML."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("builder-inited", write_pages)
    app.add_html_math_renderer("mathml", inline_renderers=(show_formula, None), block_renderers=(show_formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
