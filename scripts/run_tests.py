"""Runs pytest: without arguments the whole suite, with the coverage gate of pyproject.toml; with --quick a part."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

HINT = "For plain `pytest …`, `flask …` and `redis-cli`:  source {venv}/bin/activate\n"
IN_ONE_PROCESS = (
    ("tests/backends", "tests/flaskapp", "tests/lab"),
    ("tests/contract", "tests/docs", "tests/house", "tests/lua"),
)
"""Two runs at the same time, of about the same length, of tests that work in one process: they are measured."""
STARTS_OF_A_CLONE = ("tests/setup",)
"""They start processes, in which nothing is measured, one after the other, beside all others that do."""
QUICK = (
    (
        "tests/contract",
        "tests/docs",
        "tests/lua",
        "tests/http/test_seed.py::test_of_ten_at_once_atomic_admits_exactly_four",
        "tests/http/test_seed.py::test_both_on_one_redis_keep_one_set_of_books",
        "tests/test_abuse_prevention.py",
        "tests/test_admin_settings_integration.py",
    ),
    ("tests/backends", "tests/house", "tests/flaskapp/test_[d-l]*.py"),
    ("tests/flaskapp/test_[!d-l]*.py",),
)
"""Runs at the same time, of about the same length: what catches most in two minutes. The rest is `LEFT_OUT`.

Two keep two processors busy, and the third uses them while those wait.
"""
LEFT_OUT = {
    "tests/backends/test_normalised_bounds.py": "the bound of every code point in every form",
    "tests/backends/test_sentencepiece_bounds.py": "the same against SentencePiece",
    "tests/benchmarks": "the benchmarks and the hammer, briefly",
    "tests/contract/test_comparison.py": "the strategies in every order of two and three callers",
    "tests/contract/test_mixed_strategies.py": "strategies that take turns on one set of books",
    "tests/contract/test_state_machine.py": "random lists of operations beside a model of their own",
    "tests/docs/test_commands.py": "every command of the documentation",
    "tests/faults": "a store that freezes, dies, loses replies",
    "tests/flaskapp/test_embedded_redis.py": "the Redis of a developer's machine",
    "tests/flaskapp/test_health.py": "what the service says of a store that comes and goes",
    "tests/flaskapp/test_idempotency.py": "callers' keys on every route",
    "tests/flaskapp/test_llm_exchange.py": "an upstream's connections, slow and broken ones",
    "tests/flaskapp/test_upstream_ways.py": "upstreams that are asked otherwise",
    "tests/http": "the service over HTTP",
    "tests/interop": "clients that others wrote",
    "tests/lab": "the race lab",
    "tests/lua/test_mutants.py": "what a wrong in a script would do",
    "tests/setup": "a clone's first start",
}
FEWER_STRATEGIES = ("-k", "not [multi and not [watch")
"""Options for pytest: the two that share every verb with the others are left to the whole suite."""
NOTHING_SELECTED = 5
"""Exit status of a pytest that found nothing to run."""


def main() -> int:
    # setup.py held them back until here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    print(HINT.format(venv=os.path.relpath(sys.prefix)), flush=True)
    arguments = sys.argv[1:]
    if "--quick" in arguments:
        return quick([argument for argument in arguments if argument != "--quick"])
    if arguments:
        return subprocess.call(unmeasured(arguments))
    return with_coverage() or on_redis()


def with_coverage() -> int:
    """The whole suite, and what it reaches of the code."""
    status = everything(measured)
    if status != 0:
        return status
    subprocess.call([sys.executable, "-m", "coverage", "combine", "--quiet"], stderr=subprocess.DEVNULL)
    return subprocess.call([sys.executable, "-m", "coverage", "report"])


def on_redis() -> int:
    """The whole suite once more, on the `redis-server` of PATH; not where the caller chose the store."""
    program = shutil.which("redis-server")
    if program is None or "TEST_REDIS_BINARY" in os.environ or "TEST_REDIS_URL" in os.environ:
        print("\nRun on one store only: for the other put a redis-server on PATH, and set no TEST_REDIS_….")
        return 0
    print(f"\nAll of it once more, on {program}.\n", flush=True)
    os.environ["TEST_REDIS_BINARY"] = program
    return everything(unmeasured)


def everything(command: Callable[[Sequence[str]], list[str]]) -> int:
    """Every test once; `command` makes the command for those that work in one process."""
    status = together(*map(command, IN_ONE_PROCESS))
    return verdict(status, together(unmeasured(others()), unmeasured(STARTS_OF_A_CLONE)))


def quick(options: Sequence[str]) -> int:
    """Ruff, and the tests in `QUICK` with these options for pytest; then what was left out."""
    lint = [
        subprocess.call([sys.executable, "-m", "ruff", *words])
        for words in (("check", "."), ("format", "--check", "."))
    ]
    with subprocess.Popen(
        unmeasured(["--collect-only", "-q", *without(LEFT_OUT, chain(*QUICK))]), stdout=subprocess.PIPE, text=True
    ) as counting:
        status = together(*(unmeasured([*without(run, LEFT_OUT), *FEWER_STRATEGIES, *options]) for run in QUICK))
        listed, _ = counting.communicate()
    found = Counter(place for place in LEFT_OUT for line in listed.splitlines() if line.startswith(place))
    print(f"\nLeft out of this quick run are {found.total()} tests:")
    for place, what in LEFT_OUT.items():
        print(f"  {found[place]:4}  {place:41} {what}")
    print("  and the strategies multi and watch, which share their verbs with legacy and memory.")
    print("The whole suite: ./scripts/test.sh    Every gate, types included: bash .ci/run")
    return verdict(*lint, counting.returncode, status)


def without(places: Iterable[str], others: Iterable[str]) -> list[str]:
    """Arguments for pytest: the tests in those places, which may be patterns, but not in others that lie within."""
    chosen = tuple(chain(*map(matching, places)))
    return [*chosen, *(f"--deselect={other}" for other in others if other.startswith(chosen))]


def matching(place: str) -> list[str]:
    """The files that a pattern means; a place that is none is itself."""
    return sorted(path.as_posix() for path in Path().glob(place)) if place.endswith("*.py") else [place]


def verdict(*statuses: int) -> int:
    """One exit status for several runs: that nothing was selected is no failure where another run had something."""
    return next((status for status in statuses if status not in {0, NOTHING_SELECTED}), min(statuses))


def together(seen: list[str], *unseen: list[str]) -> int:
    """The first is seen while it runs; the others' output comes when all are over. Not 0 if one failed."""
    for command in unseen:
        print(f"Beside the tests that you see run those of {', '.join(places_of(command))}.\n", flush=True)
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in unseen]
        beside = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output))
            for command, output in zip(unseen, outputs, strict=True)
        ]
        status = verdict(subprocess.call(seen), *(process.wait() for process in beside))
        for output in outputs:
            output.seek(0)
            sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return status


def places_of(command: Iterable[str]) -> list[str]:
    """The directories and files in which the tests of a command are, each once; of files by pattern the directory."""
    places = (word.partition("::")[0] for word in command if word.startswith("tests/"))
    return list(dict.fromkeys(str(Path(place).parent) if Path(place).is_file() else place for place in places))


def others() -> list[str]:
    """What starts services and looks at the clock, and whatever else there is."""
    files = Path("tests").glob("test_*.py")
    directories = {path.parent for path in Path("tests").glob("*/test_*.py")}
    found = {path.as_posix() for path in (*files, *directories)}
    return sorted(found.difference(*IN_ONE_PROCESS, STARTS_OF_A_CLONE))


def unmeasured(arguments: Sequence[str]) -> list[str]:
    """The command that runs pytest."""
    return [sys.executable, "-m", "pytest", *arguments]


def measured(arguments: Sequence[str]) -> list[str]:
    """The command that runs pytest, and notes what the tests reach."""
    return [sys.executable, "-m", "coverage", "run", "--parallel-mode", "-m", "pytest", *arguments]


if __name__ == "__main__":
    sys.exit(main())
