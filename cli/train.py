"""`collapse-probe train`: a recipe on a data set, into one output folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from collapse_probe.cli import options
from collapse_probe.cli.fail_on import TRIPPED, thresholds

from collapse_probe.training.logs.log import KINDS

INTERRUPTED = 130


def _penalties(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> dict[str, float]:
    """NAME=COEF words as a dictionary."""
    coefficients = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            coefficients[name] = float(text)
        except ValueError as error:
            raise click.BadParameter(f"expected NAME=COEF, came {word!r}", ctx, parameter) from error
    return coefficients


TRAINING = (
    options.data_address("--data", "Labelled images to train on.  [default: the recipe's own]"),
    options.data_address("--val-data", "Held-out images, where they do not lie in DATA/val."),
    options.output,
    click.option(
        "--set",
        "changes",
        multiple=True,
        callback=options.keywords,
        metavar="FIELD=VALUE",
        help="Change the recipe or its model: lr=5e-4, depth=32, batch_size=64, …",
    ),
    click.option(
        "--steps", type=click.IntRange(min=1), metavar="N", help="Another length; warm-up and cooldown keep their shares."
    ),
    click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:N or mps."),
    click.option("--amp", is_flag=True, help="Train in automatic mixed precision."),
    click.option("--amp-dtype", type=click.Choice(["float16", "bfloat16"]), default="bfloat16", show_default=True),
    click.option("--dry-run", is_flag=True, help="Say what would be trained and what it will cost; train nothing."),
    options.plugin,
    options.talking,
)


def training(function: Any) -> Any:
    """The flags that `train` and `sweep` share."""
    for option in reversed(TRAINING):
        function = option(function)
    return function


@click.command("train", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", metavar="RECIPE")
@click.option("--fix", "fixes", multiple=True, metavar="NAME[:K=V,…]", help="Put a fix into the model; see `ls fixes`.")
@click.option(
    "--penalty",
    "penalties",
    multiple=True,
    callback=_penalties,
    metavar="NAME=COEF",
    help="Add to the loss; see `ls penalties`.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Of the weights, the order, the augmentation.")
@click.option("-j", "--workers", type=click.IntRange(min=0), metavar="N", help="Processes that read images.")
@click.option(
    "--monitor-every", type=click.IntRange(min=0), metavar="N", help="Measure collapse every N steps, on a few images."
)
@click.option(
    "--alarm",
    multiple=True,
    metavar="'NAME OP NUMBER'",
    help="Stop with exit code 3 where this holds of what --monitor-every measures, or is undefined: "
    "'attention_entropy_share < 0.05'. The last model before is kept. May be given several times.",
)
@click.option(
    "--log",
    "logs",
    multiple=True,
    type=click.Choice(list(KINDS)),
    help="Where curves and heatmaps go; may be given several times.  [default: tensorboard, where it is installed]",
)
@click.option("--stop-after", type=click.IntRange(min=1), metavar="N", help="End after N steps in all; --resume goes on.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the output folder.")
@training
def command(quiet: bool, verbose: int, **flags: Any) -> None:
    """Train RECIPE (see `ls recipes`) on labelled images, with any fixes and penalties.

    Writes model.safetensors, which `analyze -m` and `compare` read, with training.json, checkpoints and
    logs. Works under torchrun and accelerate launch.
    """
    options.across_processes(run)(quiet=quiet, **flags)


def run(
    *,
    recipe: str,
    data: str | None,
    val_data: str | None,
    output: str | None,
    device: str,
    resume: bool,
    stop_after: int | None,
    alarm: tuple[str, ...],
    logs: tuple[str, ...],
    dry_run: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Make the recipe, train it, print how it ended."""
    thresholds(alarm, "train", "--alarm")
    options.load_libraries()
    from collapse_probe.cli.console import Talk
    from collapse_probe.cli.options import command_line

    from collapse_probe.analysis.state.phases import TRAINING
    from collapse_probe.distributed import rank_and_world
    from collapse_probe.errors import AlarmError, SettingError
    from collapse_probe.files import check_writable
    from collapse_probe.training.trainer import train

    changed = changed_recipe(recipe, **flags)
    address = data or changed.data
    if dry_run:
        click.echo(costs(changed, address, device))
        return
    if not address:
        raise SettingError(f"the recipe {recipe} has no data of its own; name a data set with --data")
    folder = Path(output or Path("runs") / changed.name)
    check_writable(folder)
    talk = Talk(quiet)
    talk.say(f"recipe {changed.name} on {address}, into {folder}")
    try:
        with talk.stages(TRAINING), talk.bar(None if changed.steps is None else changed.steps * changed.batch_size) as progress:
            trained = train(
                changed,
                address,
                folder,
                val_data=val_data,
                device=device,
                resume=resume,
                progress=progress,
                report=talk.say,
                stop_after=stop_after,
                command=command_line(),
                alarm=alarm,
                logs=logs,
            )
    except KeyboardInterrupt:
        click.echo(f"interrupted; --resume -o {folder} goes on from the last checkpoint", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except AlarmError as error:
        if rank_and_world()[0] == 0:
            click.echo(str(error), err=True)
        raise click.exceptions.Exit(TRIPPED) from None
    if rank_and_world()[0] > 0:
        return
    if not trained.finished:
        click.echo(f"stopped after step {trained.steps}, as asked; --resume goes on from {trained.checkpoint}")
        return
    click.echo(
        f"{trained.accuracy:.2%} of the held-out images right, loss {trained.loss:.4f}, "
        f"after {trained.steps} steps and {trained.seconds:.0f} s\nmodel: {trained.model}"
    )


def changed_recipe(
    name: str,
    *,
    fixes: tuple[str, ...],
    penalties: dict[str, float],
    changes: dict[str, Any],
    amp: bool,
    amp_dtype: str,
    **numbers: int | None,
) -> Any:
    """The recipe of that name as the flags change it; UnknownNameError and SettingError for what there is not."""
    from collapse_probe.registry import RECIPES

    recipe = RECIPES[name]()
    changes |= {key: value for key, value in numbers.items() if value is not None}
    changes |= {"fix": list(fixes)} if fixes else {}
    changes |= {"amp": amp_dtype} if amp else {}
    if penalties:
        changes["penalty"] = {**{key: weight for key, (weight, _) in recipe.penalties.items()}, **penalties}
    return recipe.vary(**changes)


def costs(recipe: Any, data: str, device: str) -> str:
    """The recipe and its forecast, as text."""
    from collapse_probe.training.forecast import forecast

    cost = forecast(recipe, device=device)
    unknown = "not known: the number of training images decides"
    memory = [f"{_size(count)}" for count in (cost.memory_bytes, cost.state_bytes, cost.activation_bytes)]
    lines = {
        "data": data or "–",
        "parameters": f"{cost.parameters:,}",
        "one image": "cannot be counted" if cost.flops is None else f"{cost.flops / 1e9:.4g} GFLOP forwards",
        "steps": unknown if cost.steps is None else f"{cost.steps:,} ({cost.images:,} images)",
        "whole run": unknown if cost.total_flops is None else f"{cost.total_flops:.3g} floating-point operations",
        "memory": f"{memory[0]}: {memory[1]} held, {memory[2]} an image",
        "speed": f"{cost.images_per_second:.4g} images/s, tried with {cost.trial_images} on {cost.device}",
        "expected time": unknown if cost.seconds is None else f"{duration(cost.seconds)} in one process on {cost.device}",
    }
    return "\n".join([json.dumps(recipe.to_json(), indent=2), "", *(f"{name:<22} {line}" for name, line in lines.items())])


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them.

    >>> duration(90), duration(3000), duration(90000)
    ('90 s', '50 min', '25 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
