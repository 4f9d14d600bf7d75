"""Thresholds in words, such as `similar_blocks > 4`: read as a grammar, never run as code.

The grammar: names of the summary, numbers, + − * / and parentheses; comparisons (< <= > >= == !=, also
chained); and, or, not. An undefined number makes whatever it enters undefined, unless the rest decides
alone (`False and …`, `True or …`).
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from collapse_probe.errors import SettingError

Numbers = Mapping[str, "float | int | None"]
ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
LONGEST = 1000  # characters
EXAMPLE = "similar_blocks > 4 or kappa_adjacent >= 0.5"


@dataclass(frozen=True)
class Outcome:
    """What a threshold says of some numbers: `holds` is True, False, or None where it cannot be decided."""

    holds: bool | None
    undefined: tuple[str, ...]

    @property
    def tripped(self) -> bool:
        """Whether to stop: a threshold that cannot be decided trips as well, since nothing shows that all
        is well.
        """
        return self.holds is not False


@dataclass(frozen=True)
class Threshold:
    """One expression, already read; `names` are the numbers that it needs."""

    text: str
    tree: ast.expr
    names: tuple[str, ...]

    def check(self, numbers: Numbers) -> Outcome:
        """Decide it on `numbers`; SettingError for a name that is not there."""
        for name in self.names:
            if name not in numbers:
                raise SettingError(f"the threshold {self.text!r} names {name!r}, {_nearest(name, numbers)}")
        undefined = tuple(name for name in self.names if numbers[name] is None)
        return Outcome(_truth(self.tree, numbers), undefined)

    def line(self, numbers: Numbers) -> str:
        """One line on how it came out: the numbers that entered."""
        shown = ", ".join(f"{name} is {_shown(numbers[name])}" for name in self.names)
        outcome = self.check(numbers)
        if outcome.holds is None:
            return f"threshold {self.text!r} cannot be decided and counts as tripped: {shown}"
        return f"threshold {self.text!r} {'tripped' if outcome.holds else 'did not trip'}: {shown}"


def read(text: str) -> Threshold:
    """Read an expression; SettingError where it is none, or holds more than the grammar.

    >>> read("similar_blocks > 2 * 2 and not images < 8").check({"similar_blocks": 5, "images": 9}).holds
    True
    """
    if len(text) > LONGEST:
        raise SettingError(f"a threshold has at most {LONGEST} characters, not {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SettingError(f"{text!r} is no threshold; expected for example {EXAMPLE!r}") from error
    _expect_truth(tree, text)
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return Threshold(text.strip(), tree, tuple(dict.fromkeys(names)))


def _expect_truth(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BoolOp):
        for part in node.values:
            _expect_truth(part, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _expect_truth(node.operand, text)
    elif isinstance(node, ast.Compare) and all(type(sign) in COMPARISONS for sign in node.ops):
        for part in (node.left, *node.comparators):
            _expect_number(part, text)
    else:
        raise _refused(node, text, "a comparison")


def _expect_number(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        _expect_number(node.left, text)
        _expect_number(node.right, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        _expect_number(node.operand, text)
    elif not isinstance(node, ast.Name) and not (isinstance(node, ast.Constant) and type(node.value) in (int, float)):
        raise _refused(node, text, "a number or a name of the summary")


def _refused(node: ast.expr, text: str, expected: str) -> SettingError:
    part = ast.unparse(node)
    return SettingError(f"in the threshold {text!r}, {part!r} is not {expected}; write for example {EXAMPLE!r}")


def _truth(node: ast.expr, numbers: Numbers) -> bool | None:
    if isinstance(node, ast.BoolOp):
        parts = [_truth(part, numbers) for part in node.values]
        deciding = isinstance(node.op, ast.Or)
        if deciding in parts:
            return deciding
        return None if None in parts else not deciding
    if isinstance(node, ast.UnaryOp):
        inner = _truth(node.operand, numbers)
        return None if inner is None else not inner
    assert isinstance(node, ast.Compare)
    values = [_number(part, numbers) for part in (node.left, *node.comparators)]
    links = [_compare(sign, a, b) for sign, a, b in zip(node.ops, values, values[1:], strict=False)]
    return False if False in links else None if None in links else True


def _compare(sign: ast.cmpop, one: float | None, other: float | None) -> bool | None:
    return None if one is None or other is None else COMPARISONS[type(sign)](one, other)


def _number(node: ast.expr, numbers: Numbers) -> float | None:
    if isinstance(node, ast.Constant):
        value: Any = node.value
        return float(value)
    if isinstance(node, ast.Name):
        held = numbers[node.id]
        return None if held is None or held != held else float(held)
    if isinstance(node, ast.UnaryOp):
        inner = _number(node.operand, numbers)
        return None if inner is None else -inner if isinstance(node.op, ast.USub) else inner
    assert isinstance(node, ast.BinOp)
    one, other = _number(node.left, numbers), _number(node.right, numbers)
    if one is None or other is None or (isinstance(node.op, ast.Div) and other == 0):
        return None
    return ARITHMETIC[type(node.op)](one, other)


def _nearest(name: str, numbers: Numbers) -> str:
    near = difflib.get_close_matches(name, numbers, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(numbers))}"
    return f"which the summary does not hold; {known}"


def _shown(value: float | int | None) -> str:
    return "undefined" if value is None else f"{value:.6g}"


TRIPPED = 3


def thresholds(texts: Sequence[str]) -> list[Threshold]:
    """The expressions read, before any work is done; SettingError for one that cannot be."""
    return [read(text) for text in texts]


def stop_if_tripped(rules: Sequence[Threshold], numbers: Mapping[str, Numbers]) -> None:
    """Exit with TRIPPED, and a line on stderr for each threshold that trips for any of the subjects by label.

    An empty label stands for the only subject. One that cannot be decided trips.
    """
    lines = [
        f"{label}: {rule.line(held)}" if label else rule.line(held)
        for rule in rules
        for label, held in numbers.items()
        if rule.check(held).tripped
    ]
    for line in lines:
        click.echo(line, err=True)
    if lines:
        click.get_current_context().exit(TRIPPED)
