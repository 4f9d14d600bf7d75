"""The flags that commands share, spelled as in timm's validate.py."""

from __future__ import annotations

import atexit
import difflib
import functools
import gc
import importlib
import pkgutil
import re
import shlex
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
import yaml

from collapse_probe.errors import SettingError, UnknownNameError
from collapse_probe.processes.launchers import announced
from collapse_probe.settings import parse_keywords, words_in

Decorator = Callable[[Any], Any]
LARGEST_CONFIG = 1 << 20


def blocks_in(text: str) -> list[int]:
    """Numbers of blocks from words; SettingError for anything else.

    >>> blocks_in("0,6-8")
    [0, 6, 7, 8]
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.strip().isascii() and end.strip().isdigit() for end in ends):
            raise SettingError(f"{text!r} names no blocks; expected for example 6-11 or 0,2,5-7")
        if len(largest := ends[-1].strip().lstrip("0")) > 5:
            raise SettingError(f"{text[:60]!r} names block {largest[:20]}; no model has so many")
        numbers += range(int(ends[0]), int(ends[1]) + 1)
    if not numbers or len(set(numbers)) != len(numbers):
        raise SettingError(f"{text!r} must name blocks from low to high, each once; for example 6-11 or 0,2,5-7")
    return sorted(numbers)


def keywords(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`k=v` words, several in one value or one each, as a dictionary; see `words_in` and `parse_value`."""
    words: list[str] = []
    try:
        for word in (word for value in values for word in words_in(value)):
            if words and "=" not in word:  # the rest of a value with a space in it
                words[-1] += f" {word}"
            else:
                words.append(word)
        return parse_keywords(words)
    except SettingError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error


def address(ctx: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """A data address as it was given; wrong usage where it is empty, as an unset variable is."""
    if text is not None and not text.strip():
        raise click.BadParameter("it is empty (an unset variable?); give a data address", ctx, parameter)
    return text


def block_numbers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    """The blocks that a flag names, None where it was not given."""
    return None if text is None else blocks_in(text)


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """A time as 90 (seconds), 30s, 5m, 1.5h or 2d, in seconds."""

    name = "time"
    units: ClassVar[Mapping[str, float]] = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no time; expected a number with s, m, h or d, as 5m or 1.5h", param, ctx)
        return float(match[1]) * self.units[match[2]]


class Share(click.ParamType):  # type: ignore[type-arg]
    """K/N, a part of the images: K from 1 to N."""

    name = "part"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """K and N."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value).strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no part; expected K/N with K from 1 to N, as 3/8", param, ctx)
        return int(match[1]), int(match[2])


class ImageSize(click.ParamType):  # type: ignore[type-arg]  # generic in new releases of click alone
    """Pixels of a side (64), or of height and width (64x96, 64,96, or a list in a file of flags)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A whole number, or (height, width)."""
        words = value if isinstance(value, (list, tuple)) else re.split(r"\s*[x×,]\s*", str(value).strip("()[] "))
        sides = [int(str(word)) for word in words if str(word).isdecimal() and int(str(word)) > 0]
        if len(sides) != len(words) or len(sides) not in (1, 2):
            self.fail(f"{value!r} is no size; expected pixels above 0, as 64, or height x width, as 64x96", param, ctx)
        return sides[0] if len(sides) == 1 else tuple(sides)


def load_libraries() -> None:
    """Import torch, torchvision and timm, if need be, with the garbage collector at rest, and let it leave them alone later.

    Nothing of theirs is garbage: looking for some takes a fifth of their import, and a fifth of a second whenever it is done.
    """
    if "timm" in sys.modules:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module("collapse_probe.models")  # torchvision, with a message where it does not fit torch
        importlib.import_module("timm")
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # Triton looks for leaks at the end
        if enabled:
            gc.enable()


def open_subject(data: str | None, flags: dict[str, Any]) -> tuple[Any, Any]:
    """The images (or None) and the subject that the flags of data, model and remedies describe; takes these out of `flags`."""
    from collapse_probe.data.images import open_data
    from collapse_probe.models.batchnorm import recalibrated
    from collapse_probe.models.loading import resolve

    seed, batches = flags["seed"], flags.pop("recalibrate_bn")
    part = {key: flags.pop(key) for key in ("split", "limit", "max_pixels")}
    images = None if data is None else open_data(data, seed=seed, **part)
    keys = ("checkpoint", "checkpoint_key", "partial", "pretrained", "model_kwargs", "img_size", "blocks_pattern", "fixes")
    named = {key: flags.pop(key) for key in keys}
    subject = resolve(flags.pop("model"), blocks=flags.pop("fix_blocks"), seed=seed, **named)
    if batches and images is None:
        raise click.UsageError("--recalibrate-bn needs images: give --data.")
    return images, recalibrated(
        subject, images, batches, batch_size=flags["batch_size"] or 64, device=flags["device"], seed=seed
    )


def data_line(images: Any) -> str:
    """Which data there are, and how many images."""
    return f"data {images.address}, {'a stream of images' if images.count is None else f'{images.count:,} images'}"


def across_processes(function: Callable[..., None]) -> Callable[..., None]:
    """A command that joins the process group that torchrun, srun or mpirun announces."""

    @functools.wraps(function)
    def command(*args: Any, **flags: Any) -> None:
        if announced() is None:  # wrong usage is told before torch is loaded
            return function(*args, **flags)
        load_libraries()
        from collapse_probe.distributed import joined

        with joined():
            function(*args, **flags)

    return command


def command_line() -> str:
    """The command as it was typed."""
    context = click.get_current_context(silent=True)
    words = None if context is None else context.find_root().obj
    from collapse_probe.provenance import escaped

    return escaped(shlex.join(["collapse-probe", *(sys.argv[1:] if words is None else words)]))


class FlagLoader(yaml.SafeLoader):
    """Reads YAML without aliases, a few of which can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node; an alias is refused."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name); write its value in its place")
        return super().compose_node(parent, index)


def read_flags(path: str) -> dict[Any, Any]:
    """The mapping in a small YAML file; ValueError for anything else."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError("it is no ordinary file")
    with Path(path).open("rb") as stream:
        content = stream.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise ValueError(f"it has more than {LARGEST_CONFIG} bytes")
    flags = yaml.load(content.decode("utf-8"), FlagLoader) or {}
    if not isinstance(flags, dict):
        raise ValueError("it holds no mapping of flags to values")
    return flags


def value_for(option: click.Parameter, value: Any) -> Any:
    """`value` as the default of an option; ValueError where it is of another type than the command line takes."""
    repeatable = option.multiple if isinstance(option, click.Option) else False
    if repeatable and isinstance(value, list):
        return [one_value(option, each) for each in value]
    return [one_value(option, value)] if repeatable else one_value(option, value)


def one_value(option: click.Parameter, value: Any) -> Any:
    """The same for one value of an option that may be repeated."""
    kinds: dict[Any, Any] = {click.IntRange: (int, "a whole number"), click.FloatRange: ((int, float), "a number")}
    wanted, noun = kinds.get(type(option.type), ((str, int, float), "a text"))
    if option.type is click.INT or getattr(option, "count", False):
        wanted, noun = int, "a whole number"
    elif getattr(option, "is_flag", False):
        wanted, noun = bool, "true or false"
    elif isinstance(option.type, ImageSize) and isinstance(value, list):
        return value
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"expected {noun}, came {str(value)[:60]!r} ({type(value).__name__})")
    return value


def configuration(ctx: click.Context, parameter: click.Parameter, path: str | None) -> None:
    """Defaults from a YAML file; flags on the command line override them."""
    if path is None:
        return
    try:
        content = read_flags(path)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise click.BadParameter(f"{path} cannot be read as YAML: {' '.join(str(error).split())}", ctx, parameter) from error
    options = {name.lstrip("-"): p for p in ctx.command.params for name in p.opts if name.startswith("--")}
    defaults = {}
    for key, value in content.items():
        flag = str(key).replace("_", "-")
        if flag not in options or flag == "config":
            raise click.BadParameter(f"{path} sets {str(key)[:60]!r}, which is no flag of this command", ctx, parameter)
        if flag == "json" and value is False:
            continue
        if flag == "json" and value is True and isinstance(options[flag].type, click.Choice):
            value = "summary"  # as on the command line, where it may stand alone
        if flag == "model-kwargs" and isinstance(value, dict):
            value = [f"{k}={v!r}" for k, v in value.items()]
        try:
            defaults[options[flag].name] = value_for(options[flag], value)
        except ValueError as error:
            raise click.BadParameter(f"{path}: {flag}: {error}", ctx, parameter) from error
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


def levels_of_metrics() -> dict[str, str]:
    """The level of every metric by name; of those that ship it is where their files lie, so that nothing heavy is imported."""
    from collapse_probe.registry import METRICS

    if METRICS.has_entry_points:
        return {name: metric.level for name, metric in METRICS.items()}
    folders = {level: importlib.import_module(f"{METRICS.package}.{level}") for level in ("attention", "tokens", "weights")}
    ours = {m.name.replace("_", "-"): level for level, folder in folders.items() for m in pkgutil.iter_modules(folder.__path__)}
    return ours | {name: metric.level for name, metric in METRICS.entered.items()}


def check_metrics(levels: Sequence[str], presets: Sequence[str], metrics: Sequence[str], data: str | None) -> None:
    """Raise UnknownNameError for metrics and presets that there are not; wrong usage where they need images and have none."""
    from collapse_probe.metrics.presets import PAPERS
    from collapse_probe.registry import PRESETS

    known = levels_of_metrics()
    packs = PRESETS if PRESETS.has_entry_points else {**{paper.name: paper for paper in PAPERS}, **PRESETS.entered}
    for noun, names, there in (("metric", metrics, known), ("preset", presets, packs)):
        for name in (name for name in names if name.partition("@")[0] not in there):
            near = difflib.get_close_matches(name, there, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(there)}"
            raise UnknownNameError(f"no {noun} called {name!r}; {hint}")
    names = [*metrics, *(name for preset in presets for name in packs[preset].metrics)]
    names += [name for name, level in known.items() if "all" in levels or level in levels]
    on_images = [name for name in names if known[name.partition("@")[0]] != "weights"]
    if data is None and (on_images or not names):
        why = f"{on_images[0]} needs images" if on_images else "the default metrics need images"
        raise click.UsageError(f"Missing option '--data': {why}; only `--level weights` and metrics of the weights do without.")


def load_plugins(ctx: click.Context, parameter: click.Parameter, addresses: tuple[str, ...]) -> None:
    """Load plug-ins before any other flag is used."""
    if addresses and not ctx.resilient_parsing:
        from collapse_probe.registry import load_plugin

        for address in addresses:
            load_plugin(address)


def _all(*options: Decorator) -> Decorator:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def count(*names: str, least: int, default: int | None = None, says: str | None = None) -> Decorator:
    """A flag that takes a whole number from `least` up."""
    kind = click.IntRange(min=least)
    return click.option(*names, type=kind, default=default, show_default=default is not None, metavar="N", help=says)


architecture = _all(
    click.option(
        "--checkpoint-key",
        metavar="NAME",
        help="Which weights of a checkpoint that holds several: state_dict_ema, teacher, base_encoder, …",
    ),
    click.option("--partial", is_flag=True, help="Accept a checkpoint that fits only in part."),
    click.option(
        "--pretrained/--no-pretrained",
        default=None,
        help="Published or fresh parameters.  [default: published, unless a checkpoint is given]",
    ),
    click.option("--model-kwargs", multiple=True, callback=keywords, metavar="K=V", help="Arguments of the constructor."),
    click.option("--img-size", type=ImageSize(), metavar="N|HxW", help="Side of the input [pixels], or height x width: 64x96."),
    click.option("--blocks-pattern", metavar="GLOB", help="Paths of the blocks, where they are not found: 'stages.*.*'."),
)
MODEL_HELP = "vit_b_32, timm:NAME, torchvision:NAME, hf-hub:ORG/NAME, local-dir:PATH, import:module:callable, …"
model = _all(
    click.option("-m", "--model", required=True, metavar="ADDRESS", help=MODEL_HELP),
    click.option("--checkpoint", metavar="FILE|DIR", help="Weights to load: .safetensors, .pth, .ckpt, …; a folder of one."),
    architecture,
)
DATA_HELP = "A folder of images, a .tar or .zip, a list of paths, 'photos/*.jpg', hfds/ORG/NAME, torch/NAME, bundled:photos, …"
part_of_data = _all(
    click.option("--split", metavar="NAME", help="A subfolder, or a split of the data set."),
    count("--limit", least=1, says="A seeded subset.  [default: everything]"),
    count("--max-pixels", least=1, says="The most pixels of a picture.  [default: where Pillow stops, about 179 million]"),
)


def data_address(name: str, says: str, required: bool = False) -> Decorator:
    """A flag that takes a data address."""
    return click.option(name, required=required, callback=address, metavar="ADDRESS", help=says)


data = _all(data_address("--data", DATA_HELP, required=True), part_of_data)
data_if_needed = _all(
    data_address("--data", f"{DATA_HELP}  [needed unless all metrics are of the weights]"),
    part_of_data,
)
level = click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["attention", "tokens", "weights", "all"]),
    help="Every metric of this level, beside those of --metric; weights need no data. On a CPU all of them take about seven "
    "times as long as the model's own pass over the images, the default set less than twice.  [default: a fixed set]",
)
preset = click.option(
    "--preset",
    "presets",
    multiple=True,
    metavar="NAME",
    help="The metrics of one paper, every choice fixed, beside those of --metric; see `ls presets`.",
)
running = _all(
    count("-b", "--batch-size", least=1, says="Images at a time.  [default: 64; on a GPU 256 at 224 pixels]"),
    count("-j", "--workers", least=0, says="Processes that read images ahead.  [default: what the machine has]"),
    click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."),
    click.option("--amp", is_flag=True, help="Run the model in automatic mixed precision; maps and cosines stay in float32."),
    click.option(
        "--amp-dtype",
        type=click.Choice(["float16", "bfloat16"]),
        help="The type of --amp.  [default: bfloat16 where the device has it]",
    ),
    click.option("--seed", type=int, default=0, show_default=True, metavar="N"),
    click.option(
        "--on-nonfinite",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        show_default=True,
        help="Where weights or activations are NaN or infinite: stop and name the place; or go on, leave such images out of "
        "every number, and say so first.",
    ),
)
measuring = _all(
    click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Only these metrics; see `ls metrics`."),
    count("--null-images", least=0, default=64, says="Images for the untrained copy; 0 leaves it out."),
)
surer = _all(
    count(
        "--null-seeds",
        least=1,
        default=1,
        says="Untrained copies of so many seeds: their mean is the null, their spread is stored.",
    ),
    click.option(
        "--until-ci",
        type=click.FloatRange(min=0, min_open=True),
        metavar="W",
        help="Take images in random order and stop when every headline mean's 95 % interval is within ± W (32 images or more)."
        "  [default: all images]",
    ),
)
remedies = _all(
    click.option(
        "--fix",
        "fixes",
        multiple=True,
        metavar="NAME[:K=V,…]",
        help="Put a fix into the model: at its neutral setting where it has one, or with these settings; see `ls fixes`.",
    ),
    click.option(
        "--fix-blocks",
        callback=block_numbers,
        metavar="BLOCKS",
        help="Where: 6-11, or 0,2,5-7.  [default: wherever the fix can act]",
    ),
    count(
        "--recalibrate-bn",
        least=0,
        default=0,
        says="Re-estimate BatchNorm statistics over N batches of the images first.",
    ),
)
records = count(
    "--records",
    least=1,
    default=50_000,
    says="Images of which what each says by itself is kept; of more, a random sample. Means and counts are over all.",
)
keeping = _all(
    click.option(
        "--save-every",
        type=Duration(),
        default="5m",
        show_default=True,
        metavar="TIME",
        help="Store the state of the run so often, in the output folder, for --resume.",
    ),
    click.option(
        "--max-time",
        type=Duration(),
        metavar="TIME",
        help="Store the state and stop after so long, with exit code 4, before a time limit does: 55m, 23.5h.",
    ),
    click.option("--resume", is_flag=True, help="Go on with the state of a run that was stopped, if there is one."),
)
talking = _all(
    click.option(
        "--config",
        callback=configuration,
        is_eager=True,
        expose_value=False,
        metavar="FILE",
        help="Flags from a YAML file; the command line overrides them.",
    ),
    click.option("-v", "--verbose", count=True, help="Say more; show tracebacks."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing but results and errors."),
)
plugin = click.option(
    "--plugin",
    multiple=True,
    callback=load_plugins,
    is_eager=True,
    expose_value=False,
    metavar="MODULE|FILE.py",
    help="Load metrics, sources, fixes, penalties or recipes of your own. May be given several times.",
)
output = click.option("-o", "--output", metavar="DIR", help="The output folder.")


class Command(click.Command):
    """A command whose --json may stand alone: `--json` is `--json=summary`, and takes no word that follows it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell a bare --json out, before an end of options."""
        end = args.index("--") if "--" in args else len(args)
        spelled = ["--json=summary" if word == "--json" else word for word in args[:end]]
        return super().parse_args(ctx, [*spelled, *args[end:]])


def answering(written: str = "A folder is written only with -o.") -> Decorator:
    """How a command answers: as JSON, and without a page."""
    says = "Print verdict and summary as JSON on stdout; --json=full prints every number."
    return _all(
        click.option("--json", "as_json", type=click.Choice(["summary", "full"]), metavar="[=full]", help=f"{says} {written}"),
        click.option("--no-page", is_flag=True, help="Write the numbers alone; `collapse-probe report DIR` draws their page."),
    )
