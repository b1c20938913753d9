"""The report: one HTML page with its pictures in it, the same pictures beside it, and all figures as JSON."""

import base64
import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from backends import open_backend
from backends.errors import ConfigurationError
from backends.money import usd_text
from backends.progress import Progress
from backends.store.link import Link
from flaskapp.lab import measure, pictures
from flaskapp.lab.race import CLOCK, TIMEOUT_SECONDS, Plan, RaceResult
from flaskapp.lab.redis_option import server_url
from flaskapp.lab.tables import by_backend, title_of

PAGE, FIGURES = "index.html", "figures.json"


@dataclass(frozen=True, slots=True)
class Rows:
    """A table."""

    heads: tuple[str, ...]
    cells: list[list[object]]


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
        """The picture, for the page."""
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that the pictures show, by the names that it has in the JSON."""

    about: dict[str, str]
    failing_order: measure.FailingOrder | None
    overspend: list[measure.Overspend]
    distances: list[RaceResult]
    throughput: list[measure.Throughput]
    server_time: list[measure.ServerTime]


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
    with server_url(None) as url, closing(Link(url, clock=CLOCK, timeout_seconds=TIMEOUT_SECONDS)) as link:
        about = measure.about(link, plan.seed)
        racy = next((name for name in names if not open_backend(name, link, CLOCK).promises_atomicity), None)
        progress("all orders of two callers", 0, 1)
        failing_order = None if racy is None else measure.failing_order(url, racy)
        overspend = measure.overspends(url, names, plan, progress)
        distances = measure.distances(url, names, plan, progress)
        throughput = measure.throughputs(url, names, progress)
        # What the throughput has booked would stay otherwise.
        link.run(lambda client: client.flushall())
        server_time = measure.server_times(link, names, plan.seed, progress)
    return Measured(about, failing_order, overspend, distances, throughput, server_time)


def write(directory: Path, plan: Plan, results: Sequence[RaceResult], where: str, found: Measured) -> Path:
    """The page and what lies beside it; the path of the page."""
    parts = [] if found.failing_order is None else [_lanes(found.failing_order)]
    parts += [
        _overspend(found.overspend),
        _latency(found.distances),
        _round_trips(found.distances),
        _throughput(found.throughput),
        _server_time(found.server_time),
    ]
    for part in parts:
        (directory / f"{part.name}.png").write_bytes(part.png)
    figures = {"about": found.about, "race": [asdict(result) for result in results]} | asdict(found)
    (directory / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    page = directory / PAGE
    page.write_text(_page(plan, results, where, parts, found.about), encoding="utf-8")
    return page


def _page(plan: Plan, results: Sequence[RaceResult], where: str, parts: list[Part], about: dict[str, str]) -> str:
    jinja = Environment(
        loader=PackageLoader("flaskapp.lab"), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    verdicts = [_verdict(name, its) for name, its in by_backend(results).items()]
    race = {"title": title_of(plan, where), "texts": _race_texts(plan, results), "rows": _race_rows(results)}
    return jinja.get_template("report.html").render(verdicts=verdicts, race=race, parts=parts, about=about)


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
    distance = ("rtt",) if any(result.rtt_ms for result in results) else ()
    heads = ("backend", *distance, "admitted", "refused", "spent $", "limit $", "over $", "check p50", "p95")
    cells: list[list[object]] = []
    for each in results:
        sums = map(_short_usd, (each.spent_nanousd, each.limit_nanousd, each.overspend_nanousd))
        times = (f"{each.check_p50_ms:.3f} ms", f"{each.check_p95_ms:.3f} ms")
        rtt = [f"{each.rtt_ms:g} ms" for _ in distance]
        cells.append([each.backend, *rtt, each.admitted, each.refused, *sums, *times])
    return Rows(heads, cells)


def _short_usd(amount_nanousd: int) -> str:
    """Exact, without the zeros at its end."""
    return usd_text(amount_nanousd).rstrip("0").rstrip(".")


def _lanes(order: measure.FailingOrder) -> Part:
    heads = ("turn", "caller", "does", "commands that read", "that write", "window then $", "limit $")
    limit = usd_text(order.limit_nanousd)
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
            heads,
            [
                [number, block.caller, block.does, block.reads, block.writes, usd_text(block.window_nanousd), limit]
                for number, block in enumerate(order.blocks, start=1)
            ],
        ),
    )


def _overspend(found: Sequence[measure.Overspend]) -> Part:
    most = max(found, key=lambda each: each.spent_to_limit)
    exact = sorted({each.backend for each in found} - {each.backend for each in found if each.spent_to_limit > 1})
    texts = [
        (
            f"With {most.concurrency} callers at once and room for {most.room}, {most.backend} spent "
            f"{most.spent_to_limit:.1f} times its limit."
        )
    ]
    if exact:
        texts.append(f"{' and '.join(exact)} never spent more than the limit, however many asked.")
    if any(each.was_held for each in found):
        texts.append("Held: all callers checked before the first recorded. By luck: they only started together.")
    cells: list[list[object]] = []
    for each in found:
        held = "yes" if each.was_held else "no"
        cells.append([each.backend, each.concurrency, each.room, held, f"{each.spent_to_limit:.3f}"])
    return Part(
        name="overspend",
        title="Overspend against concurrency",
        texts=texts,
        png=pictures.overspend(found),
        alt="Dollars spent for each dollar of the limit against callers at once.",
        rows=Rows(("backend", "callers", "room", "held", "$ spent for each $ of the limit"), cells),
    )


def _latency(found: Sequence[RaceResult]) -> Part:
    cells: list[list[object]] = []
    for each in found:
        alone = "one step" if each.check_alone_p50_ms is None else f"{each.check_alone_p50_ms:.3f} ms"
        both = (f"{each.check_p50_ms:.3f} ms", f"{each.check_p95_ms:.3f} ms")
        cells.append([each.backend, f"{each.rtt_ms:g} ms", alone, *both])
    return Part(
        name="latency",
        title="The check, against the distance of Redis",
        texts=[*claim_texts(found), "One caller at a time, all backends in turns; medians."],
        png=pictures.latency(found),
        alt="Median milliseconds of the check for each backend with Redis 0, 1 and 5 ms farther away.",
        rows=Rows(("backend", "Redis farther", "check alone, p50", "check and record, p50", "p95"), cells),
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


def _round_trips(found: Sequence[RaceResult]) -> Part:
    near = [each for each in found if each.rtt_ms == 0]
    return Part(
        name="round_trips",
        title="Round trips a request",
        texts=["Sent to Redis and waited for, counted in the connection. On a network the time follows this number."],
        png=pictures.round_trips(found),
        alt="Round trips a request for each backend.",
        rows=Rows(
            ("backend", "round trips a request"),
            [[each.backend, f"{each.round_trips_a_request or 0:.1f}"] for each in near],
        ),
    )


def _throughput(found: Sequence[measure.Throughput]) -> Part:
    return Part(
        name="throughput",
        title="Throughput",
        texts=[
            (
                f"{measure.CALLERS} threads of one Python process, each with books of its own. At 0 ms Python is what "
                "limits the fast ones; farther away it is the round trips."
            ),
        ],
        png=pictures.throughput(found, measure.CALLERS),
        alt="Decisions a second for each backend with Redis 0, 1 and 5 ms farther away.",
        rows=Rows(
            ("backend", "Redis farther", "decisions a second"),
            [[each.backend, f"{each.rtt_ms:g} ms", f"{each.a_second:,.0f}"] for each in found],
        ),
    )


def _server_time(found: Sequence[measure.ServerTime]) -> Part:
    return Part(
        name="server_time",
        title="What Redis works for one decision",
        texts=[
            (
                "Processor time of Redis' process, what it reads and answers included. The books do not grow with the "
                "number of requests, so neither does this."
            ),
        ],
        png=pictures.server_time(found),
        alt="Microseconds of Redis' processor a decision against requests in the window.",
        rows=Rows(
            ("backend", "requests in the window", "µs a decision"),
            [[each.backend, f"{each.in_window:,}", f"{each.us:.1f}"] for each in found],
        ),
    )
