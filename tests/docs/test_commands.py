"""Every command and every Python block of README and documentation: run in the order of its page, or marked with what it needs.

`# needs: …` at the end of a line, or as the first line of a block, names what a test machine lacks (a network, ImageNet, a GPU,
hours, …). Such commands, and those in running text, are held against the program: the command and its options exist.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml
from collapse_probe.cli.main import COMMANDS, group, main

from collapse_probe import registry

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name != "CHANGELOG.md")
TESTED_ELSEWHERE = {"scaling.md": "tests/analysis/test_scaling_examples.py"}  # its blocks need several processes
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`((?:torchrun .+? -m collapse_probe|srun .*?collapse-probe|collapse-probe) [^`]+)`")
NEEDS = re.compile(r"# needs: \w")
NOT_OURS = ("pip", "git", "make", "docker", "printf")


class Block(NamedTuple):
    """A block of code: its language, its text, and whether it is to be run."""

    language: str
    text: str
    runs: bool


def blocks(page):
    """The blocks of a page in their order."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(language, text, not NEEDS.match(text) and page.name not in TESTED_ELSEWHERE) for language, text in found]


def lines(text):
    """The commands of a block, continued lines joined; comments alone left out."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def commands():
    """Every command of every page: (page, the line)."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                yield from ((page.name, line) for line in lines(block.text))
        yield from ((page.name, line) for line in INLINE.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))))


def words_of(line):
    """The words after the program's name, comments dropped; None where the line does not call it."""
    words = shlex.split(line, comments=True)
    if words[0] in NOT_OURS:
        return None
    for program in (["collapse-probe"], ["-m", "collapse_probe"]):
        for place in range(len(words)):
            if words[place : place + len(program)] == program:
                return words[place + len(program) :]
    return None


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_commands_and_their_options_exist(page, line):
    words = words_of(line)
    if words is None:
        program, *rest = shlex.split(line, comments=True)
        assert program in NOT_OURS or page in TESTED_ELSEWHERE, f"what is {program!r}?"
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert program != "make" or rest[0] in targets
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
        assert program != "pip" or {*re.findall(r"\[(.*?)\]", line.partition("#")[0])} <= {*extras}
        return
    if words[0].isupper() or words[0].startswith("-"):
        return
    assert words[0] in COMMANDS
    known = {option for parameter in group.get_command(click.Context(group), words[0]).params for option in parameter.opts}
    given = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    given -= {word for word in given if word.startswith("--no-") and f"--{word.removeprefix('--no-')}" in known}
    assert given <= known | {"-h", "--help"}


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """Runs a command once, and gives what it printed; where a page repeats it, what it wrote is brought there."""
    kept = tmp_path_factory.mktemp("outputs")
    printed = {}

    def call(words, capsys):
        folder = Path(words[words.index("-o") + 1]) if "-o" in words else None
        store = kept / hashlib.sha256(repr(words).encode()).hexdigest()
        if store.exists():
            shutil.copytree(store, folder, dirs_exist_ok=True)
            return printed[store]
        with pytest.raises(SystemExit) as stop:
            main(words)
        printed[store], errors = capsys.readouterr()
        assert stop.value.code == 0, f"{shlex.join(words)}\n{errors}"
        if folder is not None and words[0] in ("analyze", "compare", "intervene", "train") and "--plugin" not in words:
            shutil.copytree(folder, store)
        return printed[store]

    return call


def shape(text):
    """The lines of an output with numbers and curves masked, and spaces taken as one: what another machine prints as well."""
    masked = re.sub(r"[▁▂▃▄▅▆▇█ ]+", " ", re.sub(r"−?\d+(?:[.,]\d+)*", "0", text))
    return [line.strip() for line in masked.splitlines() if line.strip()]


def runnable():
    return [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.fixture
def tables_as_before():
    """What a page's examples register is gone after it, so that no other test sees it."""
    tables = [table for table in vars(registry).values() if isinstance(table, registry.Registry)]
    before = [(len(table), dict(table._entries), dict(table._modules)) for table in tables]  # len fills a table
    plugins = list(registry.loaded_plugins)
    yield
    for table, (_, entries, modules) in zip(tables, before, strict=True):
        for held, known in ((table._entries, entries), (table._modules, modules)):
            held.clear()
            held.update(known)
    registry.loaded_plugins[:] = plugins


@pytest.mark.usefixtures("tables_as_before")
@pytest.mark.parametrize("page", runnable(), ids=lambda page: page.name)
def test_a_page_runs_as_it_is_printed(page, tmp_path, monkeypatch, capsys, outputs):
    """Block by block in one folder. A Python block that names its file is written there as well; a block of text is what the
    command before it prints, or a part of it.
    """
    monkeypatch.chdir(tmp_path)
    names, out = {}, ""
    for block in blocks(page):
        if block.language == "text":
            assert [line for line in shape(block.text) if line not in shape(out)] == []
            continue
        if block.language == "python":
            ast.parse(block.text)
            if file := re.match(r"# (\w+\.py)\n", block.text):
                Path(file[1]).write_text(block.text, encoding="utf-8")
            elif block.runs:
                exec(compile(block.text, page.name, "exec"), names)
            continue
        for line in lines(block.text) if block.runs else ():
            if line.startswith("printf"):
                subprocess.run(line, shell=True, check=True)
            elif (words := words_of(line)) is not None and not NEEDS.search(line):
                out = outputs(words, capsys)


def test_no_mark_hides_a_command_that_could_be_run():
    """A marked command names data or a model that a test machine lacks, or its mark says that it takes long."""
    for page in PAGES:
        for block in blocks(page):
            for line in lines(block.text) if block.language == "bash" else ():
                if words_of(line) and (mark := NEEDS.match(block.text) or NEEDS.search(line)):
                    long = re.search(r"needs: .*(minute|hours)", mark.string[mark.start() :].partition("\n")[0])
                    assert long or not ("bundled:" in line and "ours:" in line), f"{page.name}: {line}"


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob(".github/workflows/*.yml"), *ROOT.glob("docs/*.yml")]), ids=lambda path: path.name
)
def test_the_steps_of_a_workflow_name_options_and_targets_that_exist(path):
    """The program's options, and the Makefile's targets; the service itself cannot be run here."""
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    steps = [line for job in jobs.values() for step in job["steps"] for line in lines(step.get("run", ""))]
    assert steps
    for line in steps:
        if words_of(line) or line.startswith(NOT_OURS):
            test_commands_and_their_options_exist(path.name, line)
