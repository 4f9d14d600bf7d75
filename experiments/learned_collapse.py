"""Does learned collapse appear in an ordinary deep ViT trained from scratch? Data and recipe of docs/learned-collapse.md.

    python experiments/learned_collapse.py crops crops/
    python experiments/learned_collapse.py train crops/ runs/mhsa-0 --depth 24 --seed 0 --steps 4000
    python experiments/learned_collapse.py train crops/ runs/re-attention-0 --depth 24 --fix re-attention --seed 0 --steps 4000
    collapse-probe compare runs/mhsa-0/collapse -o mhsa-over-training

The crops are 64 pixels wide, of the photographs that come with scikit-image and scikit-learn. Training crops come from the left
seven tenths of each photograph, held-out ones from the right quarter: no pixel is in both. The task is to tell the photograph.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

from collapse_probe.data.readers import photographs
from collapse_probe.models.vit import ViTSettings
from collapse_probe.training.recipe import Augmentation, Recipe
from collapse_probe.training.trainer import train

SIDE, TRAIN, HELD_OUT = 64, 400, 40
SCALES = (64, 160)  # width of a crop in the photograph before it is scaled to SIDE, pixels


def write_crops(folder: Path) -> None:
    """FOLDER/train and FOLDER/val with a folder for each photograph."""
    for name, pixels in photographs():
        picture = Image.fromarray(pixels).convert("RGB")
        width, height = picture.size
        parts = {"train": (0, int(0.7 * width), TRAIN), "val": (int(0.75 * width), width, HELD_OUT)}
        for split, (left, right, count) in parts.items():
            inside = folder / split / name
            inside.mkdir(parents=True, exist_ok=True)
            draw = random.Random(f"{name}/{split}")
            for number in range(count):
                side = min(draw.randint(*SCALES), right - left, height)
                x, y = draw.randint(left, right - side), draw.randint(0, height - side)
                crop = picture.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                crop.save(inside / f"{number:04d}.png")


def recipe(depth: int, fix: str | None, seed: int, steps: int, every: int) -> Recipe:
    """An ordinary ViT as DeiT and DeepViT begin it (truncated normal, standard deviation 0.02 of width 384 scaled to 64)."""
    width = 64
    std = 0.02 * (768 / width) ** 0.5
    made = Recipe(
        name=f"crops-{depth}-{fix or 'mhsa'}",
        about=f"{depth} blocks on 64-pixel crops of photographs",
        model=ViTSettings(
            image_size=SIDE, patch_size=8, classes=13, depth=depth, width=width, heads=4, mlp_ratio=3.0, init_std=std
        ),
        embedding_std=std,
        betas=(0.9, 0.98),
        lr=1e-3,
        weight_decay=0.05,
        clip=1.0,
        steps=steps,
        warmup=steps // 20,
        batch_size=32,
        label_smoothing=0.1,
        augmentation=Augmentation(shift=4, contrast=0.3, noise=0.05, flip=True),
        recalibrate=0 if fix is None else 20,
        seed=seed,
        evaluate_every=every,
        monitor_every=every,
        monitor_images=64,
        checkpoint_every=500,
    )
    return made.vary(fix=fix)


def main() -> None:
    """Write the crops, or train one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("crops").add_argument("folder", type=Path)
    training = commands.add_parser("train")
    training.add_argument("data")
    training.add_argument("output", type=Path)
    training.add_argument("--depth", type=int, default=24)
    training.add_argument("--fix")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--steps", type=int, default=4000)
    training.add_argument("--every", type=int, default=500)
    training.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.command == "crops":
        write_crops(args.folder)
        return
    made = recipe(args.depth, args.fix, args.seed, args.steps, args.every)
    trained = train(made, args.data, args.output, resume=args.resume)
    print(f"{made.name} seed {args.seed}: accuracy {trained.accuracy:.2%} after {trained.steps} steps, {trained.seconds:.0f} s")


if __name__ == "__main__":
    main()
