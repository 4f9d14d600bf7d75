"""JSON files with a schema: read back, or refused with what was expected and how to make it anew."""

from __future__ import annotations

import json

import pytest

from collapse_probe.errors import OutputError
from collapse_probe.files import read_document
from collapse_probe.results.intervention import Interventions
from collapse_probe.results.sweep import Sweep

FACTS = {"schema": "collapse-probe/things/1", "refusal": "holds no things", "command": "gather"}


def test_what_was_written_comes_back(tmp_path):
    content = {"schema": FACTS["schema"], "values": [1, None, "ä"]}
    (tmp_path / "things.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_document(tmp_path, "things.json", **FACTS) == content
    assert read_document(str(tmp_path), "things.json", **FACTS) == content


@pytest.mark.parametrize("text", [None, "", "{", b"\xff"])
def test_a_file_that_is_missing_or_broken_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "things.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OutputError) as said:
        read_document(tmp_path, "things.json", **FACTS)
    assert str(said.value).startswith(f"{tmp_path} holds no things (")
    assert str(said.value).endswith("); expected things.json as gather writes it")


@pytest.mark.parametrize("schema", [None, "collapse-probe/things/2"])
def test_another_schema_is_refused(tmp_path, schema):
    (tmp_path / "things.json").write_text(json.dumps({} if schema is None else {"schema": schema}))
    with pytest.raises(OutputError) as said:
        read_document(tmp_path, "things.json", **FACTS)
    path = tmp_path / "things.json"
    assert str(said.value) == f"{path} has schema {schema!r}; expected 'collapse-probe/things/1': gather again"


@pytest.mark.parametrize(
    ("kind", "file", "refusal", "command"),
    [
        (Interventions, "interventions.json", "holds no interventions", "intervene"),
        (Sweep, "sweep.json", "holds no sweep", "sweep"),
    ],
)
def test_each_folder_says_which_command_makes_it(tmp_path, kind, file, refusal, command):
    with pytest.raises(OutputError, match=rf"{refusal} \(.*\); expected {file} as {command} writes it"):
        kind.load(tmp_path)
    (tmp_path / file).write_text("{}")
    with pytest.raises(OutputError, match=f"{file} has schema None; expected 'collapse-probe/.*': {command} again"):
        kind.load(tmp_path)
