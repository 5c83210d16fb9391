"""Counts of outcomes: ``python -m tests.fuzz [--examples N] [area ...]``, from the repository."""

import argparse
import sys
import time

from tests.fuzz.areas import AREAS, table
from tests.fuzz.harness import BAD, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("areas", nargs="*", default=list(AREAS), help=", ".join(AREAS))
    parser.add_argument("--examples", type=int, help="cases per area; default: those of make check")
    args = parser.parse_args()
    tallies = {}
    for name in args.areas:
        area, start = AREAS[name], time.perf_counter()
        tally = tallies[name] = fuzz(area.draw_case, args.examples or area.many, strict=False)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for failure, what in tally.failures.items():
            print(f"  {failure}\n    {what[:200]}", file=sys.stderr)
    print(table(tallies))
    return int(any(tally.counts[bad] for tally in tallies.values() for bad in BAD))


if __name__ == "__main__":
    sys.exit(main())
