"""Settings as a user gives them: read out of words, then checked one by one."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from collapse_probe.errors import SettingError

S = TypeVar("S", bound="Settings")


def names_in(names: str | Iterable[str]) -> tuple[str, ...]:
    """Names as they may be given: one alone, or several.

    >>> names_in("map-rank"), names_in(["map-rank", "token-rank"])
    (('map-rank',), ('map-rank', 'token-rank'))
    """
    return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True)
class Settings:
    """A frozen dataclass whose fields are settings, checked by their types.

    `Literal["a", "b"]` and `bool` name the values, `Annotated[float, "[0, 1)"]` the interval of a number and
    `Annotated[int, "[1, inf)"]` the least of a whole number; a child's `__post_init__` may check other types. Each check raises
    SettingError with the child's `name`, what the setting must be and what it is.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self), include_extras=True)
        for setting in (field.name for field in fields(self)):
            value, kind = getattr(self, setting), kinds[setting]
            if get_origin(kind) is Literal:
                self._choice(setting, *get_args(kind))
            elif kind is bool:
                self._choice(setting, True, False)
            elif get_origin(kind) is Annotated:
                number, interval = get_args(kind)
                low, high = map(float, interval[1:-1].split(","))
                at_open_end = (interval[0] == "(" and value == low) or (interval[-1] == ")" and value == high)
                if number is int:
                    self._whole(setting, int(low))
                elif at_open_end or not between(value, low, high):
                    raise SettingError(f"{self.name}: {setting} must be a number in {interval}, not {value!r}")

    @classmethod
    def with_settings(cls: type[S], settings: Mapping[str, Any]) -> S:
        """Made of settings by name, lists as tuples; SettingError for a name that there is not."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise SettingError(f"{cls.name} has no setting {name!r}; it has {', '.join(known) or 'none'}")
        return cls(**{key: tuple(value) if isinstance(value, list | range) else value for key, value in settings.items()})

    def _whole(self, setting: str, low: int) -> None:
        value = getattr(self, setting)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise SettingError(f"{self.name}: {setting} must be a whole number from {low} up, not {value!r}")

    def _choice(self, setting: str, *allowed: object) -> None:
        value = getattr(self, setting)
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise SettingError(f"{self.name}: {setting} must be one of {allowed}, not {value!r}")


def between(value: object, low: float, high: float) -> bool:
    """Whether a setting is a number (True and False are none) from `low` to `high`, both among them.

    >>> between(0, 0, 1), between(True, 0, 1), between("0", 0, 1)
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


PAIRS = {"(": ")", "[": "]", "{": "}", "'": "'", '"': '"'}


def parse_value(text: str) -> Any:
    """A Python literal where `text` is one, else the text itself.

    >>> parse_value("(1, 2)"), parse_value("layer")
    ((1, 2), 'layer')
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def words_in(text: str) -> list[str]:
    """A text cut at its spaces, but for those inside brackets and quotes. SettingError where one of these stays open.

    >>> words_in("img_size=(64, 96) depth=2 name='a b'")
    ['img_size=(64, 96)', 'depth=2', "name='a b'"]
    """
    words, open_ones = [""], ""
    for c in text:
        quoted = open_ones[-1:] in ("'", '"')
        if open_ones and c == open_ones[-1]:
            open_ones = open_ones[:-1]
        elif not quoted and c in PAIRS:
            open_ones += PAIRS[c]
        elif not open_ones and c.isspace():
            words.append("")
            continue
        words[-1] += c
    if open_ones:
        raise SettingError(f"{text!r} has no closing {open_ones[-1]}")
    return [word for word in words if word]


def parse_keywords(words: Iterable[str], text: str = "") -> dict[str, Any]:
    """Names and values out of words `K=V`, see `parse_value`. SettingError names the word and the whole `text` it is from.

    >>> parse_keywords(["norm=layer", "scale=2"], "re-attention:norm=layer,scale=2")
    {'norm': 'layer', 'scale': 2}
    """
    keywords: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip().isidentifier():
            expected = f"{text!r}: expected NAME:SETTING=VALUE,…" if text else "expected NAME=VALUE"
            raise SettingError(f"{expected}, came {word!r}")
        keywords[key.strip()] = parse_value(value)
    return keywords
