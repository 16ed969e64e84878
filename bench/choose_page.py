"""What docs/choosing.md shows of a run of ``python -m bench choose``: its tables and its picture."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.figure import Figure

from bench.choose import REFERENCE, ROWS, VARIANTS
from bench.schedules import STYLE
from bench.step import spread

PAGE = Path(__file__).parents[1] / "docs" / "choosing.md"
PICTURE = PAGE.with_suffix(".svg")
MARKED = re.compile(
    r"(<!-- tables of (\S+) -->\n).*(<!-- end of tables -->\n)", re.S
)  # the file, as a link of the page
TITLES = {"gpt": "GPT: test loss", "digits": "digits: test loss"}
MEASURED = ("GPT: loss", "digits: loss", "accuracy")
HEAD = ("optimizer", "adaptive", "momentum", "bytes", "ms", "× add", *MEASURED, "best for")
WARMED = ("AdamW", "AdamW without warmup", "RAdam", "RAdam without warmup")

Results = dict[str, Any]


def update(source: Path) -> None:
    """Puts the tables of a file of results into the page, and draws the picture."""
    results = json.loads(source.read_text())
    link = Path(os.path.relpath(source, PAGE.parent)).as_posix()
    PAGE.write_text(MARKED.sub(lambda _: marked(results, link), PAGE.read_text()))
    draw(results, PICTURE)


def marked(results: Results, link: str) -> str:
    return f"<!-- tables of {link} -->\n{tables(results)}<!-- end of tables -->\n"


def tables(results: Results) -> str:
    """Markdown."""
    about, timing, budget = results["machine"], results["timing"], results["budget"]
    add = timing["ms_per_million_params"][REFERENCE]
    others = timing["cores_used_by_others"]
    main = [
        (
            name,
            row.adaptive,
            row.momentum,
            f"{round(timing['state_bytes_per_param'][name], 1):g}",
            median_and_spread(timing["ms_per_million_params"][name]),
            f"{statistics.median(a / b for a, b in zip(timing['ms_per_million_params'][name], add, strict=True)):.1f}",
            *figures(results, name),
            row.best_for,
        )
        for name, row in ROWS.items()
    ]
    pairs = dict.fromkeys(itertools.chain(*((row.variant_of, row.name) for row in VARIANTS.values())))
    of_variants = [(name, *figures(results, name)) for name in pairs]
    warmed = {name: dict(results["tasks"]["gpt"][name]["validation"]) for name in WARMED}
    lrs = warmed[WARMED[0]]  # and those of the others
    of_lrs = [
        (name, *("not finite" if losses[lr] is None else f"{losses[lr]:.3f}" for lr in lrs))
        for name, losses in warmed.items()
    ]
    return f"""
{markdown(HEAD, main)}
Bytes: of state a parameter. ms: a clipped step, per million parameters, median of {len(add)} rounds over \
{timing["params"] / 1e6:g} million in float32; of SAM ascent and step, without the second gradient. × add: times as long as \
in-place add of as many elements (ms: {median_and_spread(add)}) in the same round. ±: half of what the middle half of the \
rounds spreads over; meanwhile other programs used \
{"an unknown number of" if others is None else f"{others:.1f}"} cores. {about["cpu"]}, {about["cores"]} cores, \
{timing["threads"]} threads, torch {about["torch"]}. Loss and accuracy: mean ± standard deviation over \
{len(budget["seeds"])} seeds, on test data; in brackets the lr, † where it is at an edge of its grid.

{markdown(("the same but for one thing", *MEASURED), of_variants)}
{markdown(("GPT: validation loss by lr, one seed", *(f"{lr:g}" for lr in lrs)), of_lrs)}
"""


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def figures(results: Results, name: str) -> tuple[str, str, str]:
    """GPT's loss, digits' loss and accuracy, as they are shown."""
    gpt, digits = (results["tasks"][task][name] for task in ("gpt", "digits"))
    return loss_of(gpt), loss_of(digits), mean_and_deviation([run["accuracy"] for run in digits["test"]], 100, 1) + " %"


def loss_of(result: Results) -> str:
    lrs = [lr for lr, _ in result["validation"]]
    edge = "†" if result["lr"] in (min(lrs), max(lrs)) else ""
    return f"{mean_and_deviation([run['loss'] for run in result['test']], 1, 3)} ({result['lr']:g}{edge})"


def median_and_spread(samples: list[float]) -> str:
    return f"{statistics.median(samples):.2f} ± {50 * spread(samples):.0f} %"


def mean_and_deviation(values: list[float | None], unit: float, digits: int) -> str:
    if None in values:
        return "not finite"
    return f"{unit * statistics.fmean(values):.{digits}f} ± {unit * statistics.stdev(values):.{digits}f}"


def draw(results: Results, path: Path) -> None:
    """Dots: test loss, its deviation as a bar. Curves: training loss of the GPT, means over the seeds; its loss by lr."""
    gpt = results["tasks"]["gpt"]
    names = list(ROWS)[::-1]  # the first one on top
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 8), layout="constrained")
        dots, (curves, by_lr) = figure.subplots(2, 2)
        for panel, (task, title) in zip(dots, TITLES.items(), strict=True):
            losses = numbers([[run["loss"] for run in results["tasks"][task][name]["test"]] for name in names])
            panel.errorbar(losses.mean(1), names, xerr=losses.std(1, ddof=1), fmt="o", markersize=4)
            panel.set(title=title)
            panel.grid(alpha=0.3)
        for number, name in enumerate(ROWS):
            means = numbers([run["curve"] for run in gpt[name]["test"]]).mean(0)
            ends = numpy.arange(1, len(means) + 1) * results["budget"]["steps"]["gpt"] / len(means)
            style = {"linestyle": ("-", "--", ":")[number % 3], "color": f"C{number // 3 * 2}", "linewidth": 1.2}
            curves.plot(ends, means, label=name, **style)
        curves.set(title="GPT: training loss", xlabel="gradients taken", yscale="log")
        curves.legend(fontsize=7, ncols=2, loc="upper right")
        for name in WARMED:
            lrs, losses = numbers(gpt[name]["validation"]).T
            by_lr.plot(lrs, losses, "--o" if "without" in name else "-o", label=name, markersize=4)
        by_lr.set(title="GPT: validation loss by lr, one seed", xlabel="lr", xscale="log")
        by_lr.legend()
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def numbers(values: list) -> numpy.ndarray:
    """NaN, which leaves a gap in a picture, in place of None."""
    return numpy.array(values, dtype=float)
