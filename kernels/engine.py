"""The kernels that run any rule over any number of tensors: `global_norm` and `update`, and for a rule that sums over tensors
`measure` and `add_up` before the update. No formula of a rule is here.

They walk the same tables, in device memory. A slot of an entry is a tensor in some format, with auxiliary values if the format
has them. Slots are, in this order: the source, where an update reads the parameter; the parameter, where it is written (mostly
the same tensor); and the states of the rule.
    grads       int64 [num_entries]: the gradients' addresses; 0: none in this step, the entry takes no part
    addresses   int64 [2 * slots + num_scalars, num_entries]: of each entry's slots, then of its scalars (the step count, and
                what else the rule counts), then of the slots' auxiliary values; 0: not stored
    seeds       int32 [num_entries]: of the entries' random bits
    weights     int64 [2, num_entries]: what gradients are multiplied with for the norm, and its auxiliary values: the
                parameter's address, or 0: nothing
    entry_of    int32 [num_chunks], index_of int32 [num_chunks]: chunk c is the index_of[c]-th stretch of `CHUNK` elements of
                entry entry_of[c]
    numel       int64 [num_entries], group_of int32 [num_entries]
    first_chunk int32 [num_entries + 1]: entry e has the chunks from first_chunk[e] to first_chunk[e + 1]
    hyper       float64 [num_groups, NUM_HYPER + 1]: each group's hyperparameters, and what multiplies its gradients
and pass on what belongs to a whole step as scalars in device memory, so that nobody waits for the device:
    control     float64 [2]: what gradients are multiplied with, and whether their norm is NaN or infinite (0 or 1)

A grid of any size does the same, to the bit but for the norm, whose partial sums follow the grid.
"""

import triton
import triton.language as tl

from .storage import load, store

# Slots, and rows of the table of addresses.
SOURCE: tl.constexpr = tl.constexpr(0)
PARAM: tl.constexpr = tl.constexpr(1)
STATE: tl.constexpr = tl.constexpr(2)

VERSION = tuple(int(number) for number in triton.__version__.split(".")[:2])

CHUNK = 4096  # elements of one tensor that a program takes before it looks for more
THREADS = 256
PROGRAMS_PER_PROCESSOR = 8  # of the grid; more than fit at once, so that none waits for the last ones

# Squares of float64 values far from 1 overflow or vanish; those of values times one of these do not.
HUGE: tl.constexpr = tl.constexpr(2.0**540)
TINY: tl.constexpr = tl.constexpr(2.0**-540)


def launch_options(kernel, itemsizes, warp_size, capability):
    """How a kernel is compiled for tensors of such elements; no autotuner, which would run it several times, in place.

    Args:
        kernel: `global_norm`, `update`, or `measure`.
        itemsizes: bytes of an element of each tensor that it loads; of the norm, only of the gradient.
        capability: of an NVIDIA GPU, 90 for 9.0; None for others.
    """
    options = {
        "CHUNK": CHUNK,
        # For each thread 4 elements; 8 where that makes 16 bytes of a tensor of 16 bits and registers suffice.
        "BLOCK": THREADS * (8 if min(itemsizes) <= 2 and max(itemsizes) < 8 else 4),
        "num_warps": THREADS // warp_size,
        # No fused multiply-add, as in the CPU engine, and whatever this version of Triton does by default.
        "enable_fp_fusion": False,
    }
    if capability is not None:  # registers a thread may use: left alone, the compiler spills some to fit more programs
        is_small, is_large = {*itemsizes} == {4} and len(itemsizes) < 6, max(itemsizes) == 8 and len(itemsizes) >= 6
        fewest = 64 if VERSION < (3, 7) else 96  # from 3.7 on some kernels spill at 64, and at 3.9 one still does at 88
        options["maxnreg"] = fewest if kernel is global_norm or is_small else 160 if is_large else 128
        if capability >= 120 or (capability >= 100 and kernel is global_norm and min(itemsizes) == 2):
            options["maxnreg"] += 16  # where some still spill
    return options


@triton.jit
def _is_last_program(ticket):
    """Whether all other programs have come here. What they wrote before is then visible to this one."""
    tl.debug_barrier()  # all of this program's threads have written
    return tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1


@triton.jit
def _sum_of_squares(
    sums, grad, weight, weight_aux, begin, limit,
    GRAD: tl.constexpr, PARAM: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds the squares of a block to `sums`, in float64: those of no float32 overflow or vanish there."""
    values = load(grad, grad, begin, limit, GRAD, tl.float64, BLOCK, IS_WHOLE)
    if PARAM is not None:
        # One limit instead of `& (weight != 0)`: Triton 3.9's interpreter cannot join a block of bools with a single one.
        limit = tl.where(weight != 0, limit, 0)
        weights = load(weight, weight_aux, begin, limit, PARAM, tl.float64, BLOCK, False)
        values *= tl.where((begin + tl.arange(0, BLOCK) < limit) & (values != 0), weights, 1)
    if GRAD.dtype == tl.float64:
        huge, tiny = values * TINY, values * HUGE
        sums = (sums[0] + values * values, sums[1] + huge * huge, sums[2] + tiny * tiny)
    else:
        sums = (sums[0] + values * values,)
    return sums


@triton.jit(do_not_specialize=["num_chunks", "num_entries", "first_partial", "num_partials"])
def global_norm(
    grads, entry_of, index_of, numel, num_chunks, num_entries,
    partials, first_partial, num_partials, ticket,
    max_norm, previous, grad_scale, norm, control, weights,
    GRAD: tl.constexpr, IS_FINAL: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, NUM_PARTIALS: tl.constexpr,
    PARAM: tl.constexpr = None,
):  # fmt: skip
    """The 2-norm of all gradients, unscaled, and the coefficient that clips it.

    Several launches may share ``partials`` (float64 [3, num_partials], this launch's from ``first_partial`` on); the last
    one, IS_FINAL, writes ``norm`` (0-d) and ``control``. ``previous`` is the control of a clip that came before. GRAD: the
    gradients' format. PARAM: the parameters' format if there are ``weights``, else None.
    """
    program = tl.program_id(0)
    zeros = tl.zeros((BLOCK,), tl.float64)
    if GRAD.dtype == tl.float64:
        sums = (zeros, zeros, zeros)
    else:
        sums = (zeros,)
    chunk = program
    while chunk < num_chunks:
        entry = tl.load(entry_of + chunk)
        grad = tl.load(grads + entry)
        if grad != 0:
            begin = tl.load(index_of + chunk).to(tl.int64) * CHUNK
            limit = tl.load(numel + entry)
            weight, weight_aux = grad, grad  # not looked at
            if PARAM is not None:
                weight, weight_aux = tl.load(weights + entry), tl.load(weights + num_entries + entry)
            if (begin + CHUNK <= limit) & (grad % 16 == 0):
                for done in range(0, CHUNK, BLOCK):
                    sums = _sum_of_squares(
                        sums, grad, weight, weight_aux, begin + done, limit, GRAD, PARAM, BLOCK, True
                    )
            else:
                limit = tl.minimum(limit, begin + CHUNK)
                while begin < limit:
                    sums = _sum_of_squares(sums, grad, weight, weight_aux, begin, limit, GRAD, PARAM, BLOCK, False)
                    begin += BLOCK
        chunk += tl.num_programs(0)
    for i in tl.static_range(len(sums)):
        tl.store(partials + i * num_partials + first_partial + program, tl.sum(sums[i]))
    if len(sums) == 1:  # of narrower gradients only infinity counts among the huge
        tl.store(partials + num_partials + first_partial + program, tl.sum(sums[0]) * TINY * TINY)

    if _is_last_program(ticket):
        tl.store(ticket, 0)
        if IS_FINAL:
            indices = tl.arange(0, NUM_PARTIALS)
            is_used = indices < num_partials
            # Not from the cache of this multiprocessor, which may hold what was there before.
            sum = tl.sum(tl.load(partials + indices, mask=is_used, other=0, cache_modifier=".cg"))
            huge = tl.sum(tl.load(partials + num_partials + indices, mask=is_used, other=0, cache_modifier=".cg"))
            tiny = tl.sum(tl.load(partials + 2 * num_partials + indices, mask=is_used, other=0, cache_modifier=".cg"))
            total = tl.sqrt(sum)
            total = tl.where((sum > 2.0**1020) & (huge > 0), tl.sqrt(huge) * HUGE, total)
            total = tl.where((sum < 2.0**-960) & (tiny > 0), tl.sqrt(tiny) * TINY, total)
            coef = tl.load(previous) / tl.load(grad_scale).to(tl.float64)
            total = total * tl.abs(coef)
            is_finite = total < float("inf")  # nor NaN
            limit = tl.load(max_norm)
            clip = limit / (total + 1e-6)
            clip = tl.where((limit == float("inf")) | (clip >= 1), 1.0, clip)
            tl.store(norm, total.to(norm.dtype.element_ty))
            tl.store(control, coef * clip)
            tl.store(control + 1, tl.where(is_finite, 0.0, 1.0))


@triton.jit
def _slot(row, num_entries, i: tl.constexpr, FORMATS: tl.constexpr, SCALARS: tl.constexpr):
    """The addresses of a tensor and of its auxiliary values."""
    address = tl.load(row + i * num_entries)
    aux_address = address  # not looked at
    if FORMATS[i].per_aux > 0:
        aux_address = tl.load(row + (len(FORMATS) + len(SCALARS) + i) * num_entries)
    return address, aux_address


@triton.jit
def _load_slot(
    row, num_entries, begin, limit, i: tl.constexpr,
    FORMATS: tl.constexpr, SCALARS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    address, aux_address = _slot(row, num_entries, i, FORMATS, SCALARS)
    return load(address, aux_address, begin, limit, FORMATS[i], DTYPE, BLOCK, IS_WHOLE)


@triton.jit
def _load_values(
    row, num_entries, grad, begin, limit,
    FORMATS: tl.constexpr, GRAD: tl.constexpr, SCALARS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of an entry, whose column of the table begins at `row`: parameter, gradient and states, in DTYPE."""
    param = _load_slot(row, num_entries, begin, limit, SOURCE, FORMATS, SCALARS, DTYPE, BLOCK, IS_WHOLE)
    grad = load(grad, grad, begin, limit, GRAD, DTYPE, BLOCK, IS_WHOLE)
    states = ()
    for i in tl.static_range(STATE, len(FORMATS)):
        if FORMATS[i] is not None:
            states = states + (_load_slot(row, num_entries, begin, limit, i, FORMATS, SCALARS, DTYPE, BLOCK, IS_WHOLE),)
        else:
            states = states + (grad,)  # not looked at
    return param, grad, states


@triton.jit
def _update_block(
    row, num_entries, grad, begin, limit, seed, scalars,
    UPDATE: tl.constexpr, STORES: tl.constexpr, FORMATS: tl.constexpr, GRAD: tl.constexpr, SCALARS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Loads a block of an entry, computes, and stores what is new."""
    param, grad, states = _load_values(
        row, num_entries, grad, begin, limit, FORMATS, GRAD, SCALARS, DTYPE, BLOCK, IS_WHOLE
    )
    param, states = UPDATE(scalars, param, grad, states, STORES)
    written = (param,) + states
    step = _scalar(row, num_entries, 0, FORMATS, SCALARS, None)
    for i in tl.static_range(PARAM, len(FORMATS)):
        if FORMATS[i] is not None:
            address, aux_address = _slot(row, num_entries, i, FORMATS, SCALARS)
            store(address, aux_address, begin, limit, written[i - PARAM], seed, step, FORMATS[i], BLOCK, IS_WHOLE)


@triton.jit
def _misalignment(row, num_entries, grad, FORMATS: tl.constexpr):
    """A multiple of 16 if all addresses of an entry are."""
    misaligned = grad
    for i in tl.static_range(len(FORMATS)):
        if FORMATS[i] is not None:
            misaligned |= tl.load(row + i * num_entries)
    return misaligned


@triton.jit
def _prepared(
    row, num_entries, hyper, control, grad_scale, mask,
    PREPARE: tl.constexpr, NUM_HYPER: tl.constexpr, FORMATS: tl.constexpr, SCALARS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The rule's scalars in this step, and what becomes of its second one: for one entry, or for a block of them."""
    values = ()
    for i in tl.static_range(NUM_HYPER):
        values = values + (tl.load(hyper + i, mask=mask),)
    coef = tl.load(hyper + NUM_HYPER, mask=mask) * tl.load(control) / tl.load(grad_scale).to(tl.float64)
    step = tl.load(_scalar(row, num_entries, 0, FORMATS, SCALARS, mask), mask=mask).to(tl.float64) + 1
    second = step  # not looked at
    if len(SCALARS) > 1:
        second = tl.load(_scalar(row, num_entries, 1, FORMATS, SCALARS, mask), mask=mask).to(tl.float64)
    return PREPARE(values, coef, step, second, DTYPE)


@triton.jit
def _scalar(row, num_entries, i: tl.constexpr, FORMATS: tl.constexpr, SCALARS: tl.constexpr, mask):
    """Pointers to the entries' i-th scalars; the step count is the first."""
    return tl.load(row + (len(FORMATS) + i) * num_entries, mask=mask).to(tl.pointer_type(SCALARS[i]))


@triton.jit
def _measure_block(
    sums, row, num_entries, grad, begin, limit, scalars,
    MEASURE: tl.constexpr, STORES: tl.constexpr, FORMATS: tl.constexpr, GRAD: tl.constexpr, SCALARS: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds what the rule measures of a block to `sums`."""
    param, grad, states = _load_values(
        row, num_entries, grad, begin, limit, FORMATS, GRAD, SCALARS, DTYPE, BLOCK, IS_WHOLE
    )
    measured = MEASURE(scalars, param, grad, states, STORES)
    more = ()
    for i in tl.static_range(len(sums)):
        more = more + (sums[i] + tl.where(begin + tl.arange(0, BLOCK) < limit, measured[i], 0.0),)
    return more


@triton.jit(do_not_specialize=["num_chunks", "num_entries"])
def measure(
    grads, entry_of, index_of, numel, num_chunks, addresses, group_of, hyper, num_entries, control, grad_scale, partial_sums,
    PREPARE: tl.constexpr, MEASURE: tl.constexpr, NUM_SUMS: tl.constexpr, STORES: tl.constexpr, NUM_HYPER: tl.constexpr,
    FORMATS: tl.constexpr, GRAD: tl.constexpr, SCALARS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What a rule sums over each tensor, chunk by chunk: partial_sums, float64 [NUM_SUMS, num_chunks]."""
    chunk = tl.program_id(0)
    while chunk < num_chunks:
        entry = tl.load(entry_of + chunk)
        row = addresses + entry
        grad = tl.load(grads + entry)
        if grad != 0:
            begin = tl.load(index_of + chunk).to(tl.int64) * CHUNK
            limit = tl.load(numel + entry)
            scalars, _ = _prepared(
                row, num_entries, hyper + tl.load(group_of + entry) * (NUM_HYPER + 1), control, grad_scale, None,
                PREPARE, NUM_HYPER, FORMATS, SCALARS, DTYPE,
            )  # fmt: skip
            sums = ()
            for _ in tl.static_range(NUM_SUMS):
                sums = sums + (tl.zeros((BLOCK,), tl.float64),)
            if (begin + CHUNK <= limit) & (_misalignment(row, num_entries, grad, FORMATS) % 16 == 0):
                for done in range(0, CHUNK, BLOCK):
                    sums = _measure_block(
                        sums, row, num_entries, grad, begin + done, limit, scalars,
                        MEASURE, STORES, FORMATS, GRAD, SCALARS, DTYPE, BLOCK, True,
                    )  # fmt: skip
            else:
                limit = tl.minimum(limit, begin + CHUNK)
                while begin < limit:
                    sums = _measure_block(
                        sums, row, num_entries, grad, begin, limit, scalars,
                        MEASURE, STORES, FORMATS, GRAD, SCALARS, DTYPE, BLOCK, False,
                    )  # fmt: skip
                    begin += BLOCK
            for i in tl.static_range(NUM_SUMS):
                tl.store(partial_sums + i * num_chunks + chunk, tl.sum(sums[i]))
        chunk += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_chunks", "num_entries"])
def add_up(partial_sums, first_chunk, num_chunks, num_entries, sums, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of each entry, float64 [NUM_SUMS, num_entries], each in one fixed order."""
    entry = tl.program_id(0)
    while entry < num_entries:
        begin, end = tl.load(first_chunk + entry), tl.load(first_chunk + entry + 1)
        for i in tl.static_range(NUM_SUMS):
            total = tl.zeros((BLOCK,), tl.float64)
            first = begin
            while first < end:
                chunks = first + tl.arange(0, BLOCK)
                total += tl.load(partial_sums + i * num_chunks + chunks, mask=chunks < end, other=0)
                first += BLOCK
            tl.store(sums + i * num_entries + entry, tl.sum(total))
        entry += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_chunks", "num_entries", "skips_nonfinite", "counts_skip"])
def update(
    grads, entry_of, index_of, numel, num_chunks, addresses, seeds, group_of, hyper, num_entries,
    control, grad_scale, found_inf, skips_nonfinite, skipped, counts_skip, ticket, sums,
    PREPARE: tl.constexpr, ADAPT: tl.constexpr, UPDATE: tl.constexpr, NUM_SUMS: tl.constexpr, STORES: tl.constexpr,
    NUM_HYPER: tl.constexpr, FORMATS: tl.constexpr, GRAD: tl.constexpr, SCALARS: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One step of every entry that has a gradient; none, if one of them is known not to be finite.

    Then, where ``counts_skip``, there is one more in ``skipped`` (0-d int64). FORMATS: of the slots; None: not stored, which is
    what STORES says of the states. GRAD: of the gradient. SCALARS: the scalars' dtypes. DTYPE: what is computed in. ``sums``:
    None where NUM_SUMS is 0.
    """
    program = tl.program_id(0)
    is_skipped = (tl.load(found_inf) != 0) | ((skips_nonfinite != 0) & (tl.load(control + 1) != 0))
    if is_skipped:
        if (program == 0) & (counts_skip != 0):
            tl.store(skipped, tl.load(skipped) + 1)
    else:
        chunk = program
        while chunk < num_chunks:
            entry = tl.load(entry_of + chunk)
            row = addresses + entry
            grad = tl.load(grads + entry)
            if grad != 0:
                begin = tl.load(index_of + chunk).to(tl.int64) * CHUNK
                limit = tl.load(numel + entry)
                scalars, _ = _prepared(
                    row, num_entries, hyper + tl.load(group_of + entry) * (NUM_HYPER + 1), control, grad_scale, None,
                    PREPARE, NUM_HYPER, FORMATS, SCALARS, DTYPE,
                )  # fmt: skip
                if NUM_SUMS > 0:
                    of_entry = ()
                    for i in tl.static_range(NUM_SUMS):
                        of_entry = of_entry + (tl.load(sums + i * num_entries + entry),)
                    scalars = ADAPT(scalars, of_entry, limit.to(tl.float64))
                if (begin + CHUNK <= limit) & (_misalignment(row, num_entries, grad, FORMATS) % 16 == 0):
                    for done in range(0, CHUNK, BLOCK):
                        _update_block(
                            row, num_entries, grad, begin + done, limit, seeds + entry, scalars,
                            UPDATE, STORES, FORMATS, GRAD, SCALARS, DTYPE, BLOCK, True,
                        )  # fmt: skip
                else:
                    limit = tl.minimum(limit, begin + CHUNK)
                    while begin < limit:
                        _update_block(
                            row, num_entries, grad, begin, limit, seeds + entry, scalars,
                            UPDATE, STORES, FORMATS, GRAD, SCALARS, DTYPE, BLOCK, False,
                        )  # fmt: skip
                        begin += BLOCK
            chunk += tl.num_programs(0)
        # Step counts move when no program reads them any more.
        if _is_last_program(ticket):
            tl.store(ticket, 0)
            first = 0
            while first < num_entries:
                entries = first + tl.arange(0, BLOCK)
                rows = addresses + entries
                mask = tl.load(grads + entries, mask=entries < num_entries, other=0) != 0
                if len(SCALARS) > 1:
                    groups = tl.load(group_of + entries, mask=mask, other=0)
                    _, second = _prepared(
                        rows, num_entries, hyper + groups * (NUM_HYPER + 1), control, grad_scale, mask,
                        PREPARE, NUM_HYPER, FORMATS, SCALARS, DTYPE,
                    )  # fmt: skip
                    tl.store(_scalar(rows, num_entries, 1, FORMATS, SCALARS, mask), second.to(SCALARS[1]), mask=mask)
                steps = _scalar(rows, num_entries, 0, FORMATS, SCALARS, mask)
                tl.store(steps, tl.load(steps, mask=mask) + 1, mask=mask)
                first += BLOCK
