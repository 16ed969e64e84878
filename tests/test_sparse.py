"""Sparse gradients: rows they touch move as by a dense step, no other row moves, and all else works as with dense ones."""

import contextlib
import copy
import gc
import io
import itertools
import pickle
import signal
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import CASES, can_mix_dtypes, set_grad
from helpers import assert_close, assert_same_bits, nothing_changes, only_on, randn
from torch.multiprocessing.reductions import StorageWeakRef

import fusedopt
from fusedopt import plan

# Sparse_coo_tensor checks nothing by default, and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")

# Classes that take sparse gradients, with options for which these are exact.
EXACT = {"SGD": {"lr": 0.1}, "Adagrad": {"lr": 0.1, "lr_decay": 0.01, "initial_accumulator_value": 0.5}}
ROWS = [7, 0, 2, 7, 2, 2]  # out of order, with repetitions, some rows missing
SHAPE = (9, 37)
SPARSE_CASES = [case for case in CASES if case.rule.takes_sparse]
every_sparse_case = pytest.mark.parametrize("case", SPARSE_CASES, ids=str)
COMPUTED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}  # dtypes computed in another


def sparse_grad(shape, rows, dtype=torch.float32, seed=0, num_sparse=1):
    """Normal values for some rows; for num_sparse > 1 ``rows`` counts in the matrix whose rows these dimensions choose."""
    index = torch.unravel_index(torch.tensor(rows, dtype=torch.int64), shape[:num_sparse])
    values = randn((len(rows), *shape[num_sparse:]), dtype, 31 * seed + 5)
    return torch.sparse_coo_tensor(torch.stack(index), values, shape)


def in_random_order(seed, count=6, num_rows=SHAPE[0]):
    return torch.randint(num_rows - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def summed(grad, dtype):
    """The distinct rows of a gradient of one sparse dimension and their values, added up in the order they come in."""
    keys = grad._indices()[0].tolist()
    rows = sorted(set(keys))
    place = {row: i for i, row in enumerate(rows)}
    values = torch.zeros((len(rows), *grad.shape[1:]), dtype=dtype)
    for row, value in zip(keys, grad._values().to(dtype), strict=True):
        values[place[row]] += value
    return rows, values


def table(shape=SHAPE, dtype=torch.float32, seed=1):
    return torch.nn.Parameter(randn(shape, dtype, seed))


# ---- the same as torch.optim ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EXACT)
def test_exact_classes_equal_torch(name, dtype, on_backend):
    """Two tables, one of them touched by fewer steps, maximized."""
    ours, theirs = ([table(dtype=dtype), table((4, 2, 3), dtype, 2)] for _ in range(2))
    opt = getattr(fusedopt, name)(ours, maximize=name == "Adagrad", **EXACT[name])
    peer = getattr(torch.optim, name)(theirs, maximize=name == "Adagrad", **EXACT[name])
    for step in range(5):
        for params in (ours, theirs):
            params[0].grad = sparse_grad(SHAPE, in_random_order(step), dtype, step)
            params[1].grad = sparse_grad((4, 2, 3), [step % 2, 3, 3], dtype, step) if step != 2 else None
        opt.step()
        peer.step()
    tolerance = 1e-14 if dtype == torch.float64 else 3e-6
    assert_close(ours, theirs, tolerance)
    for a, b in zip(ours, theirs, strict=True):
        for state, value in peer.state[b].items():
            if value is not None:
                assert_close([opt.state[a][state]], [value], tolerance)


@pytest.mark.parametrize("maximize", [False, True])
def test_lazy_adam_equals_sparse_adam(maximize, on_backend):
    """torch's SparseAdam adds eps before the bias correction of the second moment, Adam after it."""
    ours, theirs = table(dtype=torch.float64), table(dtype=torch.float64)
    options = dict(lr=0.1, betas=(0.8, 0.95), maximize=maximize)
    opt = fusedopt.Adam([ours], sparse="lazy", eps=1e-3, **options)
    peer = torch.optim.SparseAdam([theirs], **options)
    for step in range(1, 7):
        ours.grad, theirs.grad = (sparse_grad(SHAPE, in_random_order(step), torch.float64, step) for _ in range(2))
        peer.param_groups[0]["eps"] = 1e-3 * (1 - 0.95**step) ** 0.5
        opt.step()
        peer.step()
    assert_close([ours], [theirs], 1e-13)
    for state in ("exp_avg", "exp_avg_sq"):
        assert_close([opt.state[ours][state]], [peer.state[theirs][state]], 1e-13)
    assert float(opt.state[ours]["step"]) == peer.state[theirs]["step"] == 6


# ---- the same as a dense step of the touched rows ------------------------------------------------------------------


def check_rows(case, param, grads, **options):
    """Steps a table by sparse gradients, and for each step the touched rows alone by dense ones: the same bits, all else as
    it was."""
    dtype = COMPUTED.get(param.dtype, param.dtype)
    opt = case.make([param], sparse="lazy", **options)
    for grad in grads:
        rows, values = summed(grad, dtype)
        before = param.detach().clone(), {name: value.clone() for name, value in opt.state.get(param, {}).items()}
        part = torch.nn.Parameter(param.detach()[rows].to(dtype))
        dense = case.make([part], **options)
        if before[1]:
            saved = dense.state_dict()
            rows_of = {name: v if v.dim() == 0 else v[rows] for name, v in before[1].items()}
            dense.load_state_dict({**saved, "state": {0: rows_of}})
        part.grad = values
        dense.step()
        set_grad(param, grad)
        opt.step()

        others = [row for row in range(param.shape[0]) if row not in rows]
        assert_same_bits([param.detach()[rows]], [part.detach().to(param.dtype)], "touched rows")
        assert_same_bits([param.detach()[others]], [before[0][others]], "other rows")
        for name, value in opt.state.get(param, {}).items():
            new = dense.state[part][name]
            assert value.shape == (new.shape if new.dim() == 0 else param.shape)
            assert_same_bits([value if value.dim() == 0 else value[rows]], [new], name)
            if value.dim():
                start = torch.full_like(value, case.kwargs.get("initial_accumulator_value", 0))
                assert_same_bits([value[others]], [before[1].get(name, start)[others]], f"other rows of {name}")
        assert float(opt.state[param].get("step", 0)) == float(dense.state[part].get("step", 0))


@every_sparse_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_touched_rows_move_as_by_a_dense_step(case, dtype, on_backend):
    """The first step, in which states come to be, another, and one of other rows."""
    rows = [ROWS, [1, 7], [3, 3, 8, 0]]
    check_rows(case, table(dtype=dtype), [sparse_grad(SHAPE, r, dtype, i) for i, r in enumerate(rows)])


@pytest.mark.parametrize("case", SPARSE_CASES[::2], ids=str)
def test_complex_tables(case, on_backend):
    rows = [ROWS, [8], [3, 3, 1]]
    param = torch.nn.Parameter(torch.complex(randn(SHAPE, seed=1), randn(SHAPE, seed=2)))
    grads = [sparse_grad(SHAPE, r, seed=i) + 1j * sparse_grad(SHAPE, r, seed=9 + i) for i, r in enumerate(rows)]
    check_rows(case, param, [grad.coalesce() for grad in grads])


@only_on("cpu", "others copy rows")
@pytest.mark.parametrize("width", [9, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_width(width, dtype, on_backend):
    """Around the length of a tile; more of them than fit in a chunk."""
    count = 40_000 // width
    shape = (count + 5, width)
    rows = torch.randint(shape[0], (count,), generator=torch.Generator().manual_seed(width)).tolist()
    check_rows(SPARSE_CASES[-1], table(shape, dtype), [sparse_grad(shape, rows, dtype)])


@pytest.mark.parametrize("kind", ["transposed", "with gaps"])
def test_tables_of_odd_layout(kind, on_backend):
    for case in SPARSE_CASES[1::3]:
        values = randn((37, 9)).t() if kind == "transposed" else randn((18, 74))[::2, ::2]
        check_rows(case, torch.nn.Parameter(values), [sparse_grad(SHAPE, 2 * ROWS, seed=i) for i in range(2)])


@pytest.mark.parametrize("num_sparse", [0, 1, 2, 3])
def test_any_number_of_sparse_dimensions(num_sparse, on_backend):
    """0: the whole tensor is one row; 3: every element is one."""
    shape = (3, 5, 4)
    count = torch.Size(shape[:num_sparse]).numel()
    param = table(shape, torch.float64)
    opt = fusedopt.Adam([param], lr=0.1, sparse="lazy")
    flat = torch.nn.Parameter(param.detach().reshape(count, -1).clone())
    peer = fusedopt.Adam([flat], lr=0.1, sparse="lazy")
    for step in range(3):
        rows = in_random_order(step, 4, max(count, 2))
        param.grad = sparse_grad(shape, rows, torch.float64, step, num_sparse) if num_sparse else None
        if num_sparse == 0:
            rows = [0]
            values = randn((1, *shape), torch.float64, step)
            param.grad = torch.sparse_coo_tensor(torch.zeros((0, 1), dtype=torch.int64), values, shape)
        flat.grad = torch.sparse_coo_tensor(
            torch.tensor([rows]), param.grad._values().reshape(len(rows), -1), flat.shape
        )
        opt.step()
        peer.step()
    assert_same_bits([param.detach().reshape(count, -1)], [flat.detach()])


@only_on("cpu", "the host's reading of gradients is the same")
def test_gradient_dtypes(on_backend):
    """Of the parameter's choice: added up in the type it is computed in."""
    if not can_mix_dtypes():
        pytest.skip("this torch wants gradients of the parameter's dtype")
    for param_dtype, grad_dtype in itertools.product((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        check_rows(SPARSE_CASES[-1], table(dtype=param_dtype), [sparse_grad(SHAPE, ROWS, grad_dtype)])


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
def test_any_rows(data):
    """Case, dtype, sizes and rows drawn."""
    case = data.draw(st.sampled_from(SPARSE_CASES))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    shape = (data.draw(st.integers(1, 12)), *data.draw(st.lists(st.integers(0, 40), max_size=2)))
    lists = data.draw(st.lists(st.lists(st.integers(0, shape[0] - 1), max_size=20), min_size=1, max_size=3))
    check_rows(case, table(shape, dtype), [sparse_grad(shape, rows, dtype, i) for i, rows in enumerate(lists)])


def test_gradient_without_rows_counts_as_a_step(on_backend):
    param = table()
    opt = fusedopt.Adam([param], sparse="lazy", weight_decay=0.1, max_grad_norm=1.0)
    for grad in (sparse_grad(SHAPE, ROWS), sparse_grad(SHAPE, [])):
        before = param.detach().clone(), {name: v.clone() for name, v in opt.state[param].items()}
        param.grad = grad
        opt.step()
    assert_same_bits([param.detach()], [before[0]])
    assert float(opt.state[param].pop("step")) == 2 == float(before[1].pop("step")) + 1
    assert_same_bits(opt.state[param].values(), before[1].values())
    assert float(opt.grad_norm) == 0


def test_what_claims_to_have_no_duplicates_is_not_believed(on_backend):
    honest, liar = table(), table()
    honest.grad, liar.grad = sparse_grad(SHAPE, ROWS), sparse_grad(SHAPE, ROWS)._coalesced_(True)
    for param in (honest, liar):
        fusedopt.SGD([param], lr=0.1, max_grad_norm=0.1).step()
    assert_same_bits([liar], [honest])
    peer = table()
    peer.grad = sparse_grad(SHAPE, ROWS).to_dense()
    fusedopt.SGD([peer], lr=0.1, max_grad_norm=0.1).step()
    assert_close([liar], [peer], 1e-6)


def test_gradient_whose_values_lie_in_the_parameter(on_backend):
    """All of them are read before the first row is written."""
    param, peer = table(), table()
    for p, values in ((param, param.detach()), (peer, peer.detach().clone())):
        p.grad = torch.sparse_coo_tensor(torch.arange(8, -1, -1)[None], values, SHAPE)
        fusedopt.SGD([p], lr=0.1).step()
    assert_same_bits([param], [peer])


@only_on("cpu", "the engine's threads")
def test_same_bits_for_any_number_of_threads(threads, on_backend):
    shape = (3000, 64)
    rows = torch.randint(3000, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        param = table(shape)
        opt = fusedopt.Adagrad([param], lr=0.1, max_grad_norm=1.0)
        for step in range(2):
            param.grad = sparse_grad(shape, rows, seed=step)
            opt.step()
        results.append([param.detach(), opt.state[param]["sum"], opt.grad_norm])
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_large_row_numbers(on_backend):
    """Numbers of more than one digit of the sort, some with a digit in common, up to the last row."""
    shape = (70_000, 1)
    rows = [69_999, 5, 2053, 2047, 69_999, 4096, 2053, 65_536, 5]
    check_rows(SPARSE_CASES[-1], table(shape), [sparse_grad(shape, rows)])


def test_more_rows_than_32_bits_number():
    """In memory of which next to nothing is touched; two rows differ by 2^32."""
    try:
        param = torch.nn.Parameter(torch.empty(2**32 + 8, dtype=torch.bfloat16))
    except RuntimeError:
        pytest.skip("no 8 GB of addresses")
    rows = torch.tensor([2**32 + 5, 5, 7, 2**32 + 5])
    with torch.no_grad():
        param[rows] = 0.0
    param.grad = torch.sparse_coo_tensor(rows[None], torch.tensor([1.0, 2, 4, 8], dtype=torch.bfloat16), param.shape)
    fusedopt.SGD([param], lr=1.0, backend="cpu").step()
    assert param.detach()[rows].tolist() == [-9, -2, -4, -9]


# ---- beside dense gradients ----------------------------------------------------------------------------------------


def mixed(dtype=torch.float32):
    return [table(dtype=dtype), torch.nn.Parameter(randn((13, 7), dtype)), table((4, 2, 3), dtype, 2)]


def set_mixed_grads(params, step, dense=False):
    grads = [
        sparse_grad(SHAPE, in_random_order(step), params[0].dtype, step),
        randn((13, 7), params[0].dtype, 77 + step),
        sparse_grad((4, 2, 3), [0, 2, 2], params[0].dtype, 50 + step),
    ]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to_dense() if dense and grad.is_sparse else grad


@pytest.mark.parametrize("way", ["constructor", "call", "several optimizers", "not"])
def test_clip_counts_them_with_the_rest(way, on_backend):
    """The norm is that of the rows added up, as of the dense gradient; the clip is common to all."""
    params, peers = mixed(torch.float64), mixed(torch.float64)
    limit = 0.5 if way == "constructor" else None
    opt = fusedopt.Adagrad(params[:2] if way == "several optimizers" else params, lr=0.1, max_grad_norm=limit)
    more = [fusedopt.SGD(params[2:], lr=0.1)] if way == "several optimizers" else []
    peer = torch.optim.Adagrad(peers[:2] if more else peers, lr=0.1)
    peer_more = [torch.optim.SGD(peers[2:], lr=0.1)] if more else []
    for step in range(4):
        set_mixed_grads(params, step)
        set_mixed_grads(peers, step, dense=True)
        if way != "not":
            expected = torch.nn.utils.clip_grad_norm_(peers, 0.5)
        if way == "call":
            assert_close([opt.clip_grad_norm_(0.5)], [expected], 1e-14)
        elif more:
            assert_close([fusedopt.clip_grad_norm_([opt, *more], 0.5)], [expected], 1e-14)
        for each in (opt, peer, *more, *peer_more):
            each.step()
        if way == "constructor":
            assert_close([opt.grad_norm], [expected], 1e-14)
    assert_close(params, peers, 1e-13)


def test_gradient_may_be_dense_in_one_step_and_sparse_in_the_next(on_backend):
    param, peer = table(dtype=torch.float64), table(dtype=torch.float64)
    opt, dense = fusedopt.Adagrad([param], lr=0.1), torch.optim.Adagrad([peer], lr=0.1)
    for step, kind in enumerate("sddssNsNds"):
        grad = sparse_grad(SHAPE, in_random_order(step), torch.float64, step)
        param.grad = {"s": grad, "d": grad.to_dense(), "N": None}[kind]
        peer.grad = None if kind == "N" else grad.to_dense()
        opt.step()
        dense.step()
    assert_close([param], [peer], 1e-13)
    assert float(opt.state[param]["step"]) == 8


def test_frozen_parameter_of_any_kind_beside_it(on_backend):
    """No backend works on the meta device."""
    frozen, param = torch.nn.Parameter(torch.empty(3, device="meta")), table()
    opt = fusedopt.SGD([frozen, param], lr=0.1)
    for step in range(2):
        param.grad = sparse_grad(SHAPE, ROWS, seed=step)
        before = param.detach().clone()
        opt.step()
        assert not torch.equal(param.detach()[2], before[2])


@only_on("cpu", "the reference plans every step")
@pytest.mark.parametrize("name", EXACT)
def test_plan_is_kept(name, monkeypatch, on_backend):
    """With gradients that are other tensors, of other numbers of rows, in every step; and where one is missing."""
    params = mixed()
    opt = getattr(fusedopt, name)(params, max_grad_norm=1.0, **EXACT[name])
    made = []
    make = plan.Plan.make
    monkeypatch.setattr(plan.Plan, "make", lambda self, *arguments: (made.append(self), make(self, *arguments))[1])
    for step in range(6):
        set_mixed_grads(params, step)
        params[0].grad = sparse_grad(SHAPE, in_random_order(step, count=2 * step), seed=step)
        if step == 3:
            params[2].grad = None
        opt.step()
        opt.param_groups[0]["lr"] *= 0.9
    assert len(made) == 1
    opt.param_groups[0]["weight_decay"] = 0.1
    set_mixed_grads(params, 0)
    with pytest.raises(RuntimeError, match="sparse"), nothing_changes(opt):
        opt.step()


@only_on("cpu", "the rows are found in the same way")
def test_moved_table_is_noticed(on_backend):
    param, peer = table(), table()
    opt, other = fusedopt.Adagrad([param], lr=0.1), fusedopt.Adagrad([peer], lr=0.1)
    for step in range(4):
        for p in (param, peer):
            p.grad = sparse_grad(SHAPE, ROWS, seed=step)
        if step == 1:
            param.data = param.data.clone()
        if step == 2:
            param.data = param.data.t().contiguous().t()
        if step == 3:
            opt.state[param]["sum"] = opt.state[param]["sum"].clone()
        opt.step()
        other.step()
        assert_same_bits([param.detach(), opt.state[param]["sum"]], [peer.detach(), other.state[peer]["sum"]])


@only_on("cpu", "only a fast backend can tell")
def test_time_does_not_depend_on_the_number_of_rows(on_backend):
    """A thousand times the rows, far less than ten times the time; a dense step takes hundreds of times as long."""

    def fastest(num_rows):
        param = torch.nn.Parameter(torch.ones(num_rows, 16))
        opt = fusedopt.Adam([param], sparse="lazy", max_grad_norm=1.0)
        times = []
        for step in range(20):
            param.grad = sparse_grad(param.shape, in_random_order(step, 200, num_rows), seed=step)
            started = time.process_time()
            opt.step()
            times.append(time.process_time() - started)
        return min(times)

    assert fastest(1_000_000) < 10 * fastest(1_000)


# ---- what else a step can be ---------------------------------------------------------------------------------------


def test_nonfinite_is_found_named_and_skipped(on_backend):
    params = mixed()
    opt = fusedopt.Adagrad([("stem", params[1]), ("table", params[0]), ("other", params[2])], lr=0.1, nonfinite="error")
    set_mixed_grads(params, 0)
    opt.step()
    set_mixed_grads(params, 1)
    params[2].grad._values()[1, 0, 1] = float("inf")
    with (
        pytest.raises(RuntimeError, match=r"params'\]\[2\] \('other'\).*gradient holds NaN or inf"),
        nothing_changes(opt),
    ):
        opt.step()
    opt.nonfinite = "skip"
    with nothing_changes(opt):
        opt.step()
    assert opt.skipped_steps == 1
    set_mixed_grads(params, 2)
    opt.step()
    assert float(opt.state[params[2]]["step"]) == 2


def test_sum_beyond_every_float_is_nonfinite(on_backend):
    param = table((3, 2))
    param.grad = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.full((2, 2), 3e38), (3, 2))
    opt = fusedopt.SGD([param], lr=0.1, nonfinite="error")
    with pytest.raises(RuntimeError, match="gradient holds NaN or infinity"), nothing_changes(opt):
        opt.step()


def test_grad_scale_and_found_inf(on_backend):
    params, peers = mixed(torch.float64), mixed(torch.float64)
    opt, peer = fusedopt.SGD(params, lr=0.1, max_grad_norm=0.5), fusedopt.SGD(peers, lr=0.1, max_grad_norm=0.5)
    set_mixed_grads(params, 0)
    set_mixed_grads(peers, 0)
    for param in params:
        param.grad = param.grad * 1024.0
    opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    with nothing_changes(opt):
        opt.step()
    opt.found_inf = torch.tensor(0.0)
    opt.step()
    peer.step()
    assert_close(params, peers, 1e-15)
    assert_close([opt.grad_norm], [peer.grad_norm], 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_scaler(dtype, on_backend):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    table_layer = torch.nn.Embedding(9, 4, sparse=True).to(dtype)
    opt = fusedopt.SGD(table_layer.parameters(), lr=0.1, fused=dtype == torch.float16 or None)
    before = table_layer.weight.detach().clone()
    scaler.scale(table_layer(torch.tensor([1, 1, 3])).float().sum()).backward()
    scaler.step(opt)
    expected = before.clone()
    expected[1] -= 0.2
    expected[3] -= 0.1
    assert_close([table_layer.weight], [expected], 1e-3 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("write", [lambda g: g.mul_(2), lambda g: g._values().mul_(2)], ids=["gradient", "values"])
def test_step_after_a_clip_refuses_changed_gradients(write, on_backend):
    params = mixed()
    opt = fusedopt.Adagrad(params, lr=0.1)
    set_mixed_grads(params, 0)
    opt.clip_grad_norm_(1.0)
    write(params[0].grad)
    with pytest.raises(RuntimeError, match=r"params'\]\[0\].*changed since clip_grad_norm_"), nothing_changes(opt):
        opt.step()
    params[2].grad = params[2].grad.clone()
    params[0].grad = None
    with pytest.raises(RuntimeError, match=r"params'\]\[2\].*is new or was changed since"), nothing_changes(opt):
        opt.step()


def test_autograd_notices_the_update(on_backend):
    layer = torch.nn.Embedding(9, 4, sparse=True)
    opt = fusedopt.SGD(layer.parameters(), lr=0.1)
    product = (layer.weight * layer.weight).sum()
    layer(torch.tensor([1, 2])).sum().backward()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_skipped_step_writes_nothing(on_backend):
    """Not even the same values: autograd would count that as a change."""
    param = table()
    opt = fusedopt.Adam([param], sparse="lazy", nonfinite="skip")
    param.grad = sparse_grad(SHAPE, ROWS)
    param.grad._values()[0, 0] = float("nan")
    version = param._version
    opt.step()
    opt.clip_grad_norm_(1.0)
    assert param._version == version and not opt.state


@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.1)}, {"lr": 0.1}])
def test_scheduler(options, on_backend):
    """A schedule changes lr between steps of one plan."""
    params, peers = mixed(torch.float64), mixed(torch.float64)
    opt, peer = fusedopt.SGD(params, **options), torch.optim.SGD(peers, **copy.deepcopy(options))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (opt, peer)]
    for step in range(3):
        for each, tensors, schedule in zip((opt, peer), (params, peers), schedules, strict=True):
            set_mixed_grads(tensors, step, dense=each is peer)
            each.step()
            schedule.step()
    assert_close(params, peers, 1e-13)


@only_on("cpu", "a checkpoint knows no backend")
def test_checkpoints_go_both_ways(on_backend):
    """Of SparseAdam, whose groups lack some of Adam's options, the state."""
    params, peers = [table()], [table()]
    for ours, theirs in (
        (fusedopt.Adagrad(params, lr=0.1), torch.optim.Adagrad(peers, lr=0.1)),
        (fusedopt.Adam(params, lr=0.1, sparse="lazy"), torch.optim.SparseAdam(peers, lr=0.1)),
    ):
        params[0].grad = sparse_grad(SHAPE, ROWS)
        ours.step()
        saved = ours.state_dict()
        assert "sparse" not in saved["param_groups"][0]
        groups = theirs.state_dict()["param_groups"]
        theirs.load_state_dict({"state": copy.deepcopy(saved["state"]), "param_groups": groups})
        peers[0].grad = sparse_grad(SHAPE, [1, 2])
        theirs.step()
        ours.load_state_dict({"state": theirs.state_dict()["state"], "param_groups": saved["param_groups"]})
        assert ours.state[params[0]].keys() == theirs.state[peers[0]].keys()
        assert float(ours.state[params[0]]["step"]) == 2
        params[0].grad = sparse_grad(SHAPE, [3])
        ours.step()
        assert float(ours.state[params[0]]["step"]) == 3


@only_on("cpu", "the attribute is the same on all")
def test_sparse_is_an_attribute_that_copies_keep(on_backend):
    opt = fusedopt.AdamW([table()], sparse="lazy")
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), torch.load(buffer, weights_only=False)):
        assert copied.sparse == "lazy" and all("sparse" not in group for group in copied.param_groups)
    for value in ("eager", True, 1, ["lazy"], torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="sparse must be None or 'lazy', got"):
            fusedopt.SGD([table()], sparse=value)
        with pytest.raises(ValueError, match="sparse must be None or 'lazy', got"):
            opt.sparse = value
    assert opt.sparse == "lazy"
    lion = fusedopt.Lion([table()])
    with pytest.raises(ValueError, match="Lion takes no sparse gradients: sparse must be None, got 'lazy'"):
        lion.sparse = "lazy"
    assert lion.sparse is None
    with pytest.raises(TypeError, match="sparse"):
        fusedopt.RMSprop([table()], sparse="lazy")


def test_sparse_may_be_changed_between_steps(on_backend):
    param = table()
    opt = fusedopt.SGD([param], lr=0.1, momentum=0.9)
    param.grad = sparse_grad(SHAPE, ROWS)
    with pytest.raises(RuntimeError, match="sparse='lazy'"), nothing_changes(opt):
        opt.step()
    opt.sparse = "lazy"
    opt.step()
    buffer = opt.state[param]["momentum_buffer"].clone()
    assert buffer[ROWS].abs().min() > 0
    opt.step()  # with momentum: the second step knows that it is not the first one
    assert_close([opt.state[param]["momentum_buffer"]], [1.9 * buffer], 1e-6)
    opt.sparse = None
    with pytest.raises(RuntimeError, match="sparse='lazy'"), nothing_changes(opt):
        opt.step()


# ---- refused, with nothing changed ---------------------------------------------------------------------------------


def no_values(grad):
    grad._values().untyped_storage().resize_(0)
    return grad


REFUSED = {
    "row beyond the table": (
        lambda: torch.sparse_coo_tensor(torch.tensor([[1, 9]]), torch.ones(2, 37), SHAPE),
        "gradient has indices beyond its shape",
    ),
    "negative row": (
        lambda: torch.sparse_coo_tensor(torch.tensor([[-1, 2]]), torch.ones(2, 37), SHAPE),
        "gradient has indices beyond its shape",
    ),
    "column beyond the table, in another row": (
        lambda: torch.sparse_coo_tensor(torch.tensor([[1], [37]]), torch.ones(1), SHAPE),
        "gradient has indices beyond its shape",
    ),
    "integer values": (lambda: sparse_grad(SHAPE, [1]).to(torch.int64), "gradient is int64"),
    "float64 values": (lambda: sparse_grad(SHAPE, [1], torch.float64), r"gradient is float64 \(supported"),
    "freed values": (lambda: no_values(sparse_grad(SHAPE, [1])), "gradient's tensor of values has lost its memory"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what, on_backend):
    """At the first step, and when there is a plan for sound ones."""
    make, message = REFUSED[what]
    if "values" in what and "freed" not in what and not can_mix_dtypes():
        pytest.skip("this torch wants gradients of the parameter's dtype")
    params = mixed()
    opt = fusedopt.Adagrad([("stem", params[1]), ("table", params[0]), ("other", params[2])], lr=0.1)
    for _ in range(2):
        set_mixed_grads(params, 0)
        set_grad(params[0], make())
        where = r"Adagrad.step: .*\[1\] \('table'\)"
        with pytest.raises(RuntimeError, match=rf"{where}.*{message}.*nothing was"), nothing_changes(opt):
            opt.step()
        set_mixed_grads(params, 0)
        opt.step()


def test_row_beyond_a_table_without_columns_is_refused(on_backend):
    param = torch.nn.Parameter(torch.zeros(5, 0))
    opt = fusedopt.SGD([param], lr=0.1)
    for row, is_inside in ((4, True), (5, False), (-1, False), (0, True)):
        param.grad = torch.sparse_coo_tensor([[row]], torch.ones(1, 0), (5, 0), check_invariants=False)
        with contextlib.nullcontext() if is_inside else pytest.raises(RuntimeError, match="beyond its shape"):
            opt.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fusedopt.AdamW, "gradient is sparse, but AdamW also updates rows without a gradient; pass sparse='lazy'"),
        (
            lambda params: fusedopt.SGD(params, momentum=0.9),
            "but SGD also updates rows without a gradient unless momentum = weight_decay = 0; pass sparse='lazy'",
        ),
        (lambda params: fusedopt.Adagrad(params, weight_decay=0.1), "unless weight_decay = 0"),
        (fusedopt.RMSprop, "gradient has layout sparse_coo; only dense tensors are supported"),
        (fusedopt.NAdam, "gradient has layout sparse_coo; only dense"),
        (fusedopt.Lion, "gradient has layout sparse_coo; only dense"),
    ],
)
def test_classes_that_would_move_other_rows_say_so(make, message, on_backend):
    param = table()
    opt = make([("table", param)])
    param.grad = sparse_grad(SHAPE, ROWS)
    for step in (opt.step, lambda: opt.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=rf"\('table'\), shape \(9, 37\).*{message}"), nothing_changes(opt):
            step()


@only_on("cpu", "a third bucket is enough of a difference")
def test_second_optimizer_over_the_same_table(on_backend):
    """One norm over both finds the table in each."""
    param = table()
    param.grad = sparse_grad(SHAPE, ROWS)
    with pytest.raises(ValueError, match=r"optimizers\[1\]: .*also in optimizers\[0\]"):
        fusedopt.clip_grad_norm_([fusedopt.SGD([param]), fusedopt.Adagrad([param])], 1.0)


@pytest.mark.parametrize("writes_back", [False, True])
def test_failure_on_the_way_changes_nothing(writes_back, on_backend, monkeypatch):
    """Copying rows may run out of memory, there or back; dense parameters are then as they were too."""
    if on_backend == "cpu":
        what = "fusedopt.backends.cpu.Rows.prepare"
    else:
        what = "torch.Tensor.index_put_" if writes_back else "fusedopt.backends.sparse.replace"

    def fail(*arguments, **options):
        raise MemoryError

    params = mixed()
    opt = fusedopt.Adagrad(params, lr=0.1)
    for _ in range(2):
        set_mixed_grads(params, 0)
        with monkeypatch.context() as patch, pytest.raises(MemoryError), nothing_changes(opt):
            patch.setattr(what, fail)
            opt.step()
        opt.step()


@pytest.mark.parametrize("part", [1, 2])
def test_interrupt_divides_no_step(part, on_backend, monkeypatch):
    """Ctrl-C while sparse, or dense, parameters are updated comes out when both are."""
    if on_backend == "reference":
        pytest.skip("it tells autograd in another way, which has a test of its own")
    params, peers = mixed(), mixed()
    opt, peer = fusedopt.SGD(params, lr=0.1), fusedopt.SGD(peers, lr=0.1)
    set_mixed_grads(params, 0)
    set_mixed_grads(peers, 0)
    peer.step()
    calls, increment = itertools.count(1), torch.autograd.graph.increment_version

    def interrupted(tensors):
        if next(calls) == part:
            signal.raise_signal(signal.SIGINT)
        increment(tensors)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert_same_bits(params, peers)


@only_on("reference", "other backends' rows are copied back by the same lines")
def test_interrupt_waits_for_the_rows_to_be_copied_back(on_backend, monkeypatch):
    param, peer = table(), table()
    param.grad, peer.grad = sparse_grad(SHAPE, ROWS), sparse_grad(SHAPE, ROWS)
    opt, other = fusedopt.Adagrad([param], lr=0.1), fusedopt.Adagrad([peer], lr=0.1)
    other.step()
    copy_rows = torch.Tensor.index_put_

    def interrupted(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        return copy_rows(self, *arguments)

    monkeypatch.setattr(torch.Tensor, "index_put_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    assert_same_bits([param, opt.state[param]["sum"]], [peer, other.state[peer]["sum"]])


def test_gradients_are_not_kept(on_backend):
    param = table()
    opt = fusedopt.Adagrad([param], lr=0.1)
    param.grad = sparse_grad(SHAPE, ROWS)
    opt.step()
    values = StorageWeakRef(param.grad._values().untyped_storage())
    param.grad = None
    gc.collect()
    assert values.expired()
