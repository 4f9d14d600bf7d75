"""A file of flags is small, plain and of the right types, or wrong usage; nothing in it hangs or fills the memory."""

from __future__ import annotations

import os

import click
import pytest
from collapse_probe.cli import options
from collapse_probe.cli.analyze import command

BOMB = "metric:\n- &a0 [x,x,x,x]\n" + "".join(f"- &a{i} [*a{i - 1},*a{i - 1},*a{i - 1}]\n" for i in range(1, 9))


def defaults(path):
    context = click.Context(command)
    options.configuration(context, None, str(path))
    return context.default_map


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limit: {a: 1}", "limit: expected a whole number, came"),
        ("limit: [1, 2]", "limit: expected a whole number"),
        ("limit: true", "limit: expected a whole number, came 'True'"),
        ("limit: 2.5", "limit: expected a whole number, came '2.5'"),
        ("limit:", "limit: expected a whole number, came 'None'"),
        ("partial: 5", "partial: expected true or false"),
        ("pretrained: maybe", "pretrained: expected true or false"),
        ("until-ci: x", "until-ci: expected a number"),
        ("seed: 1.5", "seed: expected a whole number"),
        ("data: [a, b]", "data: expected a text"),
        ("data: true", "data: expected a text"),
        ("metric: [{a: 1}]", "metric: expected a text"),
        ("model-kwargs: [[1]]", "model-kwargs: expected a text"),
        (BOMB, "it has an alias"),
        ("a: &x 1\nlimit: *x", "it has an alias"),
        ("[" * 3000, "cannot be read as YAML"),
        ("- 1", "holds no mapping"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        ("nonsense: 1", "is no flag of this command"),
        ("#" * (1 << 20) + "\nlimit: 1", "has more than"),
        ("\0", "cannot be read as YAML"),
    ],
)
def test_what_is_no_flag_of_the_right_type_is_wrong_usage(text, said, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(click.BadParameter, match=said) as caught:
        defaults(tmp_path / "c.yaml")
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder", "nothing"])
def test_what_is_no_ordinary_file_is_not_read(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(click.BadParameter, match="cannot be read as YAML"):
        defaults(tmp_path / name)


def test_lists_are_taken_by_what_may_be_repeated(tmp_path):
    lines = ["metric: [a, b]", "preset: one", "limit: 3", "partial: true", "data: 5", "img_size: [64, 96]", "verbose: 1"]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "model-kwargs: {depth: 2, name: it's a b}"]))
    read = defaults(tmp_path / "c.yaml")
    assert (read["metrics"], read["presets"], read["limit"], read["partial"]) == (["a", "b"], ["one"], 3, True)
    assert read["img_size"] == [64, 96]
    assert options.keywords(None, None, tuple(read["model_kwargs"])) == {"depth": 2, "name": "it's a b"}


@pytest.mark.parametrize(
    ("values", "read"),
    [
        (("path=/my files/a b.pth depth=2",), {"path": "/my files/a b.pth", "depth": 2}),
        (("path=/my files/a", "depth=2"), {"path": "/my files/a", "depth": 2}),
        (("a=(1, 2) b='c d'",), {"a": (1, 2), "b": "c d"}),
    ],
)
def test_a_value_may_have_spaces(values, read):
    assert options.keywords(None, None, values) == read


def test_words_that_begin_with_no_name_are_wrong_usage():
    with pytest.raises(click.BadParameter, match="expected NAME=VALUE"):
        options.keywords(None, None, ("nonsense",))
