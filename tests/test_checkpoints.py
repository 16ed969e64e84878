"""Checkpoints: ours and torch.optim's both ways, without loss, without aliasing, and refused whole where they do not fit."""

import copy
import io
import itertools
import math
import re
import warnings

import pytest
import torch
from cases import CASES
from helpers import (
    ADAM_HAS_DECOUPLED,
    DTYPES,
    SPECS,
    assert_close,
    assert_same_bits,
    assert_same_run,
    clone_params,
    every_class,
    every_twin,
    known_to_torch,
    make_params,
    nothing_changes,
    randn,
    same_bits,
    set_grads,
    train,
)

import fusedopt

pytestmark = pytest.mark.usefixtures("on_backend")
SHAPES = ((13, 7), (1021,), (), (5, 3, 3))
with_twin = pytest.mark.parametrize("case", [case for case in CASES if case.twin], ids=str)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def saved(optimizer):
    """The checkpoint as it comes back from a file that nobody has to trust."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def ours(case):
    return lambda params: case.make(params)


def theirs(case):
    return lambda params: case.twin(params, **{"lr": 0.01, **case.kwargs})


def groups_of(params):
    return [{"params": params[:2], "lr": 0.02}, {"params": params[2:], "weight_decay": 0.25}]


def tolerance(case, dtype):
    """A few roundings, of float32 where torch keeps NAdam's mu_product in it."""
    return 64 * torch.finfo(torch.float32 if case.rule.extra else dtype).eps


# ---- both ways ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
@with_twin
def test_run_goes_on_in_the_other_library(case, direction, dtype):
    first, second = (ours, theirs) if direction == "ours to torch" else (theirs, ours)
    params, whole_params = make_params(SHAPES, dtype), make_params(SHAPES, dtype)
    start = first(case)(groups_of(params))
    train(start, params, 5)
    checkpoint = saved(start)

    resumed_params = clone_params(params)
    resumed = second(case)(groups_of(resumed_params))
    resumed.load_state_dict(checkpoint)
    train(resumed, resumed_params, 5, 5)

    whole = second(case)(groups_of(whole_params))
    train(whole, whole_params, 10)
    assert_same_run(resumed, whole, tolerance(case, dtype))
    assert resumed.param_groups[1]["lr"] == 0.01
    assert resumed.param_groups[1]["weight_decay"] == 0.25

    # and back once more, to the class it came from
    again = first(case)(groups_of(clone_params(resumed_params)))
    again.load_state_dict(saved(resumed))
    back, on = again.state_dict()["state"], resumed.state_dict()["state"]
    assert back.keys() == on.keys()
    for index in on:
        assert back[index].keys() == on[index].keys()
        for name in on[index]:
            assert_close([back[index][name]], [on[index][name]], 1e-6)


@every_twin
def test_checkpoint_of_default_options_has_torchs_keys(spec):
    mine, other = make_params(SHAPES), make_params(SHAPES)
    optimizer, twin = spec.make(mine), spec.twin(other, **spec.options)
    train(optimizer, mine, 2)
    train(twin, other, 2)
    a, b = optimizer.state_dict(), twin.state_dict()
    assert a.keys() == b.keys()
    assert [*map(known_to_torch, a["param_groups"])] == [*map(known_to_torch, b["param_groups"])]
    assert {index: {*state} for index, state in a["state"].items()} == {
        index: {*state} for index, state in b["state"].items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_own_resume_is_bit_exact(case, dtype):
    params, whole_params = make_params(SHAPES, dtype), make_params(SHAPES, dtype)
    optimizer, whole = case.make(params), case.make(whole_params)
    train(optimizer, params, 3)
    resumed_params = clone_params(params)
    resumed = case.make(resumed_params)
    train(resumed, resumed_params, 1, 50)  # has a plan and states of its own, to be forgotten
    for param, at in zip(resumed_params, params, strict=True):
        param.data.copy_(at)
    resumed.load_state_dict(saved(optimizer))
    train(resumed, resumed_params, 3, 3)
    train(whole, whole_params, 6)
    assert_same_bits(resumed_params, whole_params)
    for a, b in zip(resumed_params, whole_params, strict=True):
        assert resumed.state.get(a, {}).keys() == whole.state.get(b, {}).keys()
        assert_same_bits(resumed.state.get(a, {}).values(), whole.state.get(b, {}).values(), "state")


@every_class
def test_checkpoint_before_the_first_step_loads(spec):
    params, resumed_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, resumed = spec.make(params), spec.make(resumed_params)
    resumed.load_state_dict(saved(spec.peer(make_params(SHAPES))))
    train(optimizer, params, 2)
    train(resumed, resumed_params, 2)
    assert_same_bits(params, resumed_params)


@every_class
def test_checkpoint_with_parameters_that_never_stepped(spec):
    def partly(optimizer, params, first):
        for step in range(first, first + 3):
            set_grads(params, step)
            params[1].grad = None
            optimizer.step()

    params = make_params(SHAPES)
    optimizer = spec.make(params)
    partly(optimizer, params, 0)
    checkpoint = saved(optimizer)
    assert 1 not in checkpoint["state"]
    resumed_params = clone_params(params)
    resumed = spec.make(resumed_params)
    resumed.load_state_dict(checkpoint)
    partly(optimizer, params, 3)
    partly(resumed, resumed_params, 3)
    train(optimizer, params, 2, 9)
    train(resumed, resumed_params, 2, 9)
    assert_same_bits(params, resumed_params)


@pytest.mark.parametrize("source", ["ours", "torch"])
@every_twin
def test_states_of_narrow_parameters_stay_float32(spec, source):
    """torch's own load_state_dict casts them to the parameter's dtype; ours neither narrows them nor keeps narrow ones."""
    params = make_params(SHAPES, torch.bfloat16)
    optimizer = spec.make(params) if source == "ours" else spec.peer(params)
    train(optimizer, params, 3)
    resumed = spec.make(clone_params(params))
    resumed.load_state_dict(saved(optimizer))
    for i, param in enumerate(resumed.param_groups[0]["params"]):
        expected = optimizer.state[params[i]]
        assert resumed.state[param].keys() == expected.keys()
        for name, value in resumed.state[param].items():
            assert value.dtype == torch.float32
            assert same_bits(value, expected[name].float()), f"state {name!r}"
    train(resumed, resumed.param_groups[0]["params"], 1, 3)


@every_class
def test_states_take_the_layout_of_their_parameter(spec):
    """A checkpoint saved contiguous, loaded for a transposed parameter: same values at the same indices."""
    plain = make_params(((13, 7),))
    optimizer = spec.make(plain)
    train(optimizer, plain, 2)
    turned = [torch.nn.Parameter(plain[0].detach().t().contiguous().t())]
    resumed = spec.make(turned)
    resumed.load_state_dict(saved(optimizer))
    train(optimizer, plain, 2, 2)
    train(resumed, turned, 2, 2)
    assert_same_bits(plain, turned)


# ---- aliasing ----------------------------------------------------------------------------------------------------


def flattened(state_dict):
    for index, state in state_dict["state"].items():
        for name, value in state.items():
            yield (index, name), value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_class
def test_loaded_dict_is_neither_changed_nor_kept(spec, dtype):
    params = make_params(SHAPES, dtype)
    optimizer = spec.make(params, lr=torch.tensor(0.01))
    train(optimizer, params, 2)
    checkpoint = optimizer.state_dict()
    before = copy.deepcopy(checkpoint)
    resumed_params = clone_params(params)
    resumed = spec.make(resumed_params)
    resumed.load_state_dict(checkpoint)
    train(resumed, resumed_params, 2, 2)
    resumed.param_groups[0]["lr"].fill_(0.5)
    resumed.param_groups[0]["note"] = "new"
    assert repr(checkpoint["param_groups"]) == repr(before["param_groups"])
    assert_same_bits([v for _, v in flattened(checkpoint)], [v for _, v in flattened(before)], "saved value")
    loaded = [value.data_ptr() for _, value in flattened(resumed.state_dict()) if value.numel()]
    assert not {value.data_ptr() for _, value in flattened(checkpoint) if value.numel()} & set(loaded)
    with nothing_changes(resumed):  # nor does the optimizer see what becomes of the dict
        for _, value in flattened(checkpoint):
            value.fill_(3.0)
        checkpoint["param_groups"][0]["weight_decay"] = 9.0


# ---- odd, but valid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [int, float, lambda step: torch.tensor(int(step)), lambda step: torch.tensor([float(step)])],
                         ids=["int", "float", "int64 tensor", "1 element"])  # fmt: skip
@every_twin
def test_step_count_may_be_saved_as_any_number(spec, number):
    """As older torch, Apex and DeepSpeed do."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    train(optimizer, params, 3)
    train(plain, plain_params, 6)
    checkpoint = saved(optimizer)
    for state in checkpoint["state"].values():
        for name in ("step", spec.rule.extra):
            if name in state:
                state[name] = number(state[name]) if name == "step" else float(state[name])
    resumed = spec.make(params)
    resumed.load_state_dict(checkpoint)
    for state in resumed.state.values():
        if spec.rule.keeps_step:
            assert same_bits(state["step"], torch.tensor(3.0))
    train(resumed, params, 3, 3)
    assert_same_bits(params, plain_params)


@every_twin
def test_step_count_put_in_as_a_number_counts_on(spec):
    """By hand, past load_state_dict."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    train(optimizer, params, 3)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = int(state["step"])
    train(optimizer, params, 2, 3)
    train(plain, plain_params, 5)
    assert_same_bits(params, plain_params)
    assert all(float(state.get("step", 5)) == 5 for state in optimizer.state.values())


def test_momentum_buffer_of_none_is_a_first_step():
    """What torch.optim.SGD saves for a parameter without a step under momentum."""
    params, twin_params = make_params(SHAPES), make_params(SHAPES)
    options = dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.125)
    twin = torch.optim.SGD(twin_params, lr=0.1, weight_decay=0.125)
    train(twin, twin_params, 2)
    checkpoint = saved(twin)
    assert all(state["momentum_buffer"] is None for state in checkpoint["state"].values())
    checkpoint["param_groups"][0].update(momentum=0.9, dampening=0.5)
    optimizer, torchs = fusedopt.SGD(params, **options), torch.optim.SGD(clone_params(params), **options)
    optimizer.load_state_dict(checkpoint)
    torchs.load_state_dict(checkpoint)
    train(optimizer, params, 3)
    train(torchs, torchs.param_groups[0]["params"], 3)
    assert_same_run(optimizer, torchs, 1e-6)


@pytest.mark.parametrize("source", [fusedopt.Adam, torch.optim.Adam], ids=["ours", "torchs"])
def test_adamw_that_loads_adams_checkpoint_stays_decoupled(source):
    params = make_params(SHAPES, torch.float64)
    adam = source(params, lr=0.01, weight_decay=0.125)
    train(adam, params, 3)
    checkpoint = saved(adam)
    assert not checkpoint["param_groups"][0].get("decoupled_weight_decay")
    results = []
    for cls in (fusedopt.AdamW, torch.optim.AdamW):
        optimizer = cls(clone_params(params), lr=0.5)
        optimizer.load_state_dict(checkpoint)
        if ADAM_HAS_DECOUPLED or cls is fusedopt.AdamW:
            assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
        train(optimizer, optimizer.param_groups[0]["params"], 3, 3)
        results.append(optimizer)
    assert_same_run(*results, 1e-12)


def test_own_options_survive_a_checkpoint_of_torchs():
    """A checkpoint that does not know an option leaves it as the constructor set it."""
    params = make_params(SHAPES)
    twin = torch.optim.RMSprop(params, lr=0.01)
    train(twin, params, 2)
    optimizer = fusedopt.RMSprop(clone_params(params), eps_inside_sqrt=True, max_grad_norm=2.0)
    optimizer.load_state_dict(saved(twin))
    assert optimizer.param_groups[0]["eps_inside_sqrt"] is True
    assert optimizer.max_grad_norm == 2.0


@every_class
def test_options_that_an_old_checkpoint_lacks_are_the_constructors(spec):
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 2)
    checkpoint = saved(optimizer)
    for group in checkpoint["param_groups"]:
        for name in ("maximize", "foreach", "fused", "capturable", "differentiable"):
            group.pop(name, None)
    resumed = spec.make(clone_params(params), maximize=True)
    resumed.load_state_dict(checkpoint)
    assert resumed.param_groups[0]["maximize"] is True
    train(resumed, resumed.param_groups[0]["params"], 1)


@every_class
def test_foreign_keys_of_groups_survive(spec):
    params = make_params(SHAPES)
    optimizer = spec.make([{"params": params, "lr_scale": 0.3, "initial_lr": 0.7}])
    train(optimizer, params, 1)
    resumed = spec.make(clone_params(params))
    resumed.load_state_dict(saved(optimizer))
    assert resumed.param_groups[0]["lr_scale"] == 0.3
    assert resumed.param_groups[0]["initial_lr"] == 0.7


@every_class
def test_parameter_names_of_the_optimizer_are_kept(spec):
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 1)
    named = spec.make([(f"weight{i}", param) for i, param in enumerate(clone_params(params))])
    named.load_state_dict(saved(optimizer))
    assert named.param_groups[0]["param_names"] == [f"weight{i}" for i in range(len(params))]


@every_class
def test_pending_clip_does_not_survive_a_load(spec):
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    checkpoint = saved(plain)
    set_grads(params, 0)
    set_grads(plain_params, 0)
    optimizer.clip_grad_norm_(0.01)
    optimizer.load_state_dict(checkpoint)
    optimizer.step()
    plain.step()
    assert_same_bits(params, plain_params)


@every_class
def test_load_hooks_run_around_the_load(spec):
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 2)
    checkpoint = saved(optimizer)
    resumed = spec.make(clone_params(params))
    seen = []

    def pre(opt, state_dict):
        seen.append(("pre", bool(opt.state)))
        state_dict["param_groups"][0]["lr"] = 0.77  # of a shallow copy of the outer dict, as in torch
        return {**state_dict, "state": {**state_dict["state"]}}

    resumed.register_load_state_dict_pre_hook(pre)
    resumed.register_load_state_dict_post_hook(lambda opt: seen.append(("post", opt.param_groups[0]["lr"])))
    resumed.load_state_dict(checkpoint)
    has_state = bool(optimizer.state)
    assert seen == [("pre", False), ("post", 0.77)]
    assert bool(resumed.state) == has_state


# ---- of wrappers, users and other libraries --------------------------------------------------------------------------


@every_class
def test_entries_that_no_rule_keeps_step_save_and_load(spec):
    """As wrappers leave them (ScheduleFreeWrapper's "z", Lookahead's slow weights), or a user with an average of his own."""
    params, plain_params = make_params(SHAPES, torch.bfloat16), make_params(SHAPES, torch.bfloat16)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    train(optimizer, params, 2)
    for param in params:
        added = {"z": param.detach().float() + 1, "slow": None, "count": torch.tensor(3), "notes": {"kept": [1.5]}}
        optimizer.state[param].update(added)
    train(optimizer, params, 1, 2)
    checkpoint = saved(optimizer)
    resumed = spec.make(clone_params(params))
    resumed.load_state_dict(checkpoint)
    for i, (param, other) in enumerate(zip(params, resumed.param_groups[0]["params"], strict=True)):
        ours, theirs = resumed.state[other], optimizer.state[param]
        assert ours.keys() == theirs.keys() and {"z", "slow", "count", "notes"} <= ours.keys()
        assert_same_bits([ours["z"], ours["count"]], [theirs["z"], theirs["count"]])
        assert (
            ours["z"].data_ptr() != checkpoint["state"][i]["z"].data_ptr()
            and ours["notes"] == {"kept": [1.5]}
            and ours["slow"] is None
        )
    train(resumed, resumed.param_groups[0]["params"], 2, 3)
    train(plain, plain_params, 5)
    assert_same_bits(resumed.param_groups[0]["params"], plain_params)


@every_class
def test_states_go_by_name_where_the_order_is_another(spec):
    """Of parameters and of groups, whose options go along; the names of the optimizer stay those of its parameters."""
    shapes = ((7,), (7,), (3, 7), (7,), (7, 3))
    params, plain_params = make_params(shapes), make_params(shapes)
    names = [f"p{i}" for i in range(len(params))]

    def groups(params, order):
        named = [(names[i], params[i]) for i in order]
        cut = 2 if order[0] in (0, 1) else 3
        return [{"params": named[:cut], "lr": 0.01 * cut}, {"params": named[cut:], "lr": 0.01 * (5 - cut)}]

    optimizer, plain = spec.make(groups(params, (0, 1, 2, 3, 4))), spec.make(groups(plain_params, (0, 1, 2, 3, 4)))
    train(optimizer, params, 2)
    for order in ((1, 0, 4, 3, 2), (4, 2, 3, 1, 0)):
        others = clone_params(params)
        resumed = spec.make([{**group, "lr": 9.0} for group in groups(others, order)])
        resumed.load_state_dict(saved(optimizer))
        for group in resumed.param_groups:
            assert all(others[names.index(n)] is p for n, p in zip(group["param_names"], group["params"], strict=True))
            assert group["lr"] == 0.01 * len(group["params"])
        train(resumed, others, 2, 2)
        if order[0] == 1:
            train(plain, plain_params, 4)
        assert_same_bits(others, plain_params)


def test_parameter_that_changed_its_group_is_refused():
    """Whose options it should have, nothing says."""
    params = make_params(((3,), (3,), (3,), (3,)))
    names = ("a", "b", "c", "d")
    named = dict(zip(names, params, strict=True))

    def make(*groups):
        return fusedopt.AdamW([{"params": [(name, named[name]) for name in group]} for group in groups])

    optimizer = make("ab", "cd")
    train(optimizer, params, 1)
    other = make("ac", "bd")
    with (
        nothing_changes(other),
        pytest.raises(ValueError, match=r"parameter 'c' is in param_groups\[0\] here and in another"),
    ):
        other.load_state_dict(saved(optimizer))


def test_negative_gradient_of_another_librarys_adan_is_not_taken_for_ours():
    """pytorch_optimizer keeps -g under the name of our g, and its step count in the group."""
    params = make_params(SHAPES)
    optimizer = fusedopt.Adan(params)
    train(optimizer, params, 2)
    checkpoint = saved(optimizer)
    checkpoint["param_groups"][0]["step"] = 2
    for state in checkpoint["state"].values():
        del state["step"]
    with nothing_changes(optimizer), pytest.raises(ValueError, match="state 'step' is missing"):
        optimizer.load_state_dict(checkpoint)


@every_class
def test_entries_of_the_users_own_are_no_parameters_and_no_other_rules(spec):
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 2)
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer.param_groups[0]["params"].append(frozen)
    if any(optimizer.state.values()):
        optimizer.state[frozen]["ema"] = torch.ones(3)
    optimizer.state["ema"] = {"step": 5, "decay": 0.9}
    if optimizer.state.get(params[0]):
        optimizer.state[params[0]].update({name: torch.ones(2) for name in ("prev", "mu", "eta", "ax", "step_size")})
    resumed = spec.make(clone_params([*params, frozen]))  # which stays frozen
    resumed.load_state_dict(saved(optimizer))
    assert resumed.state["ema"] == {"step": 5, "decay": 0.9}
    if optimizer.state.get(params[0]):
        assert {"prev", "mu", "eta", "ax", "step_size"} <= resumed.state[resumed.param_groups[0]["params"][0]].keys()


def test_parameters_that_have_other_names_throughout_go_by_position():
    """As those of a model wrapped by DDP or torch.compile, and one of which was renamed."""
    for rename in (lambda name: f"module.{name}", lambda name: "head" if name == "p1" else name):
        params = make_params(((3,), (3,)))
        optimizer = fusedopt.AdamW([(f"p{i}", param) for i, param in enumerate(params)])
        train(optimizer, params, 1)
        others = clone_params(params)
        resumed = fusedopt.AdamW([(rename(f"p{i}"), param) for i, param in enumerate(others)])
        resumed.load_state_dict(saved(optimizer))
        for param, other in zip(params, others, strict=True):
            assert_same_bits([optimizer.state[param]["exp_avg"]], [resumed.state[other]["exp_avg"]])
        assert resumed.param_groups[0]["param_names"] == [rename("p0"), rename("p1")]


def test_names_that_contradict_the_order_are_refused():
    params = make_params(((3,), (3,), (3,)))
    optimizer = fusedopt.AdamW(list(zip(("a", "b", "c"), params, strict=True)))
    train(optimizer, params, 1)
    others = fusedopt.AdamW(list(zip(("b", "a", "d"), clone_params(params), strict=True)))
    with (
        nothing_changes(others),
        pytest.raises(ValueError, match="parameter 'b' is at another position there, and 'd' is missing"),
    ):
        others.load_state_dict(saved(optimizer))


@every_twin
def test_step_count_of_the_group_counts_for_its_parameters(spec):
    """As Apex, optimi and timm save it; a parameter without state stays without."""
    params, plain_params = make_params(SHAPES), make_params(SHAPES)
    optimizer, plain = spec.make(params), spec.make(plain_params)
    train(optimizer, params, 3)
    checkpoint = saved(optimizer)
    for state in checkpoint["state"].values():
        state.pop("step", None)
    checkpoint["state"].pop(0, None)
    checkpoint["param_groups"][0]["step"] = 3
    resumed = spec.make(params)
    resumed.load_state_dict(checkpoint)
    if spec.rule.keeps_step:
        assert "step" not in resumed.param_groups[0]
        assert [float(resumed.state[param]["step"]) for param in params[1:]] == [3] * (len(params) - 1)
        assert params[0] not in resumed.state
    train(resumed, params, 2, 3)
    train(plain, plain_params, 5)
    assert_same_bits(params[1:], plain_params[1:])


@every_class
def test_switch_that_only_the_checkpoint_has_is_warned_of(spec):
    """Training would go on by another rule than it began with. Words, numbers and tags of the user's own say nothing."""
    params = make_params(SHAPES)
    optimizer = spec.make([{"params": params, "is_decayed": True}])
    train(optimizer, params, 1)
    checkpoint = saved(optimizer)
    checkpoint["param_groups"][0].update(caution=True, lr_scale=0.5, tag="x", off=False)
    with pytest.warns(
        UserWarning, match=r"param_groups\[0\] of the checkpoint has caution=True; .* ignores it"
    ) as caught:
        optimizer.load_state_dict(checkpoint)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert optimizer.param_groups[0]["caution"] is True


@every_class
@pytest.mark.parametrize("place", ["ours", "Apex's"])
def test_checkpoint_of_a_clipped_training_warns_who_does_not_clip(spec, place):
    params = make_params(SHAPES)
    optimizer = spec.make(params, max_grad_norm=0.5 if place == "ours" else None)
    train(optimizer, params, 1)
    checkpoint = saved(optimizer)
    if place != "ours":  # FusedLAMB has it in its groups
        checkpoint["param_groups"][0]["max_grad_norm"] = 0.5
    resumed = spec.make(clone_params(params))
    with pytest.warns(UserWarning, match="trained with max_grad_norm=0.5, and this optimizer does not clip"):
        resumed.load_state_dict(checkpoint)
    assert "max_grad_norm" not in resumed.param_groups[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec.make(clone_params(params), max_grad_norm=2.0).load_state_dict(checkpoint)
        resumed.load_state_dict(saved(resumed))
    if spec.twin_name and place == "ours":
        spec.twin(clone_params(params), **known_to_torch(spec.options)).load_state_dict(checkpoint)


# ---- refused -----------------------------------------------------------------------------------------------------


def other_group_count(checkpoint):
    checkpoint["param_groups"].append({**checkpoint["param_groups"][0], "params": []})


def other_size(checkpoint):
    checkpoint["param_groups"][1]["params"].append(99)


def other_shape(checkpoint):
    for state in checkpoint["state"].values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == (1021,):
                state[name] = value[:-1]


def transposed(checkpoint):
    for state in checkpoint["state"].values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == (13, 7):
                state[name] = value.t()


def not_a_tensor(checkpoint):
    for state in checkpoint["state"].values():
        for name, value in state.items():
            if value.dim() > 0:
                state[name] = value.tolist()


def missing_state(checkpoint):
    for state in checkpoint["state"].values():
        for name in [*state]:
            if state[name].dim() > 0:
                del state[name]
                state["unrelated"] = torch.ones(3)
                break


def bad_option(checkpoint):
    checkpoint["param_groups"][1]["lr"] = -0.5


def bad_step(checkpoint):
    for state in checkpoint["state"].values():
        state["step"] = torch.tensor(-3.0)


def step_of_nan(checkpoint):
    for state in checkpoint["state"].values():
        state["step"] = torch.tensor(math.nan)


def step_in_words(checkpoint):
    for state in checkpoint["state"].values():
        state["step"] = "three"


def converted(change):
    def convert(checkpoint):
        for state in checkpoint["state"].values():
            for name, value in state.items():
                if value.dim() > 0:
                    state[name] = change(value)

    return convert


integer_states = converted(lambda value: value.to(torch.int8))
meta_states = converted(lambda value: value.to("meta"))
sparse_states = converted(lambda value: value.to_sparse())


def state_in_words(checkpoint):
    checkpoint["state"] = dict.fromkeys(checkpoint["state"], "state")


def no_groups(checkpoint):
    del checkpoint["param_groups"]


def group_without_params(checkpoint):
    del checkpoint["param_groups"][1]["params"]


def keyed_by_strings(checkpoint):
    """As after a way through JSON."""
    checkpoint["state"] = {str(key): value for key, value in checkpoint["state"].items()}


def of_a_parameter_that_is_not_there(checkpoint):
    checkpoint["state"][99] = checkpoint["state"][0]


def option_of_the_whole_optimizer(checkpoint):
    checkpoint["param_groups"][1]["nonfinite"] = "skip"


def of_bitsandbytes(checkpoint):
    for state in checkpoint["state"].values():
        state.clear()
        state["state1"] = torch.ones(3)


def missing_optional_state(checkpoint):
    """The options of the checkpoint ask for it."""
    for group in checkpoint["param_groups"]:
        group.update({name: True for name in ("amsgrad", "centered") if name in group})


def names_that_are_none(checkpoint):
    checkpoint["param_groups"][0]["param_names"], checkpoint["param_groups"][1]["param_names"] = [["a"]], 7


def of_another_rule(checkpoint):
    for state in checkpoint["state"].values():
        state["previous_grad" if "previous_grad" not in state else "square_avg"] = torch.ones(3)


def one_id_for_two(checkpoint):
    checkpoint["param_groups"][0]["params"] = [0, 0]


def missing_step(checkpoint):
    for state in checkpoint["state"].values():
        del state["step"]


def step_per_element(checkpoint):
    for state in checkpoint["state"].values():
        state["step"] = torch.ones(3)


def optional_state_of_another_shape(checkpoint):
    for state in checkpoint["state"].values():
        state[
            {"square_avg": "grad_avg", "exp_avg": "max_exp_avg_sq"}[next(name for name in state if name != "step")]
        ] = torch.ones(2, 3)


FIRST = r"param_groups\[0\]\['params'\]\[0\].*, shape \(13, 7\), float32 on cpu: "
SECOND = r"param_groups\[0\]\['params'\]\[1\].*, shape \(1021,\), float32 on cpu: "
WRONG = {
    missing_step: FIRST + r"state 'step' is missing",
    step_per_element: FIRST + r"state 'step' has shape \(3,\) on cpu, not one value",
    optional_state_of_another_shape: r"state '\w+' has shape \(2, 3\)",
    other_group_count: r"it has 3 parameter groups, the optimizer 2",
    other_size: r"param_groups\[1\] has 3 parameters, the optimizer's 2",
    other_shape: SECOND + r"state '\w+' has shape \(1020,\)",
    transposed: FIRST + r"state '\w+' has shape \(7, 13\)",
    not_a_tensor: FIRST + r"state '\w+' is a list, not a tensor",
    missing_state: FIRST + r"state '\w+' is missing",
    bad_option: r"param_groups\[1\]: lr must be >= 0, got -0.5",
    bad_step: FIRST + r"state 'step' is -3",
    step_of_nan: FIRST + r"state 'step' is nan",
    step_in_words: FIRST + r"state 'step' is 'three', not a number",
    integer_states: FIRST + r"state '\w+' is int8",
    meta_states: FIRST + r"state '\w+' is on the meta device, it has no values",
    sparse_states: FIRST + r"state '\w+' has layout torch.sparse_coo",
    state_in_words: FIRST + r"its state is a str, not a dict",
    no_groups: r"it needs 'param_groups', a list, and 'state', a dict",
    group_without_params: r"param_groups\[1\] has no list 'params'",
    keyed_by_strings: r"state has keys that are no parameter's: '0', '1', '2', …",
    of_a_parameter_that_is_not_there: r"state has keys that are no parameter's: 99",
    option_of_the_whole_optimizer: r"param_groups\[1\]: 'nonfinite' applies to the whole optimizer",
    of_bitsandbytes: FIRST + r"\w+ has no state 'state1'",
    missing_optional_state: FIRST + r"state '(max_exp_avg_sq|grad_avg)' is missing",
    names_that_are_none: r"param_groups\[0\]\['param_names'\] is no list of names",
    of_another_rule: FIRST + r"\w+ has no state '(previous_grad|square_avg)'",
    one_id_for_two: SECOND + r"it has the same id, 0, as another parameter",
}


def applies(spec, change):
    """Momentum may be absent, for its first step; some rules keep no step count."""
    return {
        missing_state: not spec.rule.states[0].option,
        bad_step: spec.rule.keeps_step,
        step_of_nan: spec.rule.keeps_step,
        step_in_words: spec.rule.keeps_step,
        missing_step: spec.rule.keeps_step,
        step_per_element: spec.rule.keeps_step,
        missing_optional_state: spec.rule.name in ("adam", "rmsprop"),
        optional_state_of_another_shape: spec.rule.name in ("adam", "rmsprop"),
    }.get(change, True)


@pytest.mark.parametrize(
    "spec, change",
    [(spec, change) for spec in SPECS for change in WRONG if applies(spec, change)],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_checkpoint_that_does_not_fit_is_refused_whole(spec, change):
    params = make_params(SHAPES)
    optimizer = spec.make(groups_of(params))
    train(optimizer, params, 3)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for state in checkpoint["state"].values():
        for value in state.values():
            value.add_(1)
    checkpoint["param_groups"][0]["lr"] = 0.9
    change(checkpoint)
    reason = re.compile(WRONG[change], re.DOTALL)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=reason) as raised:
        optimizer.load_state_dict(checkpoint)
    assert f"{spec.name}.load_state_dict: " in str(raised.value)
    assert "unchanged" in str(raised.value)

    plain_params = make_params(SHAPES)
    plain = spec.make(groups_of(plain_params))
    train(plain, plain_params, 3)
    train(optimizer, params, 2, 3)
    train(plain, plain_params, 2, 3)
    assert_same_bits(params, plain_params)


def test_refusal_lists_the_first_five_differences():
    shapes = [(3 + i,) for i in range(7)]
    params, others = make_params(shapes), make_params([(4 + i,) for i in range(7)])
    optimizer, other = fusedopt.Lion(params), fusedopt.Lion(others)
    train(other, others, 1)
    with pytest.raises(ValueError, match="and 2 more") as raised:
        optimizer.load_state_dict(other.state_dict())
    assert str(raised.value).count("has shape") == 5


CLASSES = sorted({case.optimizer for case in CASES} - {"AdamW"})


def states_of(name):
    rule = next(spec.rule for spec in SPECS if spec.name == name)
    return {state.name for state in rule.states if state.option is None} | {rule.extra}


# Those that keep the same take over from each other, as in torch: AdamW's moments are a start for LAMB.
STRANGERS = [pair for pair in itertools.permutations(CLASSES, 2) if states_of(pair[0]) != states_of(pair[1])]


@pytest.mark.parametrize("source, into", STRANGERS)
def test_checkpoint_of_another_class_is_refused(source, into):
    options = {"lr": 0.01, "weight_decay": 0.125}
    momentum = {"momentum": 0.9}
    others, params = make_params(SHAPES), make_params(SHAPES)
    other = getattr(fusedopt, source)(others, **options, **(momentum if source == "SGD" else {}))
    optimizer = getattr(fusedopt, into)(params, **options, **(momentum if into == "SGD" else {}))
    train(other, others, 2)
    train(optimizer, params, 2)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="does not fit this optimizer"):
        optimizer.load_state_dict(saved(other))


@every_class
def test_step_after_a_load_uses_the_loaded_states(spec):
    """Though a plan of the old ones is cached."""
    params = make_params(SHAPES)
    optimizer = spec.make(params)
    train(optimizer, params, 2)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for state in checkpoint["state"].values():
        for name, value in state.items():
            if value.dim() > 0:
                state[name] = randn(value.shape, seed=3).abs()
    middle = clone_params(params)
    optimizer.load_state_dict(checkpoint)
    train(optimizer, params, 2, 2)

    fresh = spec.make(middle)
    fresh.load_state_dict(checkpoint)
    train(fresh, middle, 2, 2)
    assert_same_bits(params, middle)
    for param, twin in zip(params, middle, strict=True):
        assert_same_bits(optimizer.state.get(param, {}).values(), fresh.state.get(twin, {}).values(), "state")
