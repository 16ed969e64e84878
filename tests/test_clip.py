"""Clipping by global norm: the three ways, what they leave alone, huge and tiny and non-finite norms."""

import copy
import math
import weakref

import pytest
import torch
from helpers import (
    DTYPES,
    SPECS,
    assert_close,
    assert_same_bits,
    assert_unchanged,
    bits,
    clone_params,
    every_class,
    every_twin,
    make_params,
    nothing_changes,
    only_on,
    randn,
    set_grads,
    snapshot,
    train,
)

import fusedopt
from fusedopt import reference
from fusedopt.step import clip_coefficient

pytestmark = pytest.mark.usefixtures("on_backend")

# ---- the ways to clip --------------------------------------------------------------------------------------------
# Each makes (optimizers over all of `params`, a function that takes one clipped step).


def in_the_step(spec, params, limit, **extra):
    optimizer = spec.make(params, max_grad_norm=limit, **extra)
    return [optimizer], optimizer.step


def by_method(spec, params, limit, **extra):
    optimizer = spec.make(params, **extra)

    def step():
        optimizer.clip_grad_norm_(limit)
        optimizer.step()

    return [optimizer], step


def by_function_over_two(spec, params, limit, **extra):
    optimizers = [spec.make(params[:2], **extra), spec.make(params[2:], **extra)]

    def step():
        fusedopt.clip_grad_norm_(iter(optimizers), limit)
        for optimizer in optimizers:
            optimizer.step()

    return optimizers, step


def by_torch(spec, params, limit, **extra):
    optimizer = spec.peer(params, **extra)

    def step():
        torch.nn.utils.clip_grad_norm_(params, limit)
        optimizer.step()

    return [optimizer], step


def spec_of(name):
    return next(spec for spec in SPECS if spec.name == name)


WAYS = (in_the_step, by_method, by_function_over_two)
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
SHAPES = ((13, 7), (1021,), (), (5, 3, 3))


def true_norm(params):
    return math.sqrt(sum(float((param.grad.double() ** 2).sum()) for param in params if param.grad is not None))


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1.0, 34.0, 1e6, math.inf], ids=str)
@every_way
@every_class
def test_clipped_steps_equal_torchs(spec, way, limit):
    """The norm is about 34: far above, about at, and far below the limit; several steps, as momentum remembers."""
    params = make_params(SHAPES, torch.float64)
    twin_params = clone_params(params)
    if limit == 0 and way is in_the_step:
        with pytest.raises(ValueError, match=r"^max_grad_norm must be > 0, got 0.0 .*; pass None to disable clipping$"):
            way(spec, params, limit)
        return
    _, step = way(spec, params, limit)
    _, twin_step = by_torch(spec, twin_params, limit)
    for seed in range(3):
        set_grads(params, seed)
        set_grads(twin_params, seed)
        step()
        twin_step()
    if limit > 1e-3 or spec.rule.name != "lion":
        assert_close(params, twin_params, spec.tolerance)


@every_way
def test_coefficient_is_torchs_where_the_norm_is_tiny(way):
    """min(1, limit / (norm + 1e-6)): at a norm and a limit of 1e-6 it halves the gradient."""
    params = make_params(SHAPES, torch.float64)
    twin_params = clone_params(params)
    spec = spec_of("SGD")
    _, step = way(spec, params, 1e-6, lr=1e6, momentum=0, weight_decay=0)
    _, twin_step = by_torch(spec, twin_params, 1e-6, lr=1e6, momentum=0, weight_decay=0)
    for at, take in ((params, step), (twin_params, twin_step)):
        set_grads(at, 0)
        norm = true_norm(at)
        for param in at:
            param.grad *= 1e-6 / norm
        take()
    assert_close(params, twin_params, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_class
def test_the_ways_are_bitwise_the_same(spec, dtype):
    results = []
    for way in WAYS:
        params = make_params(SHAPES, dtype)
        _, step = way(spec, params, 1.5)
        for seed in range(3):
            set_grads(params, seed)
            step()
        results.append(params)
    assert_same_bits(results[1], results[0])
    # Over two optimizers the squares are added in another order.
    assert_close(results[2], results[0], 1e-6 if dtype == torch.float32 else 1e-2)


@every_way
@every_class
def test_clip_bites(spec, way):
    """A limit changes the first step of every class but those whose step does not depend on the gradient's scale."""
    results = []
    for limit in (0.1, math.inf):
        params = make_params(SHAPES, torch.float64)
        optimizers, step = way(spec, params, limit, weight_decay=0)
        for seed in range(2):
            for i, param in enumerate(params):
                param.grad = randn(param.shape, param.dtype, i) * (1 + 4 * seed)
            step()
        results.append((params, optimizers))
    changed = bits(results[0][0][1]) != bits(results[1][0][1])
    assert changed or spec.rule.name == "lion"
    buffers = [optimizers[0].state[params[0]] for params, optimizers in results]
    name = spec.rule.states[0].name
    assert float(buffers[0][name].abs().max()) < 0.1 * float(buffers[1][name].abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_way
def test_gradients_are_not_written(way, dtype):
    params = make_params(SHAPES, dtype)
    set_grads(params, 0)
    grads = [param.grad for param in params]
    before = [grad.clone() for grad in grads]
    versions = [grad._version for grad in grads]
    _, step = way(spec_of("AdamW"), params, 0.01)
    step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert_same_bits(grads, before, "gradient")
    assert [grad._version for grad in grads] == versions


# ---- the norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_way
def test_grad_norm_is_the_norm_before_clipping(way, dtype):
    params = make_params((*SHAPES, (100_003,)), dtype)
    set_grads(params, 3)
    params[3].grad = None
    optimizers, step = way(spec_of("AdamW"), params, 0.25)
    assert all(optimizer.grad_norm is None for optimizer in optimizers)
    step()
    for optimizer in optimizers:
        assert optimizer.grad_norm.shape == ()
        assert optimizer.grad_norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-14 if dtype == torch.float64 else 1e-7
        assert float(optimizer.grad_norm) == pytest.approx(true_norm(params), rel=tolerance)


def test_clip_returns_the_norm():
    params = make_params(SHAPES)
    set_grads(params, 0)
    pair = fusedopt.SGD(params[:1]), fusedopt.Lion(params[1:])
    total = fusedopt.clip_grad_norm_(pair, 1.0)
    assert total.shape == ()
    assert float(total) == pytest.approx(true_norm(params), rel=1e-6)
    assert all(float(optimizer.grad_norm) == float(total) for optimizer in pair)
    optimizer = fusedopt.AdamW(params)
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(true_norm(params), rel=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_norm_is_of_the_gradients_there_are_now(backend):
    """Not of one that has gone since the step before."""
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, backend=backend)
    for removed in (None, 1, 0):
        set_grads(params, removed or 5)
        if removed is not None:
            params[removed].grad = None
        assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(true_norm(params), rel=1e-6)
        optimizer.step()


def test_coefficient_is_the_references():
    for norm in (0.0, 1e-7, 0.5, 1.0, 2.0, 1e30):
        for limit in (0.0, 1e-6, 1.0, 3.0):
            expected = float(reference.clip_coefficient(torch.tensor(norm, dtype=torch.float64), limit))
            assert expected <= 1
            assert clip_coefficient(norm, limit) == pytest.approx(expected, rel=1e-15)


def test_norm_without_gradients_is_zero():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    with nothing_changes(optimizer):
        assert float(optimizer.clip_grad_norm_(1.0)) == 0
        optimizer.step()
    assert float(optimizer.grad_norm) == 0


HUGE_AND_TINY = [
    *[(torch.float32, magnitude) for magnitude in (1e20, 1e30, 1e38, 1e-20, 1e-30, 1e-38, 1e-42)],
    *[(torch.float64, magnitude) for magnitude in (1e100, 1e155, 1e200, 1e300, 1e-100, 1e-160, 1e-200, 1e-300)],
    *[(torch.bfloat16, magnitude) for magnitude in (1e20, 1e38, 1e-20, 1e-38)],
    *[(torch.float16, magnitude) for magnitude in (2e4, 6e-8)],
]


@every_way
@pytest.mark.parametrize("dtype, magnitude", HUGE_AND_TINY, ids=str)
def test_norm_neither_overflows_nor_vanishes(dtype, magnitude, way):
    """The squares leave the gradient's range; gradients clipped to 1 must not turn into zeros."""
    params = make_params(((13,), (7, 5), (33,)), dtype)
    start = clone_params(params)
    for i, param in enumerate(params):
        param.grad = (1 + randn(param.shape, torch.float64, i).abs()).clamp(max=3).mul(magnitude).to(dtype)
    optimizers, step = way(spec_of("SGD"), params, 1.0, momentum=0, weight_decay=0, lr=1.0)
    step()
    grads = torch.cat([param.grad.double().flatten() / magnitude for param in params])
    unit = float(grads.norm())
    norm = unit * magnitude
    limit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    for optimizer in optimizers:
        assert float(optimizer.grad_norm) == (
            pytest.approx(norm, rel=1e-5, abs=0 if dtype == torch.float64 else 1e-44) if norm < limit else math.inf
        )
    factor = min(1.0, 1.0 / (norm + 1e-6)) * magnitude
    expected = torch.cat([param.detach().double().flatten() for param in start]) - grads * factor
    moved = torch.cat([param.detach().double().flatten() for param in params])
    tolerance = 3 * torch.finfo(dtype).eps
    assert (moved - expected).abs().max() <= tolerance * expected.abs().max()
    if norm > 1:
        assert (moved - torch.cat([param.detach().double().flatten() for param in start])).abs().max() > 0.05


def test_norm_of_float16_beyond_its_range():
    """70000 is no float16, but the norm is not one either."""
    params = make_params(((5,), (4,)), torch.float16)
    for param in params:
        param.grad = torch.full_like(param, 23333.0)
    optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=3.0)
    start = [param.detach().double() for param in params]
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(3 * float(torch.tensor(23333.0).half()), rel=1e-6)
    for param, before in zip(params, start, strict=True):
        torch.testing.assert_close(before - param.detach().double(), torch.ones_like(before), rtol=0, atol=4e-3)


@every_way
@every_class
def test_infinite_limit_only_computes(spec, way):
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizers, step = way(spec, params, math.inf)
    plain = spec.make(plain_params)
    for seed in range(2):
        set_grads(params, seed)
        step()
        train(plain, plain_params, 1, seed)
        assert float(optimizers[0].grad_norm) == pytest.approx(true_norm(params), rel=1e-6)
    assert_same_bits(params, plain_params)


def test_infinite_norm_under_an_infinite_limit_is_not_nan():
    """inf / inf is no coefficient: what is finite moves as without a clip."""
    params = make_params(((13,), (5,)))
    plain_params = clone_params(params)
    for at in (params, plain_params):
        set_grads(at, 0)
        at[0].grad[3] = math.inf
    optimizer, plain = fusedopt.SGD(params, max_grad_norm=math.inf), fusedopt.SGD(plain_params)
    optimizer.step()
    plain.step()
    assert_same_bits(params, plain_params)
    assert float(optimizer.grad_norm) == math.inf


# ---- a clip that waits for its step ------------------------------------------------------------------------------


@every_twin
def test_clipping_twice_composes_as_in_torch(spec):
    params, twin_params = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer, twin = spec.make(params), spec.peer(twin_params)
    for seed in range(2):
        set_grads(params, seed)
        set_grads(twin_params, seed)
        for limit in (20.0, 3.0, 7.0):
            ours = optimizer.clip_grad_norm_(limit)
            theirs = torch.nn.utils.clip_grad_norm_(twin_params, limit)
            assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
        optimizer.step()
        twin.step()
    assert_close(params, twin_params, spec.tolerance)


@every_twin
def test_clip_by_call_composes_with_clip_in_the_step(spec):
    """What a loop does that keeps its old clip_grad_norm_ call."""
    params, twin_params = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer, twin = spec.make(params, max_grad_norm=2.0), spec.peer(twin_params)
    for seed in range(2):
        set_grads(params, seed)
        set_grads(twin_params, seed)
        norm = optimizer.clip_grad_norm_(5.0)
        optimizer.step()
        torch.nn.utils.clip_grad_norm_(twin_params, 5.0)
        torch.nn.utils.clip_grad_norm_(twin_params, 2.0)
        twin.step()
        assert float(optimizer.grad_norm) == float(norm) > 10  # before any clipping
    assert_close(params, twin_params, spec.tolerance)


@every_class
def test_pending_clip_applies_to_one_step(spec):
    params, plain_params = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    set_grads(params, 0)
    optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    coef = 0.5 / (true_norm(params) + 1e-6)
    for param, twin in zip(params, plain_params, strict=True):
        twin.grad = param.grad * coef
    plain.step()
    assert_close(params, plain_params, 1e-10)
    train(optimizer, params, 1, 1)
    train(plain, plain_params, 1, 1)
    assert_close(params, plain_params, 1e-10)


@pytest.mark.parametrize("set_to_none", [True, False])
@every_class
def test_zero_grad_forgets_a_pending_clip(spec, set_to_none):
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    set_grads(params, 0)
    optimizer.clip_grad_norm_(1e-3)
    optimizer.zero_grad(set_to_none=set_to_none)
    train(optimizer, params, 1, 1)
    train(plain, plain_params, 1, 1)
    assert_same_bits(params, plain_params)


@every_class
def test_clip_alone_changes_nothing(spec):
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    set_grads(params, 0)
    with nothing_changes(optimizer):
        optimizer.clip_grad_norm_(0.1)
    assert not optimizer.state
    optimizer.zero_grad()
    train(optimizer, params, 2)
    with nothing_changes(optimizer):
        optimizer.clip_grad_norm_(0.1)


@every_class
def test_limit_may_change_between_steps(spec):
    params, twin_params = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer = spec.make(params)
    twin = spec.peer(twin_params)
    assert optimizer.max_grad_norm is None
    for seed, limit in enumerate((None, 0.5, torch.tensor(4.0), None, 1e-9)):
        optimizer.max_grad_norm = limit
        train(optimizer, params, 1, seed)
        set_grads(twin_params, seed)
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(twin_params, float(limit))
        twin.step()
        assert_close(params, twin_params, max(spec.tolerance, 1e-10))


@only_on("cpu", "no backend is asked")
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("max_grad_norm", -1.0, "max_grad_norm must be > 0"),
        ("max_grad_norm", "x", "max_grad_norm must be a number"),
        ("nonfinite", "ignore", "nonfinite must be one of"),
    ],
)
def test_step_refuses_what_was_put_into_defaults(name, value, message):
    """As often as it is tried, until the value is a valid one again."""
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, max_grad_norm=1.0)
    train(optimizer, params, 1)
    valid, optimizer.defaults[name] = optimizer.defaults[name], value
    set_grads(params, 1)
    for _ in range(2):
        with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
            optimizer.step()
    optimizer.defaults[name] = valid
    optimizer.step()


def test_several_optimizers_share_one_norm():
    """Of other classes and dtypes, one of them without gradients."""
    params = [*make_params(SHAPES), *make_params(SHAPES, torch.float64, 1)]
    idle = torch.nn.Parameter(randn((3,)))
    twin_params = clone_params(params)
    set_grads(params, 0)
    set_grads(twin_params, 0)
    pair = [fusedopt.AdamW(params[:4], lr=0.1), fusedopt.SGD(params[4:], lr=0.1), fusedopt.Lion([idle])]
    twins = [torch.optim.AdamW(twin_params[:4], lr=0.1), torch.optim.SGD(twin_params[4:], lr=0.1)]
    norm = fusedopt.clip_grad_norm_(pair, 0.7)
    assert float(norm) == pytest.approx(true_norm(params), rel=1e-6)
    coef = 0.7 / (true_norm(params) + 1e-6)
    for param in twin_params:
        param.grad *= coef
    for optimizer in (*pair, *twins):
        optimizer.step()
    assert_close(params, twin_params, 1e-6)


# ---- what is not finite ------------------------------------------------------------------------------------------

every_value = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)


def with_bad_gradient(params, value, seed=9):
    set_grads(params, seed)
    params[2].grad = torch.full_like(params[2], value)


@every_value
@every_way
@every_class
def test_nonfinite_propagates_as_in_torch(spec, way, value):
    params, twin_params = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizers, step = way(spec, params, 1.0)
    _, twin_step = by_torch(spec, twin_params, 1.0)
    for at, take in ((params, step), (twin_params, twin_step)):
        set_grads(at, 0)
        take()
        with_bad_gradient(at, value)
        take()
    for ours, theirs in zip(params, twin_params, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
    assert params[2].isnan()
    norm = float(optimizers[0].grad_norm)
    assert math.isnan(norm) if math.isnan(value) else norm == math.inf
    assert all(optimizer.skipped_steps == 0 for optimizer in optimizers)


@pytest.mark.parametrize("when", [0, 2], ids=["first step", "third step"])
@every_value
@every_way
@every_class
def test_skip_leaves_everything_as_it_was(spec, way, value, when):
    """Also the step counts; and no state appears. The next finite step is what it would have been."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizers, step = way(spec, params, 1.0, nonfinite="skip")
    _, plain_step = way(spec, plain_params, 1.0)
    for seed in range(when):
        for at, take in ((params, step), (plain_params, plain_step)):
            set_grads(at, seed)
            take()
    with_bad_gradient(params, value)
    before = [snapshot(optimizer) for optimizer in optimizers]
    step()
    for optimizer, then in zip(optimizers, before, strict=True):
        assert_unchanged(then, optimizer)
        assert optimizer.skipped_steps == 1
        assert not math.isfinite(float(optimizer.grad_norm))
    for at, take in ((params, step), (plain_params, plain_step)):
        set_grads(at, 20)
        take()
    assert_same_bits(params, plain_params)
    assert [optimizer.skipped_steps for optimizer in optimizers] == [1] * len(optimizers)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_value
def test_one_bad_element_anywhere_is_found(value, dtype, limit):
    """At the first, a middle and the last element, in the last of many tensors, with a limit and without."""
    for at in (0, 517, 1020):
        params = make_params(((13, 7), (3,), (1021,)), dtype)
        optimizer = fusedopt.AdamW(params, max_grad_norm=limit, nonfinite="skip")
        set_grads(params, 0)
        params[2].grad[at] = value
        with nothing_changes(optimizer):
            optimizer.step()
        assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("when", [0, 2], ids=["first step", "third step"])
@every_value
@pytest.mark.parametrize("way", [in_the_step, by_method], ids=lambda way: way.__name__)
def test_error_names_the_parameter_and_changes_nothing(way, value, when, named):
    params = make_params(SHAPES)
    given = [(f"layer{i}.weight", param) for i, param in enumerate(params)] if named else params
    optimizers, step = way(spec_of("AdamW"), given, 1.0, nonfinite="error")
    for seed in range(when):
        set_grads(params, seed)
        step()
    with_bad_gradient(params, value)
    name = r" \('layer2.weight'\)" if named else ""
    message = (
        rf"^AdamW.step: param_groups\[0\]\['params'\]\[2\]{name}, shape \(\), float32 on cpu: "
        r"gradient holds NaN or infinity; nothing was updated$"
    )
    with nothing_changes(optimizers[0]), pytest.raises(RuntimeError, match=message):
        step()
    assert optimizers[0].skipped_steps == 0

    optimizers[0].zero_grad()
    plain_params = make_params(SHAPES)
    _, plain_step = way(spec_of("AdamW"), plain_params, 1.0)
    for seed in range(when):
        set_grads(plain_params, seed)
        plain_step()
    for at, take in ((params, step), (plain_params, plain_step)):
        set_grads(at, 20)
        take()
    assert_same_bits(params, plain_params)


def test_error_names_the_gradient_that_is_not_finite_not_a_large_one():
    params = make_params(SHAPES, torch.float64)
    optimizer = fusedopt.SGD(params, nonfinite="error")
    set_grads(params, 0)
    params[0].grad *= 1e300
    params[2].grad.fill_(math.inf)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[2\], .*gradient holds NaN or infinity"):
        optimizer.step()


@pytest.mark.parametrize("limit", [None, math.inf])
@every_class
def test_error_needs_no_limit(spec, limit):
    params = make_params(SHAPES)
    optimizer = spec.make(params, nonfinite="error", max_grad_norm=limit)
    train(optimizer, params, 1)
    with_bad_gradient(params, math.nan)
    message = rf"^{spec.name}.step: param_groups\[0\]\['params'\]\[2\].*nothing was updated"
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=message):
        optimizer.step()


@every_value
def test_error_if_nonfinite(value):
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 1)
    with_bad_gradient(params, value)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"norm is (nan|inf).*nothing was updated"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    plain_params = clone_params(params)
    plain = fusedopt.AdamW(plain_params)
    plain.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 1, 5)  # nothing is pending
    train(plain, plain_params, 1, 5)
    assert_same_bits(params, plain_params)


@every_class
def test_large_but_finite_gradients_are_not_skipped(spec):
    """Their float32 norm is infinite, their true norm is not: no reason to lose the step."""
    params = make_params(((13,), (7,)))
    optimizer = spec.make(params, max_grad_norm=1.0, nonfinite="skip")
    for param in params:
        param.grad = torch.full_like(param, 3e38)
    before = bits(params[0])
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert bits(params[0]) != before
    assert params[0].isfinite().all()


# ---- GradScaler and clip -----------------------------------------------------------------------------------------


@every_way
@every_class
def test_grad_scale_is_divided_out_before_the_clip(spec, way):
    """By hand, as GradScaler sets it. A norm of 34 under a scale of 1024; a call without unscale_ sees the scaled one."""
    params, plain_params = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizers, step = way(spec, params, 1.0)
    in_step = way is in_the_step
    _, plain_step = way(spec, plain_params, 1.0 if in_step else 1.0 / 1024)
    for seed in range(2):
        set_grads(params, seed)
        set_grads(plain_params, seed)
        for param in params:
            param.grad *= 1024
        for optimizer in optimizers:
            optimizer.grad_scale = torch.tensor(1024.0)
            optimizer.found_inf = torch.tensor(0.0)
        step()
        plain_step()
        for optimizer in optimizers:
            del optimizer.grad_scale, optimizer.found_inf
        if in_step:
            assert float(optimizers[0].grad_norm) == pytest.approx(true_norm(plain_params), rel=1e-12)
    assert_close(params, plain_params, 1e-7)


@pytest.mark.parametrize("found", [1.0, math.nan, True, torch.tensor(1.0), torch.tensor([True])], ids=str)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
def test_found_inf_skips_whatever_nonfinite_says(nonfinite, found):
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, nonfinite=nonfinite)
    with_bad_gradient(params, math.inf)
    optimizer.clip_grad_norm_(0.5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), found
    with nothing_changes(optimizer):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    del optimizer.grad_scale, optimizer.found_inf
    plain_params = make_params(SHAPES)
    plain = fusedopt.AdamW(plain_params, max_grad_norm=1.0)
    train(optimizer, params, 1, 4)
    train(plain, plain_params, 1, 4)
    assert_same_bits(params, plain_params)


# ---- refused -----------------------------------------------------------------------------------------------------


@only_on("cpu", "no backend is asked")
@pytest.mark.parametrize("limit", [-1.0, -1e-30, -math.inf, math.nan, torch.tensor(-2.0)], ids=str)
def test_bad_limit_is_refused_everywhere(limit):
    params = make_params(SHAPES)
    with pytest.raises(ValueError, match=r"^max_grad_norm must be > 0"):
        fusedopt.AdamW(params, max_grad_norm=limit)
    optimizer = fusedopt.AdamW(params, max_grad_norm=2.0)
    set_grads(params, 0)
    with nothing_changes(optimizer):
        with pytest.raises(ValueError, match=r"^max_grad_norm must be > 0"):
            optimizer.max_grad_norm = limit
        with pytest.raises(ValueError, match=r"^max_norm must be >= 0"):
            optimizer.clip_grad_norm_(limit)
        with pytest.raises(ValueError, match=r"^max_norm must be >= 0"):
            fusedopt.clip_grad_norm_([optimizer], limit)
    assert optimizer.max_grad_norm == 2.0
    assert optimizer.grad_norm is None


def test_parameter_in_two_optimizers_is_noticed_where_it_was_appended_to_a_named_group():
    first, second = make_params([(3,), (5,)])
    optimizers = [fusedopt.AdamW([("first", first)]), fusedopt.AdamW([("second", second)])]
    optimizers[1].param_groups[0]["params"].append(first)
    with pytest.raises(
        ValueError, match=r"optimizers\[1\]: .*\['params'\]\[1\], shape \(3,\).*also in optimizers\[0\]"
    ):
        fusedopt.clip_grad_norm_(optimizers, 1.0)


@pytest.mark.parametrize("limit", ["1.0", True, torch.tensor([1.0, 2.0]), [1.0]], ids=str)
def test_limit_that_is_no_number_is_refused(limit):
    params = make_params(SHAPES)
    with pytest.raises(ValueError, match=r"^max_grad_norm must be a number, got"):
        fusedopt.AdamW(params, max_grad_norm=limit)
    optimizer = fusedopt.AdamW(params)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"^max_norm must be a number, got"):
        optimizer.clip_grad_norm_(limit)


def spent():
    optimizers = iter([fusedopt.SGD(make_params(SHAPES))])
    list(optimizers)
    return optimizers


def twice_the_same():
    return [fusedopt.SGD(make_params(SHAPES))] * 2


def shared():
    params = make_params(SHAPES)
    return [fusedopt.SGD(params[:3]), fusedopt.Lion(params[2:])]


BAD_OPTIMIZERS = {
    "None as limit": (
        lambda: fusedopt.SGD(make_params(SHAPES)),
        None,
        ValueError,
        "max_norm must be a number, got None",
    ),
    "empty list": (list, 1.0, ValueError, "needs at least one optimizer; the iterable is empty or already used up"),
    "used-up iterator": (
        spent,
        1.0,
        ValueError,
        "needs at least one optimizer; the iterable is empty or already used up",
    ),
    "torch's": (lambda: torch.optim.SGD(make_params(SHAPES)), 1.0, TypeError, "takes fusedopt optimizers, got SGD"),
    "parameters": (lambda: make_params(SHAPES), 1.0, TypeError, "takes fusedopt optimizers, got Parameter"),
    "shared parameter": (
        shared,
        1.0,
        ValueError,
        r"clip_grad_norm_: optimizers\[1\]: .*shape \(\), float32 on cpu: also in optimizers\[0\]",
    ),
    "one optimizer twice": (twice_the_same, 1.0, ValueError, r"optimizers\[1\]: .*: also in optimizers\[0\]"),
}


@only_on("cpu", "no backend is asked")
@pytest.mark.parametrize("name", BAD_OPTIMIZERS)
def test_bad_argument_of_clip_grad_norm_is_refused(name):
    make, limit, kind, message = BAD_OPTIMIZERS[name]
    with pytest.raises(kind, match=message):
        fusedopt.clip_grad_norm_(make(), limit)


def test_refused_clip_over_several_optimizers_clips_none():
    """The second has a gradient that cannot be used: the first must not keep a pending clip."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    first, second = fusedopt.SGD(params, lr=0.1), fusedopt.RMSprop(others, lr=0.1)
    set_grads(params, 0)
    others[0].grad = torch.randn(13, 7).to_sparse()
    message = r"^RMSprop.clip_grad_norm_: param_groups\[0\]\['params'\]\[0\].*layout sparse_coo.*; nothing was updated"
    with pytest.raises(RuntimeError, match=message):
        fusedopt.clip_grad_norm_([first, second], 0.001)
    plain_params = make_params(SHAPES)
    train(fusedopt.SGD(plain_params, lr=0.1), plain_params, 1)
    first.step()
    assert_same_bits(params, plain_params)


@only_on("cpu", "no backend is asked")
def test_reference_norm_neither_overflows_nor_vanishes():
    """The specification must not have the fault that it is there to show."""
    for magnitude in (1e200, 1e-200):
        grads = [torch.tensor([3.0, 0.0]).double() * magnitude, torch.tensor([[4.0]]).double() * magnitude]
        assert float(reference.total_norm(grads)) == pytest.approx(5 * magnitude, rel=1e-14)
    assert float(reference.total_norm([torch.zeros(0), torch.zeros(3)])) == 0


# ---- a deferred clip is for the gradients it has seen ------------------------------------------------------------


def one_new(params):
    params[1].grad = params[1].grad.clone()


def one_more(params):
    params[-1].grad = randn(params[-1].shape)


def all_new(params):
    set_grads(params, 9)


def noise(params):
    params[1].grad.add_(1.0)


def zeroed_in_place(params):
    for param in params:
        if param.grad is not None:
            param.grad.zero_()


@pytest.mark.parametrize("change", [one_new, one_more, all_new, noise, zeroed_in_place], ids=lambda f: f.__name__)
@every_class
def test_step_refuses_a_deferred_clip_for_other_gradients(spec, change):
    """In torch new gradients are not clipped and added noise is not scaled; both would be here."""
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 1)
    set_grads(params, 1)
    params[-1].grad = None
    optimizer.clip_grad_norm_(0.1)
    change(params)
    with (
        nothing_changes(optimizer),
        pytest.raises(RuntimeError, match=r"\['params'\]\[\d\].*: its gradient is new or was"),
    ):
        optimizer.step()
    optimizer.zero_grad()
    plain_params = make_params(SHAPES)
    plain = spec.make(plain_params)
    train(plain, plain_params, 1)
    for at, opt in ((params, optimizer), (plain_params, plain)):
        train(opt, at, 1, 2)
    assert_same_bits(params, plain_params)


@every_class
def test_deferred_clip_holds_when_gradients_are_removed(spec):
    params, twin_params = make_params(SHAPES, torch.float64), make_params(SHAPES, torch.float64)
    optimizer, twin = spec.make(params), spec.peer(twin_params)
    set_grads(params, 0)
    set_grads(twin_params, 0)
    optimizer.clip_grad_norm_(0.1)
    torch.nn.utils.clip_grad_norm_(twin_params, 0.1)
    params[1].grad = twin_params[1].grad = None
    optimizer.step()
    twin.step()
    assert_close(params, twin_params, spec.tolerance)


@every_class
def test_clip_of_new_gradients_replaces_the_one_that_no_step_used(spec):
    """A loop that skips a step after its clip, and drops gradients through the model."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    set_grads(params, 0)
    optimizer.clip_grad_norm_(0.001)
    for param in params:
        param.grad = None
    for at, opt in ((params, optimizer), (plain_params, plain)):
        set_grads(at, 1)
        opt.clip_grad_norm_(0.5)
        opt.step()
    assert_same_bits(params, plain_params)
    set_grads(params, 2)
    optimizer.clip_grad_norm_(0.5)
    params[1].grad.mul_(2)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_: .*was changed since clip_grad_norm_"):
        optimizer.clip_grad_norm_(0.5)


def test_deferred_clip_does_not_keep_gradients_alive():
    param = torch.nn.Parameter(randn((5,)))
    optimizer = fusedopt.SGD([param])
    param.grad = randn((5,), seed=1)
    gone = weakref.ref(param.grad)
    optimizer.clip_grad_norm_(0.1)
    param.grad = None
    assert gone() is None


def test_copy_of_an_optimizer_has_no_deferred_clip():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, lr=0.1)
    set_grads(params, 0)
    optimizer.clip_grad_norm_(0.001)
    twin_params, twin = copy.deepcopy((params, optimizer))
    start = clone_params(twin_params)
    set_grads(twin_params, 0)
    twin.step()
    for param, before in zip(twin_params, start, strict=True):
        assert_close([param], [before - 0.1 * param.grad], 1e-6)
    before = clone_params(params)
    optimizer.step()  # the original still clips
    for param, old in zip(params, before, strict=True):
        assert (param - old).norm() <= 0.001 * 0.1 * 1.01


# ---- what the norm is made of ------------------------------------------------------------------------------------


def test_norm_tensor_is_of_the_parameters_that_take_part():
    """Not of the first one listed, nor of the last optimizer."""
    frozen = torch.nn.Parameter(torch.empty(3, dtype=torch.float64, device="meta"))
    narrow, wide = torch.nn.Parameter(randn((5,))), torch.nn.Parameter(randn((5,), torch.float64))
    optimizers = [fusedopt.SGD([wide]), fusedopt.SGD([frozen, narrow]), fusedopt.SGD([torch.nn.Parameter(randn((2,)))])]
    narrow.grad, wide.grad = randn((5,), seed=1), randn((5,), torch.float64, 2)
    both = torch.cat([narrow.grad.double(), wide.grad]).norm()
    for order in (optimizers, optimizers[::-1]):
        norm = fusedopt.clip_grad_norm_(order, float("inf"))
        assert (norm.dtype, norm.device.type) == (torch.float64, "cpu")
        assert float(norm) == pytest.approx(float(both), rel=1e-12)
    norm = optimizers[1].clip_grad_norm_(1.0)
    assert (norm.dtype, norm.device.type) == (torch.float32, "cpu")


@only_on("cpu", "no backend is asked")
def test_nonfinite_and_backend_can_be_read():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params, nonfinite="skip", backend="reference")
    assert (optimizer.nonfinite, optimizer.backend, fusedopt.SGD(params).backend) == ("skip", "reference", None)
    optimizer.nonfinite = "error"
    with pytest.raises(ValueError, match="nonfinite must be one of"):
        optimizer.nonfinite = "ignore"
    set_grads(params, 0)
    params[0].grad[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        optimizer.step()
