"""What the capture hears in many kinds of models is right, or it is refused with a sentence: never silently wrong."""

from __future__ import annotations

import warnings

import pytest
from bench import WRONG, check
from handwritten import SIZE, cases

CASES = cases()
FAILING = {  # heard wrongly today
    "a loop over heads",
    "channels attend",
    "differential, the second first",
    "heads split off and put along the batch",
    "linear attention, softmax of q and of k",
    "map [H*B,N,N]",
    "model: plain blocks with one of: a learned sink logit",
    "model: plain blocks with one of: map [B,N,N,H]",
    "model: plain blocks with one of: multiplied elementwise",
    "model: siamese, one encoder called twice",
    "model: two towers side by side",
    "model: two towers, block by block",
    "one module a head",
    "tokens read 5 latents",
}


@pytest.mark.parametrize("name", CASES)
def test_handwritten(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdict = check(name, CASES[name], SIZE, "float32")
    assert verdict.outcome != WRONG or name in FAILING, verdict.why
