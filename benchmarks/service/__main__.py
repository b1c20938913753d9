"""``python -m benchmarks.service``: requests a second and processor a request, ours beside a bare floor and peers.

All contenders run on this machine at the same time and are asked in turns; figures of one turn are compared. Hardcap
and LiteLLM are installed from the package registry into .data/benchmarks. Exit status 1 if a figure misses what it has
to be at least, or if anything was overspent.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.service.contenders import Stage
from benchmarks.service.figures import QUICK, Bench, Plan, Results
from benchmarks.service.peers import peers
from benchmarks.service.programs import tools
from benchmarks.service.report import draw, missed, print_report, write_json


def main() -> int:
    arguments = _arguments()
    earlier = json.loads(Path(arguments.compare).read_text(encoding="utf-8")) if arguments.compare else None
    # However it is ended, it ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results, about = _run(arguments)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print_report(results, about, earlier)
    if arguments.json:
        write_json(Path(arguments.json), results, about)
    if arguments.pictures and not draw(Path(arguments.pictures), results):
        print("no pictures: matplotlib is not installed", file=sys.stderr)
    for name in missed(results.figures):
        print(f"missed: {name}", file=sys.stderr)
    return 1 if results.is_overspent or missed(results.figures) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rounds, no peers: about a minute")
    parser.add_argument("--without-peers", action="store_true", help="without Hardcap and LiteLLM")
    parser.add_argument("--turns", type=int, help="rounds of each contender")
    parser.add_argument("--only-speed", action="store_true", help="only requests a second and processor a request")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--pictures", metavar="DIR", help="draw them there")
    parser.add_argument("--compare", metavar="FILE", help="the JSON of an earlier run, shown beside this one")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> tuple[Results, dict[str, str]]:
    plan = QUICK if arguments.quick else Plan()
    plan = replace(plan, turns=arguments.turns or plan.turns)
    if sys.platform != "linux":
        raise SystemExit("processor and memory are read from /proc: this runs on Linux")
    with tempfile.TemporaryDirectory(prefix="tollgate-service-") as place, Stage(Path(place), tools()) as stage:
        bench = Bench(stage, plan, _progress)
        with_peers = not (arguments.quick or arguments.without_peers)
        bench.throughput(list(peers(stage, _progress, bench.results.remarks)) if with_peers else [])
        if not arguments.only_speed:
            for measure in (bench.first_chunk, bench.two_workers, bench.token, bench.memory, bench.functions):
                measure()
        return bench.results, _about(stage, plan)


def _progress(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


def _about(stage: Stage, plan: Plan) -> dict[str, str]:
    return {
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gunicorn": version("gunicorn"),
        "gevent": version("gevent"),
        "tools": stage.tools.remark,
        "turns": f"{plan.turns} of {plan.seconds:g} s",
    }


if __name__ == "__main__":
    sys.exit(main())
