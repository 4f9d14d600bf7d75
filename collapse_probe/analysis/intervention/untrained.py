"""What an untrained copy of a model keeps without the same blocks: how much of that is the architecture's."""

from __future__ import annotations

import dataclasses

import numpy as np

from collapse_probe.analysis.intervention.conditions import Condition, run_conditions
from collapse_probe.analysis.intervention.effects import effects_of
from collapse_probe.analysis.intervention.runner import ReplacementRunner
from collapse_probe.analysis.measurement import Images
from collapse_probe.analysis.untrained_twins import plan_of_twin
from collapse_probe.capture.edits.places import Places
from collapse_probe.devices import moved
from collapse_probe.errors import CollapseProbeError
from collapse_probe.results.intervention import GREEDY, Interventions, UntrainedCopy

MOST_IMAGES = 256


def with_untrained_copy(found: Interventions, runner: ReplacementRunner, images: Images) -> Interventions:
    """The same with what a copy with fresh parameters keeps of its own answers without the blocks that can go, or that go
    first, on images that give the price; without it where the architecture cannot be made anew or cannot lose these blocks.
    """
    subject, settings = runner.subject, runner.settings
    conditions: list[Condition] = [
        (kind, each[GREEDY].priced[max(each[GREEDY].spared, 1) - 1].blocks) for kind, each in found.orders.items()
    ]
    if not conditions or subject.fresh is None:
        return found
    runner.say("leaving the same blocks out of an untrained copy")
    try:
        twin = dataclasses.replace(subject, model=moved(subject.fresh(settings.seed + 1), runner.device).eval())
        plan, made = plan_of_twin(twin, runner.plan, settings), subject.preprocess
        kinds = [kind for kind, _ in conditions]
        places = Places.of(twin.model, plan, kinds, made.size, made.channels, settings.seed)
        if any(places.refusal(kind, block) for kind, blocks in conditions for block in blocks):
            return found
        names = found.images["names"][found.images["priced"]][:MOST_IMAGES]
        runner = ReplacementRunner(twin, places, runner.device, settings, runner.left_out, say=runner.say, saving=runner.saving)
        outputs = run_conditions(*runner.on(frozenset(map(str, names)), images), conditions, name="untrained")
    except CollapseProbeError as error:
        runner.say(f"no untrained copy: {error}")
        return found
    effects = effects_of(conditions, outputs.kl, outputs.plain, outputs.top1, None)
    copy = UntrainedCopy(len(outputs.names), len(np.unique(outputs.plain)), tuple(effects))
    return dataclasses.replace(found, untrained=copy)
