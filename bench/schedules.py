"""``python -m bench schedules``: draws every schedule of fusedopt.schedules, one panel each, into docs/schedules.svg."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from fusedopt import schedules

PICTURE = Path(__file__).parents[1] / "docs" / "schedules.svg"
STEPS = 1000
PANELS = {  # title: {label: how the schedule is made}
    "warmup_cosine": {"": lambda opt: schedules.warmup_cosine(opt, STEPS, 100)},
    "warmup_stable_decay": {
        "1-sqrt": lambda opt: schedules.warmup_stable_decay(opt, STEPS, 100, 200),
        "linear": lambda opt: schedules.warmup_stable_decay(opt, STEPS, 100, 200, decay="linear"),
    },
    "linear": {"": lambda opt: schedules.linear(opt, STEPS, 100)},
    "one_cycle": {"": lambda opt: schedules.one_cycle(opt, STEPS, 300)},
    "inverse_sqrt": {"": lambda opt: schedules.inverse_sqrt(opt, 100)},
    "step": {"": lambda opt: schedules.step(opt, 300, warmup_steps=100)},
}
# The same file each time, and of any machine: text stays text, ids come from this salt.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fusedopt", "font.size": 9, "path.simplify": True}


def factors(make: Callable) -> list[float]:
    """The lr of each step as a part of the peak, from the scheduler itself."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    lrs = []
    for _ in range(STEPS):
        lrs += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return lrs


def draw(path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots(2, 3, sharex=True, sharey=True)
        for panel, (title, curves) in zip(axes.flat, PANELS.items(), strict=True):
            for (label, make), line in zip(curves.items(), ("-", "--"), strict=False):
                panel.plot(range(1, STEPS + 1), factors(make), line, label=label, linewidth=1.5)
            panel.set(title=title, ylim=(0, 1.05))
            if len(curves) > 1:
                panel.legend(loc="lower center")
        figure.supxlabel(f"optimizer step, of {STEPS}")
        figure.supylabel("part of the peak lr")
        figure.savefig(path, metadata={"Date": None, "Creator": None})
