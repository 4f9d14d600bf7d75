"""How many photographs one core makes ready in a second, by whose loader, and what the faster ways change.

    python benchmarks/loading.py                 three minutes on one CPU core
    python benchmarks/loading.py --count 16 --rounds 1

JPEG files become batches of 224 × 224 pixels, with the evaluation transform of timm's ViTs (shorter side 248, bicubic,
central crop). Ways take turns; seconds are those on the processor, of one thread, the median over rounds with the lowest and
the highest. Pixels are compared with the model's own transform, in steps of 8 bits; the last column says by how much the mean
similarities, nulls and kappas of a ViT with random, sharpened weights move, at most.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from overhead import photographs
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from variants import facts, spread

import collapse_probe as cp
from collapse_probe.data.images import batches, open_set
from collapse_probe.models.loading import resolve

RESULTS = Path(__file__).parent / "results"
MODEL, BATCH = "vit_tiny_patch16_224", 64
OURS = "collapse-probe"
SIDES = ((500, 375), (2000, 1500))
CORES = 16
SHARPNESS = 6.0


class Made(Dataset[torch.Tensor]):
    """Files made ready by a function of their path."""

    def __init__(self, paths: Sequence[Path], make: Callable[[Path], torch.Tensor]) -> None:
        self.paths, self.make = paths, make

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.make(self.paths[i])


def v2_transform(config: dict[str, Any], edge: int) -> Any:
    """The evaluation transform by torchvision.transforms.v2, for pictures or tensors of 8 bits."""
    side = config["input_size"][-1]
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(edge, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(side),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(config["mean"], config["std"]),
        ]
    )


def drafted(path: Path, edge: int, transform: Any) -> torch.Tensor:
    """A picture that the JPEG decoder itself makes smaller, by 2, 4 or 8, as far as the resize leaves room."""
    picture = Image.open(path)
    scale = edge / min(picture.size)
    picture.draft("RGB", (math.ceil(picture.width * scale), math.ceil(picture.height * scale)))
    made: torch.Tensor = transform(picture.convert("RGB"))
    return made


def ways(folder: Path) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Functions that make all the files of a folder ready, in batches [B, 3, height, width]."""
    images, paths = open_set(folder), sorted(folder.rglob("*.jpg"))
    preprocess = resolve(f"timm:{MODEL}", pretrained=False).preprocess
    config, edge, own = (
        timm.data.resolve_data_config({}, model=timm.create_model(MODEL)),
        preprocess.description["resize"],
        preprocess.transform,
    )
    on_tensors = v2_transform(config, edge)
    makers: dict[str, Callable[[Path], torch.Tensor]] = {
        "Pillow, timm's transform, DataLoader": lambda path: own(Image.open(path).convert("RGB")),
        "Pillow, torchvision.transforms.v2": lambda path: on_tensors(
            v2.functional.pil_to_tensor(Image.open(path).convert("RGB"))
        ),
        "torchvision's decode_jpeg, transforms.v2": lambda path: on_tensors(
            torchvision.io.decode_jpeg(torchvision.io.read_file(str(path)))
        ),
        "Pillow's draft, timm's transform": lambda path: drafted(path, edge, own),
    }
    timms = timm.data.create_loader(
        timm.data.create_dataset("folder", str(folder)),
        config["input_size"],
        BATCH,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        **{name: config[name] for name in ("interpolation", "mean", "std", "crop_pct")},
    )
    return {
        OURS: lambda: [batch.pixels for batch in batches(images, preprocess, batch_size=BATCH)],
        "timm's create_loader": lambda: [pixels for pixels, _ in timms],
        **{
            name: functools.partial(lambda make: [*DataLoader(Made(paths, make), BATCH)], make) for name, make in makers.items()
        },
    }


def steps(folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds an image of each step of the model's own transform."""
    files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]
    transform = resolve(f"timm:{MODEL}", pretrained=False).preprocess.transform
    values: list[Any] = files
    found = {}
    for name, step in [
        ("decode", lambda data: Image.open(io.BytesIO(data)).convert("RGB")),
        *((type(each).__name__, each) for each in transform.transforms),
    ]:
        taken = []
        for _ in range(rounds):
            start = time.process_time()
            made = [step(value) for value in values]
            taken.append(time.process_time() - start)
        found[name], values = 1000 * statistics.median(taken) / len(files), made
    return found


def summary(pixels: torch.Tensor) -> dict[str, Any]:
    """What `analyze` says of a ViT with sharpened random weights on these pixels."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data[: 2 * model.embed_dim] *= SHARPNESS
    return cp.analyze(model, pixels, null_images=0, gallery_images=0, batch_size=BATCH).summary


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    """Rows by way: seconds an image, and how its pixels and the summary differ from the model's own transform."""
    jobs, seconds, pixels = ways(folder), dict[str, list[float]](), dict[str, torch.Tensor]()
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            start = time.process_time()
            made = job()
            taken = time.process_time() - start
            pixels[name] = torch.cat(made)
            if turn:  # the first time kernels are chosen and files come from the disk
                seconds.setdefault(name, []).append(taken / len(pixels[name]))
    std = 1 / torch.tensor(timm.data.resolve_data_config({}, model=timm.create_model(MODEL))["std"]).view(3, 1, 1) / 255
    base, of_base, rows = pixels[OURS], summary(pixels[OURS]), {}
    for name, each in seconds.items():
        off = ((pixels[name] - base).abs() / std).round()
        moved = [abs(b - of_base[key]) for key, b in summary(pixels[name]).items() if key.endswith("_adjacent")]
        rows[name] = {
            "seconds": spread(each),
            "images_per_second": 1 / statistics.median(each),
            "values_that_differ": float((off > 0).float().mean()),
            "largest_step": int(off.max()),
            "summary_moves": max(moved),
        }
    return rows


def main() -> None:
    """Measure both sizes, print the tables and store them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=128, help="photographs of 500 × 375; of the larger ones an eighth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="the JSON file; in benchmarks/results by default")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {**facts(torch.device("cpu")), "sizes": {}}
    with tempfile.TemporaryDirectory() as place:
        for sides in SIDES:
            folder = Path(place) / f"{sides[0]}" / "photographs"
            folder.mkdir(parents=True)
            photographs(folder, asked.count if sides == SIDES[0] else max(asked.count // 8, 2))
            for path in folder.glob("*.jpg") if sides != SIDES[0] else ():
                Image.open(path).resize(sides, Image.Resampling.BICUBIC).save(path, quality=90)
            rows = measured(folder.parent, asked.rounds)
            report["sizes"][f"{sides[0]}x{sides[1]}"] = {"ways": rows, "steps_ms": steps(folder, asked.rounds)}
            print(f"{sides[0]} × {sides[1]} pixels")
            print(
                f"  {'':<42} {'ms an image':<22} {'a second':>8} {f'× {CORES}':>8}  {'values differ':>13}  steps  summary moves"
            )
            for name, row in rows.items():
                each = row["seconds"]
                taken = f"{1000 * each['median']:5.2f} ({1000 * each['low']:.2f} to {1000 * each['high']:.2f})"
                rate, changed = row["images_per_second"], f"{100 * row['values_that_differ']:.3f} %"
                print(
                    f"  {name:<42} {taken:<22} {rate:8.0f} {CORES * rate:8.0f}  {changed:>13}  {row['largest_step']:>5}"
                    f"  {row['summary_moves']:.1e}"
                )
            print(
                "  steps, ms:",
                ", ".join(f"{name} {ms:.2f}" for name, ms in report["sizes"][f"{sides[0]}x{sides[1]}"]["steps_ms"].items()),
            )
    target = asked.output or RESULTS / f"loading-{report['date']}-cpu.json"
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
