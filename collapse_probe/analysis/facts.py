"""What findings say of the model, the data and the run beside the numbers, as plain values that can be stored and compared."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from collapse_probe.analysis.measurement import Images, Measurement
from collapse_probe.analysis.state.records import Table
from collapse_probe.capture.plan import Plan
from collapse_probe.capture.trace import tile_bytes
from collapse_probe.data.images import ImageSet, OwnImages
from collapse_probe.data.readers import LeftOut
from collapse_probe.data.splits import split_data, whole_picture
from collapse_probe.data.streams.stream import ImageStream
from collapse_probe.devices import choose_device, device_name, floating_like, peak_memory
from collapse_probe.distributed import rank_and_world, unwrap
from collapse_probe.metrics.coverage import omissions, places_of_blocks, uncompared
from collapse_probe.metrics.nonfinite import some
from collapse_probe.models.checkpoints import holds_any
from collapse_probe.models.fixes.base import AppliedFix
from collapse_probe.models.loading import Subject, library_module
from collapse_probe.provenance import names_sha256, stamp
from collapse_probe.results.findings import MetricResult

NOT_FINITE = "its activations are not finite"


def nonfinite_facts(weights: Sequence[str], images: Sequence[tuple[str, str]], finite: int) -> dict[str, Any] | None:
    """What the findings say of weights and images that are not finite; None where all are."""
    if not weights and not images:
        return None
    total = len(images) + finite
    said = [f"{tensors_hold(weights)} NaN or infinite numbers ({some(weights)})"] if weights else []
    if images:
        places = [f"{count} × {place}" for place, count in Counter(place for _, place in images).most_common()]
        verb = "is" if len(images) == 1 else "are"
        why = f"activations that are not finite ({some(places)})"
        said.append(f"{len(images)} of {total} images {verb} left out of every number, because of {why}")
    return {"weights": [*weights], "images": len(images), "of": total, "sentence": f"{'; '.join(said)}."}


def tensors_hold(names: Sequence[str]) -> str:
    return "1 of the model's tensors holds" if len(names) == 1 else f"{len(names)} of the model's tensors hold"


def left_out_vectors(results: Mapping[str, MetricResult]) -> list[str]:
    """A note for each similarity of maps from which rows or columns without a direction are left out."""
    notes = []
    for name, result in results.items():
        share = np.asarray(result.details.get("left_out", ()), dtype=np.float64)
        if share.any():
            blocks = ", ".join(f"block {i}: {100 * each:.3g} %" for i, each in enumerate(share) if each)
            notes.append(
                f"{name}: {result.settings['axis']}s that are zero in float32 have no direction and are left out ({blocks})"
            )
    return notes


def model_facts(subject: Subject, plan: Plan) -> dict[str, Any]:
    """The section `model`: provenance, and the shape that the probe found."""
    heads = [plan.layers[i].heads for i in plan.map_layers]
    own = type(library_module(subject.model))
    return {
        "address": subject.address,
        "source": subject.source,
        "name": subject.name,
        "weights": subject.weights,
        "checkpoint": subject.checkpoint,
        "checkpoint_sha256": subject.checkpoint_sha256,
        **loading_facts(subject, plan),
        "class": f"{own.__module__}.{own.__qualname__}",
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "blocks": len(plan.blocks),
        "heads": heads[0] if len(set(heads)) == 1 else heads,
        "tokens": plan.tokens,
        "prefix_tokens": len(plan.prefix),
        "width": plan.width,
        "preprocess": subject.preprocess.description,
        "block_names": list(plan.blocks),
        "attention_layers": [plan.layers[i].owner for i in plan.map_layers],
        "mixes_maps": any(plan.layers[i].mixed for i in plan.map_layers),
        "adjacent": list(plan.adjacent),
        "shares_weights": shares_weights(subject.model, plan),
        "places": places_of_blocks(plan),
        "uncompared": [{"why": why, "blocks": blocks} for why, blocks in uncompared(plan).items()],
        "left_out": [{"where": each.where, "why": each.why, "blocks": list(each.places)} for each in omissions(plan)],
    }


def shares_weights(model: nn.Module, plan: Plan) -> list[bool]:
    """Whether the attention of each block and of the block before is made with the same tensors, mostly; [blocks − 1]."""
    owners = [plan.layers[i].owner for i in plan.map_layers]
    sizes = [{id(p): p.numel() for p in model.get_submodule(owner).parameters()} if owner else {} for owner in owners]
    common = [sum(size for tensor, size in one.items() if tensor in other) for one, other in pairwise(sizes)]
    return [2 * shared > sum(one.values()) for shared, one in zip(common, sizes[1:], strict=True)]


def loading_facts(subject: Subject, plan: Plan) -> dict[str, Any]:
    """How many tensors came from the checkpoint, and the numbers of the blocks with weights that did not; None without one."""
    if subject.loading is None:
        return {"loaded": None, "blocks_not_loaded": None}
    elsewhere = [i for i, name in enumerate(plan.blocks) if holds_any(subject.loading.not_loaded, name)]
    return {
        "loaded": {"tensors": subject.loading.loaded, "of": subject.loading.total},
        "blocks_not_loaded": elsewhere,
    }


def source_facts(subject: Subject, images: Images | None) -> dict[str, Any]:
    """Where the images come from, without any image of them: what the section `data` and its notes are made of.

    `total` is how many there are and `listing` the SHA-256 of their names (and labels), None where that is not known before
    they are read.
    """
    came = images.batches if isinstance(images, OwnImages) else images
    total, listing, not_read = None, None, LeftOut()
    if isinstance(images, ImageSet):
        total, not_read = len(images), images.left_out
        listing = names_sha256([*images.names, "".join(map(str, images.labels or ()))])
    elif isinstance(images, ImageStream):
        total, listing = images.count, names_sha256(images.shards.names)
    return {
        "address": None if images is None else getattr(images, "address", f"an iterable ({type(came).__name__})"),
        "bundled": bool(getattr(images, "bundled", False)),
        "total": total,
        "listing": listing,
        "class_names": list(getattr(images, "class_names", ())),
        "content_sha256": getattr(images, "content_sha256", None),
        "sample_sha256": getattr(images, "sample_sha256", None),
        "notes": list(getattr(images, "notes", ())),
        "left_out": dict(sorted(not_read.counts.items())),
        "not_read": [list(each) for each in not_read.entries()],
        "training_data": None if subject.training_data is None else dict(subject.training_data),
    }


def data_facts(source: Mapping[str, Any], measurement: Measurement, table: Table, missing: str = "") -> dict[str, Any]:
    """The section `data`, `missing` what of the data is not there; where no image was used, no address and 0 images. What was
    not read has its number in `left_out`.
    """
    tally = measurement.tally
    ill = sorted((name, f"{NOT_FINITE}: {why}") for name, why in tally.nonfinite)
    skipped = [*sorted(tally.skipped), *ill, *source["not_read"]]
    used = source["address"] is not None
    of, done = source["total"], max(len(tally.coverage), tally.images)
    return {
        "address": source["address"],
        "images": tally.images,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        "names_sha256": tally.records.fingerprint(table) if used else None,
        "bundled": source["bundled"],
        "trained_on": images_trained_on(source, table.names),
        **({"left_out": source["left_out"]} if source["left_out"] else {}),
        **({"content_sha256": source["content_sha256"]} if source["content_sha256"] else {}),
        **({"records": len(table)} if tally.records.sampled else {}),
        **({"partial": {"read": done, "of": of, "why": missing}} if missing else {}),
    }


def records_sentence(data: Mapping[str, Any]) -> str:
    """That what is said of single images is said of a sample; empty where all are kept."""
    if "records" not in data:
        return ""
    return (
        f"Means, counts and their intervals are over all {data['images']:,} images; what is said of single images (how they "
        f"settle, classes, images.npz) is of a random sample of {data['records']:,}."
    )


def data_notes(source: Mapping[str, Any], remarks: Mapping[str, int]) -> list[str]:
    """How the data were read, what of them was not, and what was done to how many images."""
    return [
        *source["notes"],
        *(f"{count:,} image{'s' * (count > 1)}: {remark}" for remark, count in sorted(remarks.items())),
    ]


def images_trained_on(source: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """How many of the images the model was trained on; None where that is not known: of weights whose training is not
    recorded, and of data that do not come with the package, whose names do not say whether they are the same images.
    """
    trained = source["training_data"]
    if trained is None or not source["bundled"] or source["address"] != trained["address"]:
        return None
    of_training = {whole_picture(name) for name in split_data(**trained).train.names}
    return sum(whole_picture(name) in of_training for name in names)


def run_facts(measurement: Measurement, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The section `run`: where, how and how fast the model was measured, and how far its attention was from its own; of states
    that come from elsewhere with what they say of it (`before`).
    """
    tally, settings = measurement.tally, measurement.settings
    speed = {
        "seconds": round(tally.seconds, 3),
        "images_per_second": round(tally.images / max(tally.seconds, 1e-9), 2),
    }
    if before:
        return {**before, **speed, **stamp(), "command": settings.command}
    plan, device = measurement.plan, choose_device(settings.device)
    return {
        "device": device_name(device),
        "dtype": settings.amp_as or str(floating_like(measurement.subject.model).dtype).removeprefix("torch."),
        "batch_size": settings.batch_size,
        "world_size": rank_and_world()[1],
        "seed": settings.seed,
        **speed,
        "peak_memory_bytes": peak_memory(device),
        "command": settings.command,
        **stamp(),
        "self_check": {name: None if math.isnan(value) else value for name, value in vars(plan.check).items()},
        "tile_bytes": tile_bytes(plan, device),
    }


def behaviour_facts(subject: Subject, plan: Plan) -> dict[str, Any]:
    """What decides beside the weights what a model computes and where it is read, as far as that is known, in JSON types."""
    applied = getattr(library_module(unwrap(subject.model)), "fixes", ())
    fixes = [fix for fix in applied if isinstance(fix, AppliedFix)] if isinstance(applied, (tuple, list)) else []
    return {
        "the blocks": list(plan.blocks),
        "the attention": [f"{each.owner}: {each.heads} × {each.queries} × {each.keys}" for each in plan.layers],
        "the depths": [f"{tap.side} of {tap.path}" for tap in plan.taps],
        "the fixes": [f"{fix.name} in {list(fix.blocks)}: {dict(fix.settings)}" for fix in fixes],
        "the model's arguments": (subject.request or {}).get("model_kwargs") or {},
    }


def versions_of(model: nn.Module) -> tuple[int, ...]:
    """How often each parameter was written to, which is looked up at once; empty where torch does not count."""
    try:
        return tuple(parameter._version for parameter in model.parameters())
    except RuntimeError:  # made in inference mode
        return ()


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict(keep_vars=False).items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            if not tensor.is_meta and tensor.numel():
                digest.update(np.ascontiguousarray(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()).data)
    return digest.hexdigest()
