"""The accumulator under everything: a model listens to batches of images from anywhere, and its state adds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collapse_probe.analysis.facts import (
    behaviour_facts,
    data_facts,
    data_notes,
    left_out_vectors,
    model_facts,
    nonfinite_facts,
    records_sentence,
    run_facts,
    source_facts,
    tensors_hold,
    versions_of,
    weights_sha256,
)
from collapse_probe.analysis.measurement import (
    FAIL,
    GALLERY_IMAGES,
    NULL_IMAGES,
    Images,
    Measurement,
    Report,
    RunSettings,
    make_metrics,
    need_images,
    plan_of,
    restored,
    settled,
    with_input,
    with_shape,
)
from collapse_probe.analysis.state.gallery import gallery_of
from collapse_probe.analysis.state.manifest import STATE_SCHEMA, first_difference, read_manifest, subject_of, tensors_of
from collapse_probe.analysis.state.records import BY_CONTENT, RECORDS
from collapse_probe.analysis.state.stopping import Stopper
from collapse_probe.analysis.summary import exact_numbers, summarise, sureness, thumbnails_of, with_ends
from collapse_probe.analysis.untrained_twins import with_untrained
from collapse_probe.capture.plan import plan_from_json, plan_to_json
from collapse_probe.data.loading import Batch
from collapse_probe.devices import give_back_memory
from collapse_probe.distributed import alone, gathered
from collapse_probe.errors import DataError, NonFiniteError, StateError
from collapse_probe.metrics.coverage import omissions, places_of_blocks
from collapse_probe.metrics.nonfinite import nonfinite_weights, some
from collapse_probe.metrics.presets import records, with_presets
from collapse_probe.models.loading import Subject, resolve
from collapse_probe.provenance import escaped
from collapse_probe.results.findings import Findings, plain, result_from_json, result_to_json
from collapse_probe.results.readings import partial_sentence, trained_on
from collapse_probe.results.verdict import with_verdict
from collapse_probe.settings import names_in
from collapse_probe.statistics.estimates import per_image_values

PAD = (
    "a sampler that pads repeats images (torch's DistributedSampler, accelerate with even_batches): turn that off, or give "
    "every image a name of its own"
)


class Probe:
    """Measures a model over batches of images that come from anywhere; what it keeps adds, so that parts can be brought
    together.

    `model` is an address, a module or a Subject; `metrics` and `presets` are names, by default a fixed set. Of `null_images`
    images, a random sample, the pixels are kept for `null_seeds` untrained copies; of `records` images, likewise, what each
    said by itself; of `gallery_images` the maps. `device` "auto" is where a module given lies, else the best there is. NaN or
    infinite activations raise NonFiniteError, or with `on_nonfinite` "skip" leave their images out.

    Whatever the batches, processes and order in which the images come, and in whatever order states are merged, the findings
    are the same to rounding: on a CPU to about 1e-12, as the model computes the same of an image in any batch (batches are
    filled up to a multiple of four images, of models that mix maps of sixteen); on a GPU, whose kernels change with the
    batch, to about 1e-6.

    >>> probe = Probe(model)                                        # doctest: +SKIP
    >>> for images, names in loader: probe.update(images, names)    # doctest: +SKIP
    >>> probe.findings().summary                                    # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | nn.Module | Subject,
        *,
        metrics: str | Sequence[str] = (),
        presets: str | Sequence[str] = (),
        device: str = "auto",
        amp: bool = False,
        amp_dtype: str | None = None,
        seed: int = 0,
        null_images: int = NULL_IMAGES,
        null_seeds: int = 1,
        gallery_images: int = GALLERY_IMAGES,
        records: int = RECORDS,
        on_nonfinite: str = FAIL,
    ) -> None:
        if isinstance(model, nn.Module) and device == "auto":
            device = str(next((p.device for p in model.parameters()), "auto"))
        settings = RunSettings(
            device=device,
            amp=amp,
            amp_dtype=amp_dtype,
            seed=seed,
            metrics=names_in(metrics),
            presets=names_in(presets),
            null_images=null_images,
            null_seeds=null_seeds,
            gallery_images=gallery_images,
            records=records,
            on_nonfinite=on_nonfinite,
        )
        with restored(model):
            self._prepare(model if isinstance(model, Subject) else resolve(model, seed=seed), settings)

    @classmethod
    def over(
        cls,
        subject: Subject,
        images: Images | None,
        settings: RunSettings,
        *,
        left_out: Mapping[str, str] | None = None,
        keep_logits: bool = False,
    ) -> Probe:
        """A probe for the images of one source, whose facts go into the findings; see `Measurement` for the rest."""
        probe = cls.__new__(cls)
        probe._prepare(subject, settings)
        probe._begin(with_input(subject, images), source_facts(subject, images), images, left_out, keep_logits)
        return probe

    @classmethod
    def stored(cls, manifest: Mapping[str, Any], device: str = "auto", command: str = "") -> Probe:
        """An empty probe for states of this manifest, without their model: it is made anew, without weights, for its
        untrained copies alone. Raises StateError where the manifest is damaged.
        """
        probe = cls.__new__(cls)
        try:
            stored: dict[str, Any] = {**manifest["settings"], "device": device, "command": command}
            words: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
            settings = RunSettings(**words)
            plan = plan_from_json(manifest["plan"])
            probe._prepare(subject_of(manifest), settings)
            metrics = make_metrics(plan, manifest["identity"]["the metrics"])
            probe._measurement = Measurement(probe._subject, plan, metrics, settings)
            probe._measurement.use_weights({n: result_from_json(n, each) for n, each in manifest["weights"].items()})
            probe._model, probe._source, probe._ill_weights = manifest["model"], manifest["source"], manifest["ill_weights"]
            probe._identity = manifest["identity"]
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"the state is damaged: its manifest lacks what it should say ({type(error).__name__}: {error})"
            ) from error
        return probe

    def _prepare(self, subject: Subject, settings: RunSettings) -> None:
        self._subject, self._settings = subject, settings
        self._measurement: Measurement | None = None
        self._source: dict[str, Any] = {}
        self._identity: dict[str, Any] | None = None
        self._run: Mapping[str, Any] = {}
        self._missing = ""
        self._versions: tuple[int, ...] = ()
        self._together = False
        self._named: bool | None = None
        self._ill_weights: list[str] = []

    def _begin(
        self,
        subject: Subject,
        source: dict[str, Any],
        images: Images | None = None,
        left_out: Mapping[str, str] | None = None,
        keep_logits: bool = False,
    ) -> None:
        settings = self._settings
        self._settings = settings = settled(settings, subject.preprocess.size, images)
        self._ill_weights = checked_weights(subject, settings)
        plan = plan_of(subject, settings.device, settings.seed)
        metrics = make_metrics(plan, with_presets(settings.metrics, settings.presets))
        names = need_images(metrics)
        if names and source["address"] is None:
            raise DataError(f"{names[0]} needs images: give data, or ask for metrics of the weights alone")
        if not names and source["address"] is not None:
            unused = "the metrics asked for are of the weights alone: the images were not used"
            source = {**source_facts(subject, None), "notes": [unused]}
        self._subject, self._source = subject, source
        self._measurement = Measurement(subject, plan, metrics, settings, left_out=left_out, keep_logits=keep_logits)
        self._model = plain(model_facts(subject, plan))

    @property
    def measurement(self) -> Measurement:
        """The measurement so far. Raises DataError before the first images."""
        if self._measurement is None:
            raise DataError("the probe has seen no images yet: call update(images) first")
        return self._measurement

    def __repr__(self) -> str:
        return f"<Probe of {self._subject.name}: {self.images} images so far; .update(images, names), .findings()>"

    @property
    def images(self) -> int:
        """How many images the numbers are of so far."""
        return 0 if self._measurement is None else self._measurement.tally.images

    @property
    def read(self) -> int:
        """How many images were read so far, those that could not be used too."""
        return 0 if self._measurement is None else max(len(self.measurement.tally.coverage), self.images)

    def update(self, images: Tensor, names: Sequence[str] | None = None, labels: Sequence[int] | Tensor | None = None) -> None:
        """Run images [B, channels, height, width], made ready for the model, through it, and add them.

        `names` say which images they are, each once; without them an image is named by a hash of its pixels. `labels` are class
        numbers. Raises DataError for anything else than float images of one size, StateError for an image that came before.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            came = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise DataError(f"expected float images [batch, channels, height, width]; came {came}")
        if not len(images):
            return
        for what, values in (("names", names), ("labels", labels)):
            if values is not None and len(values) != len(images):
                raise DataError(f"expected one of {what} for each of {len(images)} images; came {len(values)}")
        with restored(self._subject), torch.no_grad():
            if self._measurement is None:
                self._begin_with(images.shape[1:])
            self._check_usable()
            self.measurement.subject.model.eval()
            pixels = images.detach().float()
            if self._named not in (None, names is not None):
                raise StateError("images with names and images without cannot be told apart: give names to all or to none")
            self._named = names is not None
            own = content_names(pixels) if names is None else self._new([escaped(str(name)) for name in names])
            numbers = None if labels is None else torch.as_tensor(labels).detach().cpu().to(torch.int64)
            self.measurement.update(Batch((), tuple(own), pixels, numbers))

    def _begin_with(self, shape: Sequence[int]) -> None:
        subject = with_shape(self._subject, (shape[0], shape[1], shape[2]))
        self._begin(subject, {**source_facts(subject, None), "address": "images given to a Probe"})
        self.identity()  # of the weights as they are now
        self._versions = versions_of(subject.model)

    def _check_usable(self) -> None:
        """Raise StateError where a batch was added in part, or where the weights are no longer those of the first images."""
        measured = self.measurement
        if measured.inconsistent:
            raise StateError(
                "the probe was stopped while it added a batch, which may count in part: go on from an earlier state"
            )
        if self._versions and self._versions != (now := versions_of(measured.subject.model)):
            if weights_sha256(measured.subject.model) != self.identity()["the weights (SHA-256)"]:
                raise StateError("the model's weights have changed since the first images: make a new Probe for the new ones")
            self._versions = now

    def _new(self, names: list[str]) -> list[str]:
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is None:
            twice = self.measurement.tally.records.knows(names)
        if twice is not None:
            raise StateError(f"the image {twice!r} came before, and no image may count twice; {PAD}")
        return names

    def merge(self, other: Probe | Mapping[str, Any]) -> None:
        """Add what another probe, or the state of one, has seen: the same model, settings and metrics, and other images.

        Raises StateError that names the first difference, and leaves everything as it was.
        """
        if isinstance(other, Probe):
            if other._measurement is None:
                return
            other = other.state_dict()
        manifest = read_manifest(other)
        if manifest["tally"] is None:
            return
        if self._measurement is None:
            return self.load_state_dict(other)
        self._check_usable()
        self._check_same(manifest)
        part = self.measurement.loaded(tensors_of(other), manifest["tally"])
        if twice := self.measurement.tally.overlap(part, BY_CONTENT):
            raise StateError(f"both parts have seen {twice}, and no image may count twice")
        self.measurement.merge(part)

    def all_reduce(self) -> None:
        """Bring together, once, what the probes of all processes of the process group have seen; every process calls it."""
        own = None if self._measurement is None else self.measurement.plan.input_shape
        parts = gathered((own, self._together))
        shapes = [shape for shape, _ in parts if shape]
        if not shapes:
            raise DataError("no process has seen an image")
        if any(together for _, together in parts):
            raise StateError("these probes were brought together before, and no image may count twice: make new ones")
        if self._measurement is None:
            with restored(self._subject):
                self._begin_with(shapes[0])
        for rank, other in enumerate(gathered(self.identity())):
            if difference := first_difference(self.identity(), other):
                raise StateError(f"the states cannot be added: process {rank} measures something else: {difference}")
        self.measurement.all_reduce()
        self._together = len(parts) > 1

    def state_dict(self) -> dict[str, Any]:
        """All that was added: tensors on the CPU by name, and the text "manifest" (JSON) that says what they are of."""
        if self._measurement is None:
            return {"manifest": json.dumps({"schema": STATE_SCHEMA, "tally": None})}
        tensors = self.measurement.tally.state()
        return {"manifest": json.dumps({**self.manifest(), "tensors": sorted(tensors)}), **tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave for the same model, settings and metrics, in place of what was added here.

        Raises StateError that names the first difference, and leaves everything as it was.
        """
        manifest = read_manifest(state)
        if manifest["tally"] is None:
            return
        if self._measurement is None:
            with restored(self._subject):
                self._begin_with(manifest["shape"])
        self._check_same(manifest)
        self.measurement.tally = self.measurement.loaded(tensors_of(state), manifest["tally"])
        self.measurement.inconsistent = self._together = False

    def manifest(self) -> dict[str, Any]:
        """What a state is of, in JSON types."""
        measured, subject = self.measurement, self._subject
        self._check_usable()
        return {
            "schema": STATE_SCHEMA,
            "identity": self.identity(),
            "shape": list(measured.plan.input_shape),
            "plan": plan_to_json(measured.plan),
            "settings": plain(asdict(measured.settings)),
            "model": self._model,
            "request": subject.request,
            "weights": {name: result_to_json(result) for name, result in measured.of_weights().items()},
            "notes": [*subject.notes, *measured.notes],
            "ill_weights": self._ill_weights,
            "run": plain(run_facts(measured)),
            "source": self._source,
            "tally": measured.tally.facts(),
        }

    def identity(self) -> dict[str, Any]:
        """What two states must have in common to be added: by its name in words, in JSON types."""
        measured, settings = self.measurement, self._settings
        if self._identity is not None:
            return self._identity
        metrics = {f"the definition of {name}": metric.definition for name, metric in measured.metrics.items()}
        kinds = {f"the settings of {name}": metric.settings for name, metric in measured.metrics.items()}
        found: dict[str, Any] = plain(
            {
                "the model": f"{self._model['class']}, {self._model['parameters']} parameters, {self._model['blocks']} blocks",
                "the weights (SHA-256)": weights_sha256(measured.subject.model),
                "the preprocessing": self._model["preprocess"],
                "the input": list(measured.plan.input_shape),
                **behaviour_facts(self._subject, measured.plan),
                "the precision": settings.amp_as or "the model's own",
                "the metrics": [*measured.metrics],
                **metrics,
                **kinds,
                "the presets": list(settings.presets),
                "the seed": settings.seed,
                "the number of null images": settings.null_images,
                "the number of untrained copies": settings.null_seeds,
                "the number of records": settings.records,
                "the number of gallery images": settings.gallery_images,
                "the number of images in the data": self._source["total"],
                "the listing of the data (SHA-256 of names and labels)": self._source["listing"],
                "the content of the data (SHA-256)": self._source["content_sha256"],
                "the content of some images (SHA-256)": self._source["sample_sha256"],
                "the order of the images": "the data's" if settings.until_ci is None else "random, for until_ci",
                "the images left out": hashlib.sha256("\n".join(sorted(measured.left_out)).encode()).hexdigest()[:16],
                "whether outputs are kept": measured.keep_logits,
            }
        )
        self._identity = found
        return found

    def _check_same(self, manifest: Mapping[str, Any]) -> None:
        if difference := first_difference(self.identity(), manifest["identity"]):
            raise StateError(f"the states cannot be added: {difference}")

    def findings(self, report: Callable[[str], None] | None = None) -> Findings:
        """The findings of all images that were added; untrained copies are measured now, on the sample that was kept for them.

        `report(line)` is called before each longer step. Raises DataError before the first images.
        """
        self._check_usable()
        with alone(), restored(self._subject):
            return self.conclude(report or (lambda text: None))

    def tell(self, run: Mapping[str, Any], missing: str) -> None:
        """Take over how the states were measured, and what of the data is missing."""
        self._run, self._missing = run, missing

    @property
    def total(self) -> int | None:
        """How many images the data have; None where that is not known."""
        total: int | None = self._source["total"]
        return total

    def conclude(self, say: Report, stopper: Stopper | None = None) -> Findings:
        """The findings, for which all processes share the work."""
        measured = self.measurement
        measured.check_some()
        settings, tally, source, subject = measured.settings, measured.tally, self._source, measured.subject
        table = measured.table()
        stopping = None if stopper is None else stopper.facts(source["total"])
        results, twin_notes = with_untrained(measured, measured.results(table), say)
        give_back_memory()
        nonfinite = nonfinite_facts(self._ill_weights, tally.nonfinite, tally.images)
        plan = measured.plan
        not_measured = places_of_blocks(plan) + [f"left out: {each.where}: {each.why}" for each in omissions(plan)]
        data = data_facts(source, measured, table, self._missing)
        first = [partial_sentence(data), *([] if nonfinite is None else [nonfinite["sentence"]]), trained_on(data) or ""]
        said = [*subject.notes, *data_notes(source, tally.remarks), *plan.notes, *not_measured, *measured.notes]
        last = [records_sentence(data), repeats(table.names), *([] if stopping is None else [stopping["sentence"]])]
        notes = [text for text in [*first, *said, *left_out_vectors(results), *twin_notes, *last] if text]
        images = {key: np.array(values) for key, values in measured.per_image(table).items()}
        values = per_image_values(images, measured.heads)
        if tally.records.sampled:
            values = replace(values, of=tally.images, exact=exact_numbers(results))
        sure = sureness(values, results, table.labels_by_name(), source["class_names"], settings.seed)
        sure["extremes"] = with_ends(sure["extremes"], tally)
        findings = Findings(
            model=self._model,
            data=data,
            run={
                **run_facts(measured, self._run),
                "until_ci": stopping,
                "nonfinite": nonfinite,
                "notes": notes,
            },
            metrics=results,
            summary=summarise(results, values),
            images=images,
            gallery=gallery_of(tally.glimpses, plan, self._model["preprocess"]),
            presets=records(settings.presets),
            thumbnails=thumbnails_of(sure["extremes"], tally),
            sureness=sure,
        )
        return with_verdict(findings)


def checked_weights(subject: Subject, settings: RunSettings) -> list[str]:
    """The weights that are not finite, where the run is to go on with them; else NonFiniteError, with where they are felt."""
    ill = nonfinite_weights(subject.model)
    if not ill or settings.on_nonfinite != FAIL:
        return ill
    what = f"{tensors_hold(ill)} NaN or infinite numbers: {some(ill)}"
    try:
        plan_of(subject, settings.device, settings.seed)
    except NonFiniteError as error:
        where = f"; noise images show it {error.place}; give other weights"
        raise NonFiniteError(f"{what}{where}", error.place) from None
    raise NonFiniteError(
        f"{what}; noise images do not show it; give other weights, or go on (--on-nonfinite skip, on_nonfinite='skip')"
    )


def content_names(pixels: Tensor) -> list[str]:
    """Names for images that have none, from their pixels [B, channels, height, width] alone."""
    rows = pixels.cpu().contiguous()
    return [f"{BY_CONTENT}{hashlib.blake2b(row.numpy().data, digest_size=8).hexdigest()}" for row in rows]


def repeats(names: Sequence[str]) -> str:
    """That images without names came with the pixels of others; empty where none did."""
    again = len(names) - len(set(names))
    return f"{again} of {len(names)} images have the same pixels as another, and all were counted: {PAD}" if again else ""
