"""The second table: one row per storage format. A format is a row here, and a codec here, in csrc/storage.h and in
kernels/storage.py.

Every codec has the same shape. A tensor holds ``stored`` elements. If ``per_aux`` is not 0, a second tensor holds one auxiliary
value for each ``per_aux`` consecutive elements: a scale for each block of 32, or the low half of each float32. ``decode`` turns
both into values. ``encode`` turns values into both, optionally with random bits. "Consecutive" means in memory order, in the
local tensor of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Decode = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]
Encode = Callable[[torch.Tensor, "torch.Tensor | None"], "tuple[torch.Tensor, torch.Tensor | None]"]


@dataclass(frozen=True)
class Format:
    """How a tensor's values are stored.

    The reference codec works on 1-d tensors: ``decode(stored, aux) -> values`` and ``encode(values, random) -> (stored, aux)``,
    where ``random`` holds 32 random bits per element as int64 if ``takes_random``. None: round to nearest, as when a checkpoint
    is loaded.
    """

    name: str  # the same in all three languages
    dtype: torch.dtype  # of an element in memory
    decode: Decode
    encode: Encode
    aux_dtype: torch.dtype | None = None
    per_aux: int = 0  # how many consecutive elements share one auxiliary value; 0: there is none
    takes_random: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which an update that writes this format computes."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def facts(self) -> tuple[str, str | None, int, bool]:
        """(dtype, aux_dtype, per_aux, takes_random), by which the tables of two languages can be compared."""
        aux = None if self.aux_dtype is None else str(self.aux_dtype).removeprefix("torch.")
        return str(self.dtype).removeprefix("torch."), aux, self.per_aux, self.takes_random

    @property
    def is_plain(self) -> bool:
        """Whether memory holds ordinary numbers of a torch dtype, rounded to nearest."""
        return self.per_aux == 0 and self.dtype.is_floating_point and not self.takes_random

    def num_aux(self, numel: int) -> int:
        """How many auxiliary values a tensor of ``numel`` stored elements has."""
        return -(numel // -self.per_aux) if self.per_aux else 0


def _plain(dtype: torch.dtype) -> Format:
    """A dtype of torch's as a format. Encoding rounds to nearest even."""
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Format(
        str(dtype).removeprefix("torch."),
        dtype,
        decode=lambda stored, aux: stored.to(compute_dtype),
        encode=lambda values, random: (values.to(dtype), None),
    )


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        _plain(torch.float32),
        _plain(torch.float64),
        _plain(torch.bfloat16),
        _plain(torch.float16),
    )
}
_OF_DTYPE = {row.dtype: row for row in FORMATS.values() if row.is_plain and not row.takes_random}


def plain_format(dtype: torch.dtype) -> Format | None:
    """The format of ordinary tensors of a dtype, complex ones as pairs of reals; None: there is no such row."""
    return _OF_DTYPE.get(dtype.to_real() if dtype.is_complex else dtype)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers, held in int64, that spreads every input bit (the finalizer of MurmurHash3)."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def random_bits(seed: int, step: int, numel: int) -> torch.Tensor:
    """32 random bits for each element, as int64. They depend on seed, step and element alone: the same on every backend."""
    elements = torch.arange(numel)
    key = _mixed((_mixed(torch.tensor(seed & 0xFFFFFFFF)) + step) & 0xFFFFFFFF)
    low, high = elements & 0xFFFFFFFF, elements >> 32
    return _mixed((_mixed((low + key) & 0xFFFFFFFF) + high) & 0xFFFFFFFF)
