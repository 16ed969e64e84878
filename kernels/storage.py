"""How values are stored: loads and stores of blocks, by format. Nothing else in kernels/ converts between dtypes in memory."""

import triton
import triton.language as tl


@triton.jit
def load_block(address, offsets, limit, dtype: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Elements of a tensor. IS_WHOLE: its address is aligned to 16 bytes, and all of the block lies before the limit."""
    pointer = address.to(tl.pointer_type(dtype))
    if IS_WHOLE:
        return tl.load(tl.multiple_of(pointer, 16) + offsets)
    return tl.load(pointer + offsets, mask=offsets < limit, other=0)


@triton.jit
def store_block(address, offsets, limit, values, dtype: tl.constexpr, IS_WHOLE: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if dtype.primitive_bitwidth < values.dtype.primitive_bitwidth:
        values = values.to(dtype, fp_downcast_rounding="rtne")
    if IS_WHOLE:
        tl.store(tl.multiple_of(pointer, 16) + offsets, values)
    else:
        tl.store(pointer + offsets, values, mask=offsets < limit)
