"""The rule headers, computing in double, are the reference's formulas, also at 0 and infinity; and both know the same table."""

import inspect

import pytest
import torch
from cases import CASES, Oracle, random_grads, random_params

import fusedopt
from fusedopt import _C, reference
from fusedopt.backends import BACKENDS
from fusedopt.rules import RULES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_header_in_double_is_the_reference_in_float64(case):
    """1e-12 relative over 20 steps: a wrong formula cannot hide in rounding."""
    sizes = (1009, 3)
    params = random_params(sizes, torch.float64)
    optimizer = case.make(params)
    oracle = Oracle(case, optimizer.param_groups[0], params)
    for step in range(20):
        for param, grad in zip(params, random_grads(sizes, torch.float64, step), strict=True):
            param.grad = grad
        oracle.step([param.grad for param in params])
        optimizer.step()
    ours = torch.cat([param.detach() for param in params])
    assert not oracle.is_ambiguous.any()
    torch.testing.assert_close(ours, oracle.param, rtol=1e-12, atol=1e-14)
    for name, expected in oracle.state.items():
        found = [optimizer.state[param][name] for param in params]
        if name == case.rule.extra:
            assert float(found[0]) == pytest.approx(expected, rel=1e-12)
        else:
            torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_beyond_range_leave_what_the_reference_leaves(case):
    """Where squares overflow and where infinities cancel: the same elements are NaN, the others have the same values."""
    param = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    optimizer = case.make([param])
    oracle = Oracle(case, optimizer.param_groups[0], [param])
    for first in (torch.inf, 1.0):
        param.grad = torch.tensor([first, -first, 1e200, 1.0], dtype=torch.float64)
        oracle.step([param.grad])
        optimizer.step()
        torch.testing.assert_close(param.detach(), oracle.param, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_gradients_without_decay_move_nothing(case):
    params = random_params((33, 7), torch.float64)
    start = [param.detach().clone() for param in params]
    optimizer = case.make(params, weight_decay=0)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, start, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_parameter_stays_minus_infinity(case):
    """-inf as a mask, with no decay and a zero gradient: 0 * inf must not come into it."""
    param = torch.nn.Parameter(torch.tensor([-torch.inf, 1.0], dtype=torch.float64))
    optimizer = case.make([param], weight_decay=0)
    for _ in range(3):
        param.grad = torch.tensor([0.0, 1.0], dtype=torch.float64)
        optimizer.step()
    assert float(param.detach()[0]) == -torch.inf
    assert param[1].isfinite() and param[1] != 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", [case for case in CASES if case.kwargs.get("centered")], ids=str)
def test_centered_variance_of_a_constant_gradient_is_not_negative(case, backend):
    """It tends to 0, and rounding takes it below; the root of that is NaN."""
    (param,) = random_params((1021,), torch.float32)
    optimizer = case.make([param], alpha=0.5, eps=1e-12, weight_decay=0, backend=backend)
    (grad,) = random_grads((1021,), torch.float32, 0)
    for _ in range(60):
        param.grad = grad
        optimizer.step()
    assert param.isfinite().all()


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_table_and_header_agree_on_scalars_and_states(rule):
    """A scalar in another order would be read as another hyperparameter."""
    variants = {name: row for name, row in _C.rules.items() if name.split("_")[0] == rule.name}
    assert variants
    for _, hyper_names, num_slots, _ in variants.values():
        assert tuple(hyper_names.split()) == rule.hyper
        assert num_slots == len(rule.states)


def test_every_kernel_variant_is_reached_by_a_case():
    reached = set()
    for case in CASES:
        optimizer = case.make([torch.nn.Parameter(torch.ones(1))])
        reached.add(case.rule.variant(optimizer.param_groups[0]))
    assert reached == {name for name in _C.rules if RULES[name.split("_")[0]].optimizers}  # else no class has it alone


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_every_option_of_the_reference_is_an_option_of_the_class(rule):
    keywords = inspect.signature(getattr(reference, rule.name)).parameters
    options = {name for name, parameter in keywords.items() if parameter.kind is parameter.KEYWORD_ONLY}
    for optimizer in rule.optimizers:
        case = next(case for case in CASES if case.optimizer == optimizer)
        group = case.make([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
        assert options <= set(group) | set(rule.own_options)


# ---- rules that torch has not, as their papers write them: another form, tensor by tensor -------------------------


def paper_lion(lr, betas, weight_decay, **_):
    """Algorithm 2: the decay is inside the bracket."""
    momentum = 0.0

    def step(param, grad):
        nonlocal momentum
        update = torch.sign(torch.lerp(grad, torch.as_tensor(momentum).to(grad).expand_as(grad), betas[0]))
        momentum = torch.lerp(grad, torch.as_tensor(momentum).to(grad).expand_as(grad), betas[1])
        return param - lr * (update + weight_decay * param)

    return step


def paper_lamb(lr, betas, eps, weight_decay, **_):
    """Algorithm 2, with φ the identity."""
    m, v, t = 0.0, 0.0, 0

    def step(param, grad):
        nonlocal m, v, t
        t += 1
        m, v = m + (1 - betas[0]) * (grad - m), v + (1 - betas[1]) * (grad.square() - v)
        ratio = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps) + weight_decay * param
        return param - lr * param.norm() / ratio.norm() * ratio

    return step


def paper_adan(lr, betas, eps, weight_decay, **_):
    """Algorithm 1, whose betas are one minus those of the code; the code's bias corrections."""
    b1, b2, b3 = (1 - beta for beta in betas)
    m, v, n, t, before = 0.0, 0.0, 0.0, 0, None

    def step(param, grad):
        nonlocal m, v, n, t, before
        t += 1
        before = grad if before is None else before
        m, v = (1 - b1) * m + b1 * grad, (1 - b2) * v + b2 * (grad - before)
        n = (1 - b3) * n + b3 * (grad + (1 - b2) * (grad - before)) ** 2
        before = grad
        eta = lr / ((n / (1 - (1 - b3) ** t)) ** 0.5 + eps)
        return (param - eta * (m / (1 - (1 - b1) ** t) + (1 - b2) * v / (1 - (1 - b2) ** t))) / (1 + weight_decay * lr)

    return step


def paper_stableadamw(lr, betas, eps, weight_decay, **_):
    """Algorithm 2: betas that make the moments unbiased as they are."""
    v, u, t = 0.0, 0.0, 0

    def step(param, grad):
        nonlocal v, u, t
        t += 1
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        v, u = b1 * v + (1 - b1) * grad, b2 * u + (1 - b2) * grad * grad
        rms = (grad * grad / u.clamp(min=eps * eps)).mean().sqrt()
        eta = lr / max(1.0, float(rms))
        return param - eta * weight_decay * param - eta * v / (u.sqrt() + eps)

    return step


PAPERS = {"Lion": paper_lion, "LAMB": paper_lamb, "Adan": paper_adan, "StableAdamW": paper_stableadamw}


@pytest.mark.parametrize("name", PAPERS)
def test_rules_that_torch_has_not_are_as_published(name):
    """Gradients that grow at times, so that StableAdamW clips some of its steps and not others."""
    case = next(case for case in CASES if case.optimizer == name)
    params = random_params((1009, 33, 1), torch.float64)
    optimizer = case.make(params)
    papers = [PAPERS[name](**optimizer.param_groups[0]) for _ in params]
    expected = [param.detach().clone() for param in params]
    for step in range(20):
        grads = [grad * 10.0 ** (step % 3) for grad in random_grads((1009, 33, 1), torch.float64, step)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        expected = [paper(param, grad) for paper, param, grad in zip(papers, expected, grads, strict=True)]
    for param, paper in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), paper, rtol=1e-10, atol=1e-12)


def test_every_rule_is_compared_with_torch_or_with_its_paper():
    names = {name: twin for rule in RULES.values() for name, twin in rule.optimizers.items()}
    assert {name for name, twin in names.items() if twin is None} == {*PAPERS}


@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda", "triton"])
@pytest.mark.parametrize("name", ["LAMB", "StableAdamW"])
def test_rules_that_sum_over_tensors_keep_tensors_apart(name, backend):
    """To the bit what each tensor does alone, whatever lies before and after it; over several chunks."""
    if BACKENDS[backend].unavailable():
        pytest.skip(f"backend {backend}: {BACKENDS[backend].unavailable()}")
    sizes = (5, 9000, 0, 4097, 1, 130)
    together, alone = random_params(sizes, torch.float32), random_params(sizes, torch.float32)
    cls = getattr(fusedopt, name)
    optimizers = [cls(together, lr=0.1, backend=backend), *(cls([param], lr=0.1, backend=backend) for param in alone)]
    for step in range(3):
        grads = random_grads(sizes, torch.float32, step)
        for params in (together, alone):
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                param.grad = None if step == 1 and i % 2 else grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
