"""Sparse gradients: a table of embeddings, 4096 rows of which each step touches. Check, then time, as in step.py."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

import fusedopt
from bench.peers import OURS, TORCH_SPARSE
from bench.step import CheckFailed, Result, cpu_seconds, largest_difference

TABLES = {"1m x 128": (1_000_000, 128), "100k x 128": (100_000, 128)}
ROWS, LOOKUPS = 4096, 8192  # of a step: every row at least once, in random order
GRADIENTS = 8  # that take turns, so that a step finds its rows in memory and not in the cache
# Ours, torch's, and the bytes an element of a touched row takes: read and write parameter and states, read two lookups.
RULES: dict[str, tuple[Callable, Callable, int]] = {
    "SGD": (fusedopt.SGD, torch.optim.SGD, 16),
    "Adagrad": (fusedopt.Adagrad, torch.optim.Adagrad, 24),
    "Adam": (functools.partial(fusedopt.Adam, sparse="lazy"), torch.optim.SparseAdam, 32),
}


@functools.lru_cache(maxsize=1)
def make_gradients(shape: tuple[int, int]) -> list[torch.Tensor]:
    """Uncoalesced, as an embedding's backward leaves them."""
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for _ in range(GRADIENTS):
        rows = torch.randperm(shape[0], generator=generator)[: min(ROWS, shape[0])]
        again = rows[torch.randint(len(rows), (LOOKUPS - len(rows),), generator=generator)]
        lookups = torch.cat([rows, again])[torch.randperm(LOOKUPS, generator=generator)]
        values = torch.randn((LOOKUPS, shape[1]), generator=generator)
        gradients.append(torch.sparse_coo_tensor(lookups[None], values, shape, check_invariants=False))
    return gradients


def time_steps(step: Callable[[], Any], param: torch.nn.Parameter, gradients: list[torch.Tensor]) -> float:
    """Milliseconds a step, over one step with each gradient."""
    spent = 0
    for gradient in gradients:
        param.grad = gradient
        start = time.perf_counter_ns()
        step()
        spent += time.perf_counter_ns() - start
    return spent / len(gradients) / 1e6


def run(table: str, rule: str, rounds: int) -> Result:
    """Checks, then times ours and torch's in turn, ``rounds`` times. They share the table; states are their own.

    Raises:
        CheckFailed: torch's parameters differ by more than a thousandth of the largest move; nothing was timed.
    """
    shape = TABLES[table]
    gradients = make_gradients(shape)
    start = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    param = torch.nn.Parameter(start.clone())
    ours, theirs, bytes_per_param = RULES[rule]
    # The two have eps in different places, so one that is too small to matter.
    made = {OURS.name: ours([param], lr=1e-3), TORCH_SPARSE: theirs([param], lr=1e-3)}
    for optimizer in made.values():
        if "eps" in optimizer.defaults:
            optimizer.param_groups[0]["eps"] = 1e-12
    steps = {name: optimizer.step for name, optimizer in made.items()}
    results = []
    for step in steps.values():
        param.data.copy_(start)
        time_steps(step, param, gradients[:2])
        results.append(param.detach().clone())
    tolerance = 1e-3 * largest_difference(results[:1], [start])
    used = largest_difference(results[1:], results[:1]) / tolerance
    if not used <= 1:
        raise CheckFailed(f"{table}, {rule}: {TORCH_SPARSE} differs from ours by {used:.3g} times the tolerance")
    del results, start

    times, before = {name: [] for name in steps}, cpu_seconds()
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(time_steps(step, param, gradients))
    others = None
    if before is not None:
        wall, busy, own = (end - start for start, end in zip(before, cpu_seconds(), strict=True))
        others = max(0.0, (busy - own) / wall)
    touched = min(ROWS, shape[0]) * shape[1]
    check = {TORCH_SPARSE: used}
    return Result("cpu", f"sparse, {table}", rule, False, 1, touched, bytes_per_param, check, times, [], others)
