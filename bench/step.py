"""Check, then time: one rule on one workload, all contestants in turn in one run."""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.peers import MAX_NORM, OURS, BenchRule, Contestant

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
ADD_ELEMENTS = 1 << 26  # 256 MB a tensor


@dataclass
class Result:
    """Times of one rule on one workload; every list has one figure a round, in the order they were taken."""

    device: str
    workload: str
    rule: str
    clip: bool
    tensors: int
    params: int
    bytes_per_param: int
    check: dict[str, float]  # peer -> largest part of the tolerance that a parameter used
    step_ms: dict[str, list[float]]  # contestant -> ms a step
    add_gb_s: list[float]  # in-place add in the same rounds, 12 bytes an element; none below LARGE
    cores_used_by_others: float | None  # on average while timing; above DISTURBED the row says little

    def median_ms(self, name: str) -> float:
        return statistics.median(self.step_ms[name])

    def spread(self, name: str) -> float:
        return spread(self.step_ms[name])

    def us_per_tensor(self, name: str) -> float:
        return self.median_ms(name) * 1e3 / self.tensors

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


def spread(samples: list[float]) -> float:
    """Their middle half (third quartile less first), as a part of the median."""
    ordered = sorted(samples)
    first, third = (ordered[round(part * (len(ordered) - 1))] for part in (0.25, 0.75))
    return (third - first) / statistics.median(samples)


class CheckFailed(Exception):
    """A contestant does not compute what ours computes; its time would mean nothing."""


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, to the peers' advantage; whether that was possible.

    By default glibc gives large blocks back to the system, or not, by what ran before, and torch foreach, which allocates
    its temporaries anew in every step, pays page faults or does not: 60 or 130 to 500 ms for one and the same step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    never_mmap, never_trim = mallopt(-4, 0), mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return bool(never_mmap and never_trim)


@functools.lru_cache(maxsize=1)  # rows of one workload follow each other
def make_data(shapes: tuple[tuple[int, ...], ...], device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(parameters, gradients) of a workload; nobody writes to them."""
    generator = torch.Generator(device).manual_seed(0)
    start = [0.02 * torch.randn(shape, generator=generator, device=device) for shape in shapes]
    return start, [0.1 * torch.randn(shape, generator=generator, device=device) for shape in shapes]


@torch.no_grad()
def load(params: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)


@torch.no_grad()
def load_grads(params: list[torch.nn.Parameter], grads: list[torch.Tensor], scale: float) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad.copy_(grad).mul_(scale)


def check(
    steps: dict[str, Callable[[], object]], params: list[torch.nn.Parameter], start, grads, clip: bool
) -> dict[str, float]:
    """Two steps of each contestant from the same start; returns the part of the tolerance used, by peer.

    The tolerance is a thousandth of the largest move of a parameter in these steps, and four roundings of the largest one.
    Adam's update hardly changes when all gradients are scaled alike, so with clipping the first gradient is above the norm
    allowed and the second below: a contestant that does not clip, or to another norm, mixes the two differently.

    Raises:
        CheckFailed: a peer is outside of it.
    """
    norm = float(torch.nn.utils.get_total_norm(grads))
    scales = (4 * MAX_NORM / norm, MAX_NORM / 2 / norm) if clip else (1.0, 0.5)
    ours, tolerance, used = [], 0.0, {}
    for name in (OURS.name, *(name for name in steps if name != OURS.name)):
        load(params, start)
        for scale in scales:
            load_grads(params, grads, scale)
            steps[name]()
        if name == OURS.name:
            ours = [param.detach().clone() for param in params]
            tolerance = 1e-3 * largest_difference(ours, start) + 2**-22 * max(float(v.abs().max()) for v in start)
        else:
            used[name] = largest_difference(params, ours) / tolerance
            if not used[name] <= 1:
                raise CheckFailed(f"{name} differs from ours by {used[name]:.3g} times the tolerance")
    return used


@torch.no_grad()
def largest_difference(left, right) -> float:
    """Infinite or NaN where an element is."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(left, right, strict=True)]).max())


def time_blocks(step: Callable[[], object], count: int, device: str) -> float:
    """Milliseconds a step, over ``count`` steps in a row, until the device has done them."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()
    start = time.perf_counter_ns()
    for _ in range(count):
        step()
    finish()
    return (time.perf_counter_ns() - start) / count / 1e6


def cpu_seconds() -> tuple[float, float, float] | None:
    """(wall clock, CPU time of the whole machine, CPU time of this process), in seconds; None where /proc/stat is not."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    idle = fields[3] + fields[4]
    return time.perf_counter(), (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), time.process_time()


def cores_used_by_others(before: tuple[float, float, float] | None) -> float | None:
    """On average since `cpu_seconds` gave ``before``."""
    if before is None:
        return None
    wall, busy, own = (end - start for start, end in zip(before, cpu_seconds(), strict=True))
    return max(0.0, (busy - own) / wall)


def run(
    workload: str,
    rule: BenchRule,
    clip: bool,
    peers: list[Contestant],
    rounds: int,
    device: str = "cpu",
    block_ms: float = 20,
) -> Result:
    """Checks, then times ours and every peer that has the rule, in turn, ``rounds`` times.

    A round takes as many steps in a row as fill ``block_ms``, so that short steps are timed in the steady state. The
    contestants share parameters and gradients; each has states of its own. What is timed are the objects that were checked.
    clip_grad_norm_ writes the gradients it clips, so from the second step on their norm is at the limit; no one's work
    depends on that.

    Raises:
        CheckFailed: a peer computes something else; nothing was timed.
    """
    start, grads = make_data(tuple(WORKLOADS[workload]), device)
    params = [torch.nn.Parameter(value.clone()) for value in start]
    for param in params:
        param.grad = torch.zeros_like(param)
    made = {contestant.name: contestant.make(rule, params, clip, 1e-3) for contestant in (OURS, *peers)}
    steps = {name: step for name, step in made.items() if step is not None}
    try:
        used = check(steps, params, start, grads, clip)
    except CheckFailed as error:
        raise CheckFailed(f"{workload}, {rule.name}, {'with' if clip else 'without'} clip: {error}") from None

    load_grads(params, grads, 1.0)
    counts = {name: max(1, round(block_ms / time_blocks(step, 1, device))) for name, step in steps.items()}
    numel = sum(param.numel() for param in params)
    times, add_gb_s = {name: [] for name in steps}, []
    if numel >= LARGE:
        target, addend = (torch.ones(ADD_ELEMENTS, device=device) for _ in range(2))
        target.add_(addend)
    before = cpu_seconds()
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(time_blocks(step, counts[name], device))
        if numel >= LARGE:
            add_gb_s.append(
                12 * ADD_ELEMENTS / time_blocks(lambda: target.add_(addend), 2 if device == "cpu" else 20, device) / 1e6
            )
    others = cores_used_by_others(before)
    bytes_per_param = rule.bytes_per_param + (4 if clip else 0)
    return Result(device, workload, rule.name, clip, len(params), numel, bytes_per_param, used, times, add_gb_s, others)
