"""What a step and a load leave behind when memory runs out, an interrupt comes, a hook fails, or the process forks."""

import _thread
import contextlib
import itertools
import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_same_bits,
    assert_unchanged,
    bits,
    clone_params,
    every_class,
    ignores_fork_warning,
    make_params,
    needs_fork,
    nothing_changes,
    randn,
    run_in_fork,
    set_grads,
    snapshot,
    train,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt

both_backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
SHAPES = ((13, 7), (), (5, 3))


def assert_same_run(optimizer, peer) -> None:
    """Parameters and states of two optimizers, bitwise, by position."""
    pairs = zip(optimizer.param_groups[0]["params"], peer.param_groups[0]["params"], strict=True)
    for i, (param, other) in enumerate(pairs):
        assert_same_bits([param], [other], f"parameter {i}:")
        state, other_state = optimizer.state.get(param, {}), peer.state.get(other, {})
        assert state.keys() == other_state.keys()
        assert_same_bits(state.values(), other_state.values(), f"parameter {i}: state")


# ---- memory ----------------------------------------------------------------------------------------------------


class OutOfMemory(TorchDispatchMode):
    """Lets the k-th operation that makes a tensor fail."""

    def __init__(self, k: int):
        super().__init__()
        self.left = k

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        reads = func is torch.ops.aten._local_scalar_dense.default
        if func.namespace == "aten" and not writes and not reads:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("planted")
        return func(*args, **(kwargs or {}))


def fail_everywhere(optimizer, call) -> int:
    """Makes the call with its first operation failing, then its second, ... until it succeeds. How many failed."""
    for k in itertools.count(1):
        before = snapshot(optimizer)
        try:
            with OutOfMemory(k):
                call()
            return k - 1
        except MemoryError:
            assert_unchanged(before, optimizer)


@both_backends
@every_class
def test_step_without_memory_changes_nothing(spec, backend):
    """A first step, one in which a parameter joins, one from a plan, one with a clip waiting; each works when tried again."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer = spec.make(params, max_grad_norm=0.5, backend=backend)
    plain = spec.make(plain_params, max_grad_norm=0.5, backend=backend)
    failed = []
    for step in range(4):
        for each, tensors in ((optimizer, params), (plain, plain_params)):
            set_grads(tensors, step)
            if step == 0:
                tensors[1].grad = None
            if step == 3:
                each.clip_grad_norm_(0.25)
        failed.append(fail_everywhere(optimizer, optimizer.step))
        plain.step()
        assert_same_run(optimizer, plain)
    assert failed[0] > 3 and failed[1] > 1
    assert backend == "cpu" or min(failed) > 5


@every_class
def test_load_without_memory_changes_nothing(spec):
    source_params, params = make_params(SHAPES), make_params(SHAPES)
    source, optimizer = spec.make(source_params), spec.make(params, lr=0.5)
    train(source, source_params, 2)
    train(optimizer, params, 1)
    checkpoint = source.state_dict()
    failed = fail_everywhere(optimizer, lambda: optimizer.load_state_dict(checkpoint))
    assert failed >= sum(len(state) for state in checkpoint["state"].values())
    with torch.no_grad():
        for param, source_param in zip(params, source_params, strict=True):
            param.copy_(source_param)
    train(optimizer, params, 2, 2)
    train(source, source_params, 2, 2)
    assert_same_run(optimizer, source)


@contextlib.contextmanager
def address_space_left(count: int):
    """No more than so many bytes can be mapped."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


@needs_fork
@needs_proc
@ignores_fork_warning
def test_step_when_the_system_has_no_memory_changes_nothing():
    """Tensors so large that each is mapped apart; room for none, for one of the states, for all."""
    shape = (8_500_001,)
    params, plain_params = make_params([shape]), make_params([shape])
    optimizer = fusedopt.AdamW(params)
    plain = fusedopt.AdamW(plain_params)
    set_grads(params, 0)
    plain_params[0].grad = params[0].grad
    plain.step()

    def child():
        torch.set_num_threads(1)  # torch's own threads do not survive the fork
        for megabytes in (1, 50):
            before = snapshot(optimizer)
            try:
                with address_space_left(megabytes << 20):
                    optimizer.step()
            except (MemoryError, RuntimeError):
                assert_unchanged(before, optimizer)
            else:
                break  # what this process has freed before was room enough
        else:
            optimizer.step()
        assert_same_run(optimizer, plain)

    run_in_fork(child)


@needs_fork
@needs_proc
@ignores_fork_warning
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_forked_child_without_threads_to_be_had_does_it_alone(name, threads):
    params = make_params([(3_000_017,), (33,)])
    plain_params = clone_params(params)
    optimizer = getattr(fusedopt, name)(params, lr=0.01, max_grad_norm=0.5)
    plain = getattr(fusedopt, name)(plain_params, lr=0.01, max_grad_norm=0.5)
    for each, tensors in ((optimizer, params), (plain, plain_params)):
        train(each, tensors, 1)
        set_grads(tensors, 1)
    plain.step()

    def child():
        torch.set_num_threads(64)
        held = threading.Lock()
        held.acquire()
        with address_space_left(4 << 20):  # a thread's stack takes 8 MB
            with pytest.raises(RuntimeError, match="can't start new thread"):
                for _ in range(64):  # the first ones get the stacks of threads that the fork ended
                    _thread.start_new_thread(held.acquire, ())
            optimizer.step()
        torch.set_num_threads(1)  # torch itself hangs in a forked child that uses several
        assert_same_run(optimizer, plain)

    run_in_fork(child)


# ---- interrupts ------------------------------------------------------------------------------------------------

PLACES = (str(Path(fusedopt.__file__).parent), contextlib.__file__, torch.autograd.graph.__file__)
# Large enough for several threads.
LARGE_SHAPES = ((8_209,), (8_219,), (), (13, 7))


class InterruptAt:
    """Raises an interrupt before the k-th line of a step."""

    def __init__(self, k: int):
        self.left = k

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PLACES):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt  # which also ends the tracing
        return self.trace


def is_unchanged(before, optimizer) -> bool:
    try:
        assert_unchanged(before, optimizer)
    except AssertionError:
        return False
    return True


def interrupt_step(make, first: int, k: int) -> tuple[str, int]:
    """Interrupts a step at its k-th line; after it, and after the steps that follow, all is as if there had been none.

    Returns how it ended, and how many lines were left of the k.
    """
    params, plain_params = make_params(LARGE_SHAPES), make_params(LARGE_SHAPES)
    optimizer, plain = make(params), make(plain_params)
    for each, tensors in ((optimizer, params), (plain, plain_params)):
        train(each, tensors, first)
        set_grads(tensors, first)
    before, versions = snapshot(optimizer), [param._version for param in params]
    outcome = "finished"
    try:
        with InterruptAt(k) as interrupt:
            optimizer.step()
    except KeyboardInterrupt:
        outcome = "not done" if is_unchanged(before, optimizer) else "done"
    plain.step()
    if outcome == "not done":
        optimizer.step()
    assert_same_run(optimizer, plain)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    train(optimizer, params, 1, first + 1)
    train(plain, plain_params, 1, first + 1)
    assert_same_run(optimizer, plain)
    return outcome, interrupt.left


@pytest.mark.parametrize("first", [0, 1], ids=["first step", "later step"])
@both_backends
@every_class
def test_interrupted_step_is_done_or_not_done(spec, backend, first, threads):
    """At some lines all through the step, and at many near its end, where it writes."""
    threads(2)

    def interrupt_at(k):
        return interrupt_step(lambda params: spec.make(params, max_grad_norm=0.5, backend=backend), first, k)

    outcome, left = interrupt_at(10**6)
    assert outcome == "finished"
    num_lines = 10**6 - left
    early = range(1 + len(spec.name), num_lines - 90, num_lines // 2)
    outcomes = {interrupt_at(k)[0] for k in [*early, *range(max(1, num_lines - 90), num_lines + 1, 14)]}
    assert outcomes - {"finished"} == {"not done", "done"}  # a step may take a line less than the one counted


def test_interrupt_while_autograd_is_told_comes_after_the_whole_update(threads, monkeypatch):
    """The one call into Python while threads write already."""
    threads(2)
    params, plain_params = make_params(LARGE_SHAPES), make_params(LARGE_SHAPES)
    optimizer, plain = fusedopt.AdamW(params), fusedopt.AdamW(plain_params)
    tell, calls = torch.autograd.graph.increment_version, []

    def interrupted(tensors):
        calls.append(tensors)
        if len(calls) == 1:
            raise KeyboardInterrupt
        tell(tensors)

    set_grads(params, 0)
    set_grads(plain_params, 0)
    plain.step()
    versions = [param._version for param in params]
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd.graph, "increment_version", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert_same_run(optimizer, plain)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
@every_class
def test_signal_during_a_step_leaves_it_done_or_not_done(spec, kind, threads):
    """At any moment, also while several threads check the tensors or write them."""
    threads(2)
    shapes = (*LARGE_SHAPES, *[(3,)] * 65)
    params, plain_params = make_params(shapes), make_params(shapes)
    optimizer, plain = spec.make(params, max_grad_norm=0.5), spec.make(plain_params, max_grad_norm=0.5)
    train(optimizer, params, 1)
    train(plain, plain_params, 1)
    is_armed, num_raised = False, 0

    def handler(signum, frame):
        nonlocal is_armed, num_raised
        if is_armed:
            is_armed = False
            num_raised += 1
            raise kind("from the handler")

    old_handler = signal.signal(signal.SIGALRM, handler)
    generator = random.Random(spec.name)
    try:
        for step in range(1, 200):
            if step > 8 and num_raised > 0:
                break  # on a busy machine the first signals may all have come too late
            set_grads(params, step)
            for param, plain_param in zip(params, plain_params, strict=True):
                plain_param.grad = param.grad
            begin = time.perf_counter()
            plain.step()
            duration = time.perf_counter() - begin
            before = snapshot(optimizer)
            with contextlib.suppress(kind):
                is_armed = True
                signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-6, duration))
                optimizer.step()
                is_armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            if is_unchanged(before, optimizer):
                optimizer.step()
            assert_same_run(optimizer, plain)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old_handler)
    assert num_raised > 0


class Refusing(torch.Tensor):
    """A gradient that does not want to be asked."""

    is_refusing = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if cls.is_refusing and func is torch.Tensor.is_neg:
            raise KeyboardInterrupt
        return super().__torch_function__(func, types, args, kwargs or {})


@needs_fork
@ignores_fork_warning
def test_error_while_threads_check_tensors_changes_nothing(threads, monkeypatch):
    """With OpenMP's threads, and with the plain ones of a forked child."""
    threads(2)
    params, plain_params = make_params([(3, 4)] * 200), make_params([(3, 4)] * 200)
    optimizer, plain = fusedopt.AdamW(params), fusedopt.AdamW(plain_params)

    def set_refusing_grads(step):
        for i, (param, other) in enumerate(zip(params, plain_params, strict=True)):
            param.grad = randn((3, 8), seed=1000 * step + i)[:, ::2].as_subclass(Refusing)
            other.grad = param.grad.clone()

    def refuse():
        with monkeypatch.context() as patch, nothing_changes(optimizer):
            patch.setattr(Refusing, "is_refusing", True)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()

    for step in range(3):
        set_refusing_grads(step)
        if step > 0:
            run_in_fork(refuse)
            refuse()
        optimizer.step()
        plain.step()
        assert_same_run(optimizer, plain)


# ---- hooks and closures ----------------------------------------------------------------------------------------


def fail(*args):
    raise LookupError("from the hook")


@both_backends
@every_class
def test_error_before_an_update_changes_nothing(spec, backend):
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params, backend=backend), spec.make(plain_params, backend=backend)
    for step in range(3):
        set_grads(params, step)
        set_grads(plain_params, step)
        with nothing_changes(optimizer):
            with pytest.raises(LookupError):
                optimizer.step(closure=fail)
            for register, call in (
                (optimizer.register_step_pre_hook, optimizer.step),
                (optimizer.register_state_dict_pre_hook, optimizer.state_dict),
                (optimizer.register_state_dict_post_hook, optimizer.state_dict),
                (optimizer.register_load_state_dict_pre_hook, lambda: optimizer.load_state_dict(plain.state_dict())),
            ):
                handle = register(fail)
                with pytest.raises(LookupError):
                    call()
                handle.remove()
        optimizer.step()
        plain.step()
        assert_same_run(optimizer, plain)


@both_backends
@every_class
def test_error_in_a_post_hook_comes_after_the_whole_step_or_load(spec, backend):
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params, backend=backend), spec.make(plain_params, backend=backend)
    for step in range(2):
        set_grads(params, step)
        handle = optimizer.register_step_post_hook(fail)
        with pytest.raises(LookupError):
            optimizer.step()
        handle.remove()
        train(plain, plain_params, 1, step)
        assert_same_run(optimizer, plain)
    train(optimizer, params, 1, 5)
    handle = optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(LookupError):
        optimizer.load_state_dict(plain.state_dict())
    handle.remove()
    with torch.no_grad():
        for param, plain_param in zip(params, plain_params, strict=True):
            param.copy_(plain_param)
    train(optimizer, params, 1, 2)
    train(plain, plain_params, 1, 2)
    assert_same_run(optimizer, plain)


# ---- processes -------------------------------------------------------------------------------------------------


@needs_fork
@ignores_fork_warning
def test_child_forked_while_another_thread_steps_works(threads):
    threads(2)
    busy_params, params, plain_params = make_params([(70_001,)]), make_params(LARGE_SHAPES), make_params(LARGE_SHAPES)
    busy, optimizer, plain = (fusedopt.AdamW(each, max_grad_norm=0.5) for each in (busy_params, params, plain_params))
    train(busy, busy_params, 1)
    for each, tensors in ((optimizer, params), (plain, plain_params)):
        train(each, tensors, 1)
        set_grads(tensors, 1)
    plain.step()
    is_over = threading.Event()

    def keep_stepping():
        while not is_over.is_set():
            busy.step()

    def child():
        optimizer.step()
        assert_same_run(optimizer, plain)
        busy.step()  # perhaps in the middle of the parent's

    thread = threading.Thread(target=keep_stepping)
    thread.start()
    try:
        for _ in range(4):
            run_in_fork(child)
    finally:
        is_over.set()
        thread.join()


def trained() -> bytes:
    params = make_params(LARGE_SHAPES)
    train(fusedopt.AdamW(params, max_grad_norm=0.5), params, 2)
    return b"".join(bits(param) for param in params)


def train_and_send(connection) -> None:
    connection.send_bytes(trained())


@ignores_fork_warning
@pytest.mark.parametrize(
    "method", [name for name in ("fork", "spawn") if name in multiprocessing.get_all_start_methods()]
)
def test_other_process_trains_as_this_one(method):
    expected = trained()  # first here, so that a forked process finds threads that have been used
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context(method).Process(target=train_and_send, args=(sender,))
    process.start()
    assert receiver.poll(300), "the process hangs"
    assert receiver.recv_bytes() == expected
    process.join(300)
    assert process.exitcode == 0


@ignores_fork_warning
def test_data_loader_with_workers_beside_the_training_changes_nothing(threads):
    threads(2)

    def run(num_workers):
        params = make_params(((7, 1201), (1201, 7)))
        optimizer = fusedopt.AdamW(params, max_grad_norm=0.5)
        loader = torch.utils.data.DataLoader(randn((24, 7)), batch_size=4, num_workers=num_workers)
        for batch in loader:
            optimizer.zero_grad()
            (batch @ params[0] @ params[1]).square().mean().backward()
            optimizer.step()
        return params

    assert_same_bits(run(2), run(0))
