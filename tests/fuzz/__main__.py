"""`python -m tests.fuzz [kinds]`: a line for each kind of hostile input, and every trial that went wrong; 1 if any did."""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from fuzz_trials import KINDS, tally_of  # noqa: E402


def main() -> int:
    """1 where a trial went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of trials")
    parser.add_argument("--trial", type=int, help="this one alone")
    parser.add_argument("--processes", type=int, default=1)
    asked = parser.parse_args()
    jobs = [(kind, asked.seed, asked.share, asked.trial) for kind in asked.kinds or KINDS]
    wrong = 0
    with ProcessPoolExecutor(asked.processes, max_tasks_per_child=1) as pool:
        for tally in pool.map(tally_of, jobs):
            sys.stdout.write(f"{tally}\n")
            sys.stdout.flush()
            wrong += len(tally.violations)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
