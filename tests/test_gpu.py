"""What only a GPU can show. `make gpu` runs these, nothing else does."""

import copy
import math

import pytest
import torch
from cases import CASES, DTYPES, can_mix_dtypes, check_parity, dtype_id
from helpers import assert_close, assert_same_bits, clone_params, same_bits

import fusedopt
from fusedopt.backends import BACKENDS

pytestmark = pytest.mark.gpu
SIZES = (0, 1, 7, 1023, 1024, 1025, 4095, 4096, 4097, 65543)


def make_params(shapes=((1021, 33), (4099,), (), (0, 3)), dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda", dtype=dtype)) for s in shapes]


def set_grads(params, seed):
    """Into the tensors that are there, if there are."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, device="cuda", dtype=param.dtype)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


@pytest.fixture(scope="module", params=["cuda", "triton"], autouse=True)
def backend(request):
    """What optimizers get that do not ask for one. For a module, so that pytest first runs all tests with the one."""
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDOPT_BACKEND", request.param)
        yield request.param


def test_auto_picks_the_fastest_there_is():
    picked, passed_over = fusedopt.backends.explain(torch.device("cuda"))
    assert picked == ("triton" if "cuda" in passed_over else "cuda")
    if BACKENDS["cuda"].unavailable() is None:
        assert picked == "cuda"


@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_no_step_waits_for_the_device(lr, nonfinite):
    params = make_params()
    optimizer = fusedopt.AdamW(params, lr=0.01, max_grad_norm=1.0, nonfinite=nonfinite)
    if lr == "tensor":
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01, device="cuda")
    set_grads(params, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            optimizer.grad_scale, optimizer.found_inf = (torch.full((), x, device="cuda") for x in (2.0, 0.0))
            optimizer.param_groups[0]["lr"] *= 0.5
            optimizer.step()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            params[0].grad = params[0].grad * (step + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(optimizer.skipped_steps) == 0 and float(optimizer.state[params[0]]["step"]) == 6


def test_lr_on_the_device_is_read_in_every_step():
    params = make_params()
    other = clone_params(params)
    lr = torch.tensor(0.1, device="cuda")
    optimizer, plain = fusedopt.AdamW(params, lr=lr), fusedopt.AdamW(other)
    for step, value in enumerate((0.1, 0.05, 0.2)):
        lr.fill_(value)
        plain.param_groups[0]["lr"] = float(lr)
        set_grads(params, step)
        set_grads(other, step)
        optimizer.step()
        plain.step()
    assert_same_bits(params, other)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam", "Adagrad", "RMSprop"])
def test_run_goes_on_in_torch_and_back(name):
    params = make_params()
    other = clone_params(params)
    options = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    ours, theirs = getattr(fusedopt, name)(params, **options), getattr(torch.optim, name)(other, **options)
    for first, second, a, b in ((ours, theirs, params, other), (theirs, ours, other, params)):
        for step in range(2):
            set_grads(a, step)
            first.step()
        with torch.no_grad():
            for into, source in zip(b, a, strict=True):
                into.copy_(source)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for step in range(2):
            set_grads(a, step)
            set_grads(b, step)
            first.step()
            second.step()
        assert_close([p.cpu() for p in a], [p.cpu() for p in b], 1e-5)


@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_skips_and_fused_counts(fused):
    params = make_params()
    optimizer = fusedopt.AdamW(params, fused=fused)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    set_grads(params, 0)
    scaler.scale(torch.zeros((), device="cuda"))
    params[0].grad[3, 3] = torch.inf
    before = [param.detach().clone() for param in params]
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(params, before)
    assert scaler.get_scale() == 512.0 and int(optimizer.skipped_steps) == bool(fused)


def test_parameters_of_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    params = make_params()
    others = [torch.nn.Parameter(param.detach().to("cuda:1")) for param in params]
    for each in (params, others):
        optimizer = fusedopt.AdamW(each, max_grad_norm=1.0)
        for step in range(2):
            set_grads(params, step)
            for param, other in zip(params, others, strict=True):
                other.grad = param.grad.to("cuda:1")
            optimizer.step()
        assert torch.cuda.current_device() == 0
    assert_same_bits(params, [other.detach().to("cuda:0") for other in others])


def test_steps_on_a_side_stream():
    params = make_params()
    other = clone_params(params)
    optimizer, plain = (fusedopt.AdamW(each, max_grad_norm=1.0) for each in (params, other))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for step in range(6):
        set_grads(params, step)
        set_grads(other, step)
        plain.step()
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[step % 2]):
            optimizer.step()
        torch.cuda.synchronize()
    assert_same_bits(params, other)


# ---- graphs ----------------------------------------------------------------------------------------------------


def captured(optimizer, params):
    set_grads(params, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    return graph


def test_replays_of_a_captured_step_are_steps():
    """To the bit, with a learning rate that changes on the device."""
    params = make_params()
    other = clone_params(params)
    lr = torch.tensor(0.01, device="cuda")
    optimizer = fusedopt.AdamW(params, lr=lr, capturable=True, max_grad_norm=1.0)
    plain = fusedopt.AdamW(other, lr=0.01, max_grad_norm=1.0)
    graph = captured(optimizer, params)
    set_grads(other, 0)
    plain.step()
    for step in range(1000):
        lr.fill_(0.01 / (step + 1))
        plain.param_groups[0]["lr"] = float(lr)
        set_grads(params, step)
        set_grads(other, step)
        graph.replay()
        plain.step()
    assert_same_bits(params, other)
    assert float(optimizer.state[params[0]]["step"]) == 1001


def test_eager_steps_and_a_second_graph_after_a_capture():
    """On torch's own capture stream, where all tables are uploaded by the graph: nothing of that is there outside."""
    params = make_params()
    other = clone_params(params)
    optimizer = fusedopt.AdamW(params, capturable=True, max_grad_norm=1.0)
    plain = fusedopt.AdamW(other, max_grad_norm=1.0)
    set_grads(params, 0)
    set_grads(other, 0)
    optimizer.step()
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    for graph in graphs:
        with torch.cuda.graph(graph):
            optimizer.step()
    optimizer.step()
    graphs[1].replay()
    graphs[0].replay()
    optimizer.step()
    for _ in range(5):
        plain.step()
    torch.cuda.synchronize()
    assert_same_bits(params, other)


def test_capture_without_a_step_before_is_refused():
    params = make_params()
    optimizer = fusedopt.AdamW(params, capturable=True)
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="make a step before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_capture_without_capturable_is_refused():
    params = make_params()
    optimizer = fusedopt.AdamW(params)
    with pytest.raises(
        RuntimeError, match=r"param_groups\[0\]: a CUDA graph is being captured, which needs capturable"
    ):
        captured(optimizer, params)


# ---- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Lion", "AdamW"])
def test_more_elements_than_32_bits_count(name):
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < size * 20:
        pytest.skip("needs 43 GB of GPU memory")
    whole = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    whole.grad = torch.full_like(whole, 0.5)
    whole.grad[2**31 - 3 : 2**31 + 3] = -0.25
    part = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16, device="cuda"))
    part.grad = torch.tensor([0.5, -0.25, -0.25, 0.5], dtype=torch.bfloat16, device="cuda")
    for param in (whole, part):
        getattr(fusedopt, name)([param], lr=0.125).step()
    for at, like in ((0, 0), (2**31 - 4, 0), (2**31 - 3, 1), (2**31 + 2, 1), (2**31 + 3, 0), (size - 1, 0)):
        assert same_bits(whole[at].cpu(), part[like].cpu()), at
    norm = torch.linalg.vector_norm(whole.grad, dtype=torch.float64)
    optimizer = fusedopt.SGD([whole], lr=0.0, max_grad_norm=1.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-6, atol=0)


def test_a_hundred_thousand_tensors_of_one_element():
    pool = torch.zeros(100_000, device="cuda")
    params = [torch.nn.Parameter(element) for element in pool.unbind()]
    for param, grad in zip(params, (1 + torch.arange(100_000.0, device="cuda")).unbind(), strict=True):
        param.grad = grad
    fusedopt.SGD(params, lr=1.0).step()
    assert torch.equal(pool, -(1 + torch.arange(100_000.0, device="cuda")))


LLAMA_3_8B = [
    (128256, 4096), (128256, 4096), (4096,),
    *([(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)] + [(14336, 4096)] * 2 + [(4096, 14336), (4096,), (4096,)]) * 32,
]  # fmt: skip


def test_llama_3_8b_in_bfloat16():
    """Every parameter moves by the learning rate, or half of it, in the direction of its gradient: none is left out."""
    count = sum(math.prod(shape) for shape in LLAMA_3_8B)
    if torch.cuda.mem_get_info()[0] < count * 12.5:
        pytest.skip("needs 100 GB of GPU memory")
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device="cuda")) for shape in LLAMA_3_8B]
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, 0.5 if i % 2 else -0.25)
    fusedopt.AdamW(params, lr=0.125, weight_decay=0.0, max_grad_norm=1.0).step()
    for i, param in enumerate(params):
        assert (param.detach() == (-0.125 if i % 2 else 0.125)).all(), i


# ---- values: last, because there are many --------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_reference_to_rounding(case, dtypes, backend):
    if dtypes[0] != dtypes[1] and not can_mix_dtypes():
        pytest.skip("this torch wants gradients in the parameter's dtype")
    sizes = (*SIZES, 1_000_003) if dtypes == DTYPES[0] else SIZES
    check_parity(case, *dtypes, sizes=sizes, steps=3, device="cuda", backend=backend)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipped_step_is_the_reference_to_rounding(case, dtypes, backend):
    """The tensors of the CPU engine's test: over many more, c·g + λθ cancels in some element to less than the bound."""
    check_parity(case, *dtypes, sizes=(1021, 33, 0, 4099), max_grad_norm=25.0, device="cuda", backend=backend)


# Small and few, so that a tool which checks every access has an end: `tests/gpu.py` runs them under compute-sanitizer's.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_configuration(case, dtype, backend):
    params = [torch.nn.Parameter(torch.ones(size, dtype=dtype, device="cuda")) for size in (0, 1, 1023, 4101)]
    optimizer = case.make(params, lr=0.125, max_grad_norm=25.0)
    for param in params:
        param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    optimizer.step()
    moved = torch.cat([param.detach() for param in params])
    assert (moved == moved[0]).all() and moved[0] != 1
