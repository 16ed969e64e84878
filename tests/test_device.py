"""What both kinds of GPU kernels do, on tensors in host memory: the CUDA kernels compiled for the host (cuda_emulator.py), the
Triton kernels interpreted (triton_interpreter.py). The contract tests of the other files run on these backends as well.
"""

import functools
import itertools
import signal
import sys
import time

import gpu
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    POWER_ERROR,
    Oracle,
    can_mix_dtypes,
    check_parity,
    dtype_id,
    random_grads,
    random_params,
    set_grad,
)
from helpers import clone_params, in_a_new_process, make_params, nothing_changes, randn, same_bits, set_grads
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import states
from fusedopt.backends import BACKENDS, cuda, device
from fusedopt.formats import FORMATS

# Both take chunks of 4096 elements, in blocks of a power of two.
CHUNK, BLOCK = 4096, 1024
# 0, 1, around the block and the chunk, and enough chunks that programs take several.
SIZES = (0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + BLOCK + 3)
SMALL_SIZES = (0, 5, BLOCK + 3, CHUNK + 9)


GPU_BACKENDS = ("cuda", "triton")


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_reference_to_rounding(case, backend):
    """The CPU engine's bound, with a limit that bites."""
    check_parity(case, torch.float32, torch.float32, sizes=SIZES, steps=3, max_grad_norm=25.0, backend=backend)


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_take_every_dtype(case, dtypes, backend):
    if dtypes[0] != dtypes[1] and not can_mix_dtypes():
        pytest.skip("this torch wants gradients in the parameter's dtype")
    check_parity(case, *dtypes, sizes=SMALL_SIZES, steps=3, backend=backend)


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_is_the_same_on_all_backends_to_rounding(case, dtypes, count):
    check_one_step(case, dtypes, count, ("cpu", *GPU_BACKENDS))


@pytest.mark.parametrize("direction", [-1, 1], ids=["down", "up"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bounds_hold_where_powers_are_rounded_otherwise(case, direction, monkeypatch):
    """The interpreter takes its powers from NumPy, whose exp2 differs in the last place between CPUs."""
    triton_interpreter = pytest.importorskip("triton_interpreter")
    triton_interpreter.move_powers(monkeypatch, direction)
    for count in (1, 10):
        check_one_step(case, (torch.float64, torch.float64), count, ("cpu", "triton"))
    check_parity(case, torch.float64, torch.float64, sizes=SMALL_SIZES, steps=3, backend="triton")


def check_one_step(case, dtypes, count, backends):
    """The step with that count, from the same parameters and states on all of these backends.

    All backends round each operation once and in the same order, so their states have the same bits. Scalars that are computed
    from powers may differ. In float64 `Oracle.spread` bounds what these differences do to the parameter. In float32 a scalar
    is the same number or its neighbour, because it is rounded from float64. Two such scalars, and up to six operations on the
    update after them that each round to a neighbour, make 8 eps of the update. The last one or two operations round the
    parameter, to 1 ulp each. A rule that sums over its tensor gets 16 eps more: backends add in different orders.
    """
    if dtypes[0] != dtypes[1] and not can_mix_dtypes():
        pytest.skip("this torch wants gradients in the parameter's dtype")
    backends = [name for name in backends if BACKENDS[name].unavailable() is None]
    if len(backends) == 1:
        pytest.skip("no backend for GPUs works here")

    start, first = random_params(SMALL_SIZES, dtypes[0]), None
    if count > 1:
        first = case.make(start, backend="cpu")
        take_step(first, start, dtypes[1], 0)
        for state in first.state.values():
            if "step" in state:
                state["step"].fill_(count - 1)
    runs = {}
    for name in backends:
        params = clone_params(start)
        optimizer = case.make(params, backend=name)
        if first is not None:
            optimizer.load_state_dict(first.state_dict())
        take_step(optimizer, params, dtypes[1], 1)
        runs[name] = params, [optimizer.state[param] for param in params]

    oracle = Oracle(case, optimizer.param_groups[0], start, has_other_powers=True)
    if first is not None:
        oracle.load(start, first, count - 1)
    oracle.step([param.grad for param in params])
    spreads = oracle.spread.split(SMALL_SIZES)
    eps = torch.finfo(torch.float64 if dtypes[0] == torch.float64 else torch.float32).eps
    for one, other in itertools.combinations(runs, 2):
        for i, (before, ours, theirs) in enumerate(zip(start, runs[one][0], runs[other][0], strict=True)):
            before, ours, theirs = (tensor.detach() for tensor in (before, ours, theirs))
            ulp = (torch.nextafter(theirs.abs(), torch.full_like(theirs, torch.inf)) - theirs.abs()).double()
            bound = 2 * ulp + 8 * eps * (theirs.double() - before.double()).abs() + spreads[i]
            if case.rule.num_sums and theirs.numel():
                bound += 16 * torch.finfo(theirs.dtype).eps * theirs.double().abs().amax()
            assert ((ours.double() - theirs.double()).abs() <= bound).all(), f"{one} and {other} differ"
            for name, ours in runs[one][1][i].items():
                theirs = runs[other][1][i][name]
                if name == case.rule.extra:  # the product of factors in (0, 1) that are linear in a power
                    assert abs(ours - theirs) <= POWER_ERROR + torch.finfo(ours.dtype).eps, f"{one} and {other}: {name}"
                else:
                    assert same_bits(ours, theirs), f"{one} and {other}: {name}"


def take_step(optimizer, params, dtype, number):
    for param, grad in zip(params, random_grads(SMALL_SIZES, dtype, number), strict=True):
        set_grad(param, grad)
    optimizer.step()


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("which", ["param", "grad", "exp_avg", "exp_avg_sq"])
def test_misaligned_tensors_take_the_other_path(which, offset, backend):
    """To the bit: a tensor in the middle of another one starts where no 16 bytes do."""

    def misaligned(tensor):
        return torch.empty(len(tensor) + 8)[offset : offset + len(tensor)].copy_(tensor)

    size, results = CHUNK + 3, []
    for is_misaligned in (False, True):
        param = torch.nn.Parameter(randn((size,)))
        if is_misaligned and which == "param":
            param.data = misaligned(param.data)
        optimizer = fusedopt.AdamW([param], lr=0.1, backend=backend)
        for seed in (1, 2):
            param.grad = randn((size,), seed=seed)
            if is_misaligned and which == "grad":
                param.grad = misaligned(param.grad)
            optimizer.step()
            if is_misaligned and which in optimizer.state[param]:
                optimizer.state[param][which] = misaligned(optimizer.state[param][which])
        results.append([param, *optimizer.state[param].values()])
    assert all(itertools.starmap(same_bits, zip(*results, strict=True)))


STATE_FORMATS = [FORMATS[name] for name in ("float32", "bfloat16", "float16")]


def store_states(monkeypatch, choose):
    """Lets a function of a state's name and its parameter choose the format."""
    monkeypatch.setattr(states, "format_of", lambda rule, kept, param: choose(kept.name, param))


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("which", ["param", "exp_avg", "exp_avg_sq"])
def test_states_in_16_bits_are_the_same_on_both_paths(which, offset, backend, monkeypatch):
    """To the bit, beside parameters in 32 and in 16 bits."""
    store_states(monkeypatch, lambda name, param: FORMATS["bfloat16" if name == "exp_avg" else "float16"])
    size, results = 2 * CHUNK + 3, []
    for is_misaligned in (False, True):
        params = make_params(((size,), (size,)))
        params[1].data = params[1].data.bfloat16()
        optimizer = fusedopt.AdamW(params, lr=0.1, backend=backend)
        for seed in (1, 2):
            set_grads(params, seed)
            optimizer.step()
            for param in params if is_misaligned else ():
                tensor = param.data if which == "param" else optimizer.state[param][which]
                moved = torch.empty(size + 8, dtype=tensor.dtype)[offset : offset + size].copy_(tensor)
                if which == "param":
                    param.data = moved
                else:
                    optimizer.state[param][which] = moved
        results.append([tensor for param in params for tensor in (param, *optimizer.state[param].values())])
    assert all(itertools.starmap(same_bits, zip(*results, strict=True)))


def test_neighbours_have_states_in_formats_of_their_own(backend, monkeypatch):
    """The bits of the CPU engine, which does not know other parameters."""
    store_states(monkeypatch, lambda name, param: STATE_FORMATS[(param.numel() + name.endswith("sq")) % 3])
    shapes = [(CHUNK + size,) for size in (0, 1, 2, 3, 4)]
    ours, theirs = make_params(shapes), make_params(shapes)
    optimizer, other = fusedopt.AdamW(ours, backend=backend), fusedopt.AdamW(theirs, backend="cpu")
    for step in range(2):
        for params, each in ((ours, optimizer), (theirs, other)):
            set_grads(params, step)
            each.step()
    assert {optimizer.state[param]["exp_avg"].dtype for param in ours} == {row.dtype for row in STATE_FORMATS}
    for param, same in zip(ours, theirs, strict=True):
        assert all(map(same_bits, optimizer.state[param].values(), other.state[same].values()))
        torch.testing.assert_close(param, same)


def test_nothing_outside_a_tensor_is_written(backend):
    """Parameters and states that are slices: what lies around them stays."""
    sizes = (1, BLOCK - 1, CHUNK + 1)
    arenas = []

    def sliced(values):
        arena = torch.full((len(values) + 64,), 7.0)
        arenas.append((arena, len(values)))
        return arena[32 : 32 + len(values)].copy_(values)

    params = [torch.nn.Parameter(sliced(randn((size,)))) for size in sizes]
    optimizer = fusedopt.AdamW(params, amsgrad=True, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        state.update({name: sliced(value) for name, value in state.items() if value.dim()})
    set_grads(params, 1)
    optimizer.step()
    for arena, size in arenas:
        assert (arena[:32] == 7).all() and (arena[32 + size :] == 7).all()


def test_parameter_without_elements_steps_whatever_its_strides(backend):
    param = torch.nn.Parameter(torch.empty(0, 3))
    param.grad = torch.empty(3, 0).t()
    optimizer = fusedopt.AdamW([param], backend=backend)
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 1


@pytest.mark.parametrize("value", [1e20, 1e36, 1e-30])
def test_squares_of_float32_neither_overflow_nor_vanish(value, backend):
    param = torch.nn.Parameter(torch.zeros(CHUNK + 5))
    param.grad = torch.full((CHUNK + 5,), value)
    optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    expected = param.grad.double().norm()
    torch.testing.assert_close(optimizer.grad_norm, expected.float(), rtol=1e-6, atol=0)
    coef = min(1.0, 1.0 / (float(expected) + 1e-6))
    torch.testing.assert_close(param.detach(), (-coef * param.grad.double()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_no_infinity_is_lost_among_gradients_of_two_dtypes(dtype, value, backend):
    """Sums of float64 are scaled, those of float32 are not: the finite ones must not stand in for the others."""
    params = [*make_params(((5,),), torch.float32), *make_params(((5,),), torch.float64)]
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0, nonfinite="skip", backend=backend)
    set_grads(params, 0)
    params[1].grad.mul_(1e20)  # so that its scaled sum is not 0
    params[dtype == torch.float64].grad[1] = value
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1 and not optimizer.grad_norm.isfinite()
    assert all(map(same_bits, before, [param.detach() for param in params]))


# ---- launches, and who waits -----------------------------------------------------------------------------------


@pytest.fixture
def launches(backend, monkeypatch):
    """Counts what is launched, by kernel."""
    counted = {"norm": 0, "update": 0}

    def count(name):
        counted[name] += 1

    if backend == "cuda":
        call = cuda.Library.call

        def counting_call(self, name, *arguments):
            if name in counted:
                count(name)
            call(self, name, *arguments)

        monkeypatch.setattr(cuda.Library, "call", counting_call)
    else:
        from fusedopt.kernels import engine

        for name, kernel in (("norm", engine.global_norm), ("update", engine.update)):
            hook = functools.partial(lambda name, *args, **kwargs: count(name), name)
            monkeypatch.setattr(kernel, "pre_run_hooks", [*kernel.pre_run_hooks, hook])
    return counted


@pytest.mark.parametrize("num_tensors", [1, 100])
def test_a_step_is_two_launches_whatever_the_number_of_tensors(num_tensors, launches, backend):
    params = make_params([(3,)] * num_tensors)
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend=backend)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
        assert launches == {"norm": seed + 1, "update": seed + 1}
    optimizer.max_grad_norm = None
    optimizer.step()
    assert launches == {"norm": 2, "update": 3}
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert launches == {"norm": 3, "update": 4}


@pytest.mark.parametrize("num_tensors", [1, 100])
def test_sam_is_a_norm_an_ascent_and_a_step(num_tensors, launches, backend, monkeypatch):
    """Restoring the weights is none of its own, neither a launch nor a copy."""
    params = make_params([(3,)] * num_tensors)
    optimizer = fusedopt.SAM(params, fusedopt.SGD, backend=backend)
    monkeypatch.setattr(torch, "_foreach_copy_", None)
    for seed in range(2):
        set_grads(params, 2 * seed)
        optimizer.first_step()
        set_grads(params, 2 * seed + 1)
        optimizer.second_step()
        assert launches == {"norm": seed + 1, "update": 2 * (seed + 1)}


class Waits(TorchDispatchMode):
    """Counts the operations that bring a value to the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
@pytest.mark.parametrize("clip", ["in the step", "by method", "none"])
def test_no_step_waits_for_the_device(clip, nonfinite, backend):
    """But one that may have to raise an error."""
    params = make_params(((5,), (3, 3)))
    limit = 1.0 if clip == "in the step" else None
    optimizer = fusedopt.AdamW(params, max_grad_norm=limit, nonfinite=nonfinite, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    optimizer.param_groups[0]["lr"] = 0.1
    with Waits() as waits:
        if clip == "by method":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.skipped_steps, optimizer.grad_norm  # noqa: B018  both without waiting
    assert (waits.count > 0) == (nonfinite == "error")


def test_step_without_gradients_is_counted_as_skipped_too(backend):
    """As on the CPU, though there is nothing to launch."""
    optimizer = fusedopt.AdamW(make_params(((3,),)), backend=backend)
    for found_inf in (0.0, 1.0, 1.0):
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    assert int(optimizer.skipped_steps) == 2


def test_the_device_decides_to_skip_and_counts(backend):
    """Nothing moves, step counts neither; the count is a tensor."""
    params = make_params(((CHUNK + 1,), (3,)))
    optimizer = fusedopt.NAdam(params, nonfinite="skip", backend=backend)
    set_grads(params, 0)
    optimizer.step()
    before = [tensor.clone() for p in params for tensor in (p.detach(), *optimizer.state[p].values())]
    for bad in (torch.nan, torch.inf):
        set_grads(params, 1)
        params[0].grad[-1] = bad
        optimizer.step()
    now = [tensor for p in params for tensor in (p.detach(), *optimizer.state[p].values())]
    assert all(map(same_bits, before, now))
    assert isinstance(optimizer.skipped_steps, torch.Tensor) and int(optimizer.skipped_steps) == 2
    set_grads(params, 1)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 2] and int(optimizer.skipped_steps) == 2


def test_tables_are_kept_until_an_address_changes(monkeypatch, backend):
    uploads = []
    upload = device.Bucket._upload
    monkeypatch.setattr(device.Bucket, "_upload", lambda self, values: uploads.append(values) or upload(self, values))
    params = make_params(((5,), (3, 3)))
    optimizer = fusedopt.AdamW(params, backend=backend, max_grad_norm=1.0)
    set_grads(params, 0)
    optimizer.step()
    uploads.clear()
    optimizer.step()
    assert not uploads
    params[0].grad = params[0].grad.clone()
    optimizer.step()
    assert [list(values) for values in uploads] == [[param.grad.data_ptr() for param in params]]
    uploads.clear()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert len(uploads) == 1 and uploads[0][0, 0] == 0.5


# ---- what only a device does, played ----------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch):
    """Tensors of one element count as a device's, which no step may read."""

    def is_elsewhere(value):
        return isinstance(value, torch.Tensor) and value.numel() == 1

    for module in (fusedopt.rules, fusedopt.step, fusedopt.states):
        monkeypatch.setattr(module, "is_elsewhere", is_elsewhere)


def test_hyperparameters_of_the_device_are_read_there(elsewhere, backend):
    """Also one that adds a state, and one that becomes another tensor."""
    params, other = make_params(((5,), (3, 3))), make_params(((5,), (3, 3)))
    lr = torch.tensor(0.1, dtype=torch.float64)
    options = {"weight_decay": 0.125}
    optimizer = fusedopt.SGD(params, lr=lr, momentum=torch.tensor(0.5, dtype=torch.float64), backend=backend, **options)
    plain = fusedopt.SGD(other, lr=0.1, momentum=0.5, backend="cpu", **options)
    for step, value in enumerate((0.1, 0.3, 0.7, 0.2)):
        lr.fill_(value)
        plain.param_groups[0]["lr"] = value
        set_grads(params, step)
        set_grads(other, step)
        with Waits() as waits:
            if step == 2:
                lr = optimizer.param_groups[0]["lr"] = lr.clone()
            optimizer.step()
        assert step == 0 or waits.count == 0
        plain.step()
    assert all(map(same_bits, params, other))


@pytest.mark.parametrize("scale, found", [(1024.0, 0.0), (4.0, 1.0)])
def test_scaler_of_the_device_is_read_there(elsewhere, scale, found, backend):
    params, other = make_params(((5,), (3, 3))), make_params(((5,), (3, 3)))
    optimizer, plain = (fusedopt.AdamW(p, max_grad_norm=1.0, backend=b) for p, b in ((params, backend), (other, "cpu")))
    for step in range(3):
        set_grads(params, step)
        set_grads(other, step)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found * (step != 1))
        plain.grad_scale, plain.found_inf = scale, found * (step != 1)
        with Waits() as waits:
            optimizer.step()
        assert step < 2 or waits.count == 0  # a first step that is skipped leaves no plan
        plain.step()
    assert all(map(same_bits, params, other)) and int(optimizer.skipped_steps) == plain.skipped_steps == 2 * found


def test_what_a_capture_uploads_is_not_there_afterwards(monkeypatch, backend):
    """It arrives when the graph is replayed; an eager step, and the next capture, upload their own."""
    upload, launch, capturing = device.Bucket._upload, device.Bucket._launch, False
    monkeypatch.setattr(device.Bucket, "is_capturing", property(lambda self: capturing))

    def recorded(self, values):
        return torch.zeros_like(upload(self, values)) if capturing else upload(self, values)

    monkeypatch.setattr(device.Bucket, "_upload", recorded)
    monkeypatch.setattr(device.Bucket, "_launch", lambda *args, **kw: None if capturing else launch(*args, **kw))
    params, other = make_params(((5,), (3, 3))), make_params(((5,), (3, 3)))
    optimizer = fusedopt.AdamW(params, capturable=True, max_grad_norm=1.0, backend=backend)
    plain = fusedopt.AdamW(other, max_grad_norm=1.0, backend="cpu")
    for step in range(4):
        set_grads(params, step)
        set_grads(other, step)
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.1 / (step + 1)
        capturing = step % 2 == 1
        optimizer.step()
        if not capturing:
            plain.step()
    assert all(map(same_bits, params, other))


def test_interrupt_between_two_launches_comes_when_all_are_made(monkeypatch, backend):
    params, other = ([*make_params(((5,),)), *make_params(((5,),), torch.float64)] for _ in range(2))
    optimizer, plain = (fusedopt.AdamW(each, backend=backend) for each in (params, other))  # same powers: same bits
    launch = device.Bucket._launch

    def interrupted(*args, **kwargs):
        launch(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)

    for each in (params, other):
        set_grads(each, 0)
    plain.step()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(device.Bucket, "_launch", interrupted)
            optimizer.step()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert all(map(same_bits, params, other))


def test_kernel_that_cannot_run_changes_nothing(monkeypatch, backend):
    params = make_params(((5,), (3, 3)))
    optimizer = fusedopt.AdamW(params, backend=backend)
    set_grads(params, 0)

    def fails(*args, **kwargs):
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patch, nothing_changes(optimizer), pytest.raises(RuntimeError, match="no compiler"):
        if backend == "cuda":
            patch.setattr(cuda.Library, "count", fails)
        else:
            from fusedopt.kernels import engine

            patch.setattr(engine.update, "warmup", fails, raising=False)
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("is_refused", [False, True], ids=["", "a refused step between"])
def test_first_step_that_the_device_skips_does_not_count(is_refused, monkeypatch, backend):
    """SGD starts its buffer at the first gradient, undamped, also if a new plan is made after the skipped step."""
    param, later = make_params(((5,), (3,)))
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=0.9, dampening=0.5, nonfinite="skip", backend=backend)
    monkeypatch.setattr(fusedopt.plan.Plan, "_is_used", lambda self, entry, step: True)  # as for a device's step count
    param.grad = torch.full((5,), torch.nan)
    optimizer.step()
    optimizer.add_param_group({"params": [later]})
    if is_refused:
        later.grad = torch.ones(3).to_sparse()
        with pytest.raises(RuntimeError, match="gradient is sparse"):
            optimizer.step()
    set_grads([param, later], 0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], param.grad)


def test_without_the_extension_each_step_plans_anew(backend):
    """The same bits, gradients that move and layouts that differ included."""
    code = f"""
import sys
import cuda_emulator, torch, fusedopt
def run():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(7, 5).t()), torch.nn.Parameter(torch.randn(4099))]
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend={backend!r})
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    return params, optimizer
params, optimizer = run()
print(fusedopt.extension._C is None, [param.sum().item() for param in params], optimizer.grad_norm.item())
"""
    with_extension = in_a_new_process(code, TRITON_INTERPRET="1")
    without = in_a_new_process(f"import sys; sys.modules['fusedopt._C'] = None\n{code}", TRITON_INTERPRET="1")
    assert without.startswith("True") and without.split()[1:] == with_extension.split()[1:]


def test_what_a_captured_step_reads_is_kept(monkeypatch, backend):
    """A graph's replay reads the tables again, when the plan may be gone."""
    monkeypatch.setattr(device.Bucket, "is_capturing", True)
    captured = []
    monkeypatch.setattr(device, "_captured", captured)
    params = make_params(((5,),))
    set_grads(params, 0)
    optimizer = fusedopt.AdamW(params, capturable=True, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    read = [value for launch in captured for value in launch.values() if isinstance(value, torch.Tensor)]
    assert len(captured) == 2 and any(list(tensor.flatten()) == [params[0].grad.data_ptr()] for tensor in read)


def test_capture_without_capturable_is_refused(monkeypatch, backend):
    params = make_params(((5,),))
    optimizer = fusedopt.AdamW(params, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    monkeypatch.setattr(device.Bucket, "is_capturing", True)
    with (
        nothing_changes(optimizer),
        pytest.raises(RuntimeError, match=r"param_groups\[0\]: a CUDA graph is being captured, which needs capturable"),
    ):
        optimizer.step()


def test_memory_for_a_capture_is_given_out_once(backend):
    """Pinned before it; what does not fit is pinned then, which newer versions of torch can."""
    params = make_params(((5,),))
    set_grads(params, 0)
    optimizer = fusedopt.AdamW(params, backend=backend)
    optimizer.step()
    bucket = optimizer._plans.kept["step"].buckets[0]
    bucket._reserve = torch.empty(200, dtype=torch.uint8)
    values = [torch.arange(9), torch.full((2, 3), 0.5, dtype=torch.float64)]
    copies = [bucket._reserved(each) for each in values]
    assert all(map(same_bits, copies, values)) and len(bucket._reserve) == 8
    with pytest.raises(RuntimeError):  # no memory can be pinned without a GPU
        bucket._reserved(values[0])


# ---- the command for a machine with a GPU ------------------------------------------------------------------------


def test_stage_that_does_not_end_is_ended_with_all_it_started(tmp_path):
    """And what it printed is kept; a tool that is not there is a result too."""
    child = f"import time; print('began', flush=True); time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"  # run() would kill it
    for seconds in (1, 2, 4, 8, 16):  # a busy machine may need more than the first for two processes to start
        status, log = gpu.run(gpu.Stage("endless", [sys.executable, "-c", code], seconds), seconds)
        if log:
            break
    assert status == "no time left" and log.startswith("began")
    time.sleep(3)
    assert not (tmp_path / "alive").exists()
    status, log = gpu.run(gpu.Stage("absent", [str(tmp_path / "absent")], 1), 1)
    assert status == "not there" and "absent" in log


def test_reports_of_a_sanitizer_about_other_kernels_do_not_count():
    log = """
========= Invalid __global__ write of size 4 bytes
=========     at void fusedopt::cuda::update<fusedopt::Lion<float>, float>(UpdateArguments)+0x120
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x90
========= ERROR SUMMARY: 2 errors
"""
    assert gpu.findings(log) == 1
