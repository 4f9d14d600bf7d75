"""A paragraph for the methods section of a paper, and the BibTeX of what it cites, from results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collapse_probe import __version__
from collapse_probe.results.citing.publication import Reference, entry
from collapse_probe.results.citing.references import BY_KEY, FIXES, METRICS, REFERENCES, fixes_in, named_in
from collapse_probe.results.comparison import Comparison
from collapse_probe.results.findings import Findings
from collapse_probe.results.intervention import DEFINITIONS, Interventions
from collapse_probe.results.readings import is_untrained, null_of, trained_on, weights_only
from collapse_probe.results.rules import SETTLES
from collapse_probe.results.survey import Survey, SurveyRow
from collapse_probe.results.sweep import Sweep
from collapse_probe.results.text import numbered, plain, sentence_case

TOOL = "collapse_probe"
TITLE = "collapse-probe: has the attention of a Vision Transformer collapsed, and does a fix cure it?"
LIMIT = "Intervals and tests cover the choice of images, not the training run."


def methods(results: Any) -> str:
    """The paragraph: what was measured, on what, beside which chance levels, with which intervals, by which versions."""
    if isinstance(results, Comparison):
        return of_comparison(results)
    if isinstance(results, Interventions):
        return of_interventions(results)
    if isinstance(results, Sweep):
        return of_sweep(results)
    if isinstance(results, Survey):
        return of_survey(results)
    return of_findings(results)


def bibtex(results: Any) -> str:
    """The tool and every publication that the paragraph cites."""
    version = versions_of(results).get("collapse-probe", __version__)
    fields = {"title": f"{{{TITLE}}}", "author": "{collapse-probe maintainers}", "note": f"Version {version}"}
    return "\n\n".join([entry("software", TOOL, fields), *(each.bibtex for each in references(results))])


def references(results: Any) -> list[Reference]:
    """What the metrics, presets and fixes of these results rest on, in the order of REFERENCES."""
    found = {each.key for findings in subjects_of(results) for each in of_one(findings)}
    if isinstance(results, Interventions):
        found |= {"zhou2021deepvit", *(key for name in fixes_of(results.model, results.run) for key in FIXES[name])}
        found |= {key for name in (METRICS if results.orders else ()) if name == "block-influence" for key in METRICS[name]}
    if isinstance(results, Sweep):
        text = f"{plain(results.recipe)} {plain(results.varied)} {plain(results.changes)}"
        found |= {key for name in fixes_in(text) for key in FIXES[name]} | {each.key for each in named_in(text)}
        found |= {key for name in ("similar-blocks", "patch-diversity", "attention-entropy") for key in METRICS[name]}
    if isinstance(results, Survey):
        for row in results.finished:
            found |= {key for name in metrics_of(row) for key in METRICS.get(name.partition("@")[0], ())}
            found |= {key for name in fixes_of(row.model, {"notes": row.notes}) for key in FIXES[name]}
    return [each for each in REFERENCES if each.key in found]


def metrics_of(row: SurveyRow) -> list[str]:
    """What a model of a gallery was measured by."""
    return [str(name) for name in row.conditions.get("metrics", ())]


def of_one(findings: Findings) -> list[Reference]:
    """The publications behind one subject."""
    keys = {key for name in findings.metrics for key in METRICS.get(name.partition("@")[0], ())}
    keys |= {key for name in fixes_of(findings.model, findings.run) for key in FIXES[name]}
    texts = [plain(preset.get("source")) for preset in findings.presets.values()]
    keys |= {each.key for text in texts for each in named_in(text)}
    return [BY_KEY[key] for key in sorted(keys)]


def fixes_of(model: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """The fixes that a model holds, by what its findings say of it."""
    return fixes_in(f"{model.get('address')} {model.get('name')} {plain(run.get('notes') or [])}")


def subjects_of(results: Any) -> list[Findings]:
    """The findings in these results."""
    if isinstance(results, Comparison):
        return list(results.subjects.values())
    return [results] if isinstance(results, Findings) else []


def versions_of(results: Any) -> Mapping[str, Any]:
    """The versions of the packages that measured."""
    runs = [results.run, *(findings.run for findings in subjects_of(results))]
    return next((run["versions"] for run in runs if run.get("versions")), {})


def of_findings(findings: Findings) -> str:
    """The paragraph on one model."""
    sentences = [
        f"We measured {model_words(findings.model)}{on_images(findings)} with {tool(findings)}.",
        *held("The model", findings),
        *what(findings),
        *how({"": findings}, findings.run),
    ]
    return " ".join(sentences)


def of_comparison(comparison: Comparison) -> str:
    """The paragraph on several models."""
    first = comparison.subjects[comparison.first]
    models = "; ".join(f"{label}: {model_words(each.model)}" for label, each in comparison.subjects.items())
    kind = "checkpoints of one training" if comparison.trajectory else "models"
    sentences = [
        f"We compared {len(comparison.subjects)} {kind} ({models}){on_images(first)} with {tool(comparison)}.",
        *(sentence for label, each in comparison.subjects.items() for sentence in held(label, each)),
        *what(first),
        f"Each subject is compared with {comparison.first} on the same images, image by image.",
    ]
    if any(not each.unsampled for pair in comparison.pairs for each in pair.differences.values()):
        sentences += [
            "Mean differences have 95 % paired t intervals, wider on the side of the longer tail (Hall's correction of "
            "skewness); differences of κ are put together from Fieller's intervals of each (Zou and Donner's method); "
            "differences of accuracy have Tango's score interval.",
            "p belongs to the interval (two-sided), and q controls the false discovery rate over the blocks of a metric "
            "(Benjamini–Hochberg).",
        ]
    return " ".join([*sentences, *how(comparison.subjects, {**first.run, **comparison.run})])


def of_interventions(interventions: Interventions) -> str:
    """The paragraph on replaced maps."""
    data, kinds = interventions.data, "; ".join(f"{kind}: {says}" for kind, says in interventions.kinds.items())
    effects = [effect for each in interventions.single.values() for effect in each if effect.kl is not None]
    blocks = sorted({block for effect in effects for block in effect.blocks})
    others = [kind for kind in interventions.kinds if kind.partition("_")[0] in ("drop", "prefix", "sinks")]
    done, changed = "replaced attention maps", "Replaced were the maps of"
    if others:
        done, changed = "changed what its blocks compute", "Changed were"
    numbers = [
        f"KL is the {DEFINITIONS['kl']}.",
        f"Agreement is the {DEFINITIONS['agreement']}.",
        *(
            [f"Accuracy is the {DEFINITIONS['accuracy']}; its change is {DEFINITIONS['accuracy_change']}."]
            if interventions.plain.get("accuracy") is not None
            else []
        ),
    ]
    return " ".join(
        [
            f"In {model_words(interventions.model)} we {done} while it ran, on {plain(data.get('images'))} "
            f"images of {plain(data.get('address'))}, with {tool(interventions)}.",
            f"{changed} {numbered(blocks)}, one block at a time"
            f"{' and cumulatively from the last block down' if any(interventions.cumulative.values()) else ''} ({kinds}).",
            *_of_orders(interventions),
            *numbers,
            LIMIT,
            run_words(interventions.run),
        ]
    )


def _of_orders(interventions: Interventions) -> list[str]:
    """How the order was chosen in which blocks went."""
    parts = interventions.run.get("order_images")
    if not parts:
        return []
    return [
        f"Blocks were left out one after the other, each time the one whose loss cost the least mean KL on {parts['chose']} "
        f"images; how many can go was settled on {parts['settled']} others (at least {100 * SETTLES:g} % of the top "
        f"answers stay), and the price is that on the remaining {parts['priced']}."
    ]


def of_sweep(sweep: Sweep) -> str:
    """The paragraph on a grid of trainings."""
    varied = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in sweep.varied.items())
    seeds = "1 seed each" if len(sweep.seeds) == 1 else f"{len(sweep.seeds)} seeds each"
    ended = f"{len(sweep.finished)} of {len(sweep.cells)} trainings were finished and measured on held-out images"
    sureness = "One seed ranks nothing." if len(sweep.seeds) == 1 else "Means over seeds have 95 % t intervals."
    changed = f" with {plain(sweep.changes)}" if sweep.changes else ""
    data = plain(sweep.data.get("address") or sweep.data.get("data") or sweep.recipe.get("data"))
    return (
        f"We trained the recipe {plain(sweep.recipe.get('name'))}{changed} over a grid ({varied or 'nothing varied'}; {seeds}) "
        f"on {data} with {tool(sweep)}. {ended}, each beside an untrained copy (the same architecture with fresh parameters) "
        f"on the same images. {sureness} {run_words(sweep.run)}"
    )


def of_survey(survey: Survey) -> str:
    """The paragraph on a gallery of models."""
    rows, data = survey.finished, survey.data
    models = "; ".join(f"{row.label}: {model_words(row.model)}" for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in metrics_of(row)))
    missing = len(survey.rows) - len(rows)
    sentences = [
        f"We measured {len(rows)} model{'' if len(rows) == 1 else 's'} ({models or 'none could be measured'}), each with its "
        f"own preprocessing, on {data.get('images'):,} images of {plain(data.get('address'))} with {tool(survey)}.",
        f"{missing} more on the list {'was' if missing == 1 else 'were'} not measured." if missing else "",
        *(f"{row.label} holds {holding}." for row in rows if (holding := fix_words(row.model, {"notes": row.notes}))),
        f"Measured were {', '.join(map(cited, names))}." if names else "",
        LIMIT if rows else "",
        run_words(survey.run),
    ]
    return " ".join(filter(None, sentences))


def tool(results: Any) -> str:
    """The tool, its version and its citation."""
    return f"collapse-probe {versions_of(results).get('collapse-probe', __version__)} [{TOOL}]"


def model_words(model: Mapping[str, Any]) -> str:
    """A model, its size and where its parameters come from."""
    size = [f"{plain(model.get(key))} {key}" for key in ("blocks", "heads", "tokens") if model.get(key)]
    parameters = model.get("parameters")
    size += [f"{parameters:,} parameters"] if isinstance(parameters, int) else []
    weights = "random parameters" if is_untrained(model) else f"weights {plain(model.get('weights'))}"
    return f"{plain(model.get('address') or model.get('name'))} ({', '.join([*size, weights])})"


def on_images(findings: Findings) -> str:
    """On which images, and what is to be known of them."""
    if weights_only(findings):
        return ", its weight matrices alone,"
    data = findings.data
    names = f" (SHA-256 of their names {data['names_sha256'][:12]}…)" if data.get("names_sha256") else ""
    return f" on {data.get('images'):,} images of {plain(data.get('address'))}{names}"


def cited(name: str) -> str:
    """A metric with its citations."""
    keys = METRICS.get(name.partition("@")[0], ())
    return f"{name} [{', '.join(keys)}]" if keys else name


def what(findings: Findings) -> list[str]:
    """What was measured, and beside which chance levels."""
    sentences = []
    similarity = findings.metrics.get("attention-similarity")
    others = [name for name, result in findings.metrics.items() if result.values is not None]
    if similarity is not None and similarity.values is not None:
        others.remove("attention-similarity")
        sentences.append(
            "The raw similarity of two blocks is the mean cosine between the attention vectors of the same head and token in "
            "both, over images, heads and tokens [zhou2021deepvit]."
        )
        if null_of(similarity, "other_token") is not None:
            sentences.append(
                "Its chance level is the same cosine with every other token in the second block, an exact mean over all of "
                "them, and κ = (raw − chance level) / (1 − chance level): 0 is no more than chance, 1 is the same map."
            )
    if others:
        sentences.append(f"{'We also measured' if sentences else 'We measured'} {', '.join(map(cited, others))}.")
    if findings.presets:
        sentences.append(
            f"Settings are those of the preset{'' if len(findings.presets) == 1 else 's'} {', '.join(findings.presets)}."
        )
    return sentences


def held(who: str, findings: Findings) -> list[str]:
    """Which fixes a model holds."""
    fixes = fix_words(findings.model, findings.run)
    return [f"{who} holds {fixes}."] if fixes else []


def fix_words(model: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The fixes that a model holds, with their citations."""
    return ", ".join(f"{name} [{', '.join(FIXES[name])}]" for name in fixes_of(model, run))


def how(subjects: Mapping[str, Findings], run: Mapping[str, Any]) -> list[str]:
    """Untrained copies, intervals, what was left out of each subject by label ("" where it is alone), and how it was run."""
    sentences = []
    metrics = [result for findings in subjects.values() for result in findings.metrics.values()]
    nulls = [result.nulls for result in metrics if result.nulls is not None]
    copies = [each for each in nulls if each.values.get("untrained") is not None]
    if copies:
        images = max(each.images.get("untrained", 0) for each in copies)
        seeds = max((len((each.untrained_seeds or {}).get("seeds", ())) for each in copies), default=0)
        several = f"Up to {seeds} untrained copies" if seeds > 1 else "An untrained copy"
        seen = f", on {images} of the images" if images else ""
        sentences.append(
            f"{several} (the same architecture with fresh parameters){seen}, "
            f"stand{'' if seeds > 1 else 's'} beside the numbers."
        )
    if any(result.ci95 is not None for result in metrics):
        sentences.append(
            "Means over images have 95 % t intervals, wider on the side of the longer tail (Hall's correction of skewness); κ "
            f"has Fieller's interval. {LIMIT}"
        )
    made: dict[str, list[str]] = {}
    for label, findings in subjects.items():
        who, skipped = f"{label}: " if label else "", len(findings.data.get("skipped") or ())
        left_out = f"{skipped} image{' was' if skipped == 1 else 's were'} left out, because"
        sentences += [f"{who}{left_out} {'it' if skipped == 1 else 'they'} could not be used."] if skipped else []
        sentences += [f"{who}{note}"] if (note := trained_on(findings.data)) else []
        if not weights_only(findings):
            made.setdefault(plain(findings.model.get("preprocess")), []).append(label)
    if len(made) == 1:
        sentences.append(f"Preprocessing: {next(iter(made))}.")
    sentences += [f"Preprocessing of {', '.join(labels)}: {text}." for text, labels in made.items() if len(made) > 1]
    return [*sentences, run_words(run)]


def run_words(run: Mapping[str, Any]) -> str:
    """Device, precision, seed and versions."""
    parts = [
        f"{name} {plain(run.get(key))}"
        for name, key in (("device", "device"), ("precision", "dtype"), ("seed", "seed"))
        if run.get(key) is not None
    ]
    versions = run.get("versions") or {}
    parts += [f"{name} {version}" for name, version in versions.items() if name != "collapse-probe"]
    command = f" Command: {run['command']}" if run.get("command") else ""
    return f"{sentence_case(', '.join(parts))}.{command}" if parts else command.strip()
