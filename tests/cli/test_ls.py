"""`collapse-probe ls` answers from a stored list, which is that of the registries, and from the libraries' own source."""

from __future__ import annotations

import re

import pytest
from collapse_probe.cli.ls import LIBRARIES, STORED, entries, library_names, listing, registered

from collapse_probe import registry
from collapse_probe.models.deepvit import FAMILY


def test_the_stored_list_is_that_of_the_registries():
    assert STORED.read_text(encoding="utf-8") == listing(), "something was added or renamed: run `make listing`"


@pytest.mark.parametrize("library", LIBRARIES)
def test_models_of_a_library_are_those_that_it_lists_in_its_order(library):
    theirs = registry.SOURCES[library].names()
    assert library_names(library) == [name for name in theirs if name not in FAMILY]  # which we register with timm


def test_a_library_that_cannot_be_read_is_asked(monkeypatch):
    monkeypatch.setattr("collapse_probe.cli.ls.REGISTERED", re.compile("no such line"))
    assert "vit_b_32" in library_names("torchvision")


@pytest.mark.parametrize("kind", ["metrics", "presets", "fixes", "penalties", "recipes"])
def test_what_a_plug_in_brings_is_listed(kind, monkeypatch):
    monkeypatch.setattr(registry, "loaded_plugins", ["mine.py"])
    assert list(entries(kind)) == list(registered(kind))
    monkeypatch.setattr("collapse_probe.cli.ls.registered", lambda kind: iter([("mine", "of my own")]))
    assert list(entries(kind)) == [("mine", "of my own")]


def test_a_pattern_fits_names_with_and_without_their_scheme(run):
    code, out, _ = run("ls", "models", "vit_b_3?")
    assert (code, out.split()) == (0, ["torchvision:vit_b_32"])
    code, out, _ = run("ls", "models", "ours:digits-tied*")
    assert (code, out.split()) == (0, ["ours:digits-tied-mhsa", "ours:digits-tied-re-attention"])
    code, out, _ = run("ls", "metrics", "head-sim")
    assert code == 0
    assert out.startswith("head-similarity  ")
    code, out, err = run("ls", "data", "nothing")
    assert (code, out) == (0, "")
    assert "nothing among the data matches 'nothing'" in err
