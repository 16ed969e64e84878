"""What users, wrappers and configuration libraries do to an optimizer beyond torch's contract: they rebuild it from its class,
put options into groups and states into other forms, derive classes from it, and train 16-bit parameters that do not move.
"""

import copy
import warnings
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers import (
    SPECS,
    assert_same_bits,
    clone_params,
    every_class,
    every_twin,
    in_a_new_process,
    make_params,
    nothing_changes,
    only_on,
    set_grads,
    train,
)

import fusedopt
from fusedopt import stalls

pytestmark = pytest.mark.usefixtures("on_backend")


# ---- options of the whole optimizer --------------------------------------------------------------------------------


SET = {"max_grad_norm": 0.5, "nonfinite": "skip", "backend": "reference", "sparse": "lazy"}


def set_options(spec):
    return {name: value for name, value in SET.items() if name != "sparse" or spec.rule.takes_sparse}


@only_on("cpu", "nothing is computed")
@every_class
def test_options_of_the_whole_optimizer_are_in_defaults_and_repr_and_in_no_group(spec):
    optimizer = spec.make(make_params(), **set_options(spec))
    optimizer.add_param_group({"params": make_params(((3,),), seed=1)})
    for name, value in set_options(spec).items():
        assert optimizer.defaults[name] == getattr(optimizer, name) == value
        assert all(name not in group for group in optimizer.param_groups)
        assert all(name not in group for group in optimizer.state_dict()["param_groups"])
    shown = repr(optimizer)
    assert shown.startswith(f"{spec.name} (\nParameter Group 0\n") and shown.endswith("\n)")
    assert shown.partition("All groups\n")[2].startswith(
        "    max_grad_norm: 0.5\n    nonfinite: skip\n    backend: reference\n"
    )


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("name", SET)
@every_class
def test_option_of_the_whole_optimizer_is_refused_in_a_group(spec, name):
    params = make_params()
    remedy = (
        "" if name == "sparse" and not spec.rule.takes_sparse else f", and pass {name}={SET[name]!r} to the constructor"
    )
    message = (
        rf"^{spec.name}: param_groups\[0\]: {name!r} applies to the whole optimizer, .*; remove the key{remedy}(; n|$)"
    )
    with pytest.raises(ValueError, match=message):
        spec.make([{"params": params, name: SET[name]}])
    optimizer = spec.make(params)
    set_grads(params, 0)
    optimizer.param_groups[0][name] = SET[name]
    message = message.replace(f"{spec.name}:", rf"{spec.name}\.step:", 1)
    with pytest.raises(ValueError, match=message), nothing_changes(optimizer):
        optimizer.step()
    del optimizer.param_groups[0][name]
    optimizer.step()


def rebuilt_from_defaults(optimizer, params):
    return type(optimizer)(params, **optimizer.defaults)


def rebuilt_from_groups(optimizer, params):
    """As Horovod does it: a class that is derived at run time, made from the groups alone."""
    derived = type(type(optimizer).__name__, (type(optimizer),), {})
    optimizer.param_groups[0]["params"] = params
    with pytest.warns(UserWarning, match=r"copied max_grad_norm=0.5, nonfinite='skip'.* from the optimizer that"):
        return derived(optimizer.param_groups)


@pytest.mark.parametrize("rebuild", [rebuilt_from_defaults, rebuilt_from_groups])
@every_class
def test_rebuilt_optimizer_clips_and_skips_as_the_first(spec, rebuild, on_backend):
    """Also what was set after construction."""
    options = {**set_options(spec), "backend": on_backend}
    params, others = make_params(), make_params()
    first = spec.make(make_params(), **{**options, "max_grad_norm": 7.0})
    first.max_grad_norm = 0.5
    again, plain = rebuild(first, params), spec.make(others, **options)
    assert {name: getattr(again, name) for name in options} == options
    assert {name: again.defaults[name] for name in options} == options
    train(again, params, 2)
    train(plain, others, 2)
    assert_same_bits(params, others)
    params[0].grad[0] = torch.inf
    again.step()
    assert int(again.skipped_steps) == 1


@only_on("cpu", "nothing is computed")
def test_optimizer_of_other_groups_takes_nothing_over(recwarn):
    params = make_params()
    clipping = fusedopt.Adam(params, max_grad_norm=0.5)
    assert fusedopt.Adam(params).max_grad_norm is None
    assert fusedopt.Adam([{"params": params}]).max_grad_norm is None
    assert fusedopt.Adam(clipping.param_groups, max_grad_norm=2.0).max_grad_norm == 2.0
    assert fusedopt.StableAdamW(clipping.param_groups).max_grad_norm is None  # another rule
    assert not recwarn.list


@only_on("cpu", "nothing is computed")
def test_groups_carry_options_also_of_an_optimizer_that_is_gone_or_copied():
    groups = copy.deepcopy(fusedopt.SAM(make_params(), fusedopt.SGD, rho=0.3, lr=0.1, max_grad_norm=0.5)).param_groups
    with pytest.warns(UserWarning, match=r"copied max_grad_norm=0.5, rho=0.3 from") as caught:
        again = fusedopt.SAM(groups, fusedopt.SGD)
    assert len(caught) == 1 and (again.max_grad_norm, again.rho) == (0.5, 0.3)
    again.load_state_dict(again.state_dict())
    assert again.param_groups.defaults is again.defaults
    again.max_grad_norm = None  # as the warning says
    assert again.defaults["max_grad_norm"] is None


def test_groups_filled_from_defaults_are_taken(on_backend):
    """As torch's own base class does it for Lookahead and other wrappers; then the keys say what holds anyway."""
    params, plain_params = make_params(), make_params()
    optimizer, plain = (fusedopt.AdamW(each, max_grad_norm=0.5) for each in (params, plain_params))
    wrapper = torch.optim.Optimizer(optimizer.param_groups, optimizer.defaults)
    assert wrapper.param_groups[0] is optimizer.param_groups[0] and optimizer.param_groups[0]["max_grad_norm"] == 0.5
    assert "max_grad_norm" not in optimizer.state_dict()["param_groups"][0]
    train(optimizer, params, 1)
    train(plain, plain_params, 1)
    assert_same_bits(params, plain_params)
    assert "max_grad_norm" not in optimizer.param_groups[0]
    optimizer.max_grad_norm = 2.0  # no key of before contradicts it
    optimizer.param_groups[0]["weight_decay"] = 0.5
    train(optimizer, params, 1)
    assert fusedopt.AdamW([{"params": make_params(), **optimizer.defaults}], **optimizer.defaults).max_grad_norm == 2.0


@only_on("cpu", "nothing is computed")
def test_refused_group_is_left_as_it_was_given():
    known, other = make_params(((3,), (4,)))
    optimizer = fusedopt.AdamW([known], max_grad_norm=0.5)
    group = {"params": [other, known]}
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(group)
    assert not {*SET} & group.keys()
    group["params"] = [other]
    optimizer.add_param_group(group)


@only_on("cpu", "nothing is computed")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "nesterov" not in spec.rule.hyper], ids=str)
def test_another_rules_switch_in_a_group_is_a_key_as_any_other(spec):
    assert spec.make([{"params": make_params(), "nesterov": True}]).param_groups[0]["nesterov"] is True


def test_optimizer_whose_defaults_were_replaced_steps(on_backend):
    params = make_params()
    optimizer = fusedopt.AdamW(params)
    twin = torch.optim.AdamW(params)
    optimizer.defaults = twin.defaults
    train(optimizer, params, 1)
    optimizer.defaults["max_grad_norm"] = 1e-3
    train(optimizer, params, 1, 1)
    assert optimizer.grad_norm is not None


@only_on("cpu", "nothing is computed")
def test_zero_redundancy_optimizer_takes_the_class(tmp_path):
    """It passes its arguments on in the groups too."""
    code = f"""
import fusedopt, torch
from torch.distributed.optim import ZeroRedundancyOptimizer
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
for options in ({{}}, {{"max_grad_norm": 0.5, "nonfinite": "skip", "backend": "reference"}}):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = ZeroRedundancyOptimizer([param], optimizer_class=fusedopt.SGD, lr=1.0, **options)
    for _ in range(2):
        param.grad = torch.tensor([0.0, 3.0, 4.0])
        optimizer.step()
    print([round(value, 3) for value in param.tolist()])
"""
    assert in_a_new_process(code).splitlines() == ["[1.0, -5.0, -7.0]", "[1.0, 0.4, 0.2]"]


@only_on("cpu", "nothing is computed")
def test_sam_is_rebuilt_from_its_class_and_defaults():
    first = fusedopt.SAM(make_params(), fusedopt.SGD, rho=0.3, adaptive=True, lr=0.1, max_grad_norm=0.5)
    again = type(first)(make_params(), **first.defaults)
    assert (again.rho, again.adaptive, again.max_grad_norm) == (0.3, True, 0.5)
    assert "rho" not in again.param_groups[0] and "adaptive" not in again.param_groups[0]
    first.rho = 0.7
    assert type(first)(make_params(), **first.defaults).rho == 0.7


@only_on("cpu", "nothing is computed")
def test_adamw_takes_decoupled_weight_decay_of_its_defaults_alone():
    params = make_params()
    assert fusedopt.AdamW(params, decoupled_weight_decay=True).param_groups[0]["decoupled_weight_decay"] is True
    with pytest.raises(ValueError, match="AdamW always decouples weight decay"):
        fusedopt.AdamW(params, decoupled_weight_decay=False)


class Config(Sequence):
    """As the lists of configuration libraries: neither a tuple nor a list."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


@pytest.mark.parametrize("make", [list, lambda betas: Config(*betas), np.array, torch.tensor, lambda betas: deque(betas)],
                         ids=["list", "configuration", "NumPy", "tensor", "deque"])  # fmt: skip
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.rule.betas], ids=str)
def test_betas_may_be_any_sequence(spec, make):
    """They become a tuple, as in torch, so that a checkpoint holds no type of another library."""
    betas = (0.5, 0.75, 0.875)[: len(spec.rule.betas)]
    params, plain_params = make_params(), make_params()
    optimizer, plain = spec.make(params, betas=make(betas)), spec.make(plain_params, betas=betas)
    kept = optimizer.param_groups[0]["betas"]
    assert type(kept) is tuple and all(type(beta) in (float, torch.Tensor) for beta in kept)
    train(optimizer, params, 2)
    train(plain, plain_params, 2)
    optimizer.param_groups[0]["betas"] = make(betas)  # also put in later
    train(optimizer, params, 1, 2)
    train(plain, plain_params, 1, 2)
    assert_same_bits(params, plain_params)
    for wrong in ("0.9", "0" * len(betas), {0.9: 1, 0.99: 2}, {0.9, 0.99, 0.5}, make(betas[:1]), None, 0.9):
        with pytest.raises(ValueError, match=f"betas must be {len(betas)} numbers"):
            spec.make(make_params(), betas=wrong)


# ---- states in another form ------------------------------------------------------------------------------------------


COUNTS = {
    "one element": lambda count: torch.tensor([float(count)]),
    "float64": lambda count: torch.tensor(float(count), dtype=torch.float64),
    "int64": lambda count: torch.tensor(int(count)),
    "int64 of one element": lambda count: torch.tensor([int(count)]),
    "shared": lambda count: torch.tensor([float(count)]).share_memory_(),
}


@pytest.mark.parametrize("form", COUNTS)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.rule.keeps_step], ids=str)
def test_step_count_in_another_form_is_used_in_place(spec, form, on_backend):
    """As A3C's SharedAdam plants it, whose processes count together."""
    params, plain_params = make_params(), make_params()
    optimizer, plain = spec.make(params), spec.make(plain_params)
    train(optimizer, params, 2)
    counts = {}
    for param in params:
        counts[param] = optimizer.state[param]["step"] = COUNTS[form](optimizer.state[param]["step"])
    before = {param: (count.shape, count.dtype, count.data_ptr()) for param, count in counts.items()}
    train(optimizer, params, 2, 2)
    for count in counts.values():
        count.add_(3)  # as another process would
    train(optimizer, params, 1, 4)
    train(plain, plain_params, 4)
    for state in plain.state.values():
        state["step"].add_(3)
    train(plain, plain_params, 1, 4)
    assert_same_bits(params, plain_params)
    for param, count in counts.items():
        assert optimizer.state[param]["step"] is count and float(count) == 8
        assert (count.shape, count.dtype, count.data_ptr()) == before[param]
    optimizer.load_state_dict(optimizer.state_dict())


def test_momentum_product_in_another_form_is_used_in_place(on_backend):
    """torch keeps it in float32 always, ours is as wide as the states."""
    params = make_params(dtype=torch.float64)
    optimizer = fusedopt.NAdam(params)
    train(optimizer, params, 2)
    products = [optimizer.state[param]["mu_product"].float() for param in params]
    for param, product in zip(params, products, strict=True):
        optimizer.state[param]["mu_product"] = product
    before = float(products[0])
    train(optimizer, params, 1, 2)
    assert optimizer.state[params[0]]["mu_product"] is products[0] and float(products[0]) < before


def test_one_count_of_two_parameters_is_refused():
    params = make_params()
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 1)
    shared = torch.tensor(1)
    for param in params[:2]:
        optimizer.state[param]["step"] = shared
    set_grads(params, 1)
    with pytest.raises(ValueError, match="state 'step' shares memory with state 'step' of"), nothing_changes(optimizer):
        optimizer.step()


def test_adagrad_shares_its_sums_before_the_first_step(on_backend):
    params, plain_params = make_params(), make_params()
    options = dict(lr=0.1, initial_accumulator_value=0.5)
    optimizer, plain = fusedopt.Adagrad(params, **options), fusedopt.Adagrad(plain_params, **options)
    twin = torch.optim.Adagrad(clone_params(params), **options)
    for each in (optimizer, twin):
        each.share_memory()
    for state, expected in zip(optimizer.state.values(), twin.state.values(), strict=True):
        assert {name: value.is_shared() for name, value in state.items()} == {"step": False, "sum": True}
        assert_same_bits([state["step"], state["sum"]], [expected["step"], expected["sum"]])
    sums = [state["sum"] for state in optimizer.state.values()]
    train(optimizer, params, 2)
    train(plain, plain_params, 2)
    assert_same_bits(params, plain_params)
    optimizer.share_memory()  # again: what there is stays
    assert all(optimizer.state[param]["sum"] is kept for param, kept in zip(params, sums, strict=True))


@only_on("cpu", "nothing is computed")
@every_twin
def test_every_public_name_of_the_twin_is_there(spec):
    assert not {name for name in dir(spec.twin) if not name.startswith("_")} - {*dir(spec.cls)}


# ---- classes that are derived at run time ----------------------------------------------------------------------------


class Wrapper:
    """As Lightning's: it has the class of what it wraps, and attributes of its own before those."""

    def __init__(self, optimizer):
        self.inner = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def step(self, closure=None):
        return self.inner.step(closure) if closure is not None else self.inner.step()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("base", [spec.cls for spec in SPECS], ids=[spec.name for spec in SPECS])
def test_wrapper_with_a_class_derived_from_sam(base, by_hand):
    results = []
    for wrap in (lambda optimizer: optimizer, Wrapper):
        params = make_params()
        optimizer = wrap(fusedopt.SAM(params, base, rho=0.5, lr=0.01))
        assert isinstance(optimizer, base) and isinstance(optimizer, fusedopt.SAM)
        for seed in range(2):

            def closure(params=params, optimizer=optimizer, seed=seed):
                optimizer.zero_grad()
                loss = sum((param * (seed + 1) + 0.5).square().sum() for param in params)
                loss.backward()
                return loss

            if by_hand:
                closure()
                optimizer.first_step()
                closure()
                optimizer.second_step()
            else:
                optimizer.step(closure)
        optimizer.rho = 0.25
        optimizer.step(closure)
        results.append([param.detach() for param in params])
    assert_same_bits(*results)


@only_on("cpu", "nothing is computed")
def test_copy_of_an_optimizer_of_a_derived_class_keeps_the_class():
    class Plain(fusedopt.SAM(make_params(), fusedopt.Lion).__class__):
        pass

    for optimizer in (Plain(make_params(), rho=0.3), type("Mine", (fusedopt.AdamW,), {})(make_params(), fused=True)):
        copied = copy.deepcopy(optimizer)
        assert type(copied) is type(optimizer) and copied.defaults == optimizer.defaults
        assert getattr(copied, "_step_supports_amp_scaling", False) == getattr(
            optimizer, "_step_supports_amp_scaling", False
        )


# ---- 16-bit parameters that do not move ------------------------------------------------------------------------------


def steps_of(optimizer, params, count, grad=torch.ones_like):
    for _ in range(count):
        for param in params:
            param.grad = grad(param)
        optimizer.step()


STALL = r"the last \d+ steps have not changed it, because each update is less than half the distance"


@pytest.mark.parametrize("dtype, lr", [(torch.bfloat16, 1e-4), (torch.float16, 1e-5)], ids=str)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name in ("AdamW", "Lion", "SGD")], ids=str)
def test_parameter_whose_updates_round_to_nothing_is_named_once(spec, dtype, lr, on_backend):
    """Among some that move, and large enough that a sample is compared. In float32 all of them would move."""
    weight = torch.nn.Parameter(torch.ones(5000, dtype=dtype))
    moving = torch.nn.Parameter(torch.zeros(7, dtype=dtype))
    wide = torch.nn.Parameter(torch.ones(7))
    optimizer = spec.cls([("moving", moving), ("norm.weight", weight), ("wide", wide)], lr=lr, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_of(optimizer, [moving, weight, wide], stalls.FIRST_COMPARISON)
    with pytest.warns(UserWarning, match=rf"\[1\] \('norm.weight'\), shape \(5000,\).*: {STALL}") as caught:
        steps_of(optimizer, [moving, weight, wide], 1)
    assert len(caught) == 1 and "more" not in str(caught[0].message) and caught[0].filename == __file__
    assert bool((weight == 1).all()) and bool((moving != 0).all()) and bool((wide != 1).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_of(optimizer, [moving, weight, wide], stalls.FIRST_COMPARISON * (stalls.FACTOR - 1))


@pytest.mark.parametrize("case", ["one element moves", "no gradient", "zero gradient", "lr of 0", "NaN gradient skipped",
                                  "float32", "replaced in between", "moved once"])  # fmt: skip
def test_no_stall_is_seen_where_there_is_none(case, on_backend):
    values = torch.ones(500, dtype=torch.float32 if case == "float32" else torch.bfloat16)
    if case == "one element moves":
        values[77] = 0.0
    param = torch.nn.Parameter(values)
    optimizer = fusedopt.AdamW([param], lr=0.0 if case == "lr of 0" else 1e-4, weight_decay=0.0, nonfinite="skip")
    grad = {
        "zero gradient": torch.zeros_like,
        "no gradient": lambda param: None,
        "NaN gradient skipped": lambda param: torch.full_like(param, torch.nan),
    }.get(case, torch.ones_like)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_of(optimizer, [param], 2, grad)
        if case == "replaced in between":
            param.data = param.data * 2
        if case == "moved once":
            optimizer.param_groups[0]["lr"] = 0.1
            steps_of(optimizer, [param], 1, grad)
            optimizer.param_groups[0]["lr"] = 1e-4
        steps_of(optimizer, [param], stalls.FIRST_COMPARISON, grad)


def test_stall_that_is_an_error_leaves_the_step_undone(on_backend):
    param, moving = (torch.nn.Parameter(value * torch.ones(3, dtype=torch.bfloat16)) for value in (1.0, 0.0))
    optimizer = fusedopt.AdamW([param, moving], lr=1e-4)
    steps_of(optimizer, [param, moving], stalls.FIRST_COMPARISON)
    with warnings.catch_warnings(), nothing_changes(optimizer):
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=STALL):
            optimizer.step()
    optimizer.step()
    assert float(optimizer.state[moving]["step"]) == stalls.FIRST_COMPARISON + 1


def test_sample_is_small_and_of_every_column():
    for shape in ((4096, 4096), (1000, 3), (7,), (1, 1, 2048), ()):
        weight = torch.arange(torch.Size(shape).numel()).view(shape)
        sample = stalls._picked(weight)
        assert 1 <= sample.numel() == stalls._num_picked(weight.shape) <= stalls.SAMPLES
        if weight.dim() == 2:
            assert len({*(sample % shape[1]).tolist()}) > min(shape[1], 1000) / 2
            assert torch.equal(stalls._picked(weight.t().contiguous().t()), sample)


@only_on("cpu", "it is about what is compared")
@pytest.mark.parametrize("period", [2, 3])
def test_parameter_that_swings_is_no_stall(period):
    """Though it is where it was at the last look."""
    param = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(stalls.FIRST_COMPARISON + period):
            param.grad = torch.full_like(param, 1.0 if step % period else 1.0 - period)
            optimizer.step()


def test_parameter_that_is_given_another_form_is_no_stall(on_backend):
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_of(optimizer, [param], 2)
        param.grad, param.data = None, torch.ones(5, dtype=torch.bfloat16)
        steps_of(optimizer, [param], stalls.FIRST_COMPARISON)
        param.grad, param.data = None, torch.ones(5, dtype=torch.float16)
        steps_of(optimizer, [param], 1)


def test_stall_that_begins_later_is_seen_later(on_backend):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = fusedopt.SGD([param], lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps_of(optimizer, [param], stalls.FIRST_COMPARISON)
    optimizer.param_groups[0]["lr"] = 1e-6
    with pytest.warns(UserWarning, match=STALL):
        steps_of(optimizer, [param], stalls.FIRST_COMPARISON * (stalls.FACTOR - 1) + 1)


@pytest.mark.parametrize("is_skipped", [False, True])
def test_stall_is_seen_under_sam(is_skipped, on_backend):
    """A step that changed nothing, because it was skipped, shows nothing: the next one is looked at. A device skips unseen."""
    if is_skipped and on_backend in ("cuda", "triton"):
        return
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = fusedopt.SAM([param], fusedopt.SGD, rho=0.5, lr=1e-6)

    def closure():
        optimizer.zero_grad()
        loss = param.float().square().sum()
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(stalls.FIRST_COMPARISON - is_skipped):
            optimizer.step(closure)
        if is_skipped:
            closure()
            optimizer.first_step()
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.second_step()
            del optimizer.found_inf
            optimizer.step(closure)
    with pytest.warns(UserWarning, match=STALL):
        optimizer.step(closure)


# ---- import ----------------------------------------------------------------------------------------------------------


IMPORT = """
import sys, time, torch
begin = time.process_time()
import fusedopt
print(time.process_time() - begin, "torch._dynamo" in sys.modules)
"""


@only_on("cpu", "nothing is computed")
def test_import_is_quick_and_imports_no_compiler():
    """Workers of data loaders import it too. CPU time, and the least of three, as other programs share the caches."""
    seconds, has_dynamo = zip(*(in_a_new_process(IMPORT).split() for _ in range(3)), strict=True)
    assert {*has_dynamo} == {"False"}
    assert min(map(float, seconds)) <= 0.3


COMPILED_FIRST = """
import torch, fusedopt
from torch._dynamo.testing import CompileCounter
param = torch.nn.Parameter(torch.ones(3))
optimizer = fusedopt.SGD([param], lr=0.5)
counter = CompileCounter()

@torch.compile(backend=counter)
def train():
    loss = param.square().sum()
    param.grad = torch.ones(3)
    optimizer.step()
    return loss * 2

train(), train()
print(param.tolist(), torch._dynamo.utils.counters["graph_break"].total(), counter.frame_count)
"""


@only_on("cpu", "it is about what is compiled")
def test_first_step_ever_may_be_in_a_compiled_function():
    moved, breaks = in_a_new_process(COMPILED_FIRST).strip().split("] ")
    assert moved == "[0.0, 0.0, 0.0" and int(breaks.split()[0]) <= 2
