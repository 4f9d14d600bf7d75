"""Every check that needs a GPU, in one call of at most eight minutes, and small ones of the same kind on a CPU.

    python benchmarks/gpu.py --out gpu.json                all parts, on the GPU where there is one
    python benchmarks/gpu.py --parts prices profile        some of them

It runs from a checkout; torch, timm, NumPy, SciPy and what else the analysis itself imports must be installed, and a package
that is missing is named first. No network is used. Every part is a process of its own with a time limit, and what it found
until then is kept, so that one that fails or hangs takes nothing from the others.

    environment   the machine, the software, what is missing; matrix products and copies for scale
    equality      logits bit for bit with and without listening; kernels heard, and what logsumexp they gave
    errors        numbers in float32, TF32, float16 and bfloat16 against float64 of the same queries and keys
    prices        seconds of plain, capture and default analysis in turns, with the floor
    profile       the operators that the default analysis spends its time in
    memory        peaks of plain and default analysis at 1,025 and 4,097 tokens
    exhaustion    a run that is short of memory against one that is not
    tests         the suite's tests that are marked gpu
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
NEEDED = ("torch", "torchvision", "timm", "numpy", "scipy", "pandas", "safetensors", "PIL", "yaml")
BESIDES = (
    "matplotlib",
    "seaborn",
    "click",
    "jinja2",
    "rich",
    "pytest",
    "pytest_timeout",
    "hypothesis",
    "transformers",
    "triton",
)
TOTAL = 470
"""Seconds that all parts may take."""

Note = Callable[[str, Any], None]


def environment(device: Any, note: Note) -> None:
    """The machine, the software, and how fast the plainest things are here."""
    import torch
    from variants import facts

    note("facts", facts(device))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        note("gpu", {"memory": properties.total_memory, "multiprocessors": properties.multi_processor_count})
        note("cuda", {"version": torch.version.cuda, "capability": torch.cuda.get_device_capability(device)})
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = best_seconds(lambda: a @ a, device)
    note("product", {"size": size, "dtype": str(dtype), "teraflops": 2 * size**3 / seconds / 1e12})
    b = torch.empty(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    note("copy", {"terabytes_per_second": 2 * b.numel() / best_seconds(b.clone, device) / 1e12})


def best_seconds(job: Callable[[], object], device: Any, runs: int = 5) -> float:
    """The fewest seconds of some runs, after two that are not counted."""
    from variants import clock

    found = []
    for _ in range(runs + 2):
        start = clock(device)[0]
        job()
        found.append(clock(device)[0] - start)
    return min(found[2:])


def cases(device: Any, *labels: str) -> list[Any]:
    """The models called so; the smallest alone where there is no GPU."""
    from subjects import CASES

    return [CASES[label] for label in labels] if device.type == "cuda" else [CASES["tiny"]]


def equality(device: Any, note: Note) -> None:
    """Whether listening changes a bit of the output, in models of each dtype and under autocast, and what was heard."""
    import torch
    from subjects import make_model

    from collapse_probe.capture.capture import discover_plan, record
    from collapse_probe.devices import autocast

    for case in cases(device, "B/16", "S/16", "L/16@384", "S/16@1024", "DeepViT-L"):
        images = torch.randn(2 if case.side > 512 else 5, 3, case.side, case.side, device=device)
        for name in ("float32", "tf32", "float16", "bfloat16", "autocast float16", "autocast bfloat16"):
            if device.type == "cpu" and name in ("tf32", "autocast float16"):
                continue
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
            amp = name.removeprefix("autocast ") if name.startswith("autocast") else None
            dtype = torch.float32 if amp or name == "tf32" else getattr(torch, name)
            model, pixels = make_model(case, device).to(dtype), images.to(dtype)
            with torch.no_grad(), autocast(device, amp):
                before = model(pixels)
                plan = discover_plan(model, (case.side, case.side))
                with record(model, plan) as recordings:
                    after = model(pixels)
                first = recordings.take().attention[0]
            sums = None if first.logsumexp is None else [list(first.logsumexp.shape), str(first.logsumexp.dtype)]
            check = {key: getattr(plan.check, key) for key in ("row_sum", "output", "logsumexp")}
            note(
                f"{case.label} {name}",
                {
                    "equal": bool(torch.equal(before, after)),
                    "operation": first.operation,
                    "logsumexp": sums,
                    "captured": None if first.q is None else [list(first.q.shape), str(first.q.dtype)],
                    "self_check": check,
                },
            )


def errors(device: Any, note: Note) -> None:
    """How far the numbers are from those that float64 gives for the same queries and keys, for maps of three sharpnesses."""
    import numpy as np
    import torch
    from subjects import make_model
    from variants import DEFAULT, Variants

    from collapse_probe.capture.capture import record
    from collapse_probe.devices import autocast

    for case in cases(device, "B/16", "S/16"):
        case = replace(case, cuda_batch=8, cpu_batch=4)
        for sharpness, factor in (("near-uniform", 0.05), ("ordinary", 1.0), ("peaked", 4.0)):
            for name in ("float32", "tf32", "float16", "bfloat16"):
                if device.type == "cpu" and name in ("tf32", "float16"):
                    continue
                torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
                amp = name if name.endswith("16") else None
                variants = Variants(case, device, amp)
                variants._model = make_model(case, device)
                with torch.no_grad():
                    for block in variants.model.blocks:
                        block.attn.qkv.weight *= factor
                images = torch.randn(case.batch(device), 3, case.side, case.side, device=device)
                job = variants.job(DEFAULT)
                job(images)
                run = variants.runs[DEFAULT]
                results = run.results(run.table())
                with torch.no_grad(), record(variants.model, variants.plan) as recordings, autocast(device, amp):
                    variants.model(images)
                trace = recordings.take()
                found = {}
                for metric, reference in references(trace).items():
                    values = results[metric].values
                    found[metric] = float(np.nanmax(np.abs(values - reference.mean(0).cpu().numpy())))
                    if metric.startswith("attention-similarity"):
                        single = reference.diagonal(-1, 1, 2).cpu().numpy()
                        found[f"{metric}, single images"] = float(np.abs(run.per_image(run.table())[metric] - single).max())
                note(f"{case.label} {sharpness} {name}", found)


def references(trace: Any) -> dict[str, Any]:
    """Cosines of columns, rows and centred columns, and entropies, of every image in float64 from what was captured."""
    import torch

    maps = []
    for attention in trace.attention:
        if attention.q is None:
            maps.append(attention.probs.double())
        else:
            maps.append(torch.softmax(attention.q.double() * attention.scale @ attention.k.double().mT, -1))
    A = torch.stack(maps)

    def cosines(x: Any, dim: int) -> Any:
        unit = x / x.norm(dim=dim, keepdim=True)
        return torch.stack([(one * unit).sum(dim).mean((2, 3)) for one in unit]).movedim(-1, 0)

    return {
        "attention-similarity": cosines(A, -2),
        "attention-similarity@row": cosines(A, -1),
        "attention-similarity@centred": cosines(A - A.mean(-2, keepdim=True), -2),
        "attention-entropy": -(A * A.clamp_min(1e-300).log()).sum(-1).mean(-1).movedim(1, 0),
    }


def prices(device: Any, note: Note) -> None:
    """Ratios to the plain forward pass, eager and fused, in turns on the same batches."""
    import torch
    from subjects import floor
    from variants import CAPTURE, DEFAULT, NEIGHBOURS, PLAIN, Variants, alternated, spread

    for case in cases(device, "B/16", "S/16", "L/16@384", "S/16@1024", "DeepViT-L"):
        for dtype in ("bfloat16", None) if case.label in ("S/16", "tiny") else ("bfloat16",):
            try:
                variants = Variants(case, device, dtype)
                jobs = {name: variants.job(name) for name in (PLAIN, CAPTURE, NEIGHBOURS, DEFAULT)}
                seconds = alternated(jobs, case, device, 7 if device.type == "cuda" else 1)
                batch = case.batch(device)
                row: dict[str, Any] = {"batch": batch}
                for name, each in seconds.items():
                    ratio = spread([a[0] / b[0] for a, b in zip(each, seconds[PLAIN], strict=True)])
                    row[name] = {"microseconds": spread([one[0] / batch * 1e6 for one in each]), "ratio": ratio}
                row["floor"] = floor(case, device, row[PLAIN]["microseconds"]["median"] * 1e-6)
                note(f"{case.label} {dtype or 'float32'}", row)
            except Exception as error:
                note(f"{case.label} {dtype or 'float32'}", {"failed": f"{type(error).__name__}: {error}"})
            finally:
                variants = jobs = None
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def profile(device: Any, note: Note) -> None:
    """The 25 operators with most time of their own, of plain and of the default analysis on one batch."""
    import torch
    from torch.profiler import ProfilerActivity
    from variants import DEFAULT, PLAIN, Variants

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for case in cases(device, "B/16", "S/16"):
        variants = Variants(case, device, "bfloat16")
        images = torch.randn(case.batch(device), 3, case.side, case.side, device=device)
        for name in (PLAIN, DEFAULT):
            job = variants.job(name)
            for _ in range(2):
                job(images)
            with torch.profiler.profile(activities=activities) as profiler:
                start = time.perf_counter()
                job(images)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                wall = time.perf_counter() - start
            own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, own))
            waits = {row.key: row.count for row in rows if row.key.startswith(("cudaStreamSync", "cudaMemcpy", "cudaLaunch"))}
            table = [[row.key[:110], row.count, getattr(row, own), row.self_cpu_time_total] for row in rows[:25]]
            total = sum(getattr(row, own) for row in rows)
            columns = ["name", "calls", f"{own} [µs]", "self_cpu_time_total [µs]"]
            note(
                f"{case.label} {name}",
                {"wall_seconds": wall, "total [µs]": total, "waits": waits, "columns": columns, "rows": table},
            )


def memory(device: Any, note: Note) -> None:
    """The most memory that the plain pass and the default analysis take, the model included, at 1,025 and 4,097 tokens."""
    import torch
    from variants import DEFAULT, PLAIN, Variants, peak_bytes

    for case in cases(device, "S/16@512", "S/16@1024"):
        for dtype in ("bfloat16", None):
            peaks = {}
            for name in (PLAIN, DEFAULT):
                variants = Variants(case, device, dtype)
                job = variants.job(name)
                images = torch.randn(case.batch(device), 3, case.side, case.side, device=device)
                if device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(2):
                    job(images)
                peaks[name] = peak_bytes(device)
                del variants, job, images
            note(f"{case.label} {dtype or 'float32'}", {**peaks, "ratio": peaks[DEFAULT] / peaks[PLAIN]})


def exhaustion(device: Any, note: Note) -> None:
    """The same images with all memory and with so little that the first attempt fails: the numbers and the counts."""
    import numpy as np
    import torch
    from variants import DEFAULT, Variants

    (case,) = cases(device, "S/16@512")
    images = torch.randn(case.batch(device), 3, case.side, case.side)
    found = []
    for short in (False, True):
        variants = Variants(case, device, None)
        job, run = variants.job(DEFAULT), variants.runs[DEFAULT]
        if short and device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(torch.cuda.memory_allocated() + 700 * 2**20, total) / total)
        job(images)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        found.append(run.results(run.table()))
        note("short of memory" if short else "enough memory", {"images": run.tally.images, "remarks": dict(run.tally.remarks)})
    apart = {
        name: float(np.nanmax(np.abs(one.values - found[1][name].values), initial=0.0))
        for name, one in found[0].items()
        if one.values is not None
    }
    note("difference", apart)


def tests(device: Any, note: Note) -> None:
    """The tests that are marked gpu, of the files that hold one."""
    if importlib.util.find_spec("pytest") is None:
        note("result", "pytest is not installed")
        return
    if device.type != "cuda":
        note("result", "there is no GPU")
        return
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    words = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
    if importlib.util.find_spec("pytest_timeout") is None:
        words += ["-o", "timeout=", "-W", "ignore::pytest.PytestConfigWarning"]
    done = subprocess.run([*words, "--continue-on-collection-errors", *files], cwd=ROOT, capture_output=True, text=True)
    note("files", [Path(file).name for file in files])
    note("result", {"exit": done.returncode, "output": done.stdout[-4000:]})


PARTS: dict[str, tuple[Callable[[Any, Note], None], int]] = {
    "environment": (environment, 30),
    "equality": (equality, 75),
    "prices": (prices, 150),
    "profile": (profile, 60),
    "errors": (errors, 60),
    "memory": (memory, 60),
    "exhaustion": (exhaustion, 40),
    "tests": (tests, 60),
}
"""Every part with its limit in seconds, in their order."""


def run_part(name: str, path: Path) -> None:
    """In a process of its own: one part, everything that it notes written at once."""
    import torch

    device, found = torch.device("cuda" if torch.cuda.is_available() else "cpu"), dict[str, Any]()

    def note(key: str, value: Any) -> None:
        found[key] = value
        path.write_text(json.dumps(found, default=str))
        text = json.dumps(value, default=str)
        print(f"  {key}: {text if len(text) < 600 else text[:600] + ' …'}", flush=True)

    PARTS[name][0](device, note)


def main() -> None:
    """Run the parts, one process each, and write what they found after every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "gpu.json")
    parser.add_argument("--limit", type=int, default=TOTAL, help="seconds for all parts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.out)
        return
    missing = {kind: [n for n in names if importlib.util.find_spec(n) is None] for kind, names in
               (("needed", NEEDED), ("besides", BESIDES))}  # fmt: skip
    print(f"missing: {missing}", flush=True)
    start, found = time.monotonic(), {"missing": missing, "parts": {}}
    for name in args.parts:
        limit = min(PARTS[name][1], args.limit - (time.monotonic() - start))
        place, began = args.out.with_name(f"{args.out.stem}-{name}.json"), time.monotonic()
        print(f"\n{name}", flush=True)
        place.unlink(missing_ok=True)
        outcome = "out of time before it began"
        if limit > 5:
            try:
                words = [sys.executable, __file__, "--part", name, "--out", str(place)]
                code = subprocess.run(words, timeout=limit, stderr=subprocess.PIPE, text=True)
                outcome = "done" if code.returncode == 0 else f"failed: {code.stderr[-1500:]}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit:.0f} s"
        noted = json.loads(place.read_text()) if place.exists() else {}
        place.unlink(missing_ok=True)
        found["parts"][name] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "found": noted}
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {outcome}, {found['parts'][name]['seconds']} s", flush=True)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    main()
