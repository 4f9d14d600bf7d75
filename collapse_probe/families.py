"""Which family a metric belongs to, by its name."""

from __future__ import annotations

from collapse_probe.attention_families import ATTENTION
from collapse_probe.captions import Caption
from collapse_probe.family import Family
from collapse_probe.token_families import TOKENS
from collapse_probe.weight_families import WEIGHTS

FAMILIES: dict[str, Family] = {**ATTENTION, **TOKENS, **WEIGHTS}


def family_of(name: str) -> Family:
    """The family of metric `name`; a plain description for one that has no words here."""
    base = name.partition("@")[0]
    return FAMILIES.get(base) or Family(Caption(base, "Its definition is at the end of this page.", ""), "other", base, "value")
