"""Resident memory against the number of images: a Probe over synthetic images, each number in a process of its own.

    python benchmarks/memory.py                          1 thousand, 100 thousand and 1 million images; a few minutes
    python benchmarks/memory.py --images 1000 5000       other numbers

The model is so small that images are the work. "peak" is the most resident memory that the process ever had, findings
included, "start" what it had after its first batch: torch, timm and the model. Written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

import collapse_probe as cp
from collapse_probe.models.vit import ViT
from collapse_probe.provenance import versions

BATCH = 1000
RESULTS = Path(__file__).parent / "results"


def resident(line: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(each.split()[1]) * 1024 for each in status.splitlines() if each.startswith(line))


def measured(images: int, records: int) -> dict[str, float]:
    """One process: what a Probe over so many images takes."""
    torch.manual_seed(0)
    model = ViT(image_size=16, patch_size=8, classes=2, width=8, depth=3, heads=2).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)  # maps that are not uniform
    probe, start, generator = (
        cp.Probe(model, device="cpu", records=records),
        time.perf_counter(),
        torch.Generator().manual_seed(1),
    )
    first = 0
    for begin in range(0, images, BATCH):
        count = min(BATCH, images - begin)
        pixels = torch.randn(count, 3, 16, 16, generator=generator)
        probe.update(pixels, [f"{begin + i:09d}.png" for i in range(count)])
        first = first or resident("VmRSS")
    before = resident("VmHWM")
    findings = probe.findings()
    peak = resident("VmHWM")
    tensors = [value for value in probe.state_dict().values() if isinstance(value, torch.Tensor)]
    assert findings.summary["images"] == images
    return {
        "images": images,
        "seconds": round(time.perf_counter() - start, 1),
        "start_bytes": first,
        "peak_of_pass_bytes": before,
        "peak_bytes": peak,
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "kappa_adjacent": findings.summary["kappa_adjacent"],
    }


def main() -> None:
    """Print and store a row for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        sys.stdout.write(json.dumps(measured(asked.one, asked.records)))
        return
    rows = []
    for images in asked.images:
        words = [sys.executable, __file__, "--one", str(images), "--records", str(asked.records)]
        rows.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
        row = {key: f"{value / 2**20:.1f} MiB" if key.endswith("bytes") else value for key, value in rows[-1].items()}
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
    command = " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]])
    facts = {"command": command, "date": date.today().isoformat(), "machine": platform.processor() or platform.machine()}
    (RESULTS / f"memory-{asked.records}-records.json").write_text(
        json.dumps({**facts, "records": asked.records, "versions": versions(), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
