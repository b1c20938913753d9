"""The report: one HTML page with its pictures in it, the same pictures beside it, and all figures as JSON."""

import base64
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from backends import open_backend
from backends.clock import Clock, SystemClock
from backends.errors import ConfigurationError
from backends.money import usd_text
from backends.progress import Progress
from backends.store.link import Link
from flaskapp.lab import measure, pictures
from flaskapp.lab.race import Plan, RaceResult
from flaskapp.lab.tables import title_of
from flaskapp.ops.embedded_redis import EmbeddedServer

PAGE, FIGURES = "index.html", "figures.json"


@dataclass(frozen=True, slots=True)
class Rows:
    """A table: texts only."""

    heads: tuple[str, ...]
    cells: list[list[str]]


@dataclass(frozen=True, slots=True)
class Part:
    """One picture and its texts."""

    name: str
    title: str
    texts: list[str]
    png: bytes
    alt: str
    rows: Rows

    @property
    def base64(self) -> str:
        """For the page."""
        return base64.b64encode(self.png).decode()


@dataclass(slots=True)
class Measured:
    """Everything that the pictures show."""

    about: dict[str, str]
    order: measure.FailingOrder | None
    overspends: list[measure.Overspend] = field(default_factory=list)
    distances: list[RaceResult] = field(default_factory=list)
    throughputs: list[measure.Throughput] = field(default_factory=list)
    server_times: list[measure.ServerTime] = field(default_factory=list)


def check_can_be_made(directory: Path) -> None:
    """Before anything is measured.

    Raises:
        ConfigurationError: matplotlib is missing, or there is no such place.
    """
    pictures.check_there()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigurationError(f"--report: {directory} cannot be written to ({error.strerror})") from error


def measured(names: Sequence[str], plan: Plan, progress: Progress) -> Measured:
    """Measure everything, on a server of its own.

    Raises:
        ConfigurationError: a name that is not registered.
        StoreError: the server failed.
    """
    clock = SystemClock()
    with (
        tempfile.TemporaryDirectory(prefix="tollgate-report-") as directory,
        EmbeddedServer(Path(directory)) as server,
    ):
        link = Link(server.url, clock=clock, timeout_seconds=5.0)
        try:
            return _measured(link, names, plan, clock, progress)
        finally:
            link.close()


def _measured(link: Link, names: Sequence[str], plan: Plan, clock: Clock, progress: Progress) -> Measured:
    url = link.url
    racy = next((name for name in names if not open_backend(name, link, clock).promises_atomicity), None)
    progress("all orders of two callers", 0, 1)
    order = None if racy is None else measure.failing_order(url, racy)
    found = Measured(measure.about(link, plan.seed) | {"measured": measure.day_and_time(clock)}, order)
    _empty(link)
    found.overspends = measure.overspends(url, names, plan, clock, progress)
    found.distances = measure.distances(url, names, plan, clock, progress)
    found.throughputs = measure.throughputs(url, names, clock, progress)
    _empty(link)
    found.server_times = measure.server_times(link, names, plan.seed, clock, progress)
    return found


def _empty(link: Link) -> None:
    """The server is our own."""
    link.run(lambda client: client.flushall())


def write(directory: Path, plan: Plan, results: Sequence[RaceResult], where: str, found: Measured) -> Path:
    """The page and what lies beside it; the path of the page."""
    parts = [make(found) for make in _PARTS if found.order is not None or make is not _lanes]
    for part in parts:
        (directory / f"{part.name}.png").write_bytes(part.png)
    figures = {
        "about": found.about,
        "race": [asdict(result) for result in results],
        "failing_order": None if found.order is None else asdict(found.order),
        "overspend": [asdict(each) for each in found.overspends],
        "distances": [asdict(each) for each in found.distances],
        "throughput": [asdict(each) for each in found.throughputs],
        "server_time": [asdict(each) for each in found.server_times],
    }
    (directory / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    page = directory / PAGE
    page.write_text(_page(plan, results, where, parts, found.about), encoding="utf-8")
    return page


def _page(plan: Plan, results: Sequence[RaceResult], where: str, parts: list[Part], about: dict[str, str]) -> str:
    jinja = Environment(
        loader=PackageLoader("flaskapp.lab"), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    verdicts = [_verdict(name, [each for each in results if each.backend == name]) for name in _names(results)]
    race = {"title": title_of(plan, where), "texts": _race_texts(plan, results), "rows": _race_rows(results)}
    return jinja.get_template("report.html").render(verdicts=verdicts, race=race, parts=parts, about=about)


def _names(results: Sequence[RaceResult]) -> list[str]:
    return list(dict.fromkeys(each.backend for each in results))


def _verdict(name: str, its: Sequence[RaceResult]) -> dict[str, object]:
    """All distances of one backend in one line."""
    over_nanousd = sum(each.overspend_nanousd for each in its)
    everywhere = "" if len(its) == 1 else " at every distance"
    if not over_nanousd:
        return {"text": f"{name} stayed within its limit{everywhere}.", "is_over": False}
    over_at = [each for each in its if each.overspend_nanousd]
    where = everywhere if len(over_at) == len(its) else f" at {len(over_at)} of {len(its)} distances"
    limit_nanousd = sum(each.limit_nanousd for each in over_at)
    limits = f"{'the limit' if len(over_at) == 1 else 'limits'} of ${_short_usd(limit_nanousd)}"
    text = f"{name} overspent{where}: ${_short_usd(over_nanousd)} over {limits}."
    return {"text": text, "is_over": True}


def _race_texts(plan: Plan, results: Sequence[RaceResult]) -> list[str]:
    by_bill = results[0].measured_by != "books"
    texts = [
        "What was spent is what the upstream says that it billed." if by_bill else "What was spent is in the books."
    ]
    if any(each.was_held for each in results):
        texts.append("Callers of a backend with a gap between check and record were held there until all had checked.")
    if plan.spread:
        texts.append(f"Costs differ by up to {plan.spread:.0%}; the limit is the sum of the {plan.room} largest.")
    return texts


def _race_rows(results: Sequence[RaceResult]) -> Rows:
    has_distance = any(result.rtt_ms for result in results)
    distance = ("rtt",) if has_distance else ()
    heads = ("backend", *distance, "admitted", "refused", "spent $", "limit $", "over $", "check p50", "p95")
    return Rows(
        heads,
        [
            [
                each.backend,
                *([f"{each.rtt_ms:g} ms"] if has_distance else []),
                str(each.admitted),
                str(each.refused),
                _short_usd(each.spent_nanousd),
                _short_usd(each.limit_nanousd),
                _short_usd(each.overspend_nanousd),
                f"{each.check_p50_ms:.3f} ms",
                f"{each.check_p95_ms:.3f} ms",
            ]
            for each in results
        ],
    )


def _short_usd(amount_nanousd: int) -> str:
    """Exact, without the zeros at its end."""
    return usd_text(amount_nanousd).rstrip("0").rstrip(".")


def _lanes(found: Measured) -> Part:
    order = found.order
    if order is None:
        raise ValueError("nobody with a gap took part")
    return Part(
        name="lanes",
        title="One order that overspends",
        texts=[
            (
                f"Two callers of the {order.backend} backend, room for one. Time goes down. Each looks while the other "
                "has not yet written: both see an empty window, both may go, and both write."
            ),
            (
                f"It is number {order.number:,} of the {order.orders:,} orders of two callers that differ; "
                f"{order.overspending_orders:,} of them overspend. See it step by step: flask --app wsgi explore "
                f"--backends {order.backend} --replay {order.number}"
            ),
        ],
        png=pictures.lanes(order),
        alt="Two lanes. Both check before either has recorded; after the second record the books are over the limit.",
        rows=Rows(
            ("turn", "caller", "does", "commands that read", "that write", "window then $", "limit $"),
            [
                [
                    str(number + 1),
                    block.caller,
                    block.does,
                    str(block.reads),
                    str(block.writes),
                    usd_text(block.window_nanousd),
                    usd_text(order.limit_nanousd),
                ]
                for number, block in enumerate(order.blocks)
            ],
        ),
    )


def _overspend(found: Measured) -> Part:
    most = max(found.overspends, key=lambda each: each.spent_to_limit)
    exact = sorted(
        {each.backend for each in found.overspends}
        - {each.backend for each in found.overspends if each.spent_to_limit > 1}
    )
    texts = [
        (
            f"With {most.concurrency} callers at once and room for {most.room}, {most.backend} spent "
            f"{most.spent_to_limit:.1f} times its limit."
        )
    ]
    if exact:
        texts.append(f"{' and '.join(exact)} never spent more than the limit, however many asked.")
    if any(each.was_held for each in found.overspends):
        texts.append("Held: all callers checked before the first recorded. By luck: they only started together.")
    return Part(
        name="overspend",
        title="Overspend against concurrency",
        texts=texts,
        png=pictures.overspend(found.overspends),
        alt="Dollars spent for each dollar of the limit against callers at once.",
        rows=Rows(
            ("backend", "callers", "room", "held", "$ spent for each $ of the limit"),
            [
                [
                    each.backend,
                    str(each.concurrency),
                    str(each.room),
                    "yes" if each.was_held else "no",
                    f"{each.spent_to_limit:.3f}",
                ]
                for each in found.overspends
            ],
        ),
    )


def _latency(found: Measured) -> Part:
    return Part(
        name="latency",
        title="The check, against the distance of Redis",
        texts=[*claim_texts(found.distances), "One caller at a time, all backends in turns; medians."],
        png=pictures.latency(found.distances),
        alt="Median milliseconds of the check for each backend with Redis 0, 1 and 5 ms farther away.",
        rows=Rows(
            ("backend", "Redis farther", "check alone, p50", "check and record, p50", "p95"),
            [
                [
                    each.backend,
                    f"{each.rtt_ms:g} ms",
                    "one step" if each.check_alone_p50_ms is None else f"{each.check_alone_p50_ms:.3f} ms",
                    f"{each.check_p50_ms:.3f} ms",
                    f"{each.check_p95_ms:.3f} ms",
                ]
                for each in found.distances
            ],
        ),
    )


def claim_texts(results: Sequence[RaceResult]) -> list[str]:
    """How much less time the atomic check takes at each distance, beside the seed's claim of "75-80 % less"."""
    by_name = {(each.backend, each.rtt_ms): each for each in results}
    lines = []
    for (name, rtt_ms), atomic in by_name.items():
        legacy = by_name.get(("legacy", rtt_ms))
        if name != "atomic" or legacy is None:
            continue
        line = f"{_less(atomic.check_p50_ms, legacy.check_p50_ms)} than check and record"
        if legacy.check_alone_p50_ms is not None:
            line += f", {_less(atomic.check_p50_ms, legacy.check_alone_p50_ms)} than the check alone"
        lines.append(f"Redis {rtt_ms:g} ms farther away: {line}.")
    return ['The seed claims that the atomic check takes "75–80 % less" time. Here it takes:', *lines] if lines else []


def _less(ours: float, theirs: float) -> str:
    share = 100 * (1 - ours / theirs)
    return f"{share:.0f} % less" if share >= 0 else f"{-share:.0f} % more"


def _round_trips(found: Measured) -> Part:
    near = [each for each in found.distances if each.rtt_ms == 0]
    return Part(
        name="round_trips",
        title="Round trips a request",
        texts=["Sent to Redis and waited for, counted in the connection. On a network the time follows this number."],
        png=pictures.round_trips(found.distances),
        alt="Round trips a request for each backend.",
        rows=Rows(
            ("backend", "round trips a request"),
            [[each.backend, f"{each.round_trips_a_request or 0:.1f}"] for each in near],
        ),
    )


def _throughput(found: Measured) -> Part:
    return Part(
        name="throughput",
        title="Throughput",
        texts=[
            (
                f"{measure.CALLERS} threads of one Python process, each with books of its own. At 0 ms Python is what "
                "limits the fast ones; farther away it is the round trips."
            ),
        ],
        png=pictures.throughput(found.throughputs, measure.CALLERS),
        alt="Decisions a second for each backend with Redis 0, 1 and 5 ms farther away.",
        rows=Rows(
            ("backend", "Redis farther", "decisions a second"),
            [[each.backend, f"{each.rtt_ms:g} ms", f"{each.a_second:,.0f}"] for each in found.throughputs],
        ),
    )


def _server_time(found: Measured) -> Part:
    return Part(
        name="server_time",
        title="What Redis works for one decision",
        texts=[
            (
                "Processor time of Redis' process, what it reads and answers included. The books do not grow with the "
                "number of requests, so neither does this."
            ),
        ],
        png=pictures.server_time(found.server_times),
        alt="Microseconds of Redis' processor a decision against requests in the window.",
        rows=Rows(
            ("backend", "requests in the window", "µs a decision"),
            [[each.backend, f"{each.in_window:,}", f"{each.us:.1f}"] for each in found.server_times],
        ),
    )


_PARTS: tuple[Callable[[Measured], Part], ...] = (
    _lanes,
    _overspend,
    _latency,
    _round_trips,
    _throughput,
    _server_time,
)
