"""The CUDA kernels. Compiled for the host: what is CUDA's alone, beside what test_device.py tests. Compiled for GPUs: what nvcc
made of every kernel in the installed object.
"""

import ctypes
import json
import shutil
import subprocess

import compile_kernels
import cuda_emulator
import pytest
import torch
from cases import CASES, DTYPES, SIZES, can_mix_dtypes, check_parity, dtype_id, set_grad
from helpers import assert_same_bits, bits, make_params, nothing_changes, randn, set_grads

import fusedopt
from fusedopt import _C, extension
from fusedopt.backends import cuda
from fusedopt.rules import RULES

pytestmark = pytest.mark.skipif(cuda.unavailable() is not None, reason=f"backend cuda: {cuda.unavailable()}")
CHUNK = 4096
INSTALLED = extension.FOLDER / "_cuda.so"


# ---- values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_reference_to_rounding_over_every_size(case, dtypes):
    """The tensors of the CPU engine's test."""
    if dtypes[0] != dtypes[1] and not can_mix_dtypes():
        pytest.skip("this torch wants gradients in the parameter's dtype")
    check_parity(case, *dtypes, sizes=SIZES[:-1], steps=2, backend="cuda")


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float64_parameters_take_narrower_gradients(grad):
    """There is no wide path for these."""
    if not can_mix_dtypes():
        pytest.skip("this torch wants gradients in the parameter's dtype")
    sgd = next(
        case for case in CASES if "momentum" in case.kwargs
    )  # of a gradient Lion shows the sign, Adam hardly the scale
    check_parity(sgd, torch.float64, grad, sizes=(CHUNK * 2, 5, 1023), steps=3, backend="cuda")


def test_any_dtypes_of_one_kernel_share_its_launches(monkeypatch):
    """And each is what it is alone."""
    dtypes = [pair for pair in DTYPES if torch.float64 not in pair]
    if not can_mix_dtypes():
        dtypes = [pair for pair in dtypes if pair[0] == pair[1]]
    together, alone = ([torch.nn.Parameter(randn((CHUNK + 5,), dtype)) for dtype, _ in dtypes] for _ in range(2))
    optimizer = fusedopt.AdamW(together, backend="cuda")
    calls = []
    call = cuda.Library.call
    monkeypatch.setattr(cuda.Library, "call", lambda self, name, *args: calls.append(name) or call(self, name, *args))
    for step in range(2):
        for param, other, (_, grad) in zip(together, alone, dtypes, strict=True):
            set_grad(param, randn(param.shape, grad, step))
            set_grad(other, randn(param.shape, grad, step))
        calls.clear()
        optimizer.step()
        assert calls.count("update") == 1
    for param in alone:
        one = fusedopt.AdamW([param], backend="cuda")
        grad = param.grad
        for step in range(2):
            set_grad(param, randn(param.shape, grad.dtype, step))
            one.step()
    assert_same_bits(together, alone)


@pytest.mark.parametrize("spec", ["AdamW", "NAdam", "Lion"])
def test_order_of_blocks_and_threads_changes_no_bit(spec):
    """The emulator draws another order for every launch."""
    results = set()
    for _ in range(10):
        params = make_params(((CHUNK * 7 + 1,), (5,), (33, 31)))
        optimizer = getattr(fusedopt, spec)(params, max_grad_norm=1.0, backend="cuda")
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        results.add(b"".join(bits(tensor) for tensor in [optimizer.grad_norm, *params]))
    assert len(results) == 1


def test_groups_and_step_counts_of_their_own():
    """Neighbours in the table with other options, other step counts and none: scalars are prepared anew for each."""
    ours, theirs = make_params([(300,)] * 60), make_params([(300,)] * 60)
    runs = []
    for params, backend in ((ours, "cuda"), (theirs, "cpu")):
        groups = [{"params": params[i::3], "lr": 0.1 * (i + 1), "weight_decay": 0.125 * i} for i in range(3)]
        optimizer = fusedopt.NAdam(groups, backend=backend)
        for step in range(6):
            set_grads(params, step)
            for i, param in enumerate(params):
                if (i + step) % 4 == 0:
                    param.grad = None
            optimizer.step()
        runs.append(optimizer)
    assert_same_bits(ours, theirs)
    steps = [[float(run.state[p]["step"]) for p in params] for run, params in zip(runs, (ours, theirs), strict=True)]
    assert steps[0] == steps[1] and len({*steps[0]}) > 1


def test_many_entries_advance_once():
    """More than one pass of the block that advances the step counts."""
    shapes = [(1 + i % 3,) for i in range(2100)]
    ours, theirs = make_params(shapes), make_params(shapes)
    pairs = [(each, fusedopt.NAdam(each, backend=name)) for each, name in ((ours, "cuda"), (theirs, "cpu"))]
    for step in range(2):
        for params, optimizer in pairs:
            set_grads(params, step)
            if step == 1:
                params[7].grad = None
            optimizer.step()
    assert_same_bits(ours, theirs)
    states = [[optimizer.state[p] for p in params] for params, optimizer in pairs]
    assert states[0][7]["step"] == 1 and states[0][8]["step"] == 2
    for name in ("step", "mu_product"):
        assert_same_bits(*([state[name] for state in each] for each in states))


# ---- what fails ------------------------------------------------------------------------------------------------


@pytest.fixture
def failing():
    yield cuda_emulator.fail
    cuda_emulator.fail(None)


@pytest.mark.parametrize("after, call", [
    (0, "cudaGetDevice"), (1, "cudaGetDevice"),
    (0, "cudaLaunchKernel"), (1, "cudaLaunchKernel"),
    (0, "cudaOccupancyMaxActiveBlocksPerMultiprocessor"), (0, "cudaDeviceGetAttribute"),
])  # fmt: skip
def test_failed_cuda_call_is_named_and_changes_nothing(after, call, failing):
    """Then the optimizer is as good as new."""
    params, others = make_params(), make_params()
    optimizer, other = (fusedopt.AdamW(each, max_grad_norm=1.0, backend="cuda") for each in (params, others))
    set_grads(params, 0)
    set_grads(others, 0)
    versions = [param._version for param in params]
    failing(call, after)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match=f"CUDA: {call}: unknown error"):
        optimizer.step()
    failing(None)
    assert [param._version for param in params] == versions
    for step in range(2):
        optimizer.step()
        other.step()
        set_grads(params, step)
        set_grads(others, step)
    assert_same_bits(params, others)


def test_device_that_the_object_was_not_compiled_for_is_a_reason(failing):
    cuda._problem_on.cache_clear()
    failing("cudaOccupancyMaxActiveBlocksPerMultiprocessor")
    try:
        assert "FUSEDOPT_CUDA_ARCHS" in cuda._problem_on(0)
        cuda._problem_on.cache_clear()
        failing(None)
        assert cuda._problem_on(0) is None
    finally:
        cuda._problem_on.cache_clear()


def test_emulator_sees_threads_that_wait_for_ever(tmp_path):
    """A barrier that half of the threads never reach, as an error; the next kernel runs."""
    source = tmp_path / "kernel.cpp"
    source.write_text("""
#include "cuda_runtime.h"
struct Args { int waiting; int* sum; };
static void kernel(Args args) {
  if (int(threadIdx.x) < args.waiting) __syncthreads();
  atomicAdd(args.sum, 1);
}
extern "C" __attribute__((visibility("default"))) int launch(int waiting, int* sum) {
  Args args{waiting, sum};
  void* values[] = {&args};
  return cudaLaunchKernel(kernel, dim3(2), dim3(64), values, 0, nullptr);
}
""")
    target = tmp_path / "kernel.so"
    cuda_emulator.compile_kernel_code(target, source)
    library, total = ctypes.CDLL(str(target)), ctypes.c_int()
    assert library.launch(32, ctypes.byref(total)) != 0 and total.value == 32
    for waiting in (0, 64):
        total.value = 0
        assert library.launch(waiting, ctypes.byref(total)) == 0 and total.value == 128


@pytest.mark.parametrize("change, reason", [
    (("rule lion 1", "rule lion 2"), "it differs in the rule 'lion'"),
    (("format bfloat16 bfloat16 -", "format bfloat16 float16 -"), "it differs in the format 'bfloat16'"),
    (("\nformat float16 float16 - 0 0", ""), "it lacks the format 'float16'"),
    (("const double* control;", "double* control;const double* more;"), "the arguments of its update differ"),
    (("memory host\n", ""), "built from another version"),
])  # fmt: skip
def test_object_of_another_version_is_refused(change, reason, tmp_path, monkeypatch):
    library = ctypes.CDLL(str(cuda.LIBRARY))
    library.fusedopt_cuda_interface.restype = ctypes.c_char_p
    text = library.fusedopt_cuda_interface().decode()
    assert change[0] in text
    source = tmp_path / "old.cpp"
    functions = "".join(
        f'extern "C" const char* fusedopt_cuda_{name}(...) {{ return nullptr; }}\n'
        for name in ("num_devices", "num_blocks", "norm", "update")
    )
    source.write_text(
        f'{functions}extern "C" const char* fusedopt_cuda_interface() {{ return R"({text.replace(*change)})"; }}\n'
    )
    target = tmp_path / "old.so"
    subprocess.run([cuda_emulator.COMPILER, "-shared", "-fPIC", source, "-o", target], check=True)
    monkeypatch.setattr(cuda, "LIBRARY", target)
    cuda._load.cache_clear()
    try:
        assert "built from another version" in cuda.unavailable() and reason in cuda.unavailable()
        assert cuda.supports(torch.device("cuda"))  # so that `doctor` says why not
    finally:
        cuda._load.cache_clear()


def test_auto_never_picks_the_emulator():
    assert fusedopt.backends.explain(torch.device("cpu"))[0] == "cpu"


# ---- compiled for GPUs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    """Name -> (code, facts) of every kernel in the installed object."""
    pytest.importorskip("triton")  # brings the disassembler
    if not INSTALLED.exists():
        pytest.skip("the CUDA part was not built")
    return {name: (code, facts) for name, code, facts in compile_kernels.cuda_kernels(INSTALLED)}


def test_nvcc_has_built_the_cuda_part():
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    assert INSTALLED.exists() and INSTALLED.stat().st_size < 30e6


@pytest.mark.xdist_group("compiled by nvcc")
def test_no_kernel_spills_and_every_aligned_access_is_wide(kernels):
    """In each update one wide load of the parameter, the gradient and every state that is kept, and one wide store of all but
    the gradient, in float32 and in 16 bits in two places; and none that must find out what kind of memory it is. A kernel with
    states has all of that twice: for states in the type that is computed in, which are stored in one place, and for others.
    """
    targets = {name.split()[0] for name in kernels}
    measured = [name for name, (*_, num_sums) in _C.rules.items() if num_sums]
    assert len(kernels) == len(targets) * (len(("global_norm", "add_up")) + 2 * (len(_C.rules) + len(measured)))
    for name, (code, facts) in kernels.items():
        assert facts["spilled"] == 0, name
        assert " LD.E" not in code and " ST.E" not in code, name
        if "global_norm" in name:
            assert facts["wide_loads"] >= len(("float32", "bfloat16", "float16", "float64"))
            continue
        if "add_up" in name:
            continue
        rule, options = name.split(" ", 1)[1].removesuffix(" measure").rstrip(">").split("<")
        row = RULES[rule.lower()]
        num_kept = sum(state.option is None for state in row.states) + options.count("true")
        num_read = 0 if rule == "SAM" else num_kept  # its state is only written
        if options.startswith("double"):
            num_loads, num_stores = 2 + num_read, 1 + num_kept
        elif num_kept == 0:
            num_loads, num_stores = 2, 2
        else:
            num_loads, num_stores = 2 * (2 + num_read), (2 + num_kept) + (2 + 2 * num_kept)
        if name.endswith("measure"):
            assert facts["wide_loads"] > 0 and facts["wide_stores"] == 0, name
            continue
        for number, of_each in ((facts["wide_loads"], num_loads), (facts["wide_stores"], num_stores)):
            assert number > 0 and number % of_each == 0, name  # several times over where a loop is unrolled


@pytest.mark.xdist_group("compiled by nvcc")
def test_registers_are_those_of_the_committed_table(kernels):
    """So that a change is seen; `python -m tests.compile_kernels --write` writes it anew."""
    kept = json.loads(compile_kernels.TABLE.read_text())
    compiler = f"nvcc {compile_kernels.nvcc_version()}"
    if compiler not in kept:
        pytest.skip(f"the table has not {compiler}")
    now = {name: facts for name, (_, facts) in kernels.items()}
    if {name.split()[0] for name in now} != {name.split()[0] for name in kept[compiler]}:
        pytest.skip("the object was built for other GPUs than the table is of")
    assert now == kept[compiler]
