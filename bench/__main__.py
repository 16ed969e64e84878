"""``python -m bench cpu [--quick]``: times every rule against torch.optim, prints a table, writes JSON."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import torch
from rich.progress import track

from bench import report
from bench.peers import PEERS, RULES
from bench.step import WORKLOADS, CheckFailed, run

RESULTS = Path(__file__).parent / "results"


def plan(workloads: list[str], rules: list[str]) -> list[tuple[str, str, bool]]:
    """(workload, rule, clip) of every row: AdamW everywhere and clipped, the others on two workloads, not clipped."""
    rows = [(w, "AdamW", clip) for w in workloads for clip in (True, False) if "AdamW" in rules]
    return rows + [
        (w, rule, False) for rule in rules if rule != "AdamW" for w in workloads if w in ("4x16.8m", "10x1m")
    ]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("device", choices=sorted(PEERS))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no 124M-parameter model")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--rules", nargs="+", choices=RULES, metavar="NAME", help=", ".join(RULES))
    parser.add_argument("--rounds", type=int, help="default 15, with --quick 5")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, help="default: bench/results/DEVICE-DATE.json")
    options = parser.parse_args(argv)
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(argv: list[str]) -> int:
    options = arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    workloads = options.workloads or [name for name in WORKLOADS if not (options.quick and name == "gpt2-124m")]
    rounds = options.rounds or (5 if options.quick else 15)
    results = []
    try:
        rows = plan(workloads, options.rules or list(RULES))
        for workload, rule, clip in track(rows, "benchmark", disable=not sys.stderr.isatty(), transient=True):
            results.append(run(workload, RULES[rule], clip, list(PEERS[options.device]), rounds))
    except CheckFailed as error:
        print(f"bench: {error}; not timed", file=sys.stderr)
        return 1
    path = options.out or RESULTS / f"{options.device}-{datetime.date.today()}.json"
    report.write(results, path)
    report.show(results, path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
