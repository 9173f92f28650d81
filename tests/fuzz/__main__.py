"""Fuzz until time is up, target after target with ever new seeds: `make fuzz SECONDS=600`.

Prints how many cases ended in which class, then each finding; status 1 if there is one. `--only`
and `--seed` run a finding again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz import campaign
from tests.fuzz.targets import TARGETS

#: seconds that a target gets at a time
_TURN = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="(default: %(default)s)")
    parser.add_argument("--only", choices=list(TARGETS), help="this target alone")
    parser.add_argument("--seed", type=int, help="this case alone, of the target of --only")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    args = parser.parse_args()
    names = [args.only] if args.only else list(TARGETS)
    until = time.monotonic() + args.seconds
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    findings: list[str] = []
    while time.monotonic() < until:
        for name in names:
            with tempfile.TemporaryDirectory() as scratch:
                first = args.first + counts[name].total() if args.seed is None else args.seed
                turn = min(until, time.monotonic() + _TURN)
                cases = None if args.seed is None else 1
                result = campaign.run(name, first, cases, turn, Path(scratch))
            counts[name] += result.counts
            findings += result.findings
            for finding in result.findings:
                print(finding, flush=True)
        if args.seed is not None:
            break
    for name, its in counts.items():
        told = ", ".join(f"{kind} {number}" for kind, number in sorted(its.items()))
        print(f"{name:18} {its.total():7} cases: {told}")
    print(f"{sum(one.total() for one in counts.values())} cases, {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
