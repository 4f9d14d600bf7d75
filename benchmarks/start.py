"""What a run costs whatever the number of images: the time to the first output, and the whole of a run over 16 photographs.

    python benchmarks/start.py                 three minutes on two CPU cores
    python benchmarks/start.py --repeats 1

Seconds on the processor of whole processes of one thread, in turns, with those of the wall: the median and, in brackets, the
lowest and the highest. The first output is the complaint about a data address where nothing is, before which a command has
loaded all that it needs; the libraries themselves are `import torch, torchvision, timm`. The 16 photographs, of 500 × 375
pixels, go through a ViT-Ti/16 with random weights: the default analysis with its untrained twin, with the page and without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from overhead import photographs, shown
from variants import facts, spread

RESULTS = Path(__file__).parent / "results"
PHOTOGRAPHS = 16
LIBRARIES, FIRST, BARE, WHOLE = "the libraries", "first output", "16 photographs, no page", "16 photographs"


def commands(folder: Path) -> dict[str, list[str]]:
    """The processes by name; `folder` holds the photographs and takes the findings."""
    analyze = [sys.executable, "-m", "collapse_probe", "analyze", "-q", "-m", "timm:vit_tiny_patch16_224", "--no-pretrained"]
    over = [*analyze, "--data", str(folder / "photographs"), "-o"]
    return {
        LIBRARIES: [sys.executable, "-c", "import torch, torchvision, timm"],
        FIRST: [*analyze, "--data", str(folder / "nowhere")],
        BARE: [*over, str(folder / "bare"), "--no-page"],
        WHOLE: [*over, str(folder / "whole")],
    }


def main() -> None:
    """Run the processes in turns, print the table and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="the JSON file; in benchmarks/results by default")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "photographs").mkdir()
        photographs(Path(place) / "photographs", PHOTOGRAPHS)
        for turn in range(asked.repeats + 1):
            for name, words in commands(Path(place)).items():
                start, before = time.perf_counter(), os.times()
                done = subprocess.run(words, capture_output=True, text=True, env=environment)
                wall, after = time.perf_counter() - start, os.times()
                if done.returncode != (name == FIRST):
                    raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
                used = after.children_user + after.children_system - before.children_user - before.children_system
                if turn:  # the first time files come from the disk
                    seconds.setdefault(name, []).append((used, wall))
    report = {**facts(torch.device("cpu")), "seconds": {}}
    print(f"{'':<26} {'s on the processor':<22} {'s of the wall'}")
    for name, each in seconds.items():
        used, wall = (spread([one[i] for one in each]) for i in (0, 1))
        report["seconds"][name] = {"processor": used, "wall": wall}
        print(f"{name:<26} {shown(used):<22} {shown(wall)}")
    beside = spread([one[0] - base[0] for one, base in zip(seconds[FIRST], seconds[LIBRARIES], strict=True)])
    report["first_output_beside_libraries"] = beside
    print(f"first output beside the libraries, on the processor: {shown(beside)}")
    target = asked.output or RESULTS / f"start-{report['date']}-cpu.json"
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
