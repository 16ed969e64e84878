"""Bad input: the type and text of every refusal, and that parameters, states and step counts are bitwise what they were."""

import contextlib
import copy
import itertools
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    SPECS,
    assert_same_bits,
    assert_unchanged,
    every_class,
    make_params,
    nothing_changes,
    only_on,
    randn,
    set_grads,
    snapshot,
    train,
)

import fusedopt
from fusedopt import states
from fusedopt.errors import UNCHANGED
from fusedopt.extension import _C
from fusedopt.formats import FORMATS, Format, plain_format
from fusedopt.ranges import RANGES

pytestmark = pytest.mark.usefixtures("on_backend")
SHAPES = ((13, 7), (1021,), (5, 3, 3))
NAMES = ("stem.weight", "stem.bias", "head.weight")


# ---- at construction ---------------------------------------------------------------------------------------------


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize(
    "spec, kwargs, message",
    [(spec, kwargs, message) for spec in SPECS for kwargs, message in spec.rule.errors],
    ids=str,
)
def test_option_that_the_row_refuses(spec, kwargs, message):
    with pytest.raises(ValueError, match=rf"^{spec.name}: param_groups\[0\]: {message}"):
        spec.cls(make_params(SHAPES), **kwargs)


def out_of_range(spec):
    """Every hyperparameter of the rule that has a range, with values on either side of it."""
    for name in spec.rule.hyper:
        if name not in RANGES:
            continue
        low, high, includes_high = RANGES[name]
        values = [math.nan, -math.inf]
        values += [math.inf] if not includes_high or high < math.inf else []
        values += [-1e-12] if low == 0 else []
        values += [1.0000001 if includes_high else 1.0] if high == 1 else []
        for value in values:
            if name in spec.rule.betas:
                index, betas = spec.rule.betas.index(name), [0.9] * len(spec.rule.betas)
                betas[index] = value
                yield f"betas[{index}]", {"betas": tuple(betas)}, value
            else:
                yield name, {name: value}, value


RANGE_ROWS = [(spec, label, edit, value) for spec in SPECS for label, edit, value in out_of_range(spec)]


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("where", ["constructor", "second group", "added group"])
@pytest.mark.parametrize("spec, label, edit, value", RANGE_ROWS, ids=str)
def test_option_out_of_range_is_refused_at_construction(spec, label, edit, value, where):
    params = make_params(SHAPES)
    index = 0 if where == "constructor" else 1
    message = rf"^{spec.name}: param_groups\[{index}\]: {re.escape(label)} must be .*, got {re.escape(str(value))}$"
    if where == "added group":
        optimizer = spec.make(params[:1])
        with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": params[1:], **edit})
        optimizer.add_param_group({"params": params[1:]})  # none of them is taken
        return
    with pytest.raises(ValueError, match=message):
        if where == "constructor":
            spec.make(params, **edit)
        else:
            spec.make([{"params": params[:1]}, {"params": params[1:], **edit}])


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "third step"])
@pytest.mark.parametrize("spec, label, edit, value", RANGE_ROWS, ids=str)
def test_option_set_out_of_range_later_is_refused_by_the_step(spec, label, edit, value, warm):
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = (spec.make([{"params": at[:1]}, {"params": at[1:]}]) for at in (params, plain_params))
    train(optimizer, params, 2 * warm)
    train(plain, plain_params, 2 * warm)
    group = optimizer.param_groups[1]
    good = {name: group[name] for name in edit}
    group.update(edit)
    set_grads(params, 5)
    message = (
        rf"^{spec.name}.step: param_groups\[1\]: {re.escape(label)} must be .*, got {re.escape(str(value))}; "
        r"nothing was updated$"
    )
    for _ in range(2):
        with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
            optimizer.step()
    group.update(good)
    train(optimizer, params, 2, 6)
    train(plain, plain_params, 2, 6)
    assert_same_bits(params, plain_params)


BAD_VALUES = {
    "a string": {"lr": "fast"},
    "a number in a string": {"lr": "0.1"},
    "a bool": {"weight_decay": True},
    "a switch in words": {"maximize": "no"},
    "a switch that asks for a state, in words": {"amsgrad": "no"},
    "a switch as a tensor": {"maximize": torch.tensor(True)},
    "a switch beyond on": {"nesterov": 2},
    "None": {"lr": None},
    "a tensor of two": {"lr": torch.tensor([0.1, 0.2])},
    "one beta": {"betas": (0.9,)},
    "four betas": {"betas": (0.9, 0.99, 0.999, 0.9)},
    "betas as a number": {"betas": 0.9},
    "betas of None": {"betas": (None, 0.9)},
}


BAD_VALUE_ROWS = [
    (spec, name)
    for spec in SPECS
    for name, edit in BAD_VALUES.items()
    if set(edit) <= set(spec.make(make_params(SHAPES)).defaults)
]


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("spec, name", BAD_VALUE_ROWS, ids=str)
def test_option_of_the_wrong_kind_is_refused_at_construction(spec, name):
    edit = BAD_VALUES[name]
    with pytest.raises((ValueError, TypeError), match=rf"^{spec.name}: param_groups\[0\]: {next(iter(edit))}"):
        spec.make(make_params(SHAPES), **edit)


@pytest.mark.parametrize("spec, name", BAD_VALUE_ROWS, ids=str)
def test_option_of_the_wrong_kind_set_later_is_refused_by_the_step(spec, name):
    edit = BAD_VALUES[name]
    params = make_params(SHAPES)
    optimizer = spec.make([{"params": params[:1]}, {"params": params[1:]}])
    group = optimizer.param_groups[1]
    train(optimizer, params, 2)
    good = {key: group[key] for key in edit}
    group.update(edit)
    message = rf"^{spec.name}.step: param_groups\[1\]: {next(iter(edit))}.*nothing was updated$"
    with nothing_changes(optimizer), pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()
    group.update(good)
    train(optimizer, params, 1, 2)


@every_class
def test_refusal_names_the_method_that_was_called(spec):
    """Whichever of them the cached plan was made for."""
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 2)
    optimizer.param_groups[0]["lr"] = -1.0
    for method, call in (("clip_grad_norm_", lambda: optimizer.clip_grad_norm_(1.0)), ("step", optimizer.step)):
        with (
            nothing_changes(optimizer),
            pytest.raises(ValueError, match=rf"^{spec.name}\.{method}: param_groups\[0\]: lr"),
        ):
            call()


@pytest.mark.parametrize("name", ["lr", "weight_decay", "maximize"])
@every_class
def test_option_removed_later_is_refused_by_the_step(spec, name):
    params = make_params(SHAPES)
    optimizer = spec.make([{"params": params[:1]}, {"params": params[1:]}])
    train(optimizer, params, 2)
    del optimizer.param_groups[1][name]
    message = rf"^{spec.name}.step: param_groups\[1\]: '{name}' is missing; nothing was updated$"
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    "spec, kept", [(spec, kept) for spec in SPECS for kept in spec.rule.states if kept.option],
    ids=lambda value: getattr(value, "option", None) or str(value),
)  # fmt: skip
def test_option_switched_beside_a_refused_one_still_takes_effect(spec, kept):
    """The refusal of group 1 must not lose what group 0 was told in the meantime."""
    on, off = (0.6, 0) if kept.option == "momentum" else (True, False)
    results = []
    for refused in (False, True):
        params = make_params(SHAPES)
        optimizer = spec.make([{"params": params[:1]}, {"params": params[1:]}], **{kept.option: off})
        train(optimizer, params, 2)
        optimizer.param_groups[0][kept.option] = on
        if refused:
            optimizer.param_groups[1]["lr"] = -1.0
            with nothing_changes(optimizer), pytest.raises(ValueError, match="lr must be"):
                optimizer.step()
            optimizer.param_groups[1]["lr"] = 0.01
        train(optimizer, params, 2, 2)
        assert kept.name in optimizer.state[params[0]]
        assert kept.name not in optimizer.state.get(params[1], {})
        results.append(params)
    assert_same_bits(*results)


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
@pytest.mark.parametrize(
    "spec, kept", [(spec, kept) for spec in SPECS for kept in spec.rule.states if kept.option],
    ids=lambda value: getattr(value, "option", None) or str(value),
)  # fmt: skip
def test_step_that_does_not_happen_makes_no_optional_state(spec, kept, nonfinite):
    """Though an option that needs one has just come on."""
    on, off = (0.6, 0) if kept.option == "momentum" else (True, False)
    params = make_params(SHAPES)
    optimizer = spec.make(params, nonfinite=nonfinite, **{kept.option: off})
    train(optimizer, params, 2)
    optimizer.param_groups[0][kept.option] = on
    set_grads(params, 3)
    params[1].grad[7] = math.nan
    with nothing_changes(optimizer):
        if nonfinite == "skip":
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="NaN or infinity"):
                optimizer.step()


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@every_class
def test_unsupported_parameter_dtype_is_refused_at_construction(spec, dtype):
    params = make_params(SHAPES)
    bad = torch.nn.Parameter(torch.ones(3, 5).to(dtype))
    short = str(dtype).removeprefix("torch.")
    message = (
        rf"^{spec.name}: param_groups\[1\]\['params'\]\[1\] \('bad'\), shape \(3, 5\), {short} on cpu: "
        r"parameters of this dtype are not supported \(supported: float32, float64, bfloat16, float16, complex64, complex128\)$"
    )
    groups = [{"params": [("good", params[0])]}, {"params": [("fine", params[1]), ("bad", bad)]}]
    with pytest.raises(TypeError, match=message):
        spec.make(groups)
    optimizer = spec.make(groups[:1])
    with nothing_changes(optimizer), pytest.raises(TypeError, match=message):
        optimizer.add_param_group({"params": [("fine", params[1]), ("bad", bad)]})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool], ids=str)
@every_class
def test_integer_tensor_may_be_listed_but_not_stepped(spec, dtype):
    """As in torch: it cannot require a gradient, so it has none, unless someone puts one there."""
    params, count = make_params(SHAPES), torch.ones(4, dtype=dtype)
    optimizer = spec.make([*params, count])
    train(optimizer, params, 2)
    assert count not in optimizer.state
    count.grad = torch.ones(4, dtype=dtype)
    set_grads(params, 3)
    short = str(dtype).removeprefix("torch.")
    message = (
        rf"^{spec.name}.step: param_groups\[0\]\['params'\]\[3\], shape \(4,\), {short} on cpu.*nothing was updated$"
    )
    with nothing_changes(optimizer), pytest.raises(TypeError, match=message):
        optimizer.step()


@only_on("cpu", "nothing is computed")
@every_class
def test_differentiable_is_refused(spec):
    params = make_params(SHAPES)
    with pytest.raises(RuntimeError, match=rf"^{spec.name} does not support differentiable=True; use torch.optim"):
        spec.make(params, differentiable=True)
    with pytest.raises(ValueError, match=r"param_groups\[1\]: differentiable=True is not supported"):
        spec.make([{"params": params[:1]}, {"params": params[1:], "differentiable": True}])


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("nonfinite", ["ignore", "", None, True, "SKIP"], ids=str)
def test_unknown_nonfinite_is_refused(nonfinite):
    message = rf"^nonfinite must be one of 'propagate', 'skip', 'error', got {re.escape(repr(nonfinite))}$"
    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW(make_params(SHAPES), nonfinite=nonfinite)


NO_TENSOR = "optimizer can only optimize Tensors"
CONSTRUCTION = {
    "no parameters": (lambda: [], ValueError, "got an empty parameter list"),
    "a generator, used up": (lambda: (param for param in []), ValueError, "got an empty parameter list"),
    "a tensor": (lambda: torch.nn.Parameter(randn((3,))), TypeError, "iterable of Tensors or dicts"),
    "numbers": (lambda: [1.0, 2.0], TypeError, NO_TENSOR),
    "a non-leaf": (lambda: [torch.nn.Parameter(randn((3,))) * 2], ValueError, "non-leaf Tensor"),
    "a set": (lambda: [{"params": set(make_params(SHAPES))}], TypeError, "ordered collections"),
    "a parameter in two groups": (
        lambda: [{"params": (shared := make_params(SHAPES))}, {"params": shared[:1]}],
        ValueError,
        "more than one parameter group",
    ),
}


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("name", CONSTRUCTION)
@every_class
def test_wrong_parameters_are_refused_in_torchs_words(spec, name):
    make, kind, message = CONSTRUCTION[name]
    with pytest.raises(kind, match=message):
        spec.make(make())
    if spec.twin_name:
        with pytest.raises(kind, match=message):
            spec.twin(make())


# ---- backends ----------------------------------------------------------------------------------------------------


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("source", ["argument", "environment"])
@pytest.mark.parametrize("name, kind, message", [
    ("cudnn", ValueError, r"must be one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got 'cudnn'"),
    ("CPU", ValueError, r"must be one of .*, got 'CPU'"),
])  # fmt: skip
def test_unknown_backend_is_refused(name, kind, message, source, monkeypatch):
    given = {"backend": name} if source == "argument" else {}
    label = "backend" if given else "FUSEDOPT_BACKEND"
    if not given:
        monkeypatch.setenv("FUSEDOPT_BACKEND", name)
    with pytest.raises(kind, match=f"^{label} {message}"):
        fusedopt.AdamW(make_params(SHAPES), **given)


@only_on("cpu", "nothing is computed")
def test_backend_asked_for_overrules_the_environment(monkeypatch):
    monkeypatch.setenv("FUSEDOPT_BACKEND", "cpu")
    assert fusedopt.backends.resolve("reference") == "reference"
    assert fusedopt.backends.resolve(None) == "cpu"


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("source", ["argument", "environment"])
def test_backend_that_cannot_be_used_says_why(source, monkeypatch):
    monkeypatch.setattr(fusedopt.backends.triton, "unavailable", lambda: "no such luck")
    given = {"backend": "triton"} if source == "argument" else {}
    label = "backend" if given else "FUSEDOPT_BACKEND"
    if not given:
        monkeypatch.setenv("FUSEDOPT_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=f"^{label}='triton' cannot be used: no such luck"):
        fusedopt.AdamW(make_params(SHAPES), **given)


@only_on("cpu", "nothing is computed")
def test_backend_that_does_not_fit_the_device_is_refused_by_the_step(monkeypatch):
    monkeypatch.setattr(fusedopt.backends.cuda, "unavailable", lambda where=None: None)
    monkeypatch.setattr(fusedopt.backends.cuda, "supports", lambda where, is_asked_for=False: where.type == "cuda")
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params, backend="cuda")
    set_grads(params, 0)
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="backend='cuda' does not work on cpu"):
        optimizer.step()


@only_on("cpu", "nothing is computed")
@pytest.mark.skipif(sys.platform == "win32", reason="environment")
def test_unknown_instruction_set_is_refused_at_import():
    result = subprocess.run(
        [sys.executable, "-c", "import fusedopt"],
        env={**os.environ, "FUSEDOPT_CPU_ISA": "x86_64_v9"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode != 0
    assert "FUSEDOPT_CPU_ISA='x86_64_v9' is not available on this CPU; it has " in result.stderr


# ---- refused by the step -----------------------------------------------------------------------------------------
# Each breaks the last parameter, in the second group, of a named model; `(13, 7)` and `(1021,)` come before it.


class Odd(torch.Tensor):
    """A subclass that dispatches itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


def sparse_gradient(optimizer, param):
    param.grad = randn(param.shape).to_sparse()


def gradient_of_another_shape(optimizer, param):
    param.data = randn((3, 5, 3), seed=1)


def gradient_of_another_size(optimizer, param):
    param.data = randn((5, 3, 4), seed=1)


def double_gradient(optimizer, param):
    param.grad = None
    param.grad_dtype = None
    param.grad = randn(param.shape, torch.float64)


def integer_gradient(optimizer, param):
    param.grad = None
    param.grad_dtype = None
    param.grad = torch.ones(param.shape, dtype=torch.int64)


def meta_parameter(optimizer, param):
    meta = torch.nn.Parameter(torch.empty(param.shape, device="meta"))
    meta.grad = torch.empty(param.shape, device="meta")
    optimizer.param_groups[1]["params"][0] = meta


def float8_parameter(optimizer, param):
    param.grad = None
    param.data = randn(param.shape).to(torch.float8_e4m3fn)
    param.grad = randn(param.shape).to(torch.float8_e4m3fn)


def expanded_parameter(optimizer, param):
    param.data = randn((1, 3, 3), seed=1).expand(5, 3, 3)


def self_overlapping_parameter(optimizer, param):
    param.data = randn((20,), seed=1).as_strided((5, 3, 3), (2, 1, 1))


def overlapping_parameters(optimizer, param):
    buffer = randn((1060,), seed=1)
    optimizer.param_groups[0]["params"][1].data = buffer[:1021]
    param.data = buffer[1015:1060].view(5, 3, 3)


def interleaved_parameters(optimizer, param):
    """Neither is dense, and only every third element is shared."""
    buffer = randn((4000,), seed=1)
    optimizer.param_groups[0]["params"][1].data = buffer[: 3 * 1021 : 3]
    param.data = buffer[1:91:2].view(5, 3, 3)


def gradient_of_many_dimensions(optimizer, param):
    param.data = param.data.view(*[1] * 70, 5, 3, 3)
    param.grad = param.grad.view(*[1] * 70, 5, 3, 3)


def state_of_another_shape(optimizer, param):
    replace_state(optimizer, param, lambda value: value[:, :, 1:])


def state_of_another_dtype(optimizer, param):
    replace_state(optimizer, param, lambda value: value.bfloat16())


def state_that_is_a_list(optimizer, param):
    replace_state(optimizer, param, lambda value: value.tolist())


def state_on_meta(optimizer, param):
    replace_state(optimizer, param, lambda value: value.to("meta"))


def expanded_state(optimizer, param):
    replace_state(optimizer, param, lambda value: value[:1].expand(5, 3, 3))


def replace_state(optimizer, param, change):
    rule = optimizer.rule
    kept = next(state for state in rule.stored(optimizer.param_groups[1]) if state)
    value = optimizer.state[param].get(kept.name) if param in optimizer.state else None
    value = torch.ones(5, 3, 3) if value is None else value
    optimizer.state[param] = {**optimizer.state.get(param, {}), kept.name: change(value)}


HEAD = r"param_groups\[1\]\['params'\]\[0\] \('head.weight'\), "
REFUSED = {
    sparse_gradient: (
        RuntimeError,
        HEAD + r"shape \(5, 3, 3\), float32 on cpu: gradient (is sparse, but|has layout sparse_coo; only dense)",
    ),
    gradient_of_another_shape: (
        RuntimeError,
        HEAD + r"shape \(3, 5, 3\), float32 on cpu: gradient has shape \(5, 3, 3\)",
    ),
    gradient_of_another_size: (
        RuntimeError,
        HEAD + r"shape \(5, 3, 4\), float32 on cpu: gradient has shape \(5, 3, 3\)",
    ),
    double_gradient: (
        RuntimeError,
        HEAD + r"shape \(5, 3, 3\), float32 on cpu: gradient is float64 "
        r"\(supported for this parameter: float32, bfloat16, float16\)",
    ),
    integer_gradient: (RuntimeError, HEAD + r"shape \(5, 3, 3\), float32 on cpu: gradient is int64 \(supported"),
    meta_parameter: (RuntimeError, HEAD + r"shape \(5, 3, 3\), float32 on meta: parameter is on the meta device"),
    float8_parameter: (
        TypeError,
        HEAD + r"shape \(5, 3, 3\), float8_e4m3fn on cpu: parameters of this dtype are not supported",
    ),
    expanded_parameter: (
        RuntimeError,
        HEAD + r"shape \(5, 3, 3\), float32 on cpu: several of its elements share one address, strides \(0, 3, 1\)",
    ),
    self_overlapping_parameter: (
        RuntimeError,
        HEAD + r".*several of its elements share one address, strides \(2, 1, 1\)",
    ),
    overlapping_parameters: (
        ValueError,
        HEAD + r"shape \(5, 3, 3\), float32 on cpu: parameter shares memory with parameter of "
        r"param_groups\[0\]\['params'\]\[1\] \('stem.bias'\), shape \(1021,\), float32 on cpu; they must not overlap",
    ),
    interleaved_parameters: (
        ValueError,
        r"param_groups\[\d\]\['params'\]\[\d\] \('\w+.\w+'\), .* shares memory with parameter of param_groups",
    ),
    gradient_of_many_dimensions: (RuntimeError, HEAD + r".*parameter has 73 dimensions; at most 64 are supported"),
    state_of_another_shape: (
        ValueError,
        HEAD + r"shape \(5, 3, 3\), float32 on cpu: state '\w+' has shape \(5, 3, 2\)",
    ),
    state_of_another_dtype: (TypeError, HEAD + r".*: state '\w+' is bfloat16, not float32"),
    state_that_is_a_list: (TypeError, HEAD + r".*: state '\w+' is a list, not a tensor"),
    state_on_meta: (RuntimeError, HEAD + r".*: state '\w+' is on the meta device, it has no values"),
    expanded_state: (RuntimeError, HEAD + r".*: state '\w+' has several elements at one address"),
}


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "third step"])
@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
@every_class
def test_step_refuses_by_name_and_changes_nothing(spec, damage, warm, limit):
    """The damage is in group 1: group 0 must not move either. Undone, the run goes on as if nothing had been."""
    if damage in (double_gradient, integer_gradient) and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch wants gradients in the parameter's dtype")
    kind, message = REFUSED[damage]

    def build():
        params = make_params(SHAPES)
        named = [*zip(NAMES, params, strict=True)]
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.03}]
        optimizer = spec.make(groups, max_grad_norm=limit)
        train(optimizer, params, 2 * warm)
        return params, optimizer

    params, optimizer = build()
    set_grads(params, 5)
    good = [(param, param.data) for param in params]
    good_state = {param: dict(state) for param, state in optimizer.state.items()}
    damage(optimizer, params[2])
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(kind, match=rf"^{spec.name}\.step: {message}.*; nothing was updated$"):
            optimizer.step()
        assert_unchanged(before, optimizer)
    with pytest.raises(kind, match=rf"^{spec.name}\.clip_grad_norm_: {message}.*; nothing was updated$"):
        optimizer.clip_grad_norm_(1.0)
    assert_unchanged(before, optimizer)

    for param, data in good:
        param.grad = None
        param.data = data
    optimizer.param_groups[1]["params"][0] = params[2]
    optimizer.state.clear()
    optimizer.state.update(good_state)
    plain_params, plain = build()
    train(optimizer, params, 2, 8)
    train(plain, plain_params, 2, 8)
    assert_same_bits(params, plain_params)


@every_class
def test_subclass_that_dispatches_itself_is_refused(spec):
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 1)
    params[1].grad = torch.Tensor._make_wrapper_subclass(Odd, (1021,), dtype=torch.float32)
    message = (
        rf"^{spec.name}.step: param_groups\[0\]\['params'\]\[1\], .*gradient is a Odd; this tensor subclass is not"
    )
    before = [param.detach().clone() for param in params]
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert_same_bits(params, before)


@every_class
def test_refused_step_still_returns_to_the_caller_after_the_closure(spec):
    """The closure has run, its gradients stay; the update has not."""
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["lr"] = math.nan
    calls = []

    def closure():
        calls.append(1)
        set_grads(params, 4)
        return 1.0

    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="lr must be >= 0, got nan"):
        optimizer.step(closure)
    assert calls == [1]
    assert_same_bits(params, before)
    assert all(param.grad is not None for param in params)


@every_class
def test_views_side_by_side_do_not_overlap(spec):
    """Neighbours in one buffer, as DDP and flat parameters have them, are not refused, nor are interleaved columns."""
    buffer, matrix = randn((100,)), randn((13, 6))
    params = [torch.nn.Parameter(view) for view in (buffer[:33], buffer[33:40], buffer[40:40], buffer[40:])]
    params += [torch.nn.Parameter(matrix[:, :3]), torch.nn.Parameter(matrix[:, 3:])]
    apart = [torch.nn.Parameter(param.detach().clone()) for param in params]
    train(spec.make(params), params, 2)
    train(spec.make(apart), apart, 2)
    assert_same_bits(params, apart)


def test_overlap_of_parameters_that_take_turns_is_noticed():
    """Neither step has two overlapping gradients; the third has."""
    storage = randn((40,), torch.float32, 0)
    first, second = torch.nn.Parameter(storage[:30]), torch.nn.Parameter(storage[20:])
    optimizer = fusedopt.AdamW([first, second])
    first.grad = randn((30,), torch.float32, 1)
    optimizer.step()
    first.grad, second.grad = None, randn((20,), torch.float32, 2)
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['params'\]\[1\].*shares memory with .*\[0\].*nothing was"
    ):
        optimizer.step()
    assert second not in optimizer.state


def lost_gradient(optimizer, param):
    param.grad.untyped_storage().resize_(0)


def lost_parameter(optimizer, param):
    param.data.untyped_storage().resize_(0)


def lost_state(optimizer, param):
    optimizer.state[param]["exp_avg"].untyped_storage().resize_(0)


def lost_step(optimizer, param):
    optimizer.state[param]["step"].untyped_storage().resize_(0)


@pytest.mark.parametrize("damage, what", [
    (lost_gradient, "gradient has lost its memory: 0 bytes are left"),
    (lost_parameter, "parameter has lost its memory"),
    (lost_state, "state 'exp_avg' has lost its memory"),
    (lost_step, "state 'step' has lost its memory"),
])  # fmt: skip
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "third step"])
def test_freed_memory_is_refused_not_read(damage, what, warm):
    """FSDP frees so; the tensor keeps its shape."""
    params = make_params(SHAPES)
    optimizer = fusedopt.NAdam(params)
    if not warm and damage in (lost_state, lost_step):
        optimizer.load_state_dict(trained_checkpoint(fusedopt.NAdam))
    train(optimizer, params, 2 * warm)
    set_grads(params, 5)
    damage(optimizer, params[1])
    before = params[0].detach().clone(), params[2].detach().clone()
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match=rf"\['params'\]\[1\], .*: {what}.*; nothing was updated$"):
            call()
    assert_same_bits((params[0], params[2]), before)


def trained_checkpoint(cls):
    params = make_params(SHAPES)
    optimizer = cls(params)
    train(optimizer, params, 1)
    return optimizer.state_dict()


def test_gradient_of_torch_func_is_refused():
    params = make_params(SHAPES)
    optimizer = fusedopt.SGD(params)
    set_grads(params, 0)

    def function(grad):
        params[1].grad = grad
        optimizer.step()
        return grad.sum()

    with pytest.raises(RuntimeError, match="gradient has no memory of its own"):
        torch.func.grad(function)(randn((1021,)))


@every_class
def test_update_that_fails_leaves_no_trace(spec, on_backend, monkeypatch):
    """Whatever goes wrong while an update is computed: memory runs out, say."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = (spec.make(at) for at in (params, plain_params))
    for warm in (False, True):
        set_grads(params, 5)
        with monkeypatch.context() as patch:
            if on_backend == "reference":
                function = getattr(fusedopt.reference, spec.rule.name)
                calls = []

                def fails_at_the_second(*args, function=function, calls=calls, **kwargs):
                    calls.append(1)
                    if len(calls) == 2:
                        raise MemoryError
                    return function(*args, **kwargs)

                patch.setattr(fusedopt.reference, spec.rule.name, fails_at_the_second)
            else:
                patch.setattr(torch, "get_num_threads", raise_memory_error)
            with nothing_changes(optimizer), pytest.raises(MemoryError):
                optimizer.step()
        assert bool(optimizer.state) == (warm and plain.state != {})
        train(optimizer, params, 1, warm)
        train(plain, plain_params, 1, warm)
    assert_same_bits(params, plain_params)


def raise_memory_error():
    raise MemoryError


def test_state_that_an_update_has_used_is_kept(on_backend, monkeypatch):
    """Though something fails behind it; without its moments the parameters would have moved twice."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = fusedopt.AdamW(params), fusedopt.AdamW(plain_params)
    bucket = fusedopt.backends.BACKENDS[on_backend].Bucket
    prepare = bucket.prepare

    def interrupted(self, *args, **on_device):
        prepare(self, *args, **on_device)()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bucket, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(optimizer, params, 1)
    train(plain, plain_params, 1)
    train(optimizer, params, 1, 1)
    train(plain, plain_params, 1, 1)
    assert_same_bits(params, plain_params)
    assert float(optimizer.state[params[0]]["step"]) == 2


def test_plan_that_does_not_hold_at_once_is_refused(on_backend, monkeypatch):
    """As when another thread takes gradients away while they are read."""
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    set_grads(params, 0)
    with monkeypatch.context() as patch:
        patch.setattr(fusedopt.backends.BACKENDS[on_backend].Bucket, "refresh", lambda self: False)
        with nothing_changes(optimizer), pytest.raises(RuntimeError, match="changed while they were read; nothing was"):
            optimizer.step()
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1


@every_class
def test_foreign_entries_of_state_are_left_alone(spec):
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    optimizer.state["global"] = 5
    train(optimizer, params, 2)
    train(plain, plain_params, 2)
    assert_same_bits(params, plain_params)
    assert optimizer.state["global"] == 5


@every_class
def test_state_replaced_by_a_plain_dict_starts_anew(spec):
    params, fresh_params = make_params(SHAPES), make_params(SHAPES)
    optimizer = spec.make(params)
    optimizer.state = {}
    train(optimizer, params, 2)
    train(spec.make(fresh_params), fresh_params, 2)
    assert_same_bits(params, fresh_params)


def test_differentiable_set_later_is_refused():
    params = make_params(SHAPES)
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 2)
    optimizer.param_groups[0]["differentiable"] = True
    with nothing_changes(optimizer), pytest.raises(ValueError, match="differentiable=True is not supported"):
        optimizer.step()


UNSOUND_GROUPS = {
    "a list": lambda groups: groups.append([]),
    "None": lambda groups: groups.append(None),
    "a tensor": lambda groups: groups.append(torch.ones(3)),
    "None in place of the first": lambda groups: groups.__setitem__(0, None),
    "no params": lambda groups: groups[0].pop("params"),
    "params of None": lambda groups: groups[0].update(params=None),
    "a tuple as params": lambda groups: groups[0].update(params=tuple(groups[0]["params"])),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "third step"])
@pytest.mark.parametrize("damage", UNSOUND_GROUPS.values(), ids=UNSOUND_GROUPS)
def test_group_that_is_none_is_refused_by_its_index(damage, warm):
    """By clipping too, which looks at the groups of several optimizers. The other optimizer is not touched."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, other = fusedopt.AdamW(params), fusedopt.AdamW(others)
    for each, tensors in ((optimizer, params), (other, others)):
        train(each, tensors, 2 * warm)
        set_grads(tensors, 5)
    sound = [*optimizer.param_groups], dict(optimizer.param_groups[0])
    before = snapshot(optimizer)
    damage(optimizer.param_groups)
    clips = (lambda: optimizer.clip_grad_norm_(1.0), lambda: fusedopt.clip_grad_norm_([other, optimizer], 1.0))
    for method, call in (("step", optimizer.step), *(("clip_grad_norm_", clip) for clip in clips)):
        message = rf"^AdamW.{method}: param_groups\[[01]\](:| is a) .*; nothing was updated$"
        with nothing_changes(other), pytest.raises((ValueError, TypeError), match=message):
            call()
    optimizer.param_groups[:] = sound[0]
    optimizer.param_groups[0].update(sound[1])
    assert_unchanged(before, optimizer)
    optimizer.step()


@only_on("cpu", "calls its table")
def test_wrong_number_of_hyperparameters_is_refused_by_the_engine():
    params = make_params(SHAPES)
    optimizer = fusedopt.NAdam(params)
    train(optimizer, params, 1)
    table = optimizer._plans.kept["step"].buckets[0]._table
    table.refresh(1, may_move=False)
    scalars, increment_version = optimizer._plans.kept["step"].groups.scalars, torch.autograd.graph.increment_version
    for bad, coefs, kind in ((scalars[0][:-1], [1.0], ValueError), (scalars[0], [], IndexError)):
        with nothing_changes(optimizer), pytest.raises(kind):
            table.update([bad], coefs, False, 1, increment_version, params)
    with nothing_changes(optimizer), pytest.raises(IndexError):
        table.update([], [1.0], False, 1, increment_version, params)
    table.release()


def memory_of(optimizer, param, what):
    """Of the parameter, or of its first state."""
    if what == "parameter":
        return param.detach()
    return next(value for value in optimizer.state[param].values() if value.shape == param.shape)


@pytest.mark.parametrize("other", [0, 1], ids=["own", "another's"])
@pytest.mark.parametrize("what", ["parameter", "state"])
@every_class
def test_gradient_over_what_the_step_writes_is_refused(spec, what, other):
    """On a warm plan, where only the gradient has moved. Reached by a view that begins one element later."""
    params = [torch.nn.Parameter(randn((40,), seed=i)) for i in range(2)]
    optimizer = spec.make(params, **({"momentum": 0.9} if spec.name == "SGD" else {}))
    train(optimizer, params, 2)
    written = memory_of(optimizer, params[other], what)
    pool = torch.empty(41, dtype=written.dtype)
    moved = pool[:40].copy_(written)
    if what == "parameter":
        params[other].data = moved
    else:
        written.data = moved
    train(optimizer, params, 2)
    params[0].grad = pool[1:]
    message = rf"{spec.name}.step: .*\['params'\]\[0\].*: gradient shares memory with {what}.*not overlap; nothing"
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()
    params[0].grad = pool[1:].clone()
    optimizer.step()


@only_on("cpu", "follows parameters that have moved")
@pytest.mark.parametrize("what", ["parameter", "state", "gradient"])
@pytest.mark.parametrize("gap", [0, 1], ids=["the same", "one element on"])
def test_parameter_over_what_a_step_needs_is_refused(what, gap):
    """On a warm plan, where only the parameter has moved. Onto its own gradient it may, if both are the same memory."""
    params = [torch.nn.Parameter(randn((40,), seed=i)) for i in range(3)]
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 2)
    pool = torch.empty(41)
    inner = pool[: params[1].numel()]
    for param in params:
        param.grad = randn(param.shape, seed=7)
    if what == "gradient":
        params[1].grad = inner.copy_(params[1].grad)
    else:
        (params[1] if what == "parameter" else optimizer.state[params[1]]["exp_avg"]).data = inner
    optimizer.step()
    before = params[0].data
    params[0].data = pool[gap : gap + 40]
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=rf"shares memory with .*must not overlap; {UNCHANGED}"),
    ):
        optimizer.step()
    params[0].data = before
    optimizer.step()
    if what == "gradient":
        params[1].data = inner[:]
        if gap == 0:
            optimizer.step()
        params[1].data = pool[1:]
        with nothing_changes(optimizer), pytest.raises(ValueError, match="gradient shares memory with parameter"):
            optimizer.step()


@only_on("cpu", "follows parameters that have moved")
def test_parameter_over_another_is_refused_after_an_interrupt_too():
    """It came when one parameter had been followed and the next had not; then that one is back."""

    class Interrupting(torch.nn.Parameter):
        is_armed = False

        def is_neg(self):
            if self.is_armed:
                raise KeyboardInterrupt
            return super().is_neg()

    params = [
        torch.nn.Parameter(randn((40,))),
        Interrupting(randn((40,), seed=1)),
        torch.nn.Parameter(randn((40,), seed=2)),
    ]
    optimizer = fusedopt.SGD(params, lr=0.1)
    train(optimizer, params, 2)
    before = [param.data for param in params]
    params[0].data, params[1].data = params[2].detach(), params[1].data.clone()
    params[1].is_armed = True
    with nothing_changes(optimizer), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    params[1].is_armed, params[1].data = False, before[1]
    with nothing_changes(optimizer), pytest.raises(ValueError, match="parameter shares memory with parameter of"):
        optimizer.step()
    params[0].data = before[0]
    optimizer.step()


def test_parameter_over_one_with_sparse_gradients_is_refused():
    """Which is in another bucket."""
    dense, table = torch.nn.Parameter(randn((40,))), torch.nn.Parameter(randn((10, 4)))
    optimizer = fusedopt.SGD([dense, table], lr=0.1)

    def set_grads():
        dense.grad = randn((40,))
        table.grad = randn((10, 4)).to_sparse(1)

    set_grads()
    optimizer.step()
    kept = dense.data  # else a gradient could come to lie there
    dense.data = table.detach().view(-1)
    set_grads()
    with nothing_changes(optimizer), pytest.raises(ValueError, match="shares memory with parameter of"):
        optimizer.step()
    dense.data = kept
    optimizer.step()


@every_class
def test_gradient_may_be_its_own_parameter(spec):
    """Of half the squared norm it is; each element is read before it is written."""
    param, apart = (torch.nn.Parameter(randn((1021,))) for _ in range(2))
    optimizers = [spec.make([tensor]) for tensor in (param, apart)]
    for _ in range(3):
        param.grad, apart.grad = param.detach(), apart.detach().clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits([param], [apart])


@pytest.mark.parametrize("what", ["parameter", "another's state", "another state", "step count"])
def test_state_over_other_memory_is_refused(what):
    params = [torch.nn.Parameter(randn((40,), seed=i)) for i in range(2)]
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 2)
    first, second = (optimizer.state[param] for param in params)
    if what == "parameter":
        first["exp_avg"] = params[0].detach()
    elif what == "another's state":
        first["exp_avg"] = second["exp_avg"]
    elif what == "another state":
        first["exp_avg"] = first["exp_avg_sq"].view(-1)
    else:
        first["step"] = second["step"]
    message = r"AdamW.step: param_groups\[0\]\['params'\]\[\d\].* shares memory with .*; they must not overlap; nothing"
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_state_of_another_dtype_is_refused(dtype, is_strided):
    """Put into the optimizer's state by hand, between two steps."""
    params = [torch.nn.Parameter(randn((40, 6), seed=i).t() if is_strided else randn((40, 6))) for i in range(2)]
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 2)
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].to(dtype).contiguous()
    set_grads(params, 2)
    message = (
        rf"AdamW.step: param_groups\[0\]\['params'\]\[1\].*state 'exp_avg' is {str(dtype)[6:]}, not float32; nothing"
    )
    with nothing_changes(optimizer), pytest.raises(TypeError, match=message):
        optimizer.step()


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float64, torch.int8])
def test_format_that_a_backend_cannot_use_is_refused(on_backend, state_dtype, param_dtype, is_strided, monkeypatch):
    """No table may hold it, whoever chose it: the engine would read the memory as something else."""
    format, reason = plain_format(state_dtype), "the update computes in"
    if format is None:
        format, reason = Format("int8_toy", state_dtype, decode=None, encode=None), "no codec for"
    elif format.compute_dtype == param_dtype:
        return  # the backend can use it
    monkeypatch.setattr("fusedopt.states.format_of", lambda *arguments: format)
    monkeypatch.setattr("fusedopt.states.first", lambda rule, group, kept, param: stored_in(format, kept, param))
    params = [torch.nn.Parameter(randn((40, 6), param_dtype).t()[:, :: 1 + is_strided]) for _ in range(2)]
    optimizer = fusedopt.AdamW(params)
    set_grads(params, 0)
    message = rf"AdamW.step: param_groups\[0\]\['params'\]\[0\].*state 'exp_avg' is stored as {format.name}, .*{reason}"
    with nothing_changes(optimizer), pytest.raises(TypeError, match=message):
        optimizer.step()
    assert not optimizer.state


def stored_in(format, kept, param):
    """A state of zeros, without its codec."""
    tensors = [tensor.zero_() for tensor in states.empty(param, param.shape, format)]
    return dict(zip(states.names_in(kept, format), tensors, strict=True))


@only_on("cpu", "it has the tables")
@pytest.mark.parametrize("is_strided", [False, True])
def test_cpp_table_takes_the_formats_that_it_has_loops_for_and_no_others(is_strided):
    """The last guard, behind those that name the parameter: a step works, or the table refuses the tensors."""

    def slot(number, format):
        codes, aux = format.encode(
            torch.full((4,), number, dtype=format.compute_dtype), torch.zeros(4, dtype=torch.int64)
        )
        tensor = torch.zeros((4, 1 + is_strided), dtype=format.dtype)[:, 0].copy_(codes)
        return tensor, _C.formats[format.name][0], aux

    num_steps = 0
    for source, param, state in itertools.product(FORMATS.values(), repeat=3):
        for grad_dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            slots = [slot(3.0, source), slot(1.0, param), slot(1.0, state)]
            grad = torch.full((4, 1 + is_strided), 2.0, dtype=grad_dtype)[:, 0]
            table, count = _C.Bucket(True), torch.zeros(())
            arguments = (slots[1][0], grad, slots, [count], _C.rules["lion"][0], 0, 0, is_strided, True)
            has_loops = param.compute_dtype == state.compute_dtype and (
                param.compute_dtype == torch.float64 or torch.float64 not in (source.compute_dtype, grad_dtype)
            )
            has_order = not is_strided or not any(
                format.per_aux or format.takes_random for format in (source, param, state)
            )
            if not has_loops or not has_order:
                with pytest.raises(TypeError, match=r"a format (does not fit the type|needs elements in memory order)"):
                    table.add(*arguments)
                continue
            table.add(*arguments)
            table.finish()
            assert table.refresh(1, False, [grad])
            table.update([[0.5, 0.0, 0.5, 0.0]], [1.0], 1, lambda written: None, [])
            for (stored, _, aux), format, expected in zip(slots[1:], (param, state), (2.5, 1.5), strict=True):
                values = format.decode(stored.contiguous(), aux)
                torch.testing.assert_close(values, torch.full_like(values, expected), rtol=1e-2, atol=0)
            assert count == 1
            num_steps += 1
    assert num_steps >= 4 * 4 + 3 * 3 * 3 * 3  # source and gradient of a float64 parameter; all four of narrower ones


@only_on("cpu", "it has the tables")
def test_cpp_table_refuses_what_it_has_no_codec_for():
    param, exp_avg, step = torch.zeros(8), torch.zeros(8), torch.zeros(())
    float32, rule = _C.formats["float32"][0], _C.rules["lion"][0]

    def add(param=param, exp_avg=exp_avg, step=step, grad=None, format=float32, aux=None):
        slots = [(param, float32, None), (param, float32, None), (exp_avg, format, aux)]
        _C.Bucket(True).add(param, grad, slots, [step], rule, 0, 0, False, False)

    add()
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool):
        for name in ("param", "exp_avg", "step", "grad"):
            with pytest.raises(TypeError, match="has no codec"):
                add(**{name: torch.zeros(8, dtype=dtype)})
    for format in (-1, len(_C.formats), _C.formats["bfloat16"][0]):
        with pytest.raises(TypeError, match="dtype is not that of its format"):
            add(format=format)
    with pytest.raises(TypeError, match="has auxiliary values, or has none"):
        add(aux=torch.zeros(1))
    with pytest.raises(TypeError, match="count's dtype is not supported, or it has several elements"):
        add(step=param)
    with pytest.raises(TypeError, match="the step count is not float32"):
        add(step=step.double())


@pytest.mark.parametrize("value", [-5.0, math.nan])
@pytest.mark.parametrize("name", ["step", "mu_product"])
def test_count_that_counts_nothing_is_refused(name, value):
    """Written into the tensor by hand, between two steps."""
    params = make_params(SHAPES)
    optimizer = fusedopt.NAdam(params)
    train(optimizer, params, 2)
    optimizer.state[params[1]][name].fill_(value)
    message = rf"NAdam.step: param_groups\[0\]\['params'\]\[1\].*: state '{name}' is {value}; nothing was updated"
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan])
@every_class
def test_scale_that_scales_nothing_is_refused(spec, scale):
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 2)
    optimizer.grad_scale = torch.tensor(scale)
    message = rf"{spec.name}.step: grad_scale must be positive and finite, got {scale}; nothing was updated"
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@every_class
def test_frozen_parameter_may_be_anything(spec):
    """As in torch: what never has a gradient is never looked at, wherever it is and whatever it holds."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    odd = [
        torch.nn.Parameter(torch.empty(3, device="meta")),
        torch.nn.Parameter(randn((4, 4)).to_sparse()),
        quantized(),
    ]
    optimizer, plain = spec.make([*odd, *params]), spec.make(plain_params)
    train(optimizer, params, 2)
    train(plain, plain_params, 2)
    assert_same_bits(params, plain_params)


@every_class
def test_woven_views_that_share_nothing_are_accepted(spec):
    """Their stretches of memory overlap, in elements of 4 and of 2 bytes; not one byte belongs to both."""
    pool = randn((8, 12))
    halves = pool.view(torch.bfloat16)  # (8, 24)
    params = [torch.nn.Parameter(view) for view in (pool[:, ::3], pool[:, 1::3], halves[:, 4::6], halves[:, 5::6])]
    apart = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for optimizer, at in ((spec.make(params), params), (spec.make(apart), apart)):
        train(optimizer, at, 2)
    assert_same_bits(params, apart)


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "third step"])
def test_lazily_negated_gradient_is_refused(warm):
    """Its memory holds minus its values; a warm plan has seen the same layout before."""
    param = torch.nn.Parameter(torch.zeros(5))
    optimizer = fusedopt.SGD([param], lr=1.0)
    values = torch.complex(torch.zeros(5), torch.ones(5))
    for _ in range(2 * warm):
        param.grad = values.imag
        optimizer.step()
    param.grad = values.conj().imag
    for call in (optimizer.step, lambda: optimizer.clip_grad_norm_(1.0)):
        with pytest.raises(RuntimeError, match="gradient is a lazy negative view; call resolve_neg"):
            call()
    param.grad = param.grad.resolve_neg()
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((5,), 1.0 - 2 * warm))


@only_on("cpu", "it is the plan that looks for it")
def test_overlap_is_found_among_many_woven_views_in_time():
    """Every pair of 300 columns reaches into each other."""
    pool = randn((50, 300))
    columns = [torch.nn.Parameter(pool[:, i]) for i in range(300)]
    optimizer = fusedopt.SGD([*columns, torch.nn.Parameter(pool[7:9, 123:125])], lr=0.1)
    set_grads(columns, 0)
    began = time.process_time()  # not of the clock, which runs on while other programs have the CPU
    optimizer.step()
    assert time.process_time() - began < 1
    set_grads(optimizer.param_groups[0]["params"], 1)
    with pytest.raises(
        ValueError, match=r"\['params'\]\[(12[34]|300)\].* shares memory with .*\['params'\]\[(12[34]|300)\]"
    ):
        optimizer.step()


def test_wide_strides_cost_nothing():
    storage = torch.zeros(21_000_001)
    param = torch.nn.Parameter(storage.as_strided((3, 2), (6_000_000, 9_000_000)))
    param.grad = torch.ones(3, 2)
    optimizer = fusedopt.SGD([param], lr=1.0)
    began = time.process_time()
    optimizer.step()
    assert time.process_time() - began < 0.5
    assert torch.equal(param.detach(), torch.full((3, 2), -1.0))


# ---- the table of bad input (docs/bad-input.md) --------------------------------------------------------------------
# Each case gets a trained AdamW over two groups with gradients in place, breaks something, and returns the call to refuse.

BAD_INPUT = {}


def bad_input(name, is_readable=True):
    """``is_readable``: everything may be read afterwards, to see that it did not change; else only the sound parameter."""

    def add(function):
        assert name not in BAD_INPUT
        BAD_INPUT[name] = (function, is_readable)
        return function

    return add


def constructed(name, make):
    bad_input(name)(lambda optimizer, param: make)


def damaged(name, damage, is_readable=True):
    def case(optimizer, param):
        damage(optimizer, param)
        return optimizer.step

    bad_input(name, is_readable)(case)


def other_gradient(name, make):
    def damage(optimizer, param):
        param.grad = None
        param.grad_dtype = None
        param.grad = make(param)

    damaged(name, damage)


def option_set(name, **options):
    damaged(name, lambda optimizer, param: optimizer.param_groups[1].update(options))


def state_set(name, key, value):
    damaged(name, lambda optimizer, param: optimizer.state[param].update({key: value(optimizer, param)}))


def loaded(name, change):
    def case(optimizer, param):
        checkpoint = copy.deepcopy(optimizer.state_dict())
        return lambda: optimizer.load_state_dict(change(checkpoint) or checkpoint)

    bad_input(name)(case)


def saved_state(name, **values):
    loaded(name, lambda checkpoint: checkpoint["state"][0].update(values))


def nested(*sizes):
    return torch.nested.nested_tensor([torch.ones(size) for size in sizes], layout=torch.jagged)


def quantized(shape=(3,)):
    return torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8)


def adamw(**options):
    return lambda: fusedopt.AdamW(make_params(SHAPES), **options)


def momentum_sgd(params):
    return fusedopt.SGD(params, momentum=0.9)


def sparse_row(row):
    """The gradient of one row of the head's weight."""
    return torch.sparse_coo_tensor(torch.tensor([[row]]), torch.ones(1, 3, 3), (5, 3, 3), check_invariants=False)


def other_class(name, make, grad):
    """An optimizer of another class, which steps the last parameter alone."""

    def case(optimizer, param):
        other = make([("head.weight", param)])
        param.grad = grad(param)
        return other.step

    bad_input(name)(case)


def second_thread(optimizer, param):
    def step():
        with fusedopt.step.Planned(optimizer._request("step")):
            raised = []

            def run():
                try:
                    optimizer.step()
                except RuntimeError as error:
                    raised.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        raise raised[0]

    return step


def of_bitsandbytes(checkpoint):
    checkpoint["state"][0] = {"step": 2, "state1": torch.ones(13, 7), "state2": torch.ones(13, 7)}


def without_first_moments(checkpoint):
    for state in checkpoint["state"].values():
        del state["exp_avg"]


def keyed_by_strings(checkpoint):
    checkpoint["state"] = {str(key): value for key, value in checkpoint["state"].items()}


constructed("no parameters: an empty list", lambda: fusedopt.AdamW([]))
constructed("a generator that is used up", lambda: fusedopt.AdamW(param for param in []))
constructed("a tensor in place of a list", lambda: fusedopt.AdamW(torch.nn.Parameter(randn((3,)))))
constructed("something in the list that is no tensor", lambda: fusedopt.AdamW([1.0]))
constructed("None in place of a list", lambda: fusedopt.AdamW(None))
constructed(
    "names for some of the parameters", lambda: fusedopt.AdamW([("weight", make_params()[0]), make_params()[0]])
)
constructed("a group without `params`", lambda: fusedopt.AdamW([{"lr": 0.1}]))
bad_input("a group that is no dict")(lambda o, param: lambda: o.add_param_group([param]))
constructed("`state_dict()` of a module in place of parameters", lambda: fusedopt.AdamW({"weight": randn((3,))}))
constructed("a set as `params` of a group", lambda: fusedopt.AdamW([{"params": set(make_params(SHAPES))}]))
constructed("a tensor that is no leaf", lambda: fusedopt.AdamW([torch.nn.Parameter(randn((3,))) * 2]))
constructed("a float8 parameter", lambda: fusedopt.AdamW([torch.nn.Parameter(randn((3,)).to(torch.float8_e4m3fn))]))
constructed("`lr` out of range", adamw(lr=-0.1))
constructed("`lr` of NaN", adamw(lr=math.nan))
constructed("`lr` in a string", adamw(lr="0.1"))
constructed("`lr` in a tensor of two", adamw(lr=torch.tensor([0.1, 0.2])))
constructed("`lr` beyond every float", adamw(lr=10**400))
constructed("a beta of 1", adamw(betas=(0.9, 1.0)))
constructed("one beta", adamw(betas=(0.9,)))
constructed("betas in a string", adamw(betas="0.9"))
constructed("betas without an order", adamw(betas={0.9, 0.95}))
constructed("`decoupled_weight_decay=False` for AdamW", adamw(decoupled_weight_decay=False))
constructed("a beta in a tensor of two", adamw(betas=(torch.tensor([0.9, 0.8]), 0.9)))
constructed("a switch in words", adamw(maximize="no"))
constructed("`differentiable=True`", adamw(differentiable=True))
constructed("`max_grad_norm=True`", adamw(max_grad_norm=True))
constructed("`max_grad_norm` negative", adamw(max_grad_norm=-1.0))
constructed("`max_grad_norm` of zero", adamw(max_grad_norm=0))
constructed(
    "`max_grad_norm` in a group",
    lambda: fusedopt.AdamW([{"params": make_params(SHAPES), "max_grad_norm": 1.0}]),
)
option_set("`nonfinite` put into a group later", nonfinite="skip")
constructed("unknown `nonfinite`", adamw(nonfinite="ignore"))
constructed("unknown `backend`", adamw(backend="cudnn"))
constructed("`backend` in a list", adamw(backend=["cpu"]))
option_set("`lr` set later to a negative number", lr=-0.1)
option_set("`weight_decay` set later to NaN", weight_decay=math.nan)
option_set("`lr` set later to None", lr=None)
damaged("an option removed later", lambda optimizer, param: optimizer.param_groups[1].pop("lr") and None)
damaged("`params` removed from a group", lambda o, param: o.param_groups[1].pop("params") and None, is_readable=False)
damaged(
    "something put into a group later that is no tensor",
    lambda optimizer, param: optimizer.param_groups[1]["params"].append("head"),
    is_readable=False,
)
damaged("`params` of a group set later to a tuple", lambda o, param: o.param_groups[1].update(params=(param,)))
damaged("a list put in among the groups", lambda o, param: o.param_groups.append([param]), is_readable=False)
damaged("a tensor put in among the groups", lambda o, param: o.param_groups.append(param), is_readable=False)
damaged("an integer parameter with a gradient", lambda o, param: integer_parameter(param))
damaged("a quantized parameter with a gradient", lambda o, param: replace_param(o, quantized()))
damaged("a float8 parameter set later", float8_parameter)
damaged("a parameter of more than 64 dimensions", lambda o, param: replace_param(o, torch.ones([1] * 65)))
damaged(
    "a complex parameter of 64 dimensions: with its pairs there are 65",
    lambda o, param: replace_param(o, torch.ones([1] * 64, dtype=torch.complex64)),
)
damaged("a sparse parameter", lambda o, param: replace_param(o, torch.eye(3).to_sparse()))
damaged("a meta parameter", lambda o, param: replace_param(o, torch.empty(3, device="meta")))
damaged("a nested parameter", lambda o, param: replace_param(o, nested(2, 3)), is_readable=False)
damaged("an expanded parameter", lambda o, param: expanded_parameter(o, param))
damaged("overlapping parameters", overlapping_parameters)
damaged("a parameter whose storage is freed", lost_parameter, is_readable=False)
damaged("a gradient whose storage is freed", lost_gradient, is_readable=False)
other_gradient("an integer gradient", lambda param: torch.ones(param.shape, dtype=torch.int64))
other_gradient("a float8 gradient", lambda param: torch.ones(param.shape).to(torch.float8_e4m3fn))
other_gradient("a quantized gradient", lambda param: quantized(param.shape))
other_gradient("a float64 gradient of a float32 parameter", lambda param: torch.ones(param.shape).double())
other_gradient("a sparse gradient", lambda param: torch.ones(param.shape).to_sparse())
other_class("a sparse gradient, for a class that never takes one", fusedopt.RMSprop, lambda param: sparse_row(1))
other_class("a sparse gradient, with momentum", momentum_sgd, lambda param: sparse_row(1))
other_class("a sparse gradient with a row that is not there", fusedopt.SGD, lambda param: sparse_row(5))
constructed("unknown `sparse`", adamw(sparse="eager"))
damaged("a gradient of another shape", gradient_of_another_shape)
damaged("a gradient over its own parameter, shifted", lambda o, param: shifted_gradient(param))
damaged("state that is no dict", lambda o, param: o.state.__setitem__(param, [1]), is_readable=False)
state_set("state of another shape", "exp_avg", lambda o, param: torch.ones(2))
state_set("state of another dtype", "exp_avg", lambda o, param: torch.ones(param.shape).bfloat16())
state_set("state that is another's", "exp_avg", lambda o, param: o.state[param]["exp_avg_sq"])
state_set("a step count of NaN", "step", lambda o, param: torch.tensor(math.nan))
state_set("a step count of infinity", "step", lambda o, param: torch.tensor(math.inf))
state_set("a step count in words", "step", lambda o, param: "three")
state_set("a step count that is another parameter's", "step", lambda o, param: one_count(o, torch.tensor(3)))
state_set("a step count in a dtype that stops at 256", "step", lambda o, param: torch.tensor(2.0).bfloat16())
state_set("a step count for each element", "step", lambda o, param: torch.ones(2))
damaged("`grad_scale` of zero", lambda o, param: setattr(o, "grad_scale", torch.tensor(0.0)))
damaged("`grad_scale` of NaN", lambda o, param: setattr(o, "grad_scale", torch.tensor(math.nan)))
damaged("`grad_scale` of two elements", lambda o, param: setattr(o, "grad_scale", torch.ones(2)))
damaged("`found_inf` of two elements", lambda o, param: setattr(o, "found_inf", torch.zeros(2)))
damaged("`found_inf` in words", lambda o, param: setattr(o, "found_inf", "no"))
loaded("a checkpoint of a module", lambda checkpoint: {"weight": randn((3,))})
bad_input("a checkpoint that is no dict")(lambda o, param: lambda: o.load_state_dict([1]))
loaded("a checkpoint with more groups", lambda checkpoint: checkpoint["param_groups"].append({"params": []}))
loaded("a checkpoint with more parameters", lambda checkpoint: checkpoint["param_groups"][1]["params"].append(9))
loaded("a checkpoint with `lr` of NaN", lambda checkpoint: checkpoint["param_groups"][1].update(lr=math.nan))
loaded(
    "a checkpoint with a beta of NaN", lambda checkpoint: checkpoint["param_groups"][1].update(betas=(0.9, math.nan))
)
saved_state("a checkpoint of other shapes", exp_avg=torch.ones(2))
saved_state("a checkpoint with integer states", exp_avg=torch.ones(13, 7, dtype=torch.int64))
saved_state("a checkpoint with a step of NaN", step=torch.tensor(math.nan))
saved_state("a checkpoint of another class", momentum_buffer=torch.ones(13, 7))
loaded("a checkpoint of bitsandbytes", of_bitsandbytes)
loaded("a checkpoint without first moments", without_first_moments)
loaded("a checkpoint whose parameters are strings", keyed_by_strings)
loaded(
    "a checkpoint with other names in another order",
    lambda checkpoint: checkpoint["param_groups"][0].update(param_names=["stem.bias", "tail.bias"]),
)
bad_input("clip to a negative norm")(lambda o, param: lambda: o.clip_grad_norm_(-1.0))
bad_input("clip to NaN")(lambda o, param: lambda: o.clip_grad_norm_(math.nan))
bad_input("clip of no optimizer")(lambda o, param: lambda: fusedopt.clip_grad_norm_([], 1.0))
bad_input("clip of None")(lambda o, param: lambda: fusedopt.clip_grad_norm_(None, 1.0))
bad_input("clip of parameters")(lambda o, param: lambda: fusedopt.clip_grad_norm_([param], 1.0))
bad_input("clip with a parameter in two optimizers")(
    lambda o, param: lambda: fusedopt.clip_grad_norm_([o, fusedopt.SGD([param])], 1.0)
)
bad_input("a parameter in two groups")(lambda o, param: lambda: o.add_param_group({"params": [("again", param)]}))
bad_input("a step from a second thread")(second_thread)


def one_count(optimizer, count):
    """A count in another form, also given to a parameter of the first group."""
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["step"] = count
    return count


def integer_parameter(param):
    param.grad = None
    param.requires_grad_(False)
    param.data = torch.ones(param.shape, dtype=torch.int64)
    param.grad = torch.ones(param.shape, dtype=torch.int64)


def replace_param(optimizer, tensor):
    param = torch.nn.Parameter(tensor, requires_grad=not tensor.is_quantized)
    param.grad = tensor.detach().clone()
    optimizer.param_groups[1]["params"][0] = param


def shifted_gradient(param):
    pool = torch.ones(param.numel() + 1)
    param.data = pool[:-1].view(param.shape)
    param.grad = pool[1:].view(param.shape)


def table_of_bad_input():
    page = Path(__file__).parent.parent / "docs" / "bad-input.md"
    rows = re.findall(r"^\| (.+?) \| `(\w+)`: ``(.+)`` \|$", page.read_text(), flags=re.M)
    return {name: (kind, message) for name, kind, message in rows}


@only_on("cpu", "no optimizer takes part")
@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype:UserWarning")
@pytest.mark.parametrize("make", [lambda: nested(2, 3), lambda: torch.ones(5, device="meta")], ids=["nested", "meta"])
def test_torch_itself_refuses_a_gradient_of_another_kind(make):
    """Nor can the parameter change under a gradient that it has: so the table has no row of either."""
    param, other = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(make())
    with pytest.raises(RuntimeError, match="assign a gradient"):
        param.grad = make()
    kind = other.layout, other.device
    with contextlib.suppress(RuntimeError):
        other.data = torch.ones(5)
    assert (other.layout, other.device) == kind


def test_every_bad_input_has_one_row_and_every_row_a_case():
    page = (Path(__file__).parent.parent / "docs" / "bad-input.md").read_text()
    rows = re.findall(r"^\| (.+?) \| `", page, flags=re.M)
    assert sorted(rows) == sorted(BAD_INPUT)
    assert sorted(table_of_bad_input()) == sorted(rows), "a row that cannot be read"


@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype:UserWarning", "ignore:.*quantize.*:UserWarning")
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_the_answer_of_its_row(name):
    """``…`` in a row is any text."""
    kind, message = table_of_bad_input().get(name, ("?", "?"))
    function, is_readable = BAD_INPUT[name]
    params = make_params(SHAPES)
    named = [*zip(NAMES, params, strict=True)]
    optimizer = fusedopt.AdamW([{"params": named[:2]}, {"params": named[2:], "lr": 0.03}])
    train(optimizer, params, 2)
    set_grads(params, 5)
    try:
        call = function(optimizer, params[2])
    except RuntimeError as error:
        if hasattr(torch.Tensor, "grad_dtype") or "attempting to assign a gradient" not in str(error):
            raise
        pytest.skip("this torch itself refuses such a gradient")
    sound = [params[0], *optimizer.state[params[0]].values()]
    before = [tensor.detach().clone() for tensor in sound]
    with nothing_changes(optimizer) if is_readable else contextlib.nullcontext(), pytest.raises(Exception) as raised:
        call()
    assert_same_bits(sound, before)
    pattern = ".*".join(map(re.escape, message.split("…")))
    text = " ⏎ ".join(line.strip() for line in str(raised.value).splitlines())
    assert (type(raised.value).__name__, bool(re.fullmatch(pattern, text))) == (kind, True), (kind, text)
