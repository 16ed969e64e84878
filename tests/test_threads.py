"""Optimizers in several threads at once, each with threads of its own: the same bits as one after the other.

`make sanitize` runs this with a thread sanitizer, which sees races that change no bit.
"""

import threading

import torch
from helpers import SPECS, assert_same_bits, bits, every_class, make_params, set_grads

# Several batches to update, and several pieces of 64 tensors to check.
SHAPES = ((8_209,), (40_009,), (), (13, 7), *[(3,)] * 130)


def run_together(count: int, body) -> None:
    """body(0), ..., body(count - 1), each in a thread, all begun at the same time."""
    barrier, errors = threading.Barrier(count), []

    def run(i):
        try:
            barrier.wait()
            body(i)
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert not errors, errors


def test_optimizers_in_threads_step_as_one_after_the_other(threads):
    """The number of threads changing all the while."""
    threads(3)

    def run(i):
        params = make_params(SHAPES, seed=i)
        optimizer = SPECS[i % len(SPECS)].make(params, max_grad_norm=0.5)
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
            torch.set_num_threads(2 + (i + step) % 3)
        results[i] = [bits(param) for param in params]

    results = {}
    run_together(8, run)
    together, results = results, {}
    for i in range(8):
        run(i)
    assert together == results


@every_class
def test_threads_step_one_optimizer_in_turn(spec, threads):
    """Under a lock of the caller's, as other libraries do."""
    threads(3)
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params, max_grad_norm=0.5), spec.make(plain_params, max_grad_norm=0.5)
    set_grads(params, 0)
    for param, plain_param in zip(params, plain_params, strict=True):
        plain_param.grad = param.grad
    lock = threading.Lock()

    def run(i):
        for _ in range(3):
            with lock:
                optimizer.step()

    run_together(4, run)
    for _ in range(12):
        plain.step()
    assert_same_bits(params, plain_params)
