"""What is cited: every metric and fix has its paper, the paragraph says what was measured, and BibTeX can be read."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from factories import findings_of, synthetic

import collapse_probe as cp
from collapse_probe import registry
from collapse_probe.results.citing.methods import bibtex, methods, references
from collapse_probe.results.citing.publication import Reference
from collapse_probe.results.citing.references import ARXIV, BY_KEY, FIXES, METRICS, REFERENCES, fixes_in, named_in
from collapse_probe.results.intervention import Effect, Interventions
from collapse_probe.results.survey import FAILED, FINISHED, Survey, SurveyRow
from collapse_probe.results.sweep import Sweep

BESIDE = {"song2012feature", "roy2007effective", "agrawal2022alpha"}  # no number of arXiv stands for these


@pytest.mark.parametrize("name", [*registry.METRICS])
def test_a_metric_cites_the_papers_that_its_source_names(name):
    cited = {BY_KEY[key].arxiv for key in METRICS.get(name, ()) if key not in BESIDE}
    assert cited == set(ARXIV.findall(registry.METRICS[name].source))
    assert ("roy2007effective" in METRICS.get(name, ())) is ("Roy & Vetterli 2007" in registry.METRICS[name].source)


@pytest.mark.parametrize("name", [*registry.FIXES])
def test_a_fix_cites_the_papers_that_its_source_names(name):
    assert {BY_KEY[key].arxiv for key in FIXES[name]} == set(ARXIV.findall(registry.FIXES[name].source))


def test_every_table_names_what_there_is():
    assert set(METRICS) <= set(registry.METRICS)
    assert set(FIXES) == set(registry.FIXES)
    assert len(BY_KEY) == len(REFERENCES)
    for preset in registry.PRESETS.values():
        assert named_in(preset.paper), preset.name


def test_no_reference_is_unused():
    used = {key for keys in (*METRICS.values(), *FIXES.values()) for key in keys}
    used |= {each.key for preset in registry.PRESETS.values() for each in named_in(preset.paper)}
    assert used == set(BY_KEY)


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda each: each.key)
def test_an_entry_is_whole(reference):
    fields = fields_of(reference.bibtex)
    assert fields["title"] == f"{{{reference.title}}}"
    assert all(re.fullmatch(r"[^,]+, [^,]+", name) for name in fields["author"].split(" and "))
    assert fields["year"] == str(reference.year)
    assert reference.key.endswith(re.sub(r"[^a-z]", "", reference.key.partition(fields["year"])[2]))
    assert reference.arxiv or reference.venue
    if reference.arxiv:
        assert 2000 + int(reference.arxiv[:2]) <= reference.year <= 2002 + int(reference.arxiv[:2])


def fields_of(text):
    """The fields of one entry, whose braces must close."""
    assert text.count("{") == text.count("}")
    assert re.match(r"@(misc|inproceedings|article|software)\{\w+,\n", text)
    return dict(re.findall(r"^  (\w+) = \{(.*)\},$", text, re.MULTILINE))


def test_a_journal_is_an_article():
    assert BY_KEY["song2012feature"].bibtex.startswith("@article{")
    assert fields_of(BY_KEY["song2012feature"].bibtex)["journal"] == "Journal of Machine Learning Research"


def test_names_as_a_sentence_has_them():
    short = {key: BY_KEY[key].short for key in ("abnar2020quantifying", "dong2021attention")}
    assert short == {"abnar2020quantifying": "Abnar & Zuidema, 2020", "dong2021attention": "Dong et al., 2021"}
    assert Reference("a", "b", "{The Group}", 2020).short == "The Group, 2020"


def test_the_paragraph_says_what_was_measured_on_what_and_beside_what():
    text = methods(synthetic())
    for words in (
        "vit_b_32 (12 blocks, 6 heads, 50 tokens, 88,224,232 parameters, weights IMAGENET1K_V1)",
        "64 images of photos",
        "[zhou2021deepvit]",
        "κ = (raw − chance level) / (1 − chance level)",
        "patch-diversity [gong2021patch]",
        "An untrained copy (the same architecture with fresh parameters), on 16 of the images",
        "95 % t intervals",
        "not the training run",
        "1 image was left out, because it could not be used.",
        "torch 2.13",
        "Command: collapse-probe analyze -m vit_b_32",
    ):
        assert words in text
    assert "\n" not in text


def test_nothing_is_said_that_was_not_measured():
    text = methods(synthetic(nulls=False))
    assert "chance level" not in text
    only = replace(synthetic(), metrics={"image-similarity": synthetic().metrics["image-similarity"]})
    assert references(only) == []
    assert "raw similarity" not in methods(only).lower()
    assert "We measured image-similarity." in methods(only)


def test_all_keys_in_the_paragraph_have_an_entry():
    text, entries = methods(synthetic()), bibtex(synthetic())
    keys = {key for group in re.findall(r"\[([\w, ]+)\]", text) for key in group.split(", ")}
    assert keys == set(re.findall(r"^@\w+\{(\w+),", entries, re.MULTILINE))
    assert {"collapse_probe", "zhou2021deepvit", "zhai2023stabilizing", "gong2021patch"} == keys


def test_presets_and_fixes_are_cited():
    presets = {"rank-collapse": {"source": {"paper": "Dong et al., arXiv 2103.03404", "code": "none"}}}
    model = {**synthetic().model, "address": "vit_b_32 + contra-norm in all blocks (neutral)"}
    found = replace(synthetic(), presets=presets, model=model)
    assert {"dong2021attention", "guo2023contranorm"} <= {each.key for each in references(found)}
    assert "The model holds contra-norm [guo2023contranorm]." in methods(found)
    assert "preset rank-collapse" in methods(found)
    assert fixes_in("feat-scales, pre-attention") == []


def test_a_comparison_says_how_differences_were_tested():
    rng = np.random.default_rng(0)
    one, other = (findings_of(*rng.uniform(0.2, 0.8, (2, 20, 3))) for _ in range(2))
    compared = cp.compare({"plain": one, "with re-attention": replace(other, model={**other.model, "name": "re-attention"})})
    text = methods(compared)
    assert "Benjamini–Hochberg" in text
    assert text.count("Preprocessing") == 1
    wide = replace(other, model={**other.model, "name": "re-attention", "preprocess": {"size": [384, 384]}})
    both = methods(cp.compare({"plain": one, "with re-attention": wide}))
    assert "Preprocessing of plain: " in both
    assert "Preprocessing of with re-attention: size (384, 384)." in both
    assert "compared with plain" in text
    assert "with re-attention holds re-attention [zhou2021deepvit]." in text
    assert "zhou2021deepvit" in bibtex(compared)


def test_interventions_and_sweeps_have_a_paragraph():
    effects = (Effect("share", (1,), 0.1, (0.05, 0.2), 0.9, (0.8, 0.95)),)
    parts = {"model": {"address": "some:model", "blocks": 3}, "data": {"images": 8, "address": "photos"}, "run": {"seed": 3}}
    found = Interventions(
        **parts, kinds={"share": "the map of the block before"}, plain={"accuracy": None}, single={"share": effects},
        cumulative={"share": effects}, similarity={},
    )  # fmt: skip
    text = methods(found)
    assert "on 8 images of photos" in text
    assert "share: the map of the block before" in text
    assert "accuracy" not in text
    sweep = Sweep(
        recipe={"name": "digits"}, varied={"fix": [None, "re-attention"]}, seeds=[0], changes={}, data={"address": "digits"},
        run={}, cells=(),
    )  # fmt: skip
    assert "One seed ranks nothing." in methods(sweep)
    assert "zhou2021deepvit" in {each.key for each in references(sweep)}


def test_a_gallery_has_a_paragraph_of_what_was_measured():
    settings = {"metrics": ["attention-similarity", "attention-sink", "image-similarity"]}
    one = {"address": "vit_b_32 + contra-norm in all blocks", "blocks": 12, "weights": "random (seed 0)"}
    rows = (
        SurveyRow(label="one", conditions=settings, folder="models/one", status=FINISHED, model=one),
        SurveyRow(label="two", conditions={"metrics": ["token-norm"]}, folder="models/two", status=FAILED, reason="no"),
    )
    found = Survey(rows, {"images": 8, "address": "photos"}, {"versions": {"collapse-probe": "0.1.0"}})
    text, entries = methods(found), bibtex(found)
    assert "We measured 1 model (one: vit_b_32 + contra-norm in all blocks (12 blocks" in text
    assert "on 8 images of photos" in text
    assert "1 more on the list was not measured." in text
    assert "one holds contra-norm [guo2023contranorm]." in text
    assert "attention-sink [xiao2024streaming], image-similarity." in text
    keys = {key for group in re.findall(r"\[([\w, ]+)\]", text) for key in group.split(", ")}
    assert keys == set(re.findall(r"^@\w+\{(\w+),", entries, re.MULTILINE))


def test_the_accuracy_of_an_intervention_is_not_its_agreement_and_blocks_are_those_replaced():
    effects = (Effect("share", (0,), not_applicable="no block before"), Effect("share", (1,), 0.1, None, 0.9, None, 0.8, -0.1))
    parts = {"model": {"address": "some:model", "blocks": 2}, "data": {"images": 8, "address": "photos"}, "run": {}}
    found = Interventions(
        **parts, kinds={"share": "the map before"}, plain={"accuracy": 0.9}, single={"share": effects},
        cumulative={"share": effects[1:]}, similarity={},
    )  # fmt: skip
    text = methods(found)
    assert "Accuracy is the share of images whose top answer is their label, in the changed model; its change is that" in text
    assert "the maps of block 1, one" in text
