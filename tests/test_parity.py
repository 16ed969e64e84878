"""Every rule x option x dtype against the float64 oracle of cases.py, against torch.optim, and the harness against mutants."""

import copy

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    SIZES,
    SMALL_SIZES,
    Oracle,
    can_mix_dtypes,
    check_parity,
    dtype_id,
    random_grads,
    random_params,
    set_grad,
)
from helpers import assert_close, nothing_changes

import fusedopt
from fusedopt.backends import cpu


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_engine_is_the_reference_to_rounding(case, dtypes, record_property):
    if dtypes[0] != dtypes[1] and not can_mix_dtypes():
        pytest.skip("this torch wants gradients in the parameter's dtype")
    sizes = SIZES if dtypes in (DTYPES[0], DTYPES[4]) else SIZES[:-1]  # the largest takes half of the time
    used = check_parity(case, *dtypes, sizes=sizes)
    record_property("tolerance_used", round(used, 3))


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipped_step_is_the_reference_to_rounding(case, dtypes):
    """A limit that bites: the norm of these gradients is several hundred."""
    check_parity(case, *dtypes, sizes=(1021, 33, 0, 4099), max_grad_norm=25.0)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_backend_keeps_the_same_bound(case, dtypes):
    if dtypes[0] != dtypes[1] and not can_mix_dtypes():
        pytest.skip("this torch wants gradients in the parameter's dtype")
    check_parity(case, *dtypes, sizes=SMALL_SIZES, steps=4, backend="reference")


@pytest.mark.parametrize("case", [case for case in CASES if case.rule.name in ("adam", "nadam", "rmsprop")], ids=str)
def test_second_moment_is_finite_where_the_square_is_not(case):
    """(1 − β₂) g² may be finite in float32 where g² is not: an order of multiplication that matters."""
    param = torch.nn.Parameter(torch.ones(17))
    optimizer = case.make([param])
    oracle = Oracle(case, optimizer.param_groups[0], [param])
    param.grad = torch.full((17,), 3e19)
    oracle.step([param.grad])
    optimizer.step()
    torch.testing.assert_close(param.detach(), oracle.param.float())
    for state in case.rule.stored(optimizer.param_groups[0]):
        if state is not None:
            torch.testing.assert_close(optimizer.state[param][state.name], oracle.state[state.name].float())


@pytest.mark.parametrize("lr", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_parameters_are_rounded_once_to_nearest_even(dtype, lr):
    """Bitwise, over random bit patterns: ties, subnormals, overflow and NaN among them."""
    generator = torch.Generator().manual_seed(0)

    def any_bits():
        return torch.randint(-(2**15), 2**15, (100_003,), generator=generator).to(torch.int16).view(dtype)

    start, grad = any_bits(), any_bits()
    # Where two magnitudes are far apart the sum is the larger: bring half of them together.
    grad[::2] = (start[::2].float() * 2.0 ** torch.randint(-12, 3, (50_002,), generator=generator)).to(dtype)
    param = torch.nn.Parameter(start.clone())
    param.grad = grad
    fusedopt.SGD([param], lr=lr).step()
    expected = (start.float() - torch.tensor(lr) * grad.float()).to(dtype)
    is_nan = expected.isnan()
    assert torch.equal(param.isnan(), is_nan)
    assert torch.equal(param.detach().view(torch.int16)[~is_nan], expected.view(torch.int16)[~is_nan])


@pytest.mark.skipif(not can_mix_dtypes(), reason="this torch wants gradients in the parameter's dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_of_any_payload_stays_nan_in_narrow_parameters(dtype):
    """Rounded as a number, the largest one would become -0."""
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    param = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    set_grad(param, nans)
    fusedopt.SGD([param], lr=1.0).step()
    assert param.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.twin], ids=str)
def test_ten_steps_equal_torch_optim(case, dtype):
    """Ours and torch each round on their own: twice the bound of one. torch keeps NAdam's mu_product in float32 always."""
    eps = torch.finfo(torch.float32 if case.rule.extra else dtype).eps
    sizes = (1021, 33, 257, 1, 0)
    ours = random_params(sizes, dtype)
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    start = [param.detach().clone() for param in ours]
    optimizer, twin = case.make(ours), case.twin(theirs, **{"lr": 0.01, **case.kwargs})
    for step in range(10):
        for a, b, grad in zip(ours, theirs, random_grads(sizes, dtype, step), strict=True):
            a.grad, b.grad = grad, grad.clone()
        optimizer.step()
        twin.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        scale = torch.maximum(first.abs(), (b - first).abs().amax() if first.numel() else first)
        assert ((a - b).abs() <= 32 * eps * scale).all()


# ---- complex parameters: real pairs ----------------------------------------------------------------------------


def complex_values(layout: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn((7, 5), dtype=dtype, generator=torch.Generator().manual_seed(seed))
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "strided":
        return torch.zeros((7, 10), dtype=dtype)[:, ::2].copy_(values)
    return values


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_complex_parameter_steps_as_its_real_pairs(case, backend, dtype, layout):
    """To the bit, states too; and as torch.optim where it has the algorithm."""
    param = torch.nn.Parameter(complex_values(layout, dtype, 0))
    pairs = torch.nn.Parameter(torch.view_as_real(complex_values(layout, dtype, 0)))
    optimizer = case.make([param], backend=backend, max_grad_norm=1.0)
    of_pairs = case.make([pairs], backend=backend, max_grad_norm=1.0)
    theirs = torch.nn.Parameter(complex_values(layout, dtype, 0))
    twin = case.twin([theirs], **{"lr": 0.01, **case.kwargs}) if case.twin else None
    for step in range(1, 5):
        param.grad, theirs.grad = complex_values(layout, dtype, step), complex_values(layout, dtype, step)
        pairs.grad = torch.view_as_real(complex_values(layout, dtype, step))
        optimizer.step()
        of_pairs.step()
        assert optimizer.grad_norm == of_pairs.grad_norm > 1
        if twin:
            torch.nn.utils.clip_grad_norm_([theirs], 1.0)
            twin.step()
    assert torch.equal(torch.view_as_real(param.detach()), pairs)
    for name, state in optimizer.state[param].items():
        assert torch.equal(torch.view_as_real(state) if state.is_complex() else state, of_pairs.state[pairs][name])
    if twin:
        assert_close([torch.view_as_real(param.detach())], [torch.view_as_real(theirs.detach())], 1e-6)
        made = {name: value for name, value in twin.state[theirs].items() if value is not None}
        assert optimizer.state[param].keys() == made.keys()
        twin.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(twin.state_dict())
        assert all(value.is_complex() == made[name].is_complex() for name, value in optimizer.state[param].items())


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "third step"])
def test_lazily_conjugated_tensors_are_refused(warm):
    """Their memory holds other values; a warm plan has seen the same memory before."""
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = fusedopt.SGD([param], lr=1.0)
    grad = torch.full((3,), 1j, dtype=torch.complex64)
    param.grad = grad
    for _ in range(2 * warm):
        optimizer.step()
    param.grad = grad.conj()
    with (
        nothing_changes(optimizer),
        pytest.raises(RuntimeError, match="gradient is a lazy conjugate view; call resolve"),
    ):
        optimizer.step()
    param.grad = grad.conj().resolve_conj()
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), 1 + 1j - 2j * warm))
    param.data = param.data.conj()
    with pytest.raises(RuntimeError, match="parameter is a lazy conjugate view; call resolve_conj"):
        optimizer.step()


def test_complex_and_real_tensors_of_one_memory_layout_are_told_apart():
    """A checkpoint, or a gradient, of the one is refused for the other."""
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = fusedopt.AdamW([param])
    param.grad = torch.ones(3, 2)
    optimizer.step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["state"][0]["exp_avg"] = checkpoint["state"][0]["exp_avg"].to(torch.complex64)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="'exp_avg' is complex64, not real floating-point"):
        optimizer.load_state_dict(checkpoint)
    param.grad = None
    param.data = torch.view_as_complex(param.data)
    param.grad = torch.ones(3, dtype=torch.complex64)
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=r"complex64 on cpu: state 'exp_avg' has shape \(3, 2\)"),
    ):
        optimizer.step()


# ---- the harness catches the bugs that suites miss ---------------------------------------------------------------


def scaled(scalar, factor):
    """The bug of a hyperparameter that arrives wrong."""

    def plant(rule, bucket, run, scalars, coefs):
        index = rule.hyper.index(scalar)
        run([[*row[:index], row[index] * factor, *row[index + 1 :]] for row in scalars], coefs)

    return plant, lambda rule: scalar in rule.hyper


def flipped(scalar):
    """The bug of a switch that arrives the other way round."""

    def plant(rule, bucket, run, scalars, coefs):
        index = rule.hyper.index(scalar)
        run([[*row[:index], 1 - row[index], *row[index + 1 :]] for row in scalars], coefs)

    return plant, lambda rule: scalar in rule.hyper


def kept(select):
    """The bug of elements that an update does not reach."""

    def plant(rule, bucket, run, scalars, coefs):
        saved = [(tensor, tensor.detach().clone()) for entry in bucket.entries for tensor in select(entry)]
        run(scalars, coefs)
        with torch.no_grad():
            for tensor, old in saved:
                tensor.copy_(old)

    return plant


def always(rule):
    return True


def no_op(rule, bucket, run, scalars, coefs):
    pass


def wrong_sign(rule, bucket, run, scalars, coefs):
    run(scalars, [-coef for coef in coefs])


def maximize_ignored(rule, bucket, run, scalars, coefs):
    run(scalars, [abs(coef) for coef in coefs])


def step_off_by_one(rule, bucket, run, scalars, coefs):
    for entry in bucket.entries:
        if float(entry.step) == 0:
            entry.step.add_(1)
    run(scalars, coefs)


def gradient_modified(rule, bucket, run, scalars, coefs):
    run(scalars, coefs)
    for entry in bucket.entries:
        entry.grad.mul_(1.0001)


def has_bias(rule):
    return rule.name in ("adam", "nadam")


MUTANTS = {
    "no-op": (no_op, always),
    "half step": scaled("lr", 0.5),
    "wrong sign": (wrong_sign, always),
    "no bias correction": flipped("bias_correction"),
    "beta1 wrong": scaled("beta1", 0.99),
    "beta2 wrong": scaled("beta2", 0.99),
    "alpha wrong": scaled("alpha", 0.99),
    "momentum wrong": scaled("momentum", 0.99),
    "lr_decay ignored": scaled("lr_decay", 0.0),
    "momentum_decay wrong": scaled("momentum_decay", 2.0),
    "dampening ignored": scaled("dampening", 0.0),
    "nesterov ignored": scaled("nesterov", 0.0),
    "eps x 100": scaled("eps", 100.0),
    "eps on the other side of the root": flipped("eps_inside_sqrt"),
    "step off by one": (step_off_by_one, has_bias),
    "last 7 elements skipped": (kept(lambda entry: [entry.param.tensor.detach()[-7:]]), always),
    "first element skipped": (kept(lambda entry: [entry.param.tensor.detach()[:1]]), always),
    "coupled and decoupled decay swapped": flipped("decoupled_weight_decay"),
    "weight decay ignored": scaled("weight_decay", 0.0),
    "gradient modified": (gradient_modified, always),
    "maximize ignored": (maximize_ignored, always),
    "first state not stored": (
        kept(lambda entry: [slot.tensor for slot in entry.states[:1] if slot is not None]),
        always,
    ),
    "amsgrad maximum not stored": (
        kept(lambda entry: [slot.tensor for slot in entry.states[2:] if slot is not None]),
        always,
    ),
}


def stores(case, slot):
    """Whether a case keeps the state of that slot."""
    states = case.rule.states[slot : slot + 1]
    return bool(states) and (states[0].option is None or bool(case.kwargs.get(states[0].option)))


# The cases in which a bug has no consequence: the option it breaks is at its neutral value there.
HARMLESS = {
    "momentum wrong": lambda case: not case.kwargs.get("momentum"),
    "lr_decay ignored": lambda case: not case.kwargs.get("lr_decay"),
    "dampening ignored": lambda case: not case.kwargs.get("dampening"),
    "nesterov ignored": lambda case: not case.kwargs.get("nesterov"),
    "eps x 100": lambda case: case.kwargs.get("initial_accumulator_value"),
    "eps on the other side of the root": lambda case: case.kwargs.get("initial_accumulator_value"),
    "step off by one": lambda case: not case.kwargs.get("bias_correction", True),
    "weight decay ignored": lambda case: not case.kwargs.get("weight_decay"),
    "maximize ignored": lambda case: not case.kwargs.get("maximize"),
    "first state not stored": lambda case: not stores(case, 0),
    "amsgrad maximum not stored": lambda case: not stores(case, 2),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_planted_bug_is_caught(case, mutant, monkeypatch):
    plant, applies = MUTANTS[mutant]
    if not applies(case.rule) or HARMLESS.get(mutant, lambda case: False)(case):
        return  # asserted to be tried somewhere by the test below
    prepare = cpu.Bucket.prepare

    def mutated(bucket, scalars, coefs):
        return lambda: plant(case.rule, bucket, lambda *args: prepare(bucket, *args)(), scalars, coefs)

    monkeypatch.setattr(cpu.Bucket, "prepare", mutated)
    with pytest.raises(AssertionError):
        check_parity(case, torch.float32, torch.float32, sizes=SMALL_SIZES)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_planted_bug_is_tried_on_some_case(mutant):
    applies, harmless = MUTANTS[mutant][1], HARMLESS.get(mutant, lambda case: False)
    assert any(applies(case.rule) and not harmless(case) for case in CASES)
