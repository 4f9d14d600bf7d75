"""`python -m tests.coverage [words]`: one line for each model, what is wrong first; with `--write`, docs/coverage.md.

Words pick the models whose library, family or name holds one of them ("handwritten" and "library" pick those suites).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import torch  # noqa: E402
from coverage_bench import DTYPES, WRONG, check, table  # noqa: E402
from coverage_page import page  # noqa: E402
from handwritten import SIZE, cases  # noqa: E402
from library import rows  # noqa: E402
from library_maps import check_row  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"


def verdict_of(job):
    """One model in one precision, in a process of its own thread."""
    suite, name, precision = job
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    if suite == "handwritten":
        return check(name, cases()[name], SIZE, precision)
    return check_row(next(row for row in rows() if f"{row.library} {row.family} {row.name}" == name), precision)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--precision", nargs="*", choices=list(DTYPES))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="all models, in all precisions or those named, and the page")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [("library", f"{row.library} {row.family} {row.name}") for row in rows()]
    names += [("handwritten", name) for name in cases()]
    words = [] if asked.write else asked.words
    precisions = asked.precision or (list(DTYPES) if asked.write else ["float32"])
    jobs = [
        (suite, name, precision)
        for precision in precisions
        for suite, name in names
        if not words or any(word in f"{suite} {name}" for word in words)
    ]
    with ProcessPoolExecutor(asked.processes) as pool:
        verdicts = []
        for verdict in pool.map(verdict_of, jobs):
            verdicts.append(verdict)
            sys.stdout.write(table([verdict]).splitlines()[0] + "\n")
            sys.stdout.flush()
    sys.stdout.write("\n" + table(verdicts) + "\n")
    if asked.write:
        PAGE.write_text(page(verdicts), encoding="utf-8")
    return int(any(v.outcome == WRONG for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
