"""What docs/choosing.md shows of a run of ``python -m bench choose``: its tables and its picture."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib
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
    spreads = [100 * spread(samples) for samples in timing["ms_per_million_params"].values()]
    others = timing["cores_used_by_others"]
    head = (
        "optimizer",
        "adaptive",
        "momentum",
        "bytes",
        "ms",
        "× add",
        "GPT: loss",
        "digits: loss",
        "accuracy",
        "best for",
    )
    main = [
        (
            name,
            row.adaptive,
            row.momentum,
            f"{round(timing['state_bytes_per_param'][name], 1):g}",
            f"{statistics.median(timing['ms_per_million_params'][name]):.2f}",
            f"{statistics.median(a / b for a, b in zip(timing['ms_per_million_params'][name], add, strict=True)):.1f}",
            *figures(results, name),
            row.best_for,
        )
        for name, row in ROWS.items()
    ]
    pairs = dict.fromkeys(itertools.chain(*((row.variant_of, row.name) for row in VARIANTS.values())))
    of_variants = [(name, *figures(results, name)) for name in pairs]
    lrs = [lr for lr, _ in results["tasks"]["gpt"][WARMED[0]]["validation"]]
    of_lrs = [
        (
            name,
            *(
                "not finite" if loss is None else f"{loss:.3f}"
                for _, loss in results["tasks"]["gpt"][name]["validation"]
            ),
        )
        for name in WARMED
    ]
    return f"""
{markdown(head, main)}
Bytes: of state a parameter. ms: a clipped step, per million parameters, median of {len(add)} rounds over \
{timing["params"] / 1e6:g} million in float32; of SAM ascent and step, without the second gradient. × add: times as long as \
in-place add of as many elements ({statistics.median(add):.2f} ms) in the same round. The middle half of the rounds spreads \
over {min(spreads):.0f} to {max(spreads):.0f} % of the median; meanwhile other programs used \
{"an unknown number of" if others is None else f"{others:.1f}"} cores. {about["cpu"]}, {about["cores"]} cores, \
{timing["threads"]} threads, torch {about["torch"]}. Loss and accuracy: mean ± standard deviation over \
{len(budget["seeds"])} seeds, on test data; in brackets the lr, † where it is at an edge of its grid.

{markdown(("the same but for one thing", "GPT: loss", "digits: loss", "accuracy"), of_variants)}
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


def mean_and_deviation(values: list[float | None], unit: float, digits: int) -> str:
    if None in values:
        return "not finite"
    return f"{unit * statistics.fmean(values):.{digits}f} ± {unit * statistics.stdev(values):.{digits}f}"


def draw(results: Results, path: Path) -> None:
    """Dots: test loss, its deviation as a bar. Curves: training loss of the GPT, means over the seeds; its loss by lr."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 8), layout="constrained")
        (top_left, top_right), (curves, warmup) = figure.subplots(2, 2)
        for panel, (task, title) in zip((top_left, top_right), TITLES.items(), strict=True):
            names = list(ROWS)[::-1]
            losses = [[run["loss"] for run in results["tasks"][task][name]["test"]] for name in names]
            finite = [(name, values) for name, values in zip(names, losses, strict=True) if None not in values]
            panel.errorbar(
                [statistics.fmean(values) for _, values in finite],
                [name for name, _ in finite],
                xerr=[statistics.stdev(values) for _, values in finite],
                fmt="o",
                markersize=4,
            )
            panel.set(title=title)
            panel.grid(alpha=0.3)
        steps = results["budget"]["steps"]["gpt"]
        for number, name in enumerate(ROWS):
            seeds = [run["curve"] for run in results["tasks"]["gpt"][name]["test"]]
            means = [
                statistics.fmean(losses) if None not in losses else math.nan for losses in zip(*seeds, strict=True)
            ]
            ends = [steps * (part + 1) / len(means) for part in range(len(means))]
            line = ("-", "--", ":")[number % 3]
            curves.plot(ends, means, line, label=name, color=f"C{number // 3 * 2}", linewidth=1.2)
        curves.set(title="GPT: training loss", xlabel="gradients taken", yscale="log")
        curves.legend(fontsize=7, ncols=2)
        for name in WARMED:
            pairs = [pair for pair in results["tasks"]["gpt"][name]["validation"] if pair[1] is not None]
            warmup.plot(
                *zip(*pairs, strict=True), "--o" if "without" in name else "-o", label=name, linewidth=1.2, markersize=4
            )
        warmup.set(title="GPT: validation loss with and without warmup", xlabel="lr", xscale="log")
        warmup.legend()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
