"""`flask ledger`: prints one identifier's books, clears them, and audits all books."""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import click
from rich.table import Column, Table
from rich.text import Text

from backends.budgets import Budget, Reason, Scope
from backends.clock import US_PER_SECOND
from backends.errors import ConfigurationError
from backends.ledger.audit import AuditReport, audit
from backends.ledger.identifier_books import MOST_SHOWN, Cleared, IdentifierBooks, Ledger, LimitUse
from backends.money import usd_text
from backends.store.link import Link
from flaskapp.budgets import BudgetPlan
from flaskapp.cli.console import failures, print_table, shown_progress
from flaskapp.http.networks import UNKNOWN_NETWORK, network_of

DISAGREES, COULD_NOT_RUN = 1, 2
_IP = "ip:"
T = TypeVar("T", IdentifierBooks, Cleared, AuditReport)


def make_ledger_cli(
    get_link: Callable[[], Link], get_plan: Callable[[], BudgetPlan], backend_name: str, ipv6_prefix: int
) -> click.Group:
    """The command group ``ledger``; it opens Redis only when a command needs it."""

    def open_link() -> Link:
        if backend_name == "memory":
            raise ConfigurationError(
                "THROTTLE_BACKEND=memory keeps its books in the process that serves: nothing to read"
            )
        return get_link()

    def budgets_of(identifier: str, link: Link) -> tuple[Budget, ...]:
        budgets = get_plan().of({Scope.IDENTIFIER: identifier}, link.time_us())
        return tuple(budget for budget in budgets if budget.scope is Scope.IDENTIFIER)

    @click.group("ledger")
    def group() -> None:
        """Look into the books, clear an identifier's, and recompute them all."""

    @group.command("show")
    @click.argument("identifier", metavar="ID")
    @click.option("--most", type=click.IntRange(0), default=MOST_SHOWN, show_default=True, help="Reservations to list.")
    @click.option("--json", "as_json", is_flag=True, help="The same as JSON, money in nano-dollars.")
    def show(identifier: str, most: int, *, as_json: bool) -> None:
        """What ID has spent, holds and has left; changes nothing.

        ID is what stands in the keys: the hash of a fingerprint, ip:NETWORK, or the hash of an API key.
        """
        with failures(COULD_NOT_RUN), shown_progress() as progress:
            link, who = open_link(), identifier_of(identifier, ipv6_prefix)
            books = Ledger(link).show(who, budgets_of(who, link), most=most, progress=progress)
        _print(books, _print_books, as_json=as_json)

    @group.command("reset")
    @click.argument("identifier", metavar="ID")
    @click.option("--json", "as_json", is_flag=True, help="The same as JSON, money in nano-dollars.")
    def reset(identifier: str, *, as_json: bool) -> None:
        """Clear the books of ID: it may spend anew. What its network and everybody have spent stays."""
        with failures(COULD_NOT_RUN):
            link, who = open_link(), identifier_of(identifier, ipv6_prefix)
            cleared = Ledger(link).reset(who, budgets_of(who, link))
        _print(cleared, _print_cleared, as_json=as_json)

    @group.command("audit")
    @click.option("--json", "as_json", is_flag=True, help="The same as JSON, money in nano-dollars.")
    def audit_(*, as_json: bool) -> None:
        """Recompute every total, and list what disagrees; changes nothing, and may run beside traffic.

        Exit status 1 if anything disagrees, 2 if it could not be run.
        """
        with failures(COULD_NOT_RUN), shown_progress() as progress:
            link = open_link()
            report = audit(link, progress)
        # An operator of several servers sees whether these are the books that were meant.
        _print(report, partial(_print_report, link.place), as_json=as_json)
        raise SystemExit(DISAGREES if report.disagreements else 0)

    return group


def identifier_of(text: str, ipv6_prefix: int) -> str:
    """The identifier that `text` stands for: of ``ip:ADDRESS``, the network that the service would count."""
    if text.startswith(_IP):
        network = network_of(text.removeprefix(_IP), ipv6_prefix)
        return text if network == UNKNOWN_NETWORK else f"{_IP}{network}"
    return text


def _print(what: T, print_text: Callable[[T], None], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(what), indent=2))
    else:
        print_text(what)


def _print_cleared(cleared: Cleared) -> None:
    click.echo(f"books of {cleared.identifier} cleared: {_moment(cleared.at_us // US_PER_SECOND)}")
    click.echo(f"window: {usd_text(cleared.window_nanousd)} USD, of it open: {usd_text(cleared.open_nanousd)} USD")
    click.echo(f"today and yesterday: {usd_text(cleared.days_nanousd)} USD")
    for name, nanousd in cleared.further_nanousd.items():
        click.echo(f"{name}: {usd_text(nanousd)} USD")
    click.echo("throttle marker: " + ("cleared" if cleared.marker else "there was none"))


def _print_books(books: IdentifierBooks) -> None:
    if not books.is_known:
        click.echo(f"nothing is booked for {books.identifier}")
        return
    print_table(_limits_table(books))
    click.echo(_marker_line(books))
    if books.reset_at_us is not None:
        click.echo(f"books cleared: {_moment(books.reset_at_us // US_PER_SECOND)}")
    shown, of = len(books.reservations), books.reservations_in_all
    click.echo(f"reservations: {of}" + (f", the newest {shown}" if shown < of else ""))
    if shown:
        print_table(_reservations_table(books))


def _limits_table(books: IdentifierBooks) -> Table:
    right = [Column(title, justify="right", no_wrap=True) for title in ("limit $", "spent", "held", "expired", "left")]
    table = Table(Column("limit", no_wrap=True), *right, "renews", box=None, pad_edge=False)
    for limit in books.limits:
        table.add_row(*map(Text, _limit_cells(limit)))
    return table


def _limit_cells(limit: LimitUse) -> list[str]:
    amounts = (limit.limit_nanousd, limit.spent_nanousd, limit.held_nanousd, limit.expired_nanousd, limit.left_nanousd)
    renews = "" if limit.renews_at_seconds is None else _moment(limit.renews_at_seconds)
    name = f"{limit.name} (shadow)" if limit.is_shadow else limit.name
    return [name, *("none" if amount is None else usd_text(amount) for amount in amounts), renews]


def _marker_line(books: IdentifierBooks) -> str:
    marker = books.marker
    if marker is None:
        return "throttle marker: none"
    busy = ", only open reservations stood in the way" if marker.busy else ""
    cause = f"{marker.cause} ({marker.budget})" if marker.cause == Reason.BUDGET_LIMIT else marker.cause
    return f"throttle marker: {cause}, {marker.left_seconds} s left{busy}"


def _reservations_table(books: IdentifierBooks) -> Table:
    columns = (Column("reservation", no_wrap=True), "state", Column("$", justify="right"), "made", "age s")
    table = Table(*columns, box=None, pad_edge=False)
    for line in books.reservations:
        made = _moment(line.made_at_us // US_PER_SECOND)
        cells = (line.reservation_id, line.state, usd_text(line.nanousd), made, str(line.age_seconds))
        table.add_row(*map(Text, cells))
    return table


def _print_report(place: str, report: AuditReport) -> None:
    click.echo(f"books in: {place}")
    states = ", ".join(f"{count} {state}" for state, count in report.records.items())
    click.echo(f"keys: {report.keys}")
    click.echo(f"reservations: {sum(report.records.values())} ({states})")
    click.echo(f"held by open ones: {usd_text(report.open_nanousd)} USD")
    click.echo(f"held by expired ones: {usd_text(report.expired_nanousd)} USD, booked in full")
    click.echo(
        f"totals checked: {report.checked_exactly} to be equal, {report.checked_at_least} to be no less than their "
        f"reservations; {report.sums_checked} sums of days"
    )
    for key in report.undecided:
        click.echo(f"undecided, it moved all the while: {key}")
    for found in report.disagreements:
        click.echo(f"{found.kind}: {found.key} {found.told}")
    click.echo(f"disagreements: {len(report.disagreements)}")


def _moment(unix_seconds: int) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
