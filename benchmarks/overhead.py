"""What listening and analysing cost beside the plain forward pass, what is the least it could, and what others' ways cost.

    python benchmarks/overhead.py                          about ten minutes on two CPU cores
    python benchmarks/overhead.py --quick                  one minute: a rough look
    python benchmarks/overhead.py --models S/16@1024 L/16@384 --no-process
    python benchmarks/overhead.py --device cuda --dtypes bfloat16 --models B/16 S/16

In a row stand a variant's seconds an image and their ratio to those of the plain pass on the same batch: the median over rounds
and, in brackets, the lowest and the highest. Variants take turns batch by batch, so that a busy machine slows all alike. On a
CPU the ratio is of seconds on the processor, which other programs change little, with that of the wall beside it; on a GPU of
the wall's, after the GPU is done. Peak memory is that of a process of its own for every figure.

"neighbours alone" is neighbour-similarity, "default analysis" the default set of metrics with its nulls, "everything" every
metric that hears images with those of every preset, each once; "ends included" adds what the last numbers and intervals take.
The floor is what arithmetic alone asks for: see subjects.py. "whole process" is `analyze` as a command, page included, beside a
script that loads and runs the same photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from subjects import CASES, Case, floor
from variants import (
    CAPTURE,
    DEFAULT,
    EVERYTHING,
    NEIGHBOURS,
    OURS,
    PEERS,
    PLAIN,
    Variants,
    alternated,
    clock,
    facts,
    peak_bytes,
    spread,
)

RESULTS = Path(__file__).parent / "results"
MODELS = ("B/32", "S/16")
IN_MEMORY = "S/16@512"
"""Measured in memory alone where models are not named: 1,025 tokens."""
ROUNDS, EVERYTHING_ROUNDS = 6, 1
PHOTOGRAPHS, REPEATS = 512, 3
PLAIN_SCRIPT = """
import sys, timm, torch
from pathlib import Path
from PIL import Image
from torch.utils.data import DataLoader
name, folder, device, dtype = sys.argv[1:]
model = timm.create_model(name, pretrained=False).eval().to(device)
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
class Photographs(torch.utils.data.Dataset):
    paths = sorted(Path(folder).glob("*.jpg"))
    def __len__(self): return len(self.paths)
    def __getitem__(self, i): return transform(Image.open(self.paths[i]).convert("RGB"))
with torch.inference_mode(), torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
    logits = [model(batch.to(device)).float().cpu() for batch in DataLoader(Photographs(), 64, num_workers=1)]
print(len(torch.cat(logits)), "images")
"""


def times(case: Case, device: torch.device, dtype: str | None, rounds: int, with_everything: bool) -> dict[str, Any]:
    """Rows by variant: seconds an image and ratios to the plain pass, all in one alternation."""
    variants, failed, jobs = Variants(case, device, dtype), {}, {}
    for name in (*OURS, *PEERS):
        if name != EVERYTHING or with_everything:
            try:
                jobs[name] = variants.job(name)
                if name in PEERS:
                    jobs[name](torch.randn(1, 3, case.side, case.side, device=device))
            except Exception as error:  # a way of others that this model, these versions or this memory do not allow
                if name not in PEERS:
                    raise
                jobs.pop(name, None)
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    seconds = alternated(jobs, case, device, rounds, {EVERYTHING: EVERYTHING_ROUNDS})
    batch, measure = case.batch(device), 0 if device.type == "cuda" else 1
    rows: dict[str, Any] = {name: {"failed": why} for name, why in failed.items()}
    for name, each in seconds.items():
        ratios = [spread([a[i] / b[i] for a, b in zip(each, seconds[PLAIN], strict=False)]) for i in (0, 1)]
        image = [statistics.median(one[i] for one in each) / batch for i in (0, 1)]
        rows[name] = {"seconds": image[measure], "ratio": ratios[measure], "wall_seconds": image[0], "wall_ratio": ratios[0]}
    for name in (DEFAULT, EVERYTHING):
        if name in seconds:
            turns = len(seconds[name])
            start = clock(device)
            variants.finish(name)
            ends = [b - a for a, b in zip(start, clock(device), strict=True)]
            whole = [
                (sum(one[i] for one in seconds[name]) + ends[i]) / sum(one[i] for one in seconds[PLAIN][:turns]) for i in (0, 1)
            ]
            rows[f"{name}, ends included"] = {"ends_seconds": ends[measure], "images": turns * batch} | {
                "ratio": {"median": whole[measure]},
                "wall_ratio": {"median": whole[0]},
                "seconds": sum(one[measure] for one in seconds[name]) / turns / batch + ends[measure] / turns / batch,
            }
    rows["floor"] = floor(case, device, rows[PLAIN]["seconds"])
    return rows


def memory(case: Case, device: torch.device, dtype: str | None, names: list[str]) -> dict[str, Any]:
    """Peak bytes of each variant in a process of its own."""
    found: dict[str, Any] = {}
    for name in names:
        words = [sys.executable, __file__, "--peak-of", name, "--models", case.label, "--device", str(device)]
        done = subprocess.run([*words, "--dtypes", dtype or "float32"], capture_output=True, text=True)
        found[name] = {"peak_bytes": int(done.stdout)} if done.returncode == 0 else {"failed": done.stderr.strip()[-300:]}
    plain = found[PLAIN].get("peak_bytes")
    for row in found.values():
        if plain and "peak_bytes" in row:
            row["peak_ratio"] = row["peak_bytes"] / plain
    return found


def peak_of(name: str, case: Case, device: torch.device, dtype: str | None) -> int:
    """In the child process of `memory`: two batches of one variant, and its ends."""
    variants = Variants(case, device, dtype)
    job = variants.job(name)
    for _ in range(2):
        job(torch.randn(case.batch(device), 3, case.side, case.side).to(device))
    if name in variants.runs:
        variants.finish(name)
    return peak_bytes(device)


def photographs(folder: Path, count: int) -> None:
    """JPEG files of about 500 × 375 pixels, each another crop of the photographs that scikit-learn and scikit-image hold."""
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    sources = [
        Image.fromarray(pixels) for pixels in (data.astronaut(), data.coffee(), data.chelsea(), *load_sample_images().images)
    ]
    for i in range(count):
        source, turn = sources[i % len(sources)], i // len(sources)
        left, top = turn * 7 % (source.width // 3), turn * 5 % (source.height // 3)
        crop = source.crop((left, top, left + source.width * 2 // 3, top + source.height * 2 // 3))
        crop.resize((500, 375)).save(folder / f"photograph_{i:04d}.jpg", quality=90)


def whole_process(case: Case, device: torch.device, dtype: str | None, count: int, repeats: int) -> dict[str, Any]:
    """`analyze` as a command beside the plain script, in turns: seconds on the processor and of the wall, and ratios."""
    seconds: dict[str, list[tuple[float, float]]] = {"plain script": [], "analyze": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photographs"
        folder.mkdir()
        photographs(folder, count)
        on = ["--device", str(device), *(["--amp", "--amp-dtype", dtype] if dtype else [])]
        analyze = [
            sys.executable,
            "-m",
            "collapse_probe",
            "analyze",
            "-m",
            f"timm:{case.name}",
            "--no-pretrained",
            "--data",
            str(folder),
        ]
        plain = [sys.executable, "-c", PLAIN_SCRIPT, case.name, str(folder), device.type, dtype or "float32"]
        for turn in range(repeats):
            for name, words in (("plain script", plain), ("analyze", [*analyze, *on, "-o", f"{place}/findings-{turn}"])):
                start, before = time.perf_counter(), os.times()
                subprocess.run(words, check=True, capture_output=True)
                after = os.times()
                used = after.children_user + after.children_system - before.children_user - before.children_system
                seconds[name].append((time.perf_counter() - start, used))
    measure = 0 if device.type == "cuda" else 1
    ratios = [spread([a[i] / b[i] for a, b in zip(seconds["analyze"], seconds["plain script"], strict=True)]) for i in (0, 1)]
    rows: dict[str, Any] = {"photographs": count, "ratio": ratios[measure], "wall_ratio": ratios[0]}
    for name, each in seconds.items():
        rows[name] = {
            "seconds": statistics.median(one[measure] for one in each),
            "wall_seconds": statistics.median(one[0] for one in each),
        }
    return rows


def shown(ratio: dict[str, float]) -> str:
    """A ratio with its spread."""
    around = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if "low" in ratio else ""
    return f"{ratio['median']:5.2f}{around}"


def table(title: str, times: dict[str, Any], memory: dict[str, Any]) -> list[str]:
    """Lines of one model's table."""
    lines = [title, f"  {'':<34} {'ms an image':>11}  {'× plain':<22} {'× plain, wall':<22} {'peak MiB':>8}  × plain"]
    for name in dict.fromkeys((*times, *memory)):
        row = times.get(name, {}) | memory.get(name, {})
        if name == "floor":
            lines.append(f"  {'floor, by ' + row['by']:<34} {'':>11}  {row['ratio']:5.2f}")
        elif "failed" in row and "seconds" not in row:
            lines.append(f"  {name:<34} fails: {row['failed']}")
        else:
            time_cells = (
                f"{row['seconds'] * 1e3:11.2f}  {shown(row['ratio']):<22} {shown(row['wall_ratio']):<22}"
                if "ratio" in row
                else f"{'':58}"
            )
            peak = f"{row['peak_bytes'] / 2**20:8.0f}  {row['peak_ratio']:.2f}" if "peak_ratio" in row else ""
            lines.append(f"  {name:<34} {time_cells} {peak}".rstrip())
    return lines


def say(*lines: str) -> None:
    """Print at once."""
    print("\n".join(lines), flush=True)


def main() -> None:
    """Run, print the table, store it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--models", nargs="+", choices=CASES, help=f"default: {', '.join(MODELS)}, and {IN_MEMORY} in memory")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="pairs of whole processes")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one minute: ViT-B/32 alone, two rounds, 32 photographs, neither everything nor memory",
    )
    parser.add_argument("--no-everything", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-process", action="store_true")
    parser.add_argument("--store", action="store_true", help="keep the numbers under benchmarks/results")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, dtypes = torch.device(args.device), [None if dtype == "float32" else dtype for dtype in args.dtypes]
    if args.peak_of:
        say(str(peak_of(args.peak_of, CASES[args.models[0]], device, dtypes[0])))
        return
    if args.quick:
        args.no_everything = args.no_memory = True
    models = args.models or (MODELS[:1] if args.quick else MODELS)
    rounds, count, repeats = (2, 32, 1) if args.quick else (args.rounds, args.photographs, args.repeats)
    found: dict[str, Any] = {**facts(device), "device": device.type, "rounds": rounds, "tables": []}
    about = [
        f"{package} {version}"
        for package, version in found["versions"].items()
        if package in ("python", "torch", "timm", "numpy")
    ]
    say(f"{found['date']}, {found['machine']}, {found['threads']} threads; {', '.join(about)}")
    for label in models:
        case = CASES[label]
        for dtype in dtypes:
            rows = times(case, device, dtype, rounds, not args.no_everything)
            peaks = (
                {}
                if args.no_memory or args.quick
                else memory(case, device, dtype, [PLAIN, CAPTURE, NEIGHBOURS, DEFAULT, *PEERS])
            )
            batch = case.batch(device)
            images = f"{rounds} rounds, {rounds * batch} images"
            title = f"\n{label} ({case.name}), {device.type} {dtype or 'float32'}, batch {batch}, {images}"
            say(*table(title, rows, peaks))
            found["tables"].append(
                {"model": label, "dtype": dtype or "float32", "batch": batch, "times": rows, "memory": peaks}
            )
    if not args.models and not args.no_memory:
        case = CASES[IN_MEMORY]
        peaks = memory(case, device, dtypes[0], [PLAIN, CAPTURE, NEIGHBOURS, DEFAULT, *PEERS])
        say(*table(f"\n{case.label}, 1,025 tokens, batch {case.batch(device)}: memory alone", {}, peaks))
        found["tables"].append({"model": case.label, "dtype": args.dtypes[0], "batch": case.batch(device), "memory": peaks})
    if not args.no_process:
        for dtype in dtypes:
            row = whole_process(CASES[models[0]], device, dtype, count, repeats)
            found["whole process"] = {"model": models[0], "dtype": dtype or "float32", **row}
            each = [
                f"{name} {row[name]['seconds']:.1f} s (wall {row[name]['wall_seconds']:.1f})"
                for name in ("plain script", "analyze")
            ]
            say(f"\nwhole process, {models[0]}, {count} photographs, {repeats} pairs: {', '.join(each)}")
            say(f"  {shown(row['ratio'])} × plain; wall {shown(row['wall_ratio'])}")
    if args.store:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"overhead-{found['date']}-{device.type}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        say(f"stored {path}")


if __name__ == "__main__":
    main()
