"""`python -m tests.coverage handwritten|library [words]`: the table of what is heard, with what is wrong first."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import torch  # noqa: E402
from bench import check, table  # noqa: E402
from handwritten import SIZE, cases  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("suite", choices=["handwritten", "library"])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--precision", nargs="*", default=["float32"])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    verdicts = []
    for name, case in cases().items():
        if asked.words and not any(word in name for word in asked.words):
            continue
        for precision in asked.precision:
            verdicts.append(check(name, case, SIZE, precision))
    print(table(verdicts))


if __name__ == "__main__":
    main()
