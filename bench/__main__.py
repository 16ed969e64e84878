"""``python -m bench cpu|cuda|sparse [--quick]``: times every rule against torch.optim, prints a table, writes JSON.

``python -m bench choose [--quick]`` trains two small models with every optimizer, prints tables, writes JSON;
``python -m bench choose --page JSON`` puts them into docs/choosing.md. ``python -m bench schedules`` draws docs/schedules.svg.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
from rich.progress import track

from bench import report, sparse
from bench.peers import PEERS, RULES
from bench.step import WORKLOADS, CheckFailed, keep_freed_memory, run

RESULTS = Path(__file__).parent / "results"
ALL_RULES = ("4x16.8m", "10x1m")  # workloads that every rule runs on


def plan(workloads: list[str], rules: list[str]) -> list[tuple[str, str, bool]]:
    """(workload, rule, clip) of every row: AdamW everywhere and clipped, the others on a few workloads, not clipped."""
    return [
        (workload, rule, clip)
        for workload in workloads
        for rule in rules
        for clip in (True, False)
        if rule == "AdamW" or (not clip and (workload in ALL_RULES or (workload, rule) == ("gpt2-124m", "SAM(AdamW)")))
    ]


def default_path(device: str, whole: bool) -> Path:
    """Results that are kept are never overwritten; those of a part of the benchmark are, and git ignores them."""
    stem = f"{device}-{datetime.date.today()}"
    if not whole:
        return RESULTS / f"{stem}-quick.json"
    names = itertools.chain([f"{stem}.json"], (f"{stem}-{number}.json" for number in itertools.count(2)))
    return next(RESULTS / name for name in names if not (RESULTS / name).exists())


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line."""
        self.exit(2, f"bench: {message}\n")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("device", choices=[*sorted(PEERS), "sparse"], help="sparse: tables of embeddings, on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no 124M-parameter model")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--rules", nargs="+", choices=RULES, metavar="NAME", help=", ".join(RULES))
    parser.add_argument("--repeats", type=int, help="rounds of every row; default 15, with --quick 5")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, help="default: bench/results/DEVICE-DATE.json; of a part, -quick.json")
    options = parser.parse_args(argv)
    for name in ("repeats", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.device == "sparse" and (options.workloads or options.rules):
        parser.error("--workloads and --rules are those of dense gradients")
    options.out = options.out or default_path(
        options.device, whole=not (options.quick or options.workloads or options.rules)
    )
    check_writable(parser, options.out)
    return options


def check_writable(parser: Parser, out: Path) -> None:
    """Ends the program now, not after it has measured."""
    if out.is_dir() or not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        parser.error(f"--out: cannot write {out}")


def draw_schedules(argv: list[str]) -> int:
    if argv:
        Parser().error(f"schedules takes no arguments, got {' '.join(argv)}")
    from bench import schedules  # needs matplotlib, which a machine that only times need not have

    schedules.draw(schedules.PICTURE)
    print(f"written to {schedules.PICTURE}")
    return 0


def choose_optimizer(argv: list[str]) -> int:
    parser = Parser(prog="python -m bench choose")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--out", type=Path, help="default: bench/results/choose-DATE.json; with --quick, -quick.json")
    parser.add_argument(
        "--page", type=Path, metavar="JSON", help="measure nothing; its tables and picture go into docs/"
    )
    options = parser.parse_args(argv)
    if options.page and (options.quick or options.out):
        parser.error("--page measures nothing, so it takes neither --quick nor --out")
    if options.page and not options.page.is_file():
        parser.error(f"--page: no file {options.page}")
    from bench import choose, choose_page  # need scikit-learn and matplotlib

    if options.page:
        choose_page.update(options.page)
        return 0
    out = options.out or default_path("choose", whole=not options.quick)
    check_writable(parser, out)
    results = choose.run(choose.QUICK if options.quick else choose.FULL)
    out.write_text(choose.as_json(results))
    print(choose_page.tables(json.loads(out.read_text())))
    print(f"written to {out}")
    return 0


def main(argv: list[str]) -> int:
    if argv[:1] == ["schedules"]:
        return draw_schedules(argv[1:])
    if argv[:1] == ["choose"]:
        return choose_optimizer(argv[1:])
    options = arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: torch sees no GPU here", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    workloads = options.workloads or [
        name for name in WORKLOADS if not (options.quick and options.device == "cpu" and name == "gpt2-124m")
    ]
    rounds = options.repeats or (5 if options.quick else 15)
    if options.device == "sparse":
        rows = [functools.partial(sparse.run, table, rule, rounds) for table in sparse.TABLES for rule in sparse.RULES]
    else:
        peers = list(PEERS[options.device])
        rows = [
            functools.partial(run, workload, RULES[rule], clip, peers, rounds, options.device)
            for workload, rule, clip in plan(workloads, options.rules or list(RULES))
        ]
    if not rows:
        print(f"bench: nothing to time: rules other than AdamW run on {' and '.join(ALL_RULES)}", file=sys.stderr)
        return 2
    memory_kept = keep_freed_memory()
    results, failed = [], False
    for row in track(rows, "benchmark", disable=not sys.stderr.isatty(), transient=True):
        try:
            results.append(row())
        except CheckFailed as error:
            print(f"bench: {error}; not timed", file=sys.stderr)
            failed = True
    if results:
        report.write(results, options.out, memory_kept)
        report.show(results, options.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
