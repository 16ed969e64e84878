"""Parameters that are DTensors, of FSDP2 (`fully_shard`) and placed by hand: each process updates its part.

Run as a program, this file is one of several processes, which go through the checks together; pytest starts them once and
reads what each found.
"""

import copy
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
import weakref
from pathlib import Path

import pytest
import torch

WORLD = 3  # so that two can have what the third has no part in
CHECKS = {}


def check(function):
    """To be run in all processes, after the same ones before it."""
    CHECKS[function.__name__] = function
    return function


if __name__ == "__main__":
    import conftest  # noqa: F401  the emulated backends
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from helpers import SPECS, randn, same_bits
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        get_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )  # fmt: skip
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    import fusedopt
    from fusedopt.backends import BACKENDS

    SHARDED = [spec for spec in SPECS if spec.rule.num_sums == 0]
    USABLE = [name for name in ("cpu", "reference", "cuda") if BACKENDS[name].unavailable() is None]


class Model(torch.nn.Module):
    """Rows that do not divide evenly, and a bias of which only the first process has anything."""

    def __init__(self, hidden=33):
        super().__init__()
        self.first, self.last = torch.nn.Linear(5, hidden), torch.nn.Linear(hidden, 1)
        with torch.no_grad():
            for i, param in enumerate(self.parameters()):
                param.copy_(randn(param.shape, seed=i))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def backward(model, step):
    """Every process has the same batch, so the averaged gradient is that of the whole model alone."""
    model.zero_grad()
    model(randn((8, 5), seed=1000 + step)).square().sum().backward()


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()


def full(tensor):
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def assert_close(ours, theirs, tolerance=2e-6):
    for a, b in zip(ours, theirs, strict=True):
        a, b = full(a), full(b)
        error = float((a - b).abs().max() / b.abs().max())
        assert error <= tolerance


def placed(values, *placements, mesh):
    return torch.nn.Parameter(distribute_tensor(values.clone(), mesh, placements))


def set_grad(param, values):
    is_placed = isinstance(param, DTensor)
    param.grad = distribute_tensor(values, param.device_mesh, param.placements) if is_placed else values


# ---- the checks --------------------------------------------------------------------------------------------------


@check
def sharded_training_is_the_training_of_the_whole_model(rank):
    """Every class that updates elements one by one, on every backend, clipped in the step by the norm over all processes."""
    for backend in USABLE:
        for spec in SHARDED:
            model, whole = Model(), Model()
            fully_shard(model)
            assert model.last.bias.to_local().numel() == (rank == 0)
            options = {**spec.options, "max_grad_norm": 5.0, "backend": backend}
            optimizer, alone = spec.cls(model.parameters(), **options), spec.cls(whole.parameters(), **options)
            for step in range(4):
                train(model, optimizer, 1, step)
                train(whole, alone, 1, step)
                assert float(alone.grad_norm) > 5
                torch.testing.assert_close(optimizer.grad_norm, alone.grad_norm, rtol=1e-6, atol=0)
            assert_close(model.parameters(), whole.parameters())
            for param, other in zip(model.parameters(), whole.parameters(), strict=True):
                mine, its = optimizer.state[param], alone.state[other]
                assert mine.keys() == its.keys()
                assert_close(mine.values(), its.values())
                for value in mine.values():
                    if value.dim():
                        assert isinstance(value, DTensor) and value.placements == param.placements


@check
def sharded_training_is_torchs(rank):
    for spec in SHARDED:
        if spec.twin_name is None:
            continue
        model, other = Model(), Model()
        fully_shard(model), fully_shard(other)
        optimizer, twin = spec.make(model.parameters()), spec.twin(other.parameters(), **spec.options)
        for step in range(3):
            backward(model, step)
            norm = optimizer.clip_grad_norm_(5.0)
            optimizer.step()
            backward(other, step)
            expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 5.0)
            twin.step()
            torch.testing.assert_close(norm, full(expected), rtol=1e-6, atol=0)
        assert_close(model.parameters(), other.parameters(), 1e-5)


@check
def sharded_in_two_ways_at_once(rank):
    """Tensor parallelism inside `fully_shard`; one of the two is over one process."""
    for shape in ((WORLD, 1), (1, WORLD)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        for backend in USABLE:
            model, whole = Model(hidden=8 * WORLD), Model(hidden=8 * WORLD)
            parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel(), "last": RowwiseParallel()})
            fully_shard(model, mesh=mesh["data"])
            assert model.first.weight.device_mesh.ndim == 2
            options = {"lr": 0.01, "max_grad_norm": 5.0, "backend": backend}
            optimizer, alone = (fusedopt.AdamW(m.parameters(), **options) for m in (model, whole))
            for step in range(3):
                train(model, optimizer, 1, step)
                train(whole, alone, 1, step)
                torch.testing.assert_close(optimizer.grad_norm, alone.grad_norm, rtol=1e-6, atol=0)
            assert_close(model.parameters(), whole.parameters())


@check
def sam_climbs_by_the_norm_of_the_whole_model(rank):
    for backend in USABLE:
        for adaptive in (False, True):
            model, whole = Model(), Model()
            fully_shard(model)
            options = {"rho": 0.1, "adaptive": adaptive, "lr": 0.01, "backend": backend}
            optimizer, alone = (fusedopt.SAM(m.parameters(), **options) for m in (model, whole))
            for step in range(3):
                for of, at in ((optimizer, model), (alone, whole)):
                    backward(at, step)
                    of.first_step()
                assert_close(model.parameters(), whole.parameters())
                for of, at in ((optimizer, model), (alone, whole)):
                    backward(at, step)
                    of.second_step()
                assert_close(model.parameters(), whole.parameters())


def closure_that_fails_once(params):
    """The second time it is called; gradients differ from call to call."""
    calls = itertools.count()

    def closure():
        call = next(calls)
        for param in params:
            set_grad(param, randn(param.shape, seed=call))
        if call == 1:
            raise KeyError
        return 0.0

    return closure


@check
def sam_comes_back(rank):
    """By `restore`, after a closure that fails, and where a device decides whether to skip; beside plain parameters too."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        for others in ([], [torch.nn.Parameter(randn((4,)))]):
            params = [placed(randn((6, 3)), Shard(0), mesh=mesh), *others]
            before = [full(param).clone() for param in params]
            optimizer = fusedopt.SAM(params, fusedopt.SGD, rho=0.1, lr=0.5, nonfinite="skip", backend=backend)
            closure = closure_that_fails_once(params)
            with pytest.raises(KeyError):
                optimizer.step(closure)
            assert all(same_bits(full(param), old) for param, old in zip(params, before, strict=True))
            optimizer.first_step()
            assert not same_bits(full(params[0]), before[0])
            versions = [param._version for param in params]
            optimizer.restore()
            assert all(param._version > version for param, version in zip(params, versions, strict=True))
            assert all(same_bits(full(param), old) for param, old in zip(params, before, strict=True))
            optimizer.step(closure)
            assert_close(params[:1], [before[0] - 0.5 * randn((6, 3), seed=3)])


@check
def every_element_counts_once_in_the_norm(rank):
    """However many processes have it: spread, spread over columns, replicated, and no DTensor at all; two optimizers too."""
    mesh, grid = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (WORLD, 1))
    values = [randn((7, 5), seed=i) for i in range(7)]
    for backend in USABLE:
        params = [
            placed(values[0], Shard(0), mesh=mesh),
            placed(values[1], Shard(1), mesh=mesh),
            placed(values[2], Replicate(), mesh=mesh),
            placed(values[3], Replicate(), Shard(0), mesh=grid),
            placed(values[4], Shard(0), Replicate(), mesh=grid),
            placed(values[5], Shard(0), Shard(1), mesh=grid),
            torch.nn.Parameter(values[6].clone()),
        ]
        grads = [randn((7, 5), seed=10 + i) for i in range(7)]
        for param, grad in zip(params, grads, strict=True):
            set_grad(param, grad)
        expected = torch.cat(grads).double().norm().float()
        optimizer = fusedopt.SGD(params, lr=1.0, max_grad_norm=1.0, backend=backend)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-6, atol=0)
        moved = [value - grad / expected for value, grad in zip(values, grads, strict=True)]
        assert_close(params, moved)
        for parts in ([params[:1], params[1:]], [params[:6], params[6:]], [params[:1], params[6:]]):
            both = [fusedopt.SGD(part, lr=1.0, backend=backend) for part in parts]
            within = sum(float(full(p.grad).double().norm() ** 2) for part in parts for p in part) ** 0.5
            norm = fusedopt.clip_grad_norm_(both, 1.0)
            assert math.isclose(float(norm), within, rel_tol=1e-6)


@check
def norms_that_float32_cannot_square(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        for value in (1e30, 1e-30):
            param = placed(torch.zeros(9), Shard(0), mesh=mesh)
            set_grad(param, torch.full((9,), value))
            limit = math.inf if value > 1 else 1.0  # clips neither
            optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=limit, backend=backend)
            optimizer.step()
            assert math.isclose(float(optimizer.grad_norm), 3 * value, rel_tol=1e-6)
            assert_close([param], [torch.full((9,), -value)])
        param = placed(torch.zeros(9, dtype=torch.float64), Shard(0), mesh=mesh)
        set_grad(param, torch.full((9,), 1e200, dtype=torch.float64))
        optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=3.0, backend=backend)
        optimizer.step()
        assert_close([param], [torch.full((9,), -1.0, dtype=torch.float64)])


@check
def all_processes_skip_what_one_of_them_saw(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        for value in (math.inf, math.nan):
            for nonfinite in ("skip", "error"):
                param, other = placed(randn((6, 3)), Shard(0), mesh=mesh), placed(randn((2,)), Replicate(), mesh=mesh)
                options = {"lr": 0.1, "nonfinite": nonfinite, "max_grad_norm": 1.0, "backend": backend}
                optimizer = fusedopt.AdamW([param, other], **options)
                set_grad(param, randn((6, 3), seed=1))
                set_grad(other, randn((2,), seed=1))
                optimizer.step()
                grad = randn((6, 3), seed=2)
                grad[5, 1] = value  # the last process has it
                set_grad(param, grad)
                before = full(param).clone()
                if nonfinite == "skip":
                    optimizer.step()
                    assert int(optimizer.skipped_steps) == 1
                else:
                    with pytest.raises(RuntimeError, match="nothing was updated"):
                        optimizer.step()
                assert same_bits(full(param), before)
                assert all(float(state["step"]) == 1 for state in optimizer.state.values())
                set_grad(param, randn((6, 3), seed=3))
                optimizer.step()
                assert float(optimizer.state[param]["step"]) == 2


@check
def all_processes_skip_what_one_of_them_was_told(rank):
    """GradScaler agrees on `found_inf` by the first gradient's placement only."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        for limit in (None, 1.0):
            param = placed(randn((6, 3)), Shard(0), mesh=mesh)
            optimizer = fusedopt.AdamW([param], lr=0.1, max_grad_norm=limit, backend=backend)
            set_grad(param, randn((6, 3), seed=1))
            for told in (1.0, 0.0):
                optimizer.found_inf = torch.tensor(told if rank == 1 else 0.0)
                optimizer.step()
            assert int(optimizer.skipped_steps) == 1 and float(optimizer.state[param]["step"]) == 1


@check
def shards_of_fsdp1_skip_together_or_the_step_refuses_to_unscale(rank):
    """ShardedGradScaler agrees on infinities when it unscales. A step that unscales would see those of its own shard alone."""
    for fused in (None, True):
        for use_orig_params in (False, True):
            model = FSDP(Model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
            optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, fused=fused)
            scaler = ShardedGradScaler(device="cpu", init_scale=8.0)
            for step in range(3):
                optimizer.zero_grad()
                scaler.scale(model(randn((8, 5), seed=step)).square().sum()).backward()
                for param in model.parameters():
                    if step == 1 and rank == 0 and param.grad is not None and param.grad.numel():
                        param.grad.view(-1)[0] = math.inf
                if fused:
                    before = [param.detach().clone() for param in model.parameters()]
                    with pytest.raises(RuntimeError, match=r"belongs to FSDP1, .*, or leave out fused=True"):
                        scaler.step(optimizer)
                    assert all(map(same_bits, before, (param.detach() for param in model.parameters())))
                    break
                scaler.step(optimizer)
                scaler.update()
            else:
                assert scaler.get_scale() == 4.0
                assert {float(state["step"]) for state in optimizer.state.values()} <= {2.0}
    model = FSDP(Model(), device_id=torch.device("cpu"))
    clipping, skipping = (
        fusedopt.AdamW(model.parameters(), **o) for o in ({"max_grad_norm": 1.0}, {"nonfinite": "skip"})
    )
    model(randn((8, 5))).square().sum().backward()
    for call in (clipping.step, skipping.step, lambda: skipping.clip_grad_norm_(1.0)):
        with pytest.raises(
            RuntimeError, match="belongs to FSDP1, of which each process would take the norm of its own shard"
        ):
            call()
    for spec in SPECS:
        if spec.rule.num_sums:
            with pytest.raises(TypeError, match="belongs to FSDP1, but the rule sums over whole tensors"):
                spec.make(model.parameters()).step()
    with pytest.raises(RuntimeError, match="belongs to FSDP1"):
        fusedopt.SAM(model.parameters(), lr=0.1).first_step()
    model.zero_grad()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = ShardedGradScaler(device="cpu", init_scale=8.0)
    scaler.scale(model(randn((8, 5))).square().sum()).backward()
    if rank == 0:
        next(model.parameters()).grad[0] = math.inf
    scaler.unscale_(optimizer)  # before the step: then all know
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0 and optimizer.skipped_steps == 1 and not optimizer.state


@check
def a_clip_is_for_the_gradients_it_has_seen(rank):
    """Both ways to write to a DTensor are noticed: through it, and through what this process has of it."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        for write in (lambda grad: grad.mul_(100), lambda grad: grad.to_local().mul_(100)):
            param = placed(randn((6, 3)), Shard(0), mesh=mesh)
            before = full(param).clone()
            optimizer = fusedopt.SGD([param], lr=1.0, backend=backend)
            set_grad(param, randn((6, 3), seed=1))
            norm = optimizer.clip_grad_norm_(0.5)
            grad = full(param.grad).clone()
            write(param.grad)
            with pytest.raises(RuntimeError, match="its gradient is new or was changed since clip_grad_norm_"):
                optimizer.step()
            assert same_bits(full(param), before)
            set_grad(param, grad)
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            assert_close([param], [before - grad * 0.5 / norm])


@check
def a_clip_takes_gradients_that_no_one_counts(rank):
    """Parts made in inference mode have no version."""
    with torch.inference_mode():
        part = randn((2, 3), seed=1)
    mesh = init_device_mesh("cpu", (WORLD,))
    param = placed(randn((2 * WORLD, 3)), Shard(0), mesh=mesh)
    param.grad = DTensor.from_local(part, mesh, [Shard(0)])
    optimizer = fusedopt.SGD([param], lr=1.0)
    before = full(param).clone()
    norm = optimizer.clip_grad_norm_(0.5)
    optimizer.step()
    assert_close([param], [before - full(param.grad) * 0.5 / norm])


def fail_second(bucket, prepare, calls, *arguments, **options):
    if next(calls) == 1:
        raise MemoryError
    return prepare(bucket, *arguments, **options)


@check
def what_can_fail_does_so_before_any_part_has_moved(rank):
    """Some are spread, some are not: two launches on one device."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        params = [placed(randn((6, 3), seed=i), how, mesh=mesh) for i, how in enumerate((Shard(0), Replicate()))]
        optimizer = fusedopt.AdamW(params, lr=0.1, backend=backend)
        for param in params:
            set_grad(param, randn((6, 3), seed=5))
        optimizer.step()
        before = [full(param).clone() for param in params]
        kind, calls = BACKENDS[backend].Bucket, itertools.count()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(kind, "prepare", functools.partialmethod(fail_second, kind.prepare, calls))
            optimizer.step()
        assert all(same_bits(full(param), old) for param, old in zip(params, before, strict=True))
        assert all(float(state["step"]) == 1 for state in optimizer.state.values())
        optimizer.step()
        assert all(float(state["step"]) == 2 for state in optimizer.state.values())


@check
def a_process_outside_the_mesh_has_nothing_to_do(rank):
    mesh = DeviceMesh("cpu", [0, 1])
    part, grad = (randn((3,) if rank < 2 else (0,), seed=10 * i + rank) for i in range(2))
    param = torch.nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False))
    param.grad = DTensor.from_local(grad, mesh, [Shard(0)], run_check=False)
    optimizer = fusedopt.SGD([param], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    expected = torch.cat([randn((3,), seed=10 + i) for i in range(2)]).norm() if rank < 2 else torch.zeros(())
    torch.testing.assert_close(optimizer.grad_norm, expected)


@check
def gradients_may_be_on_their_way_or_of_another_dtype(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        param = placed(randn((6, 3)), Replicate(), mesh=mesh)
        before, grad = full(param).clone(), randn((6, 3), seed=1)
        optimizer = fusedopt.SGD([param], lr=1.0, backend=backend)
        part = distribute_tensor(grad, mesh, [Shard(0)])
        param.grad = part.redistribute(placements=[Replicate()], async_op=True)
        optimizer.step()
        assert_close([param], [before - grad])
        if hasattr(torch.Tensor, "grad_dtype"):
            param.grad_dtype = None
            for step in (2, 3):
                param.grad = distribute_tensor(grad.bfloat16(), mesh, [Replicate()])
                optimizer.step()
                assert_close([param], [before - grad - (step - 1) * grad.bfloat16()])


@check
def checkpoints_go_both_ways(rank):
    """Through the state dicts of torch.distributed.checkpoint, and from and to torch's own class."""
    for make_first, make_second in (
        (fusedopt.AdamW, fusedopt.AdamW),
        (fusedopt.AdamW, torch.optim.AdamW),
        (torch.optim.AdamW, fusedopt.AdamW),
    ):
        model, other = Model(), Model()
        fully_shard(model), fully_shard(other)
        first, second = make_first(model.parameters(), lr=0.01), make_second(other.parameters(), lr=0.5)
        train(model, first, 3)
        with torch.no_grad():
            for target, source in zip(other.parameters(), model.parameters(), strict=True):
                target.copy_(source)
        # torch takes over the very tensors.
        set_optimizer_state_dict(other, second, copy.deepcopy(get_optimizer_state_dict(model, first)))
        assert second.param_groups[0]["lr"] == 0.01
        train(model, first, 2, first=3)
        train(other, second, 2, first=3)
        assert_close(other.parameters(), model.parameters(), 1e-6)
        third = make_second(other.parameters(), lr=0.5)
        third.load_state_dict(second.state_dict())
        for mine, its in zip(third.state.values(), second.state.values(), strict=True):
            assert all(same_bits(full(mine[name]), full(its[name])) for name in its)


@check
def a_checkpoint_of_several_processes_is_one_of_the_whole_model(rank):
    """Saved to disk and loaded by torch.distributed.checkpoint, where nothing is spread."""
    model, whole = Model(), Model()
    fully_shard(model)
    optimizer, alone = fusedopt.AdamW(model.parameters(), lr=0.01), fusedopt.AdamW(whole.parameters(), lr=0.5)
    train(model, optimizer, 3)
    folder = Path(sys.argv[2], "checkpoint")
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(whole, alone), strict=True))
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(whole, alone, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for param, other in zip(model.parameters(), whole.parameters(), strict=True):
        mine, its = optimizer.state[param], alone.state[other]
        assert all(same_bits(full(mine[name]), its[name]) for name in mine)
    train(model, optimizer, 2, first=3)
    train(whole, alone, 2, first=3)
    assert_close(model.parameters(), whole.parameters())


@check
def what_does_not_fit_is_refused_by_name(rank):
    mesh = init_device_mesh("cpu", (WORLD,))

    def fresh(*placements):
        param = placed(randn((6, 3)), *placements, mesh=mesh)
        set_grad(param, randn((6, 3), seed=1))
        return param

    def refused(optimizer, step, kind, message):
        [param] = optimizer.param_groups[0]["params"]
        before = full(param).clone()
        for _ in range(2):
            with pytest.raises(kind, match=message):
                step()
        assert same_bits(full(param), before) and param._local_tensor.grad is None

    param = fresh(Shard(0))
    optimizer = fusedopt.AdamW([param])
    optimizer.step()
    good = param.grad
    param.grad = good.redistribute(placements=[Replicate()])
    refused(
        optimizer,
        optimizer.step,
        RuntimeError,
        r"gradient is a DTensor placed R\S* on a mesh of \(3,\), the parameter a",
    )
    param.grad = good
    kept = optimizer.state[param]["exp_avg"]
    for wrong in (kept.full_tensor(), kept.redistribute(placements=[Replicate()])):
        optimizer.state[param]["exp_avg"] = wrong
        refused(optimizer, optimizer.step, ValueError, r"state 'exp_avg' is a .*, the parameter a DTensor placed S")
        with pytest.raises(ValueError, match=r"state 'exp_avg' is a .*, the parameter a DTensor placed S"):
            fusedopt.AdamW([param]).load_state_dict(optimizer.state_dict())
    optimizer.state[param]["exp_avg"] = kept
    optimizer.step()
    for cls in (fusedopt.LAMB, fusedopt.StableAdamW):
        optimizer = cls([fresh(Shard(0))])
        refused(optimizer, optimizer.step, TypeError, "sums over the whole of it; nothing was updated")
        assert not optimizer.state
        cls([fresh(Replicate())]).step()
        alone = placed(randn((6, 3)), Replicate(), Shard(0), mesh=init_device_mesh("cpu", (WORLD, 1)))
        set_grad(alone, randn((6, 3)))
        cls([alone]).step()
    rows = fusedopt.Adagrad([fresh(Replicate())], rowwise=True)
    refused(rows, rows.step, TypeError, "rowwise=True supports plain tensors only")
    partial = DTensor.from_local(randn((6, 3)), mesh, [Partial()])
    partial.grad = DTensor.from_local(randn((6, 3)), mesh, [Partial()])
    optimizer = fusedopt.AdamW([torch.nn.Parameter(randn((2,)))])
    optimizer.param_groups[0]["params"][0] = partial
    refused(optimizer, optimizer.step, RuntimeError, "redistribute it")


@check
def frozen_dtensors_are_left_alone(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    frozen, trained = (placed(randn((6, 3), seed=i), Shard(0), mesh=mesh) for i in range(2))
    frozen.requires_grad_(False)
    optimizer = fusedopt.LAMB([frozen, torch.nn.Parameter(randn((3,)))])
    optimizer.param_groups[0]["params"][1].grad = randn((3,), seed=1)
    optimizer.step()
    optimizer = fusedopt.AdamW([frozen, trained], max_grad_norm=1.0)
    for step in range(3):
        set_grad(trained, randn((6, 3), seed=10 + step))
        optimizer.step()
    assert same_bits(full(frozen), randn((6, 3))) and frozen not in optimizer.state


@check
def a_first_gradient_that_comes_late_is_noticed(rank):
    """It arrives at the DTensor: the local tensor, whose address the engines know, never has one."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        early, late = (placed(randn((6, 3), seed=i), Shard(0), mesh=mesh) for i in range(2))
        twin = torch.nn.Parameter(full(late).clone())
        optimizer, twins = fusedopt.AdamW([early, late], lr=0.1, backend=backend), fusedopt.AdamW([twin], lr=0.1)
        for step in range(4):
            set_grad(early, randn((6, 3), seed=step))
            if step >= 2:
                twin.grad = randn((6, 3), seed=10 + step)
                set_grad(late, twin.grad)
            optimizer.step()
            twins.step()
            assert_close([late], [twin])


@check
def a_step_plans_only_once_and_leaves_no_trace(rank):
    """The optimizer holds gradients during the step alone; both counts by which autograd sees writing go up."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        params = [placed(randn((6, 3), seed=i), Shard(0), mesh=mesh) for i in range(2)]
        optimizer = fusedopt.AdamW(params, max_grad_norm=1.0, backend=backend)
        plan = None
        for step in range(4):
            for param in params:
                set_grad(param, randn((6, 3), seed=step))
            counts = [(param._version, param._local_tensor._version) for param in params]
            grads = [weakref.ref(param.grad._local_tensor) for param in params]
            optimizer.step()
            assert plan is None or optimizer._plans.kept.get("step") is plan or backend == "reference"
            plan = optimizer._plans.kept["step"]
            for param, (whole, part) in zip(params, counts, strict=True):
                assert param._version > whole and param._local_tensor._version > part
                assert param._local_tensor.grad is None and param.grad is not None
            optimizer.zero_grad()
            assert not any(grad() is not None for grad in grads)


@check
def parts_that_are_replaced_are_followed(rank):
    """As `fully_shard` does when a module moves: the DTensor stays, and gets another local tensor."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for backend in USABLE:
        results = []
        for replaces in (False, True):
            param = placed(randn((6, 3)), Shard(0), mesh=mesh)
            optimizer = fusedopt.AdamW([param], lr=0.1, backend=backend)
            for step in range(4):
                set_grad(param, randn((6, 3), seed=step))
                old = param._local_tensor
                if replaces and step == 2:
                    param._local_tensor = old.clone()
                if replaces and step == 3:
                    state = optimizer.state[param]["exp_avg"]
                    state._local_tensor = state._local_tensor.clone()
                optimizer.step()
                assert old.grad is None
            results.append(full(param))
        assert same_bits(*results)


@check
def states_made_by_a_checkpoint_move_nothing(rank):
    """DCP makes missing states by a step with lr 0 and gradients of zero."""
    model = Model()
    fully_shard(model)
    before = [full(param).clone() for param in model.parameters()]
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1, max_grad_norm=1.0)
    get_optimizer_state_dict(model, optimizer)
    assert len(optimizer.state) == len(before)
    assert all(same_bits(full(param), old) for param, old in zip(model.parameters(), before, strict=True))


# ---- several processes ---------------------------------------------------------------------------------------------


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    outcomes = {}
    for name, function in CHECKS.items():
        try:
            function(rank)
            outcomes[name] = None
        except BaseException:
            outcomes[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
        if outcomes[name]:
            break  # the others may wait for this one in the middle of it
    os._exit(0)  # gloo's threads may abort a process that ends as usual


@functools.cache
def outcomes():
    """What each process wrote, by check."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        started = [
            subprocess.Popen([sys.executable, __file__, str(rank), folder], env=environment) for rank in range(WORLD)
        ]
        try:
            for process in started:
                process.wait(timeout=900)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in started:
                process.kill()
                process.wait()
        files = [Path(folder, f"{rank}.json") for rank in range(WORLD)]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("name", CHECKS)
def test_over_processes(name):
    for rank, found in enumerate(outcomes()):
        failed = next((other for other, text in found.items() if text), "none")
        problem = found.get(name, f"not reached, since {failed} failed")
        assert problem is None, f"process {rank}: {problem}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
