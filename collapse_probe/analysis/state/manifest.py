"""What a stored state says of itself: it is read, compared with another's, and the model behind it is made anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from collapse_probe.data.preprocessing import given_pixels
from collapse_probe.errors import ModelError, StateError
from collapse_probe.models.loading import Subject, resolve

STATE_SCHEMA = "collapse-probe/state/2"


def read_manifest(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a state is of; StateError for what is none."""
    try:
        manifest: Any = json.loads(state["manifest"])
        schema = manifest["schema"]
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"expected the state of a Probe, as state_dict() gives it; came {type(state).__name__}") from error
    if schema != STATE_SCHEMA:
        raise StateError(f"expected a state with schema {STATE_SCHEMA!r}; came {schema!r}: measure again with this version")
    if manifest["tally"] is not None and manifest["tensors"] != sorted(tensors_of(state)):
        raise StateError("the state is incomplete: its tensors are not those that it was stored with")
    return dict(manifest)


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first fact in which two states differ, in words; empty where there is none."""
    for fact in dict.fromkeys([*one, *other]):
        mine, others = one.get(fact), other.get(fact)
        if mine != others:
            return f"{fact}: {_short(mine)} and {_short(others)} are not the same"
    return ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}…"


def subject_of(manifest: Mapping[str, Any]) -> Subject:
    """The subject of a stored state: its provenance, and its architecture where it can be made again, without its weights."""
    facts, request, shape = manifest["model"], manifest["request"], manifest["shape"]
    made = replace(given_pixels(shape[0], (shape[1], shape[2])), description=facts["preprocess"])

    def fresh(seed: int) -> nn.Module:
        asked = {key: value for key, value in request.items() if key not in ("address", "fixes", "blocks")}
        size = asked["img_size"]
        asked |= {"pretrained": False, "img_size": tuple(size) if isinstance(size, list) else size}
        subject = resolve(request["address"], request["fixes"], request["blocks"], **asked)
        if subject.fresh is None:
            raise ModelError("the model's architecture cannot be made anew here")
        twin = subject.fresh(seed)
        if (came := sum(p.numel() for p in twin.parameters())) != facts["parameters"]:
            raise ModelError(
                f"{request['address']} makes a model of {came:,} parameters here, the states are of {facts['parameters']:,}"
            )
        return twin

    return Subject(
        address=facts["address"],
        source=facts["source"],
        name=facts["name"],
        weights=facts["weights"],
        model=nn.Identity(),
        preprocess=made,
        fresh=None if request is None else fresh,
        notes=tuple(manifest["notes"]),
        blocks_pattern=None if request is None else request["blocks_pattern"],
        training_data=manifest["source"]["training_data"],
        request=request,
    )
