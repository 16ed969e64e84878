"""Check, then time: one rule on one workload, all contestants in turn in one run."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.peers import OURS, BenchRule, Contestant

_BLOCK = [
    (768,),
    (768,),
    (768, 2304),
    (2304,),
    (768, 768),
    (768,),
    (768,),
    (768,),
    (768, 3072),
    (3072,),
    (3072, 768),
    (768,),
]
WORKLOADS = {
    "gpt2-124m": [(50257, 768), (1024, 768), *(_BLOCK * 12), (768,), (768,)],
    "4x16.8m": [(4096, 4096)] * 4,
    "10x1m": [(1000, 1000)] * 10,
    "1000x64": [(64,)] * 1000,
    "1000x1": [(1,)] * 1000,  # host cost
}
DISTURBED = 0.1  # cores
# Elements; below, a step stays in the cache and its bandwidth is not that of memory.
LARGE = 30_000_000


@dataclass
class Result:
    """Times of one rule on one workload; every list has one figure a round, in the order they were taken."""

    workload: str
    rule: str
    clip: bool
    tensors: int
    params: int
    bytes_per_param: int
    check: dict[str, float]  # peer -> largest part of the tolerance that a parameter used
    step_ms: dict[str, list[float]]  # contestant -> ms a step
    add_gb_s: list[float]  # in-place add in the same rounds, 12 bytes an element
    cores_used_by_others: float | None  # on average while timing; above DISTURBED the row says little

    def median_ms(self, name: str) -> float:
        return statistics.median(self.step_ms[name])

    def ratio(self, peer: str) -> float:
        """How many times longer the peer takes: median over rounds of the ratio within a round."""
        pairs = zip(self.step_ms[peer], self.step_ms[OURS.name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def gb_s(self) -> float:
        return self.params * self.bytes_per_param / self.median_ms(OURS.name) / 1e6

    def bandwidth_share(self) -> float:
        """Our bandwidth over that of in-place add, median over rounds."""
        moved = self.params * self.bytes_per_param / 1e6
        pairs = zip(self.step_ms[OURS.name], self.add_gb_s, strict=True)
        return statistics.median(moved / ms / add for ms, add in pairs)


class CheckFailed(Exception):
    """A contestant does not compute what ours computes; its time would mean nothing."""


def make_params(shapes: list[tuple[int, ...]], seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = 0.01 * torch.randn(param.shape, generator=generator)
    return params


def check(rule: BenchRule, clip: bool, peers: list[Contestant], shapes, lr: float = 1e-3) -> dict[str, float]:
    """Two steps of each contestant from the same start; returns the part of the tolerance used, by peer.

    The tolerance is 1e-5 of the largest parameter, a hundredth of one update.

    Raises:
        CheckFailed: a peer is outside of it.
    """
    ended = {}
    for contestant in (OURS, *peers):
        params = make_params(shapes)
        step = contestant.make(rule, params, clip, lr)
        step()
        step()
        ended[contestant.name] = torch.cat([param.detach().flatten() for param in params])
    ours = ended.pop(OURS.name)
    used = {name: float((theirs - ours).abs().max() / (1e-5 * ours.abs().max())) for name, theirs in ended.items()}
    for name, part in used.items():
        if not part <= 1:
            raise CheckFailed(f"{rule.name}, clip={clip}: {name} differs from ours by {part:.3g} times the tolerance")
    return used


def time_blocks(step: Callable[[], object], count: int) -> float:
    """Milliseconds a step, over ``count`` steps in a row."""
    start = time.perf_counter_ns()
    for _ in range(count):
        step()
    return (time.perf_counter_ns() - start) / count / 1e6


def cpu_seconds() -> tuple[float, float, float] | None:
    """(wall clock, CPU time of the whole machine, CPU time of this process), in seconds; None where /proc/stat is not."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    idle = fields[3] + fields[4]
    return time.perf_counter(), (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), time.process_time()


def run(
    workload: str, rule: BenchRule, clip: bool, peers: list[Contestant], rounds: int, block_ms: float = 20
) -> Result:
    """Times ours and every peer that has the rule, in turn, ``rounds`` times.

    A round takes as many steps in a row as fill ``block_ms``, so that short steps are timed in the steady state. The
    contestants share parameters and gradients; each has states of its own.
    """
    shapes = WORKLOADS[workload]
    small = [shape for shape in shapes if torch.Size(shape).numel() < 3_000_000][:50] or [(1000, 1003)]
    peers = [peer for peer in peers if peer.make(rule, [torch.nn.Parameter(torch.ones(1))], clip, 0.0)]
    used = check(rule, clip, peers, small)

    params = make_params(shapes)
    steps = {peer.name: peer.make(rule, params, clip, 1e-5) for peer in (OURS, *peers)}
    counts = {}
    for name, step in steps.items():
        step()
        counts[name] = max(1, round(block_ms / time_blocks(step, 2)))
    target, addend = torch.randn(1 << 26), torch.randn(1 << 26)
    target.add_(addend)
    times, add_gb_s = {name: [] for name in steps}, []
    before = cpu_seconds()
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(time_blocks(step, counts[name]))
        add_gb_s.append(12 * target.numel() / time_blocks(lambda: target.add_(addend), 1) / 1e6)
    others = None
    if before is not None:
        wall, busy, own = (end - start for start, end in zip(before, cpu_seconds(), strict=True))
        others = max(0.0, (busy - own) / wall)
    numel = sum(param.numel() for param in params)
    bytes_per_param = rule.bytes_per_param + (4 if clip else 0)
    return Result(workload, rule.name, clip, len(params), numel, bytes_per_param, used, times, add_gb_s, others)
