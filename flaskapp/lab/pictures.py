"""The report's pictures, as PNG. matplotlib is the extra `lab`; nothing else of the project needs it."""

import io
import itertools
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from backends.errors import ConfigurationError
from backends.money import NANOUSD_PER_USD
from flaskapp.lab.measure import Block, FailingOrder, Overspend, ServerTime, Throughput
from flaskapp.lab.race import RaceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

WIDTH_INCHES = 6.4
INK, SOFT, LINE, BAD = "#1b2330", "#5a6575", "#dfe3e9", "#b3261e"
COLOURS = {"legacy": "#c9482b", "multi": "#b47a00", "watch": "#1f5fbf", "atomic": "#1c7a4a"}
OTHERS = ("#6b4fa3", "#2a8c9e", "#8a5a44")
NOT_THERE = "the report draws with matplotlib, which is not installed: python -m pip install 'matplotlib>=3.10'"
_STYLE: Any = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": "#ffffff",
    # A dollar is a dollar.
    "text.parse_math": False,
}


def check_there() -> None:
    """Before anything is measured.

    Raises:
        ConfigurationError: matplotlib is missing; the line says how to install it.
    """
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (an extra)
    except ImportError as error:
        raise ConfigurationError(NOT_THERE) from error


def colour_of(name: str, names: Sequence[str]) -> str:
    """Always the same for ours."""
    others = [each for each in names if each not in COLOURS]
    return COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)]


Drawing = ParamSpec("Drawing")


def _styled(draw: Callable[Drawing, bytes]) -> Callable[Drawing, bytes]:
    @wraps(draw)
    def drawn(*args: Drawing.args, **kwargs: Drawing.kwargs) -> bytes:
        import matplotlib as mpl  # noqa: PLC0415 (an extra)

        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


class _Picture:
    """One figure with one pair of axes."""

    def __init__(self, height_inches: float) -> None:
        # Not pyplot: it keeps figures and looks for a display.
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

        self.figure: Figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        self.axes: Axes = self.figure.subplots()

    def png(self) -> bytes:
        out = io.BytesIO()
        # No date and no version in it: the same figures give the same bytes.
        self.figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
        return out.getvalue()


@_styled
def overspend(found: Sequence[Overspend]) -> bytes:
    """Dollars spent for each dollar of the limit, against callers at once."""
    picture, names = _Picture(4.2), _names(found)
    axes = picture.axes
    for name, was_held in itertools.product(names, (True, False)):
        its = [each for each in found if each.backend == name and each.was_held == was_held]
        if not its:
            continue
        has_both = any(each.was_held for each in found if each.backend == name)
        by_luck = has_both and not was_held
        how = ", by luck" if by_luck else ", held in its gap" if has_both else ""
        # Where several lie on one another, each is seen: the later, the thinner.
        wider = 1.5 * (len(names) - 1 - names.index(name))
        axes.plot(
            [each.concurrency for each in its],
            [each.spent_to_limit for each in its],
            label=f"{name}{how}",
            color=colour_of(name, names),
            linestyle=":" if by_luck else "-",
            marker="o",
            # Hollow, so that one sees it where it lies on the other.
            markerfacecolor="#ffffff" if by_luck else None,
            linewidth=2 + wider,
            markersize=6 + wider,
        )
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.annotate("the limit", (1, 1), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=INK)
    axes.set(xscale="log", yscale="log", xlabel="callers at once", ylabel="$ spent for each $ of the limit")
    for axis, ticks in ((axes.xaxis, sorted({each.concurrency for each in found})), (axes.yaxis, [1, 2, 5, 10, 20])):
        axis.set_ticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.legend(loc="upper left")
    return picture.png()


@_styled
def latency(results: Sequence[RaceResult]) -> bytes:
    """Median of the check, against what Redis is farther away."""
    picture, names, bars = _Picture(4.4), _names(results), []
    for name in names:
        its = [each for each in results if each.backend == name]
        colour = colour_of(name, names)
        alone = [each.check_alone_p50_ms for each in its if each.check_alone_p50_ms is not None]
        if alone:
            bars.append((f"{name}: its check alone", alone, colour, 0.45))
        what = "check and record" if alone else "both in one"
        bars.append((f"{name}: {what}", [each.check_p50_ms for each in its], colour, 1.0))
    _at_each_distance(picture.axes, bars, _rtts(results), "{:.3g}", "median, milliseconds")
    return picture.png()


@_styled
def round_trips(results: Sequence[RaceResult]) -> bytes:
    """What a request sends to Redis and waits for."""
    near = [each for each in results if each.rtt_ms == min(_rtts(results))]
    picture = _Picture(0.9 + 0.55 * len(near))
    names = [each.backend for each in near]
    trips = [each.round_trips_a_request or 0 for each in near]
    bars = picture.axes.barh(names, trips, color=[colour_of(name, names) for name in names], height=0.6)
    picture.axes.bar_label(bars, fmt="{:.1f}", padding=4, color=INK)
    picture.axes.invert_yaxis()
    picture.axes.set_xlim(0, max(trips) * 1.12)
    picture.axes.set_xlabel("round trips a request")
    picture.axes.grid(visible=False, axis="y")
    return picture.png()


@_styled
def throughput(found: Sequence[Throughput], callers: int) -> bytes:
    """Decisions a second."""
    picture, names = _Picture(4.2), _names(found)
    bars = [
        (name, [each.a_second for each in found if each.backend == name], colour_of(name, names), 1.0) for name in names
    ]
    _at_each_distance(picture.axes, bars, _rtts(found), "{:,.0f}", f"decisions a second, {callers} callers")
    return picture.png()


@_styled
def server_time(found: Sequence[ServerTime]) -> bytes:
    """Processor time of the server for a decision, against the requests in the window."""
    picture, names = _Picture(4.0), _names(found)
    axes = picture.axes
    for name in names:
        its = [each for each in found if each.backend == name]
        across, up = [each.in_window for each in its], [each.us for each in its]
        axes.plot(across, up, color=colour_of(name, names), marker="o", linewidth=2.2, label=name)
    axes.set(xscale="log", xlabel="requests in the window", ylabel="µs of Redis' processor, each")
    ticks = sorted({each.in_window for each in found})
    axes.set_xticks(ticks, [_short(tick) for tick in ticks])
    axes.set_ylim(0, max(each.us for each in found) * 1.2)
    axes.legend(loc="upper left", ncols=len(names))
    return picture.png()


@_styled
def lanes(order: FailingOrder) -> bytes:
    """Two lanes, time goes down: who does what, and what the books hold after it."""
    picture = _Picture(1.5 * len(order.blocks) + 1.0)
    axes = picture.axes
    axes.set_axis_off()
    axes.set_xlim(0, 3)
    axes.set_ylim(len(order.blocks) + 0.05, -0.55)
    for column, title in enumerate(("caller A", "caller B", "the books")):
        axes.text(column + 0.5, -0.3, title, ha="center", va="center", weight="bold", color=INK)
        axes.plot([column + 0.5] * 2, [-0.1, len(order.blocks)], color=LINE, linewidth=2, zorder=0)
    for row, block in enumerate(order.blocks):
        _block(axes, order, row, block)
    return picture.png()


def _block(axes: "Axes", order: FailingOrder, row: int, block: Block) -> None:
    column = "AB".index(block.caller)
    is_check, is_over = block.does != "record", block.window_nanousd > order.limit_nanousd
    colour = "#1f5fbf" if is_check else COLOURS["legacy"]
    face = "#eaf1fb" if is_check else "#fbe9e4"
    axes.add_patch(_box(column, row, face, colour))
    cost, limit = _usd(order.cost_nanousd), _usd(order.limit_nanousd)
    head, what = {
        "check": ("checks", f"sees {_usd(block.window_nanousd)} spent:\n{cost} fits"),
        "check_on": ("checks on", "and does not look\nat the window again"),
        "record": ("records", f"adds {cost}"),
    }[block.does]
    commands = f"{block.reads + block.writes} commands"
    axes.text(column + 0.5, row + 0.28, head, ha="center", va="center", weight="bold", color=colour)
    axes.text(column + 0.5, row + 0.56, f"{what}\n{commands}", ha="center", va="center", fontsize=10, color=INK)
    axes.annotate(
        "",
        (2.2, row + 0.45),
        (column + 0.95, row + 0.45),
        arrowprops={"arrowstyle": "<|-" if is_check else "-|>", "color": SOFT, "linewidth": 1.2},
    )
    axes.text(
        2.5,
        row + 0.45,
        f"{_usd(block.window_nanousd)}\nof {limit}" + ("\nOVER" if is_over else ""),
        ha="center",
        va="center",
        weight="bold" if is_over else "normal",
        color=BAD if is_over else INK,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": "#ffffff", "edgecolor": BAD if is_over else LINE},
    )


def _box(column: int, row: int, face: str, edge: str) -> "Patch":
    from matplotlib.patches import FancyBboxPatch  # noqa: PLC0415 (an extra)

    style = "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch((column + 0.08, row + 0.1), 0.84, 0.74, boxstyle=style, facecolor=face, edgecolor=edge)


def _at_each_distance(
    axes: "Axes", bars: Sequence[tuple[str, list[float], str, float]], rtts_ms: Sequence[float], written: str, what: str
) -> None:
    """Bars side by side for each distance: label, values, colour and opacity of each."""
    width = 0.84 / len(bars)
    for number, (label, values, colour, alpha) in enumerate(bars):
        places = [group + (number - (len(bars) - 1) / 2) * width for group in range(len(rtts_ms))]
        drawn = axes.bar(places, values, width * 0.94, label=label, color=colour, alpha=alpha)
        is_crowded = len(bars) > 3  # noqa: PLR2004 (what fits side by side)
        axes.bar_label(drawn, fmt=written, padding=3, color=INK, fontsize=10, rotation=90 if is_crowded else 0)
    axes.set_xticks(range(len(rtts_ms)), [f"{rtt_ms:g} ms farther" for rtt_ms in rtts_ms])
    axes.grid(visible=False, axis="x")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(bars), 2), fontsize=11)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    # Room for what is written on the highest bar.
    least, most = axes.get_ylim()
    axes.set_ylim(least, most * 2)
    axes.set_ylabel(f"{what}, log scale")


def _names(found: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(each.backend for each in found))


def _rtts(found: Sequence[RaceResult] | Sequence[Throughput]) -> list[float]:
    return sorted({each.rtt_ms for each in found})


def _short(number: int) -> str:
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number // size}{letter}"
    return str(number)


def _usd(amount_nanousd: int) -> str:
    return f"${amount_nanousd / NANOUSD_PER_USD:.5f}".rstrip("0") if amount_nanousd else "$0"
