"""What is shown of a run: tables, JSON, comparison, pictures."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from benchmarks.service.figures import GOALS, Figure, Results
from benchmarks.service.rounds import Sample, Spread, spread

_PIPE_WIDTH = 170


def write_json(path: Path, results: Results, about: Mapping[str, str]) -> None:
    """All of it, sample by sample."""
    path.write_text(json.dumps({"about": about, **asdict(results)}, indent=2) + "\n", encoding="utf-8")


def print_report(results: Results, about: Mapping[str, str], earlier: Mapping[str, Any] | None) -> None:
    """Both tables, and what there is to say of them."""
    console = Console()
    console = console if console.is_terminal else Console(width=_PIPE_WIDTH)
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    console.print(_contenders(results.samples))
    console.print(_figures(results.figures, earlier))
    for each in results.figures:
        remark = f" [{each.remark}]" if each.remark else ""
        say(f"{GOALS[each.key].name}{remark}. What would make it lie: {GOALS[each.key].lies}")
    for remark in results.remarks:
        say(f"doubt: {remark}")
    for each in results.books:
        booked, billed = each.booked_nanousd / 1e9, each.billed_nanousd / 1e9
        verdict = "nothing overspent" if booked >= billed else "OVERSPENT"
        say(f"after {each.after}: booked {booked:.6f} USD, by the upstream's own count {billed:.6f} USD: {verdict}")
    say(", ".join(f"{name} {value}" for name, value in about.items()))


def missed(figures: Sequence[Figure]) -> list[str]:
    """The figures that are not what they have to be at least."""
    return [GOALS[each.key].name for each in figures if _reached(each) == "no"]


def draw(directory: Path, results: Results) -> list[Path]:
    """Two pictures; none where matplotlib is not installed."""
    try:
        import matplotlib as mpl  # noqa: PLC0415 (optional)

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    names = list(results.samples)
    found = []
    for stem, title in (("a_second", "requests a second, one worker"), ("cpu_ms", "processor ms an answer")):
        spreads = [_of(results.samples[name], stem) for name in names]
        figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(names)), layout="constrained")
        medians = [each.median for each in spreads]
        errors = [[each.median - each.least for each in spreads], [each.most - each.median for each in spreads]]
        axes.barh(
            names, medians, xerr=errors, capsize=3, color=["#888" if "ours" not in name else "#27c" for name in names]
        )
        axes.invert_yaxis()
        axes.set_title(f"{title}: median, least and most of the turns")
        found.append(directory / f"service-{stem}.png")
        figure.savefig(found[-1], dpi=120)
        plt.close(figure)
    return found


def _contenders(samples: Mapping[str, Sequence[Sample]]) -> Table:
    titles = (
        "requests a second",
        "processor ms",
        "first chunk p50 ms",
        "p99",
        "parts",
        "server",
        "upstream",
        "clients",
        "Redis",
        "others",
    )
    table = Table("one worker, 32 connections", *(Column(title, justify="right") for title in titles))
    for name, rows in samples.items():
        shares = ("server_share", "upstream_share", "load_share", "redis_share", "others_share")
        table.add_row(
            name,
            _text(_of(rows, "a_second"), 0),
            _text(_of(rows, "cpu_ms"), 2),
            f"{_of(rows, 'first_p50_ms').median:.1f}",
            f"{_of(rows, 'first_p99_ms').median:.1f}",
            f"{_of(rows, 'writes').median:.0f}",
            *(f"{_of(rows, share).median:.2f}" for share in shares),
        )
    return table


def _figures(figures: Sequence[Figure], earlier: Mapping[str, Any] | None) -> Table:
    before = {each["key"]: Spread(**each["measured"]) for each in earlier["figures"]} if earlier else {}
    titles = ["measured", "by processor", "at least", "aim", "reached", *(["earlier"] if earlier else [])]
    table = Table("figure", *(Column(title, justify="right", no_wrap=True) for title in titles))
    for each in figures:
        goal, sign = GOALS[each.key], "≥" if GOALS[each.key].is_least else "≤"
        was = [_text(before[each.key], 2) if each.key in before else ""] if earlier else []
        processor = "" if each.by_processor is None else _text(each.by_processor, 2)
        bounds = (f"{sign} {goal.bound:g} {goal.unit}", f"{goal.aim:g} {goal.unit}")
        table.add_row(goal.name, f"{_text(each.measured, 2)} {goal.unit}", processor, *bounds, _reached(each), *was)
    return table


def _reached(figure: Figure) -> str:
    goal, value = GOALS[figure.key], figure.measured.median
    sign = 1 if goal.is_least else -1
    return "aim" if sign * value >= sign * goal.aim else "yes" if sign * value >= sign * goal.bound else "no"


def _of(rows: Sequence[Sample], name: str) -> Spread:
    return spread([getattr(each, name) for each in rows])


def _text(value: Spread, places: int) -> str:
    text = f"{value.median:,.{places}f}"
    return text if value.least == value.most else f"{text} ({value.least:,.{places}f}–{value.most:,.{places}f})"
