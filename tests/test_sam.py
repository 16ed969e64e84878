"""SAM and ASAM: against per-tensor loops around torch.optim, the ascent itself, weights that come back to the bit."""

import copy
import importlib.util
import itertools
import pickle
import signal
import warnings
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_close,
    assert_same_bits,
    bits,
    clone_params,
    make_params,
    nothing_changes,
    only_on,
    randn,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt import _C
from fusedopt.plan import Plan

SHAPES = ((13, 7), (1021,), (), (0, 3), (4099,))
BASES = {
    "AdamW": {"weight_decay": 0.125},
    "SGD": {"momentum": 0.9, "weight_decay": 0.125},
    "NAdam": {},
    "RMSprop": {"momentum": 0.5, "centered": True, "eps": 1e-3},
}


def loss_of(params, seed, scale=1.0):
    """Not quadratic, of all elements, so that the second gradient is another one."""
    return scale * sum(
        ((param * 0.7).sin() * randn(param.shape, param.dtype, seed + i)).sum() for i, param in enumerate(params)
    )


def closure_of(optimizer, params, seed, scale=1.0):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(params, seed, scale)
        loss.backward()
        return loss

    return closure


class PlainSAM:
    """Per tensor, in float64 arithmetic of torch, around an optimizer of torch."""

    def __init__(self, groups, twin, max_grad_norm=None):
        self.groups, self.twin, self.max_grad_norm = groups, twin, max_grad_norm

    def step(self, closure, sign=1.0):
        loss = closure()
        used = [(p, group) for group in self.groups for p in group["params"] if p.grad is not None]
        weights = [p.detach().double() if group["adaptive"] else torch.ones_like(p).double() for p, group in used]
        norm = torch.cat([(w * p.grad.double()).flatten() for w, (p, _) in zip(weights, used, strict=True)]).norm()
        before = [(p, p.detach().clone()) for p, _ in used]
        with torch.no_grad():
            for w, (p, group) in zip(weights, used, strict=True):
                p.add_((sign * group["rho"] * w * w * p.grad.double() / (norm + 1e-12)).to(p.dtype))
        closure()
        with torch.no_grad():
            for p, old in before:
                p.copy_(old)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p, _ in used], self.max_grad_norm)
        self.twin.step()
        return loss


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_steps_are_those_of_a_plain_loop_around_torch(base, adaptive, on_backend):
    """Float64, so that a wrong formula cannot hide; groups of their own rho and kind, a clip that bites, ascent and descent."""
    for maximize in (False, True):
        params = make_params(SHAPES, torch.float64)
        others = clone_params(params)
        own = [{"rho": 0.7}, {"adaptive": not adaptive}]
        groups = [{"params": params[:2], **own[0]}, {"params": params[2:], **own[1]}]
        options = {"lr": 0.05, "maximize": maximize, **BASES[base]}
        ours = fusedopt.SAM(groups, getattr(fusedopt, base), rho=0.3, adaptive=adaptive, max_grad_norm=3.0, **options)
        twin = getattr(torch.optim, base)([{"params": others[:2]}, {"params": others[2:]}], **options)
        plain = [
            {"params": others[:2], "rho": 0.7, "adaptive": adaptive},
            {"params": others[2:], "rho": 0.3, "adaptive": not adaptive},
        ]
        theirs = PlainSAM(plain, twin, max_grad_norm=3.0)
        for seed in range(3):
            loss = ours.step(closure_of(ours, params, 10 * seed))
            expected = theirs.step(closure_of(twin, others, 10 * seed), -1.0 if maximize else 1.0)
            assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
            assert ours.grad_norm > 3.0
        assert_close(params, others, 1e-6 if base == "NAdam" else 1e-11)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_the_ascent_is_rho_long_along_the_gradient(adaptive, precision, on_backend):
    params = make_params(SHAPES, precision)
    optimizer = fusedopt.SAM(params, rho=2.0, adaptive=adaptive)
    loss_of(params, 0).backward()
    before = [param.detach().to(torch.float64, copy=True) for param in params]
    grads = [param.grad.double() for param in params]
    if adaptive:
        norm = torch.cat([(p * g).flatten() for p, g in zip(before, grads, strict=True)]).norm()
        expected = [p + 2.0 * p * p * g / (norm + 1e-12) for p, g in zip(before, grads, strict=True)]
    else:
        norm = torch.cat([g.flatten() for g in grads]).norm()
        expected = [p + 2.0 * g / (norm + 1e-12) for p, g in zip(before, grads, strict=True)]
    optimizer.first_step()
    tolerance = 8 * torch.finfo(precision).eps
    for param, wanted, start in zip(params, expected, before, strict=True):
        assert ((param.double() - wanted).abs() <= tolerance * (start.abs() + (wanted - start).abs())).all()
    if precision == torch.float64 and not adaptive:
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)]).norm()
        assert float(moved) == pytest.approx(2.0, rel=1e-12)


def odd_layouts():
    """Transposed, with gaps, and a slice off alignment."""
    return [
        torch.nn.Parameter(randn((33, 5)).t()),
        torch.nn.Parameter(randn((40, 6))[:, ::2]),
        torch.nn.Parameter(randn((4200,))[3:]),
    ]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_come_back_to_the_bit(precision, on_backend):
    """By a step that moves nothing, which is by the kernels, and by restore; -0.0, subnormals and infinity among them."""
    special = torch.tensor([-0.0, 1e-40, -torch.inf, 65504.0, 1e-7], dtype=torch.float64).to(precision)
    params = [torch.nn.Parameter(special), *make_params(SHAPES, precision)]
    params += odd_layouts() if precision == torch.float32 else []
    before = [bits(param) for param in params]
    optimizer = fusedopt.SAM(params, fusedopt.SGD, rho=10.0, lr=0.0)

    def set_grads():
        for i, param in enumerate(params):
            param.grad = randn(param.shape, precision, i)

    for end in (optimizer.second_step, optimizer.restore, optimizer.second_step):
        set_grads()
        optimizer.first_step()
        assert sum(bits(param) != old for param, old in zip(params, before, strict=True)) >= len(params) - 2
        set_grads()
        end()
        assert [bits(param) for param in params] == before


@pytest.mark.parametrize("base", [fusedopt.AdamW, fusedopt.LAMB])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_beside_a_large_parameter_weights_move_as_beside_a_small_one(precision, base):
    """With four million elements they are written past the caches; off alignment and with awkward ends too."""

    def moved(numel):
        params = [
            *make_params(SHAPES, precision),
            *(torch.nn.Parameter(randn((257 + offset,), precision, offset)[offset:]) for offset in range(8)),
            *(odd_layouts() if precision == torch.float32 else []),
            torch.nn.Parameter(torch.ones(numel, dtype=precision)),
        ]
        optimizer = fusedopt.SAM(params, base, rho=5.0, lr=0.1, weight_decay=0.125, backend="cpu")
        seen = []
        for step in range(2):
            for end in (optimizer.first_step, optimizer.second_step):
                for i, param in enumerate(params[:-1]):
                    param.grad = randn(param.shape, precision, i + step)
                params[-1].grad = torch.zeros_like(params[-1])  # adds nothing to the norm
                end()
                seen.append([bits(param) for param in params[:-1]] + [params[-1].unique().tolist()])
        states = [{name: bits(value) for name, value in optimizer.state[param].items()} for param in params[:-1]]
        return seen, states

    few, many = moved(300), moved(_C.large_table + 5)
    assert few == many
    for before, after in itertools.pairwise(few[0]):
        assert all(old != new or not old for old, new in zip(before[:-1], after[:-1], strict=True))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [fusedopt.LAMB, fusedopt.StableAdamW])
def test_what_is_summed_is_of_the_weights_before_the_ascent(base, precision, on_backend):
    """On each backend as in the reference; without the ascent it would be something else."""

    def trained(rho, **backend):
        params = make_params(SHAPES, precision)
        optimizer = fusedopt.SAM(params, base, rho=rho, lr=0.1, weight_decay=0.125, **backend)
        for step in range(3):
            for end in (optimizer.first_step, optimizer.second_step):
                for i, param in enumerate(params):
                    param.grad = randn(param.shape, precision, i + step)
                end()
        return params

    assert_close(trained(20.0), trained(20.0, backend="reference"), 1e-5 if precision == torch.float32 else 1e-2)


@pytest.mark.parametrize("layout", range(3))
def test_any_layout_steps_as_its_contiguous_clone(layout, on_backend):
    param = odd_layouts()[layout]
    results = []
    for params in ([param], [torch.nn.Parameter(param.detach().contiguous().clone())]):
        optimizer = fusedopt.SAM(params, fusedopt.Lion, rho=0.5, adaptive=True, lr=0.1)
        for seed in range(3):
            optimizer.step(closure_of(optimizer, params, seed))
        results.append(params)
    assert_close(results[0], results[1], 1e-6)


@pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
def test_zero_gradients_ascend_nowhere(adaptive, on_backend):
    params = make_params(SHAPES)
    optimizer = fusedopt.SAM(params, lr=0.1, weight_decay=0.0, adaptive=adaptive)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.first_step()
    assert_same_bits(before, [param.detach() for param in params])
    optimizer.second_step()
    assert_same_bits(before, [param.detach() for param in params])


@only_on("cpu", "of the GPU backends test_device.py counts the launches")
def test_a_step_copies_nothing_and_plans_nothing(monkeypatch, on_backend):
    """The weights that the ascent left behind are read by the step itself; both plans stay."""
    params = make_params(SHAPES)
    optimizer = fusedopt.SAM(params, max_grad_norm=1.0)
    optimizer.step(closure_of(optimizer, params, 0))
    monkeypatch.setattr(torch, "_foreach_copy_", None)
    monkeypatch.setattr(Plan, "make", None)
    before = [param.detach().clone() for param in params]
    optimizer.step(closure_of(optimizer, params, 1))
    assert not any(same_bits(old, param.detach()) for old, param in zip(before, params, strict=True) if old.numel())


# ---- gradients that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_nonfinite_gradients_change_nothing(nonfinite, which, value, on_backend):
    params = make_params(SHAPES)
    optimizer = fusedopt.SAM(params, lr=0.1, nonfinite=nonfinite)
    optimizer.step(closure_of(optimizer, params, 0))
    states = copy.deepcopy(optimizer.state_dict()["state"])
    before = [param.detach().clone() for param in params]
    calls = []

    def closure():
        loss = closure_of(optimizer, params, 1)()
        calls.append(loss)
        if len(calls) == which:
            params[1].grad[7] = value
        return loss

    if nonfinite == "error":
        with pytest.raises(RuntimeError, match=r"params'\]\[1\].*nothing was updated"):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
        assert int(optimizer.skipped_steps) == 1
    assert len(calls) == which  # after a first gradient that is no good there is no use in a second one
    assert_same_bits(before, [param.detach() for param in params])
    now = optimizer.state_dict()["state"]
    for index, state in states.items():
        assert_same_bits(state.values(), now[index].values())
    optimizer.step(closure_of(optimizer, params, 2))
    assert not same_bits(before[1], params[1].detach())


def test_nonfinite_gradients_propagate_as_in_torch(on_backend):
    params = make_params(SHAPES)
    optimizer = fusedopt.SAM(params, fusedopt.SGD, lr=0.1)
    optimizer.step(closure_of(optimizer, params, 0))
    loss_of(params, 1).backward()
    params[1].grad[7] = torch.inf
    before = [param.detach().clone() for param in params]
    optimizer.first_step()
    assert params[1][7].isnan() and not params[0].isnan().any()
    optimizer.restore()
    assert_same_bits(before, [param.detach() for param in params])


# ---- the two steps by hand -------------------------------------------------------------------------------------


def test_by_hand_is_as_by_closure(on_backend):
    results = []
    for by_hand in (False, True):
        params = make_params(SHAPES)
        optimizer = fusedopt.SAM(params, rho=0.5, lr=0.05)
        for seed in range(3):
            closure = closure_of(optimizer, params, seed)
            if by_hand:
                closure()
                optimizer.first_step(zero_grad=True)
                assert params[0].grad is None
                closure()
                optimizer.second_step(zero_grad=True)
                assert params[0].grad is None
            else:
                optimizer.step(closure)
        results.append(params)
    assert_same_bits(*results)


def test_order_of_the_two_steps_is_watched():
    params = make_params()
    optimizer = fusedopt.SAM(params)
    loss_of(params, 0).backward()
    with nothing_changes(optimizer):
        with pytest.raises(RuntimeError, match="step needs a closure"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="first_step\\(\\) comes before"):
            optimizer.second_step()
        optimizer.restore()
    optimizer.first_step()
    with nothing_changes(optimizer):
        with pytest.raises(RuntimeError, match="first_step: was called before"):
            optimizer.first_step()
        with pytest.raises(RuntimeError, match="first_step\\(\\) was called before"):
            optimizer.step(closure_of(optimizer, params, 1))
        with pytest.raises(RuntimeError, match="cannot be copied between"):
            copy.deepcopy(optimizer)
    optimizer.step()
    optimizer.step(closure_of(optimizer, params, 1))


def test_step_without_closure_and_lr_0_makes_the_states_and_moves_nothing(on_backend):
    """As torch.distributed.checkpoint does before it loads."""
    params = make_params()
    optimizer = fusedopt.SAM(params, lr=torch.tensor(0.0))
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step(closure=None)
    assert_same_bits(before, [param.detach() for param in params])
    assert len(optimizer.state) == len(params)


def test_a_second_closure_that_fails_leaves_the_weights_where_they_were(on_backend):
    params = make_params()
    optimizer = fusedopt.SAM(params, rho=1.0)
    before = [param.detach().clone() for param in params]
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure_of(optimizer, params, 0)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert_same_bits(before, [param.detach() for param in params])
    assert not optimizer.state
    optimizer.step(closure_of(optimizer, params, 1))


@pytest.mark.parametrize("has_all", [True, False], ids=["all gradients", "a gradient less"])
def test_refused_second_step_may_be_tried_again_or_given_up(has_all, on_backend):
    """The parameters stay where the ascent has left them, also if the step cannot read the weights from there."""
    params = make_params()
    others, before = clone_params(params), [param.detach().clone() for param in params]
    optimizer, other = (fusedopt.SAM(each, rho=0.5, lr=0.1) for each in (params, others))
    for goes_on in (False, True):
        for each, of_each in ((optimizer, params), (other, others)):
            closure_of(each, of_each, 0)()
            each.first_step()
            closure_of(each, of_each, 1)()
            of_each[0].grad = of_each[0].grad if has_all else None
        optimizer.param_groups[0]["lr"] = -1.0
        with nothing_changes(optimizer), pytest.raises(ValueError, match=r"param_groups\[0\]: lr must be >= 0"):
            optimizer.second_step()
        optimizer.param_groups[0]["lr"] = 0.1
        assert not same_bits(params[0].detach(), before[0])
        for each in (optimizer, other):
            each.second_step() if goes_on else each.restore()
        assert_same_bits(params, others if goes_on else before)


@pytest.mark.parametrize("has_all", [True, False], ids=["all gradients", "a gradient less"])
def test_second_gradient_that_is_refused_leaves_the_weights_at_the_ascent(has_all, on_backend):
    """Also where only the norm shows it, which is taken when everything is planned."""
    params = make_params()
    before = [param.detach().clone() for param in params]
    optimizer = fusedopt.SAM(params, rho=0.5, lr=0.1, nonfinite="error")
    closure_of(optimizer, params, 0)()
    optimizer.first_step()
    closure_of(optimizer, params, 1)()
    params[0].grad = params[0].grad if has_all else None
    params[1].grad.view(-1)[0] = float("nan")
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"\['params'\]\[1\].*gradient holds NaN"):
        optimizer.second_step()
    optimizer.restore()
    assert_same_bits(params, before)


@pytest.mark.parametrize("when", [1, 2], ids=["in the ascent", "in the step"])
def test_interrupt_divides_no_step(when, monkeypatch):
    """Ctrl-C while memory is written: the step is done, or nothing is."""
    params = make_params()
    others = clone_params(params)
    optimizer, other = (fusedopt.SAM(each, rho=0.5, lr=0.1) for each in (params, others))
    optimizer.step(closure_of(optimizer, params, 0))
    other.step(closure_of(other, others, 0))
    calls, increment = [], torch.autograd.graph.increment_version

    def interrupted(tensors):
        calls.append(1)
        if len(calls) == when:
            signal.raise_signal(signal.SIGINT)
        increment(tensors)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(optimizer, params, 1))
    if when == 2:
        other.step(closure_of(other, others, 1))
    assert_same_bits(params, others)
    for param, twin in zip(params, others, strict=True):
        assert_same_bits(optimizer.state[param].values(), other.state[twin].values())
    for each, of_each in ((optimizer, params), (other, others)):
        each.step(closure_of(each, of_each, 2))
    assert_same_bits(params, others)


def test_parameters_with_only_one_of_the_two_gradients(on_backend):
    """One that ascended comes back and is not stepped; one that did not is stepped from where it is."""
    params = make_params()
    optimizer = fusedopt.SAM(params, fusedopt.SGD, rho=1.0, lr=0.1)
    before = [param.detach().clone() for param in params]
    for turn in range(2):
        optimizer.zero_grad()
        loss_of(params, 0).backward()
        params[1].grad = None
        optimizer.first_step()
        assert_close([params[1]], [before[1] - 0.1 * turn], 1e-6)
        assert not same_bits(params[0].detach(), before[0])
        loss_of(params, 1).backward()
        params[0].grad = None
        params[1].grad = torch.ones_like(params[1])
        optimizer.second_step()
        assert same_bits(params[0].detach(), before[0])
        assert_close([params[1]], [before[1] - 0.1 * (turn + 1)], 1e-6)


def test_step_after_a_first_ascent_reads_the_weights_from_before(on_backend):
    """The parameter has its state from the start. The plan knows it without old weights, before it has a gradient."""
    params = make_params()
    optimizer = fusedopt.SAM(params, fusedopt.SGD, rho=1.0, lr=0.1, momentum=0.9)
    for param in params:
        optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    before = params[1].detach().clone()
    for has_grad in (False, True):
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            loss_of(params, 0).backward()
            params[1].grad = torch.ones_like(params[1]) if has_grad else None
            step()
    assert_close([params[1]], [before - 0.1], 1e-6)


# ---- as its base -----------------------------------------------------------------------------------------------


def test_checkpoints_are_those_of_the_base():
    params = make_params(dtype=torch.float64)
    optimizer = fusedopt.SAM([{"params": params, "rho": 0.4}], lr=0.05)
    for seed in range(2):
        optimizer.step(closure_of(optimizer, params, seed))
    optimizer.first_step()
    checkpoint = copy.deepcopy(optimizer.state_dict())
    optimizer.restore()
    plain, twin = (cls(clone_params(params), lr=0.05) for cls in (fusedopt.AdamW, torch.optim.AdamW))
    assert checkpoint["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert fusedopt.SAM(params).state_dict()["param_groups"] == fusedopt.AdamW(params).state_dict()["param_groups"]
    plain.load_state_dict(checkpoint)
    twin.load_state_dict(checkpoint)
    others = clone_params(params)
    again = fusedopt.SAM([{"params": others, "rho": 0.4}], lr=1.0, rho=3.0)
    of_base = plain.state_dict()
    del of_base["param_groups"][0]["rho"]
    again.load_state_dict(of_base)
    assert again.param_groups[0]["rho"] == 0.4 and again.param_groups[0]["lr"] == 0.05
    optimizer.step(closure_of(optimizer, params, 5))
    again.step(closure_of(again, others, 5))
    assert_same_bits(params, others)
    from_torch = fusedopt.SAM(clone_params(params))
    from_torch.load_state_dict(twin.state_dict())


def test_copies_go_on_as_the_original():
    params = make_params()
    optimizer = fusedopt.SAM(params, fusedopt.Lion, rho=0.4, adaptive=True, lr=0.01, max_grad_norm=1.0)
    optimizer.step(closure_of(optimizer, params, 0))
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert isinstance(copied, fusedopt.SAM) and isinstance(copied, fusedopt.Lion)
        assert (copied.rho, copied.adaptive, copied.max_grad_norm) == (0.4, True, 1.0)
        own = copied.param_groups[0]["params"]
        twin = copy.deepcopy(optimizer)
        of_twin = twin.param_groups[0]["params"]
        copied.step(closure_of(copied, own, 1))
        twin.step(closure_of(twin, of_twin, 1))
        assert_same_bits(own, of_twin)


def test_schedulers_and_hooks_see_one_step():
    params = make_params()
    optimizer = fusedopt.SAM(params, fusedopt.SGD, lr=0.1, momentum=0.9)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(params, 0).backward()
        optimizer.first_step()
        assert seen == []
        optimizer.second_step()
        scheduler.step()
        optimizer.step(closure_of(optimizer, params, 1))
        scheduler.step()
    assert seen == ["before", "after"] * 2


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("is_finite", [True, False])
def test_grad_scaler(is_finite, fused, on_backend):
    """Powers of two scale exactly: the same bits as without; a gradient that is not finite only skips the step. The weights
    come back then too, whoever unscales."""
    params = make_params()
    others = clone_params(params)
    scaled, plain = (fusedopt.SAM(each, rho=0.5, lr=0.05, max_grad_norm=1.0, fused=fused) for each in (params, others))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        plain.step(closure_of(plain, others, seed))
        scaled.zero_grad()
        scaler.scale(loss_of(params, seed)).backward()
        scaled.first_step()
        scaled.zero_grad()
        scaler.scale(loss_of(params, seed)).backward()
        if seed == 2 and not is_finite:
            before = [scaled._ascent.sources[param].clone() for param in params if param.numel()]
            params[0].grad[0] = torch.inf
        scaler.step(scaled)
        scaler.update()
    if is_finite:
        assert_close(params, others, 1e-6)
    else:
        assert_same_bits(before, [param.detach() for param in params if param.numel()])
        assert int(scaled.skipped_steps) == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("changed", [torch.ones(40), torch.ones(2, 2)], ids=["longer", "another shape"])
def test_parameter_of_another_shape_in_between_is_refused(changed, backend):
    """Its old weights say nothing of the new ones; reading them would be reading other memory."""
    params = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(3))]
    optimizer = fusedopt.SAM(params, fusedopt.SGD, rho=1.0, lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    params[0].grad, params[0].data = None, changed.clone()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"params'\]\[0\].*state 'old_param' has shape \(4,\)"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match="had shape \\(4,\\)"):
        optimizer.restore()
    assert torch.equal(params[0].detach(), changed) and torch.equal(params[1].detach(), torch.ones(3))
    optimizer.step(closure_of(optimizer, params, 0))  # and it goes on


def test_parameter_of_another_dtype_goes_on():
    params = make_params()
    optimizer = fusedopt.SAM(params, fusedopt.SGD, lr=0.1)
    optimizer.step(closure_of(optimizer, params, 0))
    for param in params:
        param.grad = None
        param.data = param.data.double()
    others = clone_params(params)
    other = fusedopt.SAM(others, fusedopt.SGD, lr=0.1)
    optimizer.step(closure_of(optimizer, params, 1))
    other.step(closure_of(other, others, 1))
    assert_same_bits(params, others)


def test_mask_stays_where_its_gradient_is_zero(on_backend):
    """ASAM's norm is of θg: -inf times 0 must not come into it."""
    params = [torch.nn.Parameter(torch.tensor([-torch.inf, 1.0, 2.0]))]
    optimizer = fusedopt.SAM(params, fusedopt.SGD, rho=0.5, adaptive=True, lr=0.1)
    params[0].grad = torch.tensor([0.0, 3.0, 2.0])
    optimizer.first_step()
    torch.testing.assert_close(params[0].detach(), torch.tensor([-torch.inf, 1.3, 2.8]))
    optimizer.second_step()
    torch.testing.assert_close(params[0].detach(), torch.tensor([-torch.inf, 0.7, 1.8]))


def test_bad_arguments_are_refused():
    params = make_params()
    for options, message in (
        ({"rho": -1.0}, "rho must be >= 0, got -1.0"),
        ({"rho": float("nan")}, "rho must be >= 0, got nan"),
        ({"rho": "x"}, "rho must be a number"),
        ({"adaptive": 2}, "adaptive must be True or False, got 2"),
        ({"lr": -1.0}, "lr must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fusedopt.SAM(params, **options)
    for base in (torch.optim.AdamW, "AdamW", fusedopt.SAM, None):
        with pytest.raises(TypeError, match="base must be an optimizer class of fusedopt"):
            fusedopt.SAM(params, base)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: rho must be >= 0"):
        fusedopt.SAM([{"params": params, "rho": -1}])
    with pytest.raises(ValueError, match="SAM takes no sparse gradients"):
        fusedopt.SAM(params, sparse="lazy")
    checkpoint = fusedopt.SAM([{"params": params, "rho": 1}]).state_dict()
    checkpoint["param_groups"][0]["rho"] = -1
    with pytest.raises(ValueError, match=r"param_groups\[0\]: rho must be >= 0"):
        fusedopt.SAM(params).load_state_dict(checkpoint)

    class OwnStep(fusedopt.SGD):
        def step(self, closure=None):
            pass

    with pytest.raises(TypeError, match="OwnStep has a step of its own"):
        fusedopt.SAM(params, OwnStep)
    with pytest.raises(TypeError, match="SAM itself has no subclasses"):
        type("Mine", (fusedopt.SAM,), {})
    with pytest.raises(TypeError, match="SAM goes around an optimizer"):
        fusedopt.recipes.rnn(torch.nn.Linear(2, 2), 10, optimizer=fusedopt.SAM, lr=0.1)
    optimizer = fusedopt.SAM(params)
    with pytest.raises(ValueError, match="rho must be >= 0"):
        optimizer.rho = -1
    optimizer.param_groups[0]["rho"] = -1
    loss_of(params, 0).backward()
    with nothing_changes(optimizer), pytest.raises(ValueError, match=r"SAM.first_step: param_groups\[0\]: rho must be"):
        optimizer.first_step()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_random_lives_are_those_of_a_plain_loop(data):
    """Any of the bases, options that change, parameters that come, go without a gradient or have none."""
    base = data.draw(st.sampled_from([*BASES]))
    shapes = data.draw(st.lists(st.sampled_from([(), (1,), (7,), (0, 2), (33, 9), (1025,)]), min_size=1, max_size=4))
    params = make_params(shapes, torch.float64)
    others = clone_params(params)
    options = {"lr": 0.05, **BASES[base]}
    rho, adaptive = data.draw(st.floats(0, 2)), data.draw(st.booleans())
    ours = fusedopt.SAM(params, getattr(fusedopt, base), rho=rho, adaptive=adaptive, **options)
    twin = getattr(torch.optim, base)(others, **options)
    theirs = PlainSAM([{"params": others, "rho": rho, "adaptive": adaptive}], twin)
    for seed in range(4):
        change = data.draw(st.sampled_from(["nothing", "rho", "frozen", "reloaded", "moved"]))
        if change == "rho":
            ours.rho = theirs.groups[0]["rho"] = data.draw(st.floats(0, 2))
        if change == "reloaded":
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        if change == "moved":
            params[0].data = params[0].data.clone()
        used = [i for i in range(len(params)) if change != "frozen" or i % 2]

        def closure(optimizer, of, used=used, seed=seed):
            optimizer.zero_grad()
            loss = loss_of([of[i] for i in used], 10 * seed) if used else torch.zeros(())
            if used:
                loss.backward()
            return loss

        if used:
            ours.step(lambda closure=closure: closure(ours, params))
            theirs.step(lambda closure=closure: closure(twin, others))
    assert_close(params, others, 1e-6 if base == "NAdam" else 1e-10)


def test_example_runs(monkeypatch, capsys):
    """Both optimizers learn; the numbers of so short a run say no more."""
    pytest.importorskip("sklearn")
    path = Path(__file__).parents[1] / "examples" / "sam.py"
    spec = importlib.util.spec_from_file_location("sam_example", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr("sys.argv", ["sam.py", "--gradients", "300", "--seeds", "1"])
    threads = torch.get_num_threads()
    try:
        example.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    accuracies = [float(word.rstrip("%")) for word in printed.split() if word.endswith("%")]
    assert "SAM(SGD)" in printed and len(accuracies) == 2 and min(accuracies) > 40  # by chance: 10
