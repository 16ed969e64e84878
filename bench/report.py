"""What a run prints and writes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fusedopt
from bench.peers import OURS, TORCH_FOREACH, TORCH_FUSED, TORCH_SPARSE
from bench.step import DISTURBED, LARGE, Result

SCHEMA = 3  # 2: spread, host cost of every contestant, modified, freed_memory_kept; 3: device of each row, gpu
# How many times faster than torch fused: AdamW after clip_grad_norm_, by workload; without clipping, every rule on all.
CLIPPED = {
    "cpu": {"gpt2-124m": 1.35, "4x16.8m": 1.35, "10x1m": 1.4, "1000x64": 30.0},
    "cuda": {"gpt2-124m": 1.25, "4x16.8m": 1.25, "1000x64": 5.0},
}
UNCLIPPED = 0.97
SHARE = {"cpu": 0.95, "cuda": 0.9}  # of the bandwidth of in-place add
VERDICTS = {True: "[green]met[/]", False: "[red]NOT MET[/]", None: "[yellow]not judged[/]"}


def is_disturbed(result: Result) -> bool:
    return (result.cores_used_by_others or 0.0) > DISTURBED


def targets(result: Result) -> list[tuple[str, float, bool | None]]:
    """(what, figure, met) for every target that a result is judged by; met is None where others disturbed the timing."""
    found = []
    fused, foreach = TORCH_FUSED.name, TORCH_FOREACH.name
    speedup = CLIPPED[result.device].get(result.workload) if result.clip else UNCLIPPED
    if speedup is not None and fused in result.step_ms:
        found.append((f">= {speedup}x {fused}", result.ratio(fused), result.ratio(fused) >= speedup))
    if fused not in result.step_ms and foreach in result.step_ms and result.params >= 1_000_000:
        found.append((f">= 3x {foreach}", result.ratio(foreach), result.ratio(foreach) >= 3))
    if TORCH_SPARSE in result.step_ms:
        found.append((f">= 3x {TORCH_SPARSE}", result.ratio(TORCH_SPARSE), result.ratio(TORCH_SPARSE) >= 3))
    if result.params >= LARGE:
        share, wanted = result.bandwidth_share(), SHARE[result.device]
        found.append((f">= {100 * wanted:.0f} % of in-place add", share, share >= wanted))
    if result.workload == "1000x1" and result.device == "cpu":
        microseconds = result.us_per_tensor(OURS.name)
        found.append(("<= 0.3 us a tensor", microseconds, microseconds <= 0.3))
    return [(what, figure, None if is_disturbed(result) else met) for what, figure, met in found]


def table(results: list[Result]) -> Table:
    peers = list(dict.fromkeys(name for result in results for name in result.step_ms if name != OURS.name))
    view = Table(title="Milliseconds a step (median), and how many times longer the others take")
    figures = ("min", "spread", *peers, "B/param", "GB/s", "of add", "us/tensor, all", "check")
    for column in ("workload", "rule", "clip", "ours", *figures, "target"):
        view.add_column(column, justify="left" if column in ("workload", "rule", "target") else "right")
    for result in results:
        times = [f"{result.median_ms(p):.3f} ({result.ratio(p):.2f}x)" if p in result.step_ms else "" for p in peers]
        has_many = result.tensors >= 1000
        judged = [f"{what}: {figure:.2f}, {VERDICTS[met]}" for what, figure, met in targets(result)]
        if is_disturbed(result):
            judged.append(f"[yellow]disturbed: others used {result.cores_used_by_others:.1f} cores[/]")
        view.add_row(
            result.workload,
            result.rule,
            "yes" if result.clip else "no",
            f"{result.median_ms(OURS.name):.3f}",
            f"{min(result.step_ms[OURS.name]):.3f}",
            f"{100 * result.spread(OURS.name):.0f} %",
            *times,
            str(result.bytes_per_param),
            "" if has_many else f"{result.gb_s():.1f}",
            f"{100 * result.bandwidth_share():.0f} %" if result.params >= LARGE else "",
            " / ".join(f"{result.us_per_tensor(name):.2f}" for name in result.step_ms) if has_many else "",
            f"{max(result.check.values()):.2f}" if result.check else "",
            "\n".join(judged),
        )
    return view


def machine() -> dict[str, object]:
    """The machine and the versions; no names of hosts or folders."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    commit = git("rev-parse", "--short", "HEAD")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "commit": commit,
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "date": datetime.date.today().isoformat(),
    }


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None where it says nothing or is missing."""
    command = ["git", "--no-optional-locks", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip() or None
    except OSError:
        return None


def write(results: list[Result], path: Path, memory_kept: bool) -> None:
    rows = []
    for result in results:
        figures = {
            "median_ms": {name: result.median_ms(name) for name in result.step_ms},
            "min_ms": {name: min(samples) for name, samples in result.step_ms.items()},
            "spread": {name: result.spread(name) for name in result.step_ms},
            "ratio": {name: result.ratio(name) for name in result.step_ms if name != OURS.name},
            "gb_s": result.gb_s(),
            "add_gb_s_median": statistics.median(result.add_gb_s) if result.add_gb_s else None,
            "bandwidth_share": result.bandwidth_share() if result.params >= LARGE else None,
            "us_per_tensor": {name: result.us_per_tensor(name) for name in result.step_ms},
            "targets": [{"what": what, "figure": figure, "met": met} for what, figure, met in targets(result)],
        }
        rows.append({**dataclasses.asdict(result), **figures})
    written = {"schema": SCHEMA, "machine": {**machine(), "freed_memory_kept": memory_kept}, "results": rows}
    path.write_text(json.dumps(written, indent=1) + "\n")


def show(results: list[Result], path: Path) -> None:
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table(results))
    about = machine()
    gpu = f"{about['gpu']}, " if results[0].device == "cuda" else ""
    console.print(f"{gpu}{about['cpu']}, {about['cores']} cores, {about['threads']} threads, torch {about['torch']}")
    console.print(f"written to {path}")
