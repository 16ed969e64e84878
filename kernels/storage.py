"""How values are stored: a codec for each row of fusedopt/formats.py, found by the same name, and loads and stores by format.

A plain format is one of Triton's dtypes, to which values are converted. Any other has its formulas, those of csrc/storage.h, in
`_decode`, `_encode` and, if elements share an auxiliary value, `_aux_of`: with one `return` each, since the compiler compares
the types of all of them.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Format:
    """What the compiler must know of a format. It is part of the key under which Triton keeps a compiled kernel."""

    name: str
    dtype: tl.dtype  # of a stored element
    aux_dtype: tl.dtype | None = None
    per_aux: int = 0  # how many consecutive elements share one auxiliary value; 0: there is none
    takes_random: bool = False

    @property
    def is_plain(self) -> bool:
        return self.per_aux == 0 and not self.takes_random and self.dtype.is_floating()


FORMATS = {
    row.name: row
    for row in (
        Format("float32", tl.float32),
        Format("float64", tl.float64),
        Format("bfloat16", tl.bfloat16),
        Format("float16", tl.float16),
    )
}


# ---- codecs ------------------------------------------------------------------------------------------------------


@triton.jit
def _decode(stored, aux, FORMAT: tl.constexpr):
    """The values of stored elements. ``aux`` has one auxiliary value for each of them, if the format has any."""
    values = stored
    return values


@triton.jit
def _encode(values, aux, random, FORMAT: tl.constexpr):
    """What is stored for values, and their auxiliary values, which are made here if each value has one of its own.

    ``random`` has 32 bits for each value, if the format takes them.
    """
    stored = values
    if FORMAT.is_plain:
        if FORMAT.dtype.primitive_bitwidth < values.dtype.primitive_bitwidth:
            stored = values.to(FORMAT.dtype, fp_downcast_rounding="rtne")
    return stored, aux


@triton.jit
def _aux_of(largest, FORMAT: tl.constexpr):
    """The auxiliary value of each block of elements, from the largest of their magnitudes."""
    aux = largest
    return aux


# ---- random bits -------------------------------------------------------------------------------------------------


@triton.jit
def _mixed(bits):
    """A bijection of uint32 that spreads every input bit: the finalizer of MurmurHash3."""
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def random_bits(seed, step, elements):
    """32 random bits for each element of a tensor in a step: on every backend the same."""
    key = _mixed(_mixed(seed) + step)
    return _mixed(_mixed(elements.to(tl.uint32) + key) + (elements >> 32).to(tl.uint32))


# ---- blocks of elements ------------------------------------------------------------------------------------------


@triton.jit
def load(
    address, aux_address, begin, limit,
    FORMAT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Values of a tensor, in DTYPE. IS_WHOLE: it starts at 16 bytes, and all of the block lies before the limit."""
    offsets = begin + tl.arange(0, BLOCK)
    pointer = address.to(tl.pointer_type(FORMAT.dtype))
    if IS_WHOLE:
        stored = tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        stored = tl.load(pointer + offsets, mask=offsets < limit, other=0)
    aux = stored  # not looked at
    if FORMAT.per_aux > 0:
        aux_pointer = aux_address.to(tl.pointer_type(FORMAT.aux_dtype))
        aux = tl.load(aux_pointer + offsets // FORMAT.per_aux, mask=offsets < limit, other=0)
    return _decode(stored, aux, FORMAT).to(DTYPE)


@triton.jit
def store(
    address, aux_address, begin, limit, values, seed, step,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Stores the values of a block. ``seed`` and ``step`` point to what random bits depend on, beside the element."""
    offsets = begin + tl.arange(0, BLOCK)
    aux, random = values, offsets  # not looked at
    if FORMAT.per_aux > 0:
        aux_pointer = aux_address.to(tl.pointer_type(FORMAT.aux_dtype))
    if FORMAT.per_aux > 1:
        # As integers, magnitudes have the same order, with NaN last, which a maximum of floats may leave out.
        magnitudes = tl.where(offsets < limit, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        largest = tl.max(tl.reshape(magnitudes, (BLOCK // FORMAT.per_aux, FORMAT.per_aux)), 1)
        aux = _aux_of(largest.to(tl.float32, bitcast=True), FORMAT)
        blocks = begin // FORMAT.per_aux + tl.arange(0, BLOCK // FORMAT.per_aux)
        tl.store(aux_pointer + blocks, aux, mask=blocks * FORMAT.per_aux < limit)
        aux = tl.reshape(tl.broadcast_to(aux[:, None], (BLOCK // FORMAT.per_aux, FORMAT.per_aux)), (BLOCK,))
    if FORMAT.takes_random:
        random = random_bits(tl.load(seed).to(tl.uint32), (tl.load(step) + 1).to(tl.uint32), offsets)
    stored, aux = _encode(values, aux, random, FORMAT)
    pointer = address.to(tl.pointer_type(FORMAT.dtype))
    if IS_WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + offsets, stored)
    else:
        tl.store(pointer + offsets, stored, mask=offsets < limit)
    if FORMAT.per_aux == 1:
        tl.store(aux_pointer + offsets, aux, mask=offsets < limit)
