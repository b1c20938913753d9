"""``python -m benchmarks.outages``: faults that are injected under load, with an upstream that keeps its own bill.

Each fault has a service (gunicorn, two workers), a Redis and an upstream of its own, and eight clients that ask without
an end. What clients saw, what the books hold beside the upstream's bill, and how soon all was as before is printed as a
table. The exit status is 1 where the books hold less than the bill, or anything else is not as it should be.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.outages.faults import FAULTS
from benchmarks.outages.play import Result, play
from benchmarks.outages.report import markdown, print_report, summary
from benchmarks.outages.soak import draw, run_soak, write


def main() -> int:
    arguments = _arguments()
    if arguments.list:
        for fault in FAULTS:
            print(f"{fault.section}  {fault.name:20} {fault.title}")
        return 0
    if arguments.soak:
        return _soak(arguments)
    chosen = [fault for fault in FAULTS if not arguments.only or fault.name in arguments.only]
    if unknown := set(arguments.only) - {fault.name for fault in FAULTS}:
        raise SystemExit(f"--only: no fault is called {', '.join(sorted(unknown))}; --list names them")
    results: list[Result] = []
    for number, fault in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {fault.name}, {fault.title} …", file=sys.stderr, flush=True)
        results.append(play(fault))
        print(f"    {summary(results[-1])}", file=sys.stderr, flush=True)
    print_report(results)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text(markdown(results), encoding="utf-8")
    return 1 if any(each.missed for each in results) else 0


def _soak(arguments: argparse.Namespace) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="tollgate-soak-") as directory:
        soak = run_soak(arguments.soak, arguments.seed, Path(directory), say)
    print(f"seed {soak.seed}; faults: {soak.faults}")
    print(f"clients saw: {soak.saw}; emergency budget: {soak.emergency_nanousd / 1e9:.4f} USD")
    print("\n".join(soak.missed) or "flat, and the books are right")
    if arguments.json:
        write(soak, Path(arguments.json))
    if arguments.picture and not draw(soak, Path(arguments.picture)):
        say("no picture: matplotlib is not installed")
    return 1 if soak.missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outages", description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", default=[], help="this fault; may be said again")
    parser.add_argument("--list", action="store_true", help="the names of all faults")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--markdown", metavar="FILE", help="write the table of docs/FAULTS.md there")
    parser.add_argument("--soak", metavar="MINUTES", type=float, help="random faults for so long in one service")
    parser.add_argument("--seed", type=int, default=1, help="of the soak (%(default)s)")
    parser.add_argument("--picture", metavar="FILE", help="draw the lines of the soak there, as PNG")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
