"""Adagrad(rowwise=True): one accumulator a row, for dense and sparse gradients alike, whatever the backend."""

import copy
import re

import pytest
import torch
from helpers import assert_close, assert_same_bits, nothing_changes, only_on, randn

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

SHAPES = [(9, 37), (4, 3, 5), (7, 1), (6,), (), (0, 3), (3, 0)]
OPTIONS = [
    {},
    {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "maximize": True},
    {"weight_decay": 0.125},
    {"eps_inside_sqrt": True, "eps": 1e-3},
]


def row_by_row(
    param, grad, sums, step, lr, lr_decay=0, weight_decay=0, eps=1e-10, eps_inside_sqrt=False, maximize=False
):
    """The formula again, in plain Python's order: one row after the other; changes param and sums."""
    for row in range(len(param)):
        g = (-grad[row] if maximize else grad[row]) + weight_decay * param[row]
        if g.numel():
            sums[row] += sum(float(x) ** 2 for x in g.flatten()) / g.numel()
        root = (sums[row] + eps) ** 0.5 if eps_inside_sqrt else sums[row] ** 0.5 + eps
        param[row] -= lr / (1 + (step - 1) * lr_decay) / root * g


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_formula_row_by_row(options, dtype, on_backend):
    params = [torch.nn.Parameter(randn(shape, dtype, seed)) for seed, shape in enumerate(SHAPES)]
    opt = fusedopt.Adagrad(params, lr=0.1, rowwise=True, **options)
    initial = options.get("initial_accumulator_value", 0)
    options = {name: value for name, value in options.items() if name != "initial_accumulator_value"}
    sums = [[initial] * (shape[0] if shape else 1) for shape in SHAPES]
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    for step in range(1, 4):
        expected = [param.detach().double().reshape(param.shape or (1,)).clone() for param in params]
        for i, (param, values) in enumerate(zip(params, expected, strict=True)):
            param.grad = randn(param.shape, dtype, 100 * step + i)
            row_by_row(values, param.grad.double().reshape(values.shape), sums[i], step, 0.1, **options)
        opt.step()
        assert_close(params, [v.reshape(p.shape) for v, p in zip(expected, params, strict=True)], tolerance)
        for param, expected_sum in zip(params, sums, strict=True):
            assert opt.state[param]["sum"].shape == (*param.shape[:1], *(1 for _ in param.shape[1:]))
            found = opt.state[param]["sum"].double().flatten()
            assert_close([found], [torch.tensor(expected_sum, dtype=torch.float64)], max(tolerance, 1e-12))


def gradient(step, dense=False):
    rows = torch.randint(8, (6,), generator=torch.Generator().manual_seed(step))
    grad = torch.sparse_coo_tensor(rows[None], randn((6, 37), torch.float64, step), (9, 37))
    return grad.to_dense() if dense else grad


def test_sparse_gradients_come_to_the_same_as_dense_ones(on_backend):
    """Beside a group with an accumulator for each element, all clipped."""
    results = []
    for dense in (False, True):
        params = [torch.nn.Parameter(randn((9, 37), torch.float64, seed)) for seed in range(3)]
        groups = [{"params": params[:2], "rowwise": True}, {"params": params[2:]}]
        opt = fusedopt.Adagrad(groups, lr=0.1, max_grad_norm=1.0, initial_accumulator_value=0.1)
        for step in range(4):
            params[0].grad, params[2].grad = gradient(step, dense), gradient(10 + step, dense)
            params[1].grad = randn((9, 37), torch.float64, 50 + step)
            opt.step()
        assert [opt.state[p]["sum"].shape for p in params] == [(9, 1), (9, 1), (9, 37)]
        results.append([*params, *(opt.state[p]["sum"] for p in params), opt.grad_norm])
    assert_close(results[0], results[1], 1e-13)
    assert_same_bits(
        [results[0][0].detach()[8], results[0][3][8]],
        [randn((9, 37), torch.float64, 0)[8], torch.tensor([0.1], dtype=torch.float64)],
    )


@only_on("cpu", "a checkpoint knows no backend")
def test_checkpoints(on_backend):
    param = torch.nn.Parameter(randn((9, 37), torch.float64))
    opt = fusedopt.Adagrad([param], lr=0.1, rowwise=True)
    param.grad = gradient(0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    assert saved["param_groups"][0]["rowwise"] is True
    assert "rowwise" not in fusedopt.Adagrad([param]).param_groups[0]
    values = param.detach().clone()
    results = []
    for state in (opt.state_dict(), saved):
        opt.load_state_dict(state)
        param.data.copy_(values)
        param.grad = gradient(1)
        opt.step()
        results.append([param.detach().clone(), opt.state[param]["sum"].clone()])
    assert results[1][1].shape == (9, 1)
    saved["state"][0]["sum"] = torch.ones(9, 37)
    with pytest.raises(ValueError, match=re.escape("'sum' has shape (9, 37), not (9, 1)")), nothing_changes(opt):
        opt.load_state_dict(saved)


def test_refused_by_name(on_backend):
    table = torch.nn.Parameter(randn((9, 37)))
    table.grad = torch.ones(9, 37).to_sparse()
    opt = fusedopt.Adagrad([("table", table)], rowwise=True)
    with (
        pytest.raises(RuntimeError, match=r"\('table'\).*2 sparse dimensions; rowwise=True supports one"),
        nothing_changes(opt),
    ):
        opt.step()
    table.grad = torch.ones(9, 37).to_sparse(1)
    opt.step()
    opt.step()
    opt.param_groups[0]["rowwise"] = False
    with pytest.raises(ValueError, match=r"\('table'\).*state 'sum' has shape \(9, 1\)"), nothing_changes(opt):
        opt.step()
    opt.param_groups[0]["rowwise"] = "yes"
    with pytest.raises(ValueError, match=r"param_groups\[0\]: rowwise must be True or False"), nothing_changes(opt):
        opt.step()
    with pytest.raises(ValueError, match="rowwise must be True or False"):
        fusedopt.Adagrad([table], rowwise=2)
    waves = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    waves.grad = torch.ones(2, 2, dtype=torch.complex64)
    opt = fusedopt.Adagrad([waves], rowwise=True)
    with pytest.raises(TypeError, match="rowwise=True does not support complex parameters"), nothing_changes(opt):
        opt.step()


def test_wrong_shape_of_a_state_is_refused(on_backend):
    table = torch.nn.Parameter(randn((9, 37)))
    table.grad = torch.ones(9, 37)
    opt = fusedopt.Adagrad([table], rowwise=True)
    opt.step()
    opt.state[table]["sum"] = torch.ones(9, 37)
    with pytest.raises(ValueError, match=re.escape("state 'sum' has shape (9, 37), not (9, 1)")), nothing_changes(opt):
        opt.step()
