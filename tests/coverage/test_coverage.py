"""What the capture hears in many kinds of models is right, or it is refused with a sentence: never silently wrong.

Every hand-written model and one model of each kind of library run by default; all rows in all precisions by `make coverage`,
which also writes docs/coverage.md.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
from coverage_bench import WRONG, check
from handwritten import SIZE, cases
from library import FAST, TIMM, WITHOUT, rows
from library_maps import check_row

CASES, ROWS = cases(), {f"{row.library}: {row.name}": row for row in rows()}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", CASES)
def test_handwritten(name):
    verdict = check(name, CASES[name], SIZE, "float32")
    assert verdict.outcome != WRONG, verdict.why


@pytest.mark.parametrize("name", [name for name in ROWS if name in FAST])
def test_library(name):
    verdict = check_row(ROWS[name], "float32", batches=(3,))
    assert verdict.outcome not in (WRONG, "does not run"), verdict.why


def test_every_family_of_timm_is_known():
    import timm

    own = {name for name in timm.list_modules() if find_spec(f"timm.models.{name}")}  # without what others registered
    assert "vision_transformer" in own
    new = own - set(TIMM) - set(WITHOUT)
    assert not new, f"new families of timm: give each a small model in library.TIMM, or name it in WITHOUT: {sorted(new)}"
    listed = {name for models in TIMM.values() for name, _, _ in models}
    assert all(models for models in TIMM.values())
    assert listed <= set(timm.list_models()), "timm no longer has these"


def test_the_reference_sees_a_wrong_map():
    """The bench itself: a map of other heads, images or keys is not taken for the model's own."""
    import torch
    from library_maps import Softmax, error_of

    maps = torch.rand(3, 4, 7, 7, dtype=torch.float64)
    assert error_of(maps.float(), Softmax("", maps, True)) < 1e-6
    for wrong in (maps.flip(0), maps.flip(1), maps.mT, maps.reshape(1, 12, 7, 7)):
        assert error_of(wrong.float(), Softmax("", maps.clone(), True)) > 0.1
