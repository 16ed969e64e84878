from collections.abc import Callable, Sequence
from typing import Any

import torch

interface: str
"""Digest of this file as it was at the build; fusedopt/extension.py refuses an extension with another one."""
rules: dict[str, tuple[int, str, int, int]]
"""Kernel name -> (index, hyperparameter names in ABI order, number of state slots, number of sums over the tensor)."""
formats: dict[str, tuple[int, str, str | None, int, bool]]
"""Format name -> (index, dtype, dtype of auxiliary values, how many elements share one, whether it takes random bits)."""
max_dims: int
large_table: int
has_openmp: bool

torch_functions: list[str]
"""Names of the functions of torch's C ABI that `use_torch` wants the addresses of (0: it has none), in order."""

def use_torch(tensor: type, functions: list[int], known: list[tuple[int, int, int]]) -> bool: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> bool: ...

class Watch:
    def __init__(self, groups: list[dict[str, Any]], state: dict[torch.Tensor, dict[str, Any]]) -> None: ...
    def unchanged(self, groups: list[dict[str, Any]], state: dict[torch.Tensor, dict[str, Any]]) -> bool: ...

Slot = tuple[torch.Tensor, int, torch.Tensor | None]
"""A tensor, the index of its format, and its auxiliary values. In the order of `fusedopt.entry.Entry.slots`."""

class Bucket:
    def __init__(self, is_host: bool) -> None: ...
    def add_idle(self, param: torch.Tensor) -> None: ...
    def add(
        self,
        param: torch.Tensor,
        grad: torch.Tensor | None,
        slots: list[Slot | None],
        scalars: list[torch.Tensor],
        rule: int,
        group: int,
        seed: int,
        is_strided: bool,
        is_grad_handed: bool,
    ) -> None: ...
    def add_rows(
        self,
        param: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: list[Slot | None],
        scalars: list[torch.Tensor],
        rule: int,
        group: int,
        seed: int,
        is_strided: bool,
    ) -> None: ...
    def finish(self) -> None: ...
    def refresh(self, num_threads: int, may_move: bool, handed: list[torch.Tensor | None] = ...) -> bool: ...
    def grad_addresses(self) -> bytes: ...
    def release(self) -> None: ...
    def with_gradient(self, params: list[torch.Tensor]) -> list[torch.Tensor]: ...
    def grad_norm(self, is_weighted: Sequence[bool], num_threads: int) -> float: ...
    def first_nonfinite(self) -> int: ...
    def update(
        self,
        hyper: Sequence[Sequence[float]],
        grad_coef: Sequence[float],
        num_threads: int,
        increment_version: Callable[[list[torch.Tensor]], Any],
        written: list[torch.Tensor],
    ) -> None: ...
    def scratch_bytes(self) -> int: ...
