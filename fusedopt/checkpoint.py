"""Reads a checkpoint into state and groups. Everything is checked before anything is made."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from fusedopt.checks import count_problem, state_problem
from fusedopt.entry import compute_dtype
from fusedopt.errors import name_param, named_params
from fusedopt.rules import Rule
from fusedopt.states import holding

# What tells optimizers that have no rule here: torch.optim's Adadelta, Adamax, ASGD and Rprop, and those of bitsandbytes.
OTHER_OPTIMIZERS = ({"acc_delta"}, {"exp_inf"}, {"ax", "eta", "mu"}, {"prev", "step_size"}, {"state1"})


@dataclass
class Checkpoint:
    """State, groups and warnings, ready to be taken over."""

    state: dict[Any, Any]
    param_groups: list[dict[str, Any]]
    warnings: list[str]


@dataclass
class Target:
    """The optimizer that a checkpoint is for."""

    name: str  # of its class
    rule: Rule
    param_groups: list[dict[str, Any]]
    group_defaults: Mapping[str, Any]  # the options that every group has
    defaults: Mapping[str, Any]  # these, and the options of the whole optimizer
    check_options: Callable[[dict[str, Any]], None]  # raises ValueError or TypeError for a group


@dataclass
class _Loaded:
    """One parameter of the optimizer, and where its state is in the checkpoint."""

    param: torch.Tensor
    saved_id: Any
    where: str
    group: Mapping[str, Any]  # the saved options, completed by the optimizer's defaults


def read(target: Target, state_dict: Mapping[str, Any]) -> Checkpoint:
    """What a checkpoint holds, in the form that steps keep it in. Nothing of it is changed or kept.

    Raises:
        ValueError: it does not fit the optimizer; the first differences are listed.
    """
    saved_groups = _in_order(target.param_groups, state_dict.get("param_groups"))
    differences = [*_group_differences(target, saved_groups, state_dict.get("state"))]
    if not differences:
        groups = [_without_clip(group) for group in deepcopy(saved_groups)]
        saved_state = dict(state_dict["state"])
        if target.rule.keeps_step:
            _move_steps_out_of_groups(groups, saved_state)
        differences = [*_name_differences(target.param_groups, groups)]
    if not differences:
        loaded = [*_matched(target, groups)]
        differences = [*_state_differences(target, loaded, saved_state)]
    if differences:
        listed = "\n  ".join(differences[:5])
        more = f"\n  and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise ValueError(
            f"{target.name}.load_state_dict: the checkpoint does not fit this optimizer, "
            f"which is unchanged:\n  {listed}{more}"
        )

    state: dict[Any, Any] = defaultdict(dict)
    for entry in loaded:
        if entry.saved_id in saved_state:
            state[entry.param] = _state_of(target.rule, entry, saved_state[entry.saved_id])
    known = {entry.saved_id for entry in loaded}
    state.update({key: deepcopy(value) for key, value in saved_state.items() if key not in known})
    warnings = [*_warnings(target, state_dict, groups)]
    for group, saved in zip(target.param_groups, groups, strict=True):
        saved["params"] = group["params"]
        if "param_names" in group:
            saved["param_names"] = group["param_names"]
    return Checkpoint(state, groups, warnings)


# ---- groups ----------------------------------------------------------------------------------------------------


def _without_clip(group: Mapping[str, Any]) -> dict[str, Any]:
    """Apex's LAMB keeps `max_grad_norm` in its groups; here it is an option of the whole optimizer (`_warnings`)."""
    return {name: value for name, value in group.items() if name != "max_grad_norm"}


def _in_order(groups: list[dict[str, Any]], saved_groups: Any) -> Any:
    """The saved groups; in the order of the optimizer's, where each has the names of another one of these."""
    if not isinstance(saved_groups, list) or not all(isinstance(saved, Mapping) for saved in saved_groups):
        return saved_groups
    ours = [sorted(group.get("param_names") or ()) for group in groups]
    named = [saved.get("param_names") for saved in saved_groups]
    theirs = [sorted(map(str, names)) if isinstance(names, list) else [] for names in named]
    if [] in ours or ours == theirs or len({*map(tuple, ours)}) < len(ours) or sorted(ours) != sorted(theirs):
        return saved_groups
    return [saved_groups[theirs.index(names)] for names in ours]


def _group_differences(target: Target, saved_groups: Any, saved_state: Any) -> Iterator[str]:
    if not isinstance(saved_groups, list) or not isinstance(saved_state, Mapping):
        yield "it needs 'param_groups', a list, and 'state', a dict; it is no optimizer's state_dict()"
        return
    groups = target.param_groups
    if len(saved_groups) != len(groups):
        yield f"it has {len(saved_groups)} parameter groups, the optimizer {len(groups)}"
        return
    for g, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list):
            yield f"param_groups[{g}] has no list 'params'"
            continue
        if len(saved["params"]) != len(group["params"]):
            yield f"param_groups[{g}] has {len(saved['params'])} parameters, the optimizer's {len(group['params'])}"
        names = saved.get("param_names") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            yield f"param_groups[{g}]['param_names'] is no list of names"
        try:
            target.check_options({**target.group_defaults, **_without_clip(saved)})
        except (ValueError, TypeError) as error:
            yield f"param_groups[{g}]: {error}"


def _move_steps_out_of_groups(groups: list[dict[str, Any]], saved_state: dict[Any, Any]) -> None:
    """Apex, optimi and others keep one step count per group: it becomes that of each parameter that has none."""
    for group in groups:
        without = [
            saved_id
            for saved_id in group["params"]
            if isinstance(saved_state.get(saved_id), Mapping)
            and saved_state[saved_id]
            and "step" not in saved_state[saved_id]
            and "previous_grad" not in saved_state[saved_id]  # pytorch_optimizer's Adan has the negative one
        ]
        if without and group.get("step") is not None:
            step = group.pop("step")
            saved_state.update({saved_id: {"step": step, **saved_state[saved_id]} for saved_id in without})


def _warnings(target: Target, state_dict: Mapping[str, Any], groups: list[dict[str, Any]]) -> Iterator[str]:
    """What the training that made the checkpoint did and the optimizer will not do."""
    name = target.name
    for g, (group, saved) in enumerate(zip(target.param_groups, groups, strict=True)):
        known = {"params", "param_names", *target.defaults, *target.rule.own_options, *group}
        unknown = [f"{option}=True" for option, value in saved.items() if value is True and option not in known]
        if unknown:
            yield f"param_groups[{g}] of the checkpoint has {', '.join(unknown)}; {name} has no such option and ignores it"
    places = [state_dict.get("fusedopt"), *state_dict["param_groups"]]
    limits = [place.get("max_grad_norm") for place in places if isinstance(place, Mapping)]
    limit = next((limit for limit in limits if isinstance(limit, (int, float)) and 0 < limit < math.inf), None)
    if limit is not None and target.defaults.get("max_grad_norm") is None:
        yield (
            f"the checkpoint was trained with max_grad_norm={limit}, and this optimizer does not clip; to go on clipping, "
            f"set its attribute max_grad_norm to {limit}"
        )


# ---- which state is whose --------------------------------------------------------------------------------------


def _names(param_groups: list[dict[str, Any]]) -> list[str | None]:
    """The name of each parameter, over all groups; None where it has none."""
    return [name for group in param_groups for _, name, _ in named_params(group)]


def _are_same_names(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> bool:
    """Whether both sides name every parameter, and have the same names, in whatever order."""
    ours, theirs = _names(groups), _names(saved_groups)
    return None not in ours and len(set(ours)) == len(ours) == len(theirs) and set(ours) == set(theirs)


def _name_differences(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> Iterator[str]:
    """Where names and positions contradict each other, so that neither tells whose a state is."""
    if _are_same_names(groups, saved_groups):
        for g, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
            moved = sorted({*group["param_names"]} - {*saved["param_names"]})
            if moved:
                yield f"parameter {moved[0]!r} is in param_groups[{g}] here and in another group there, with other options"
        return
    ours, theirs = (
        {name: i for i, name in enumerate(_names(some)) if name is not None} for some in (groups, saved_groups)
    )
    for name, position in ours.items():
        if theirs.get(name, position) != position:
            only_here = ", ".join(map(repr, sorted(ours.keys() - theirs.keys())[:3])) or "no name"
            yield (
                f"parameter {name!r} is at another position there, and {only_here} is missing, so states can be matched "
                "neither by name nor by position"
            )


def _matched(target: Target, saved_groups: list[dict[str, Any]]) -> Iterator[_Loaded]:
    """By name where both sides have the same names, else by position, as in torch."""
    saved_ids = [saved_id for group in saved_groups for saved_id in group["params"]]
    if _are_same_names(target.param_groups, saved_groups):
        id_of = dict(zip(_names(saved_groups), saved_ids, strict=True))
        saved_ids = [id_of[name] for name in _names(target.param_groups)]
    remaining = iter(saved_ids)
    for g, (group, saved) in enumerate(zip(target.param_groups, saved_groups, strict=True)):
        options = {**target.group_defaults, **saved}
        for i, name, param in named_params(group):
            yield _Loaded(param, next(remaining), name_param(g, i, name, param), options)


# ---- states ----------------------------------------------------------------------------------------------------


def _is_own(rule: Rule, name: Any) -> bool:
    """Whether it is a state that the rule keeps; a count of steps fits everywhere."""
    return name == "step" or name in rule.state_names


def _state_differences(target: Target, loaded: list[_Loaded], saved_state: Mapping[Any, Any]) -> Iterator[str]:
    rule, name_of_class = target.rule, target.name
    own_states = {state.name: state for state in rule.states}
    param_of: dict[Any, torch.Tensor] = {}
    for entry in loaded:
        where, param = entry.where, entry.param
        if param_of.setdefault(entry.saved_id, param) is not param:
            yield f"{where}: it has the same id, {entry.saved_id!r}, as another parameter"
        saved = saved_state.get(entry.saved_id)
        if saved is None or (isinstance(saved, Mapping) and all(value is None for value in saved.values())):
            continue
        if not isinstance(saved, Mapping):
            yield f"{where}: its state is a {type(saved).__name__}, not a dict"
            continue
        is_new = own_states.keys().isdisjoint(saved)
        for names in OTHER_OPTIMIZERS if is_new else ():
            if names <= saved.keys():
                yield f"{where}: {name_of_class} has no state {', '.join(map(repr, sorted(names)))}"
        # torch's SGD too has no momentum before its first step with momentum; else every state is there from the first step on.
        stored = [kept.name for kept in rule.stored(entry.group) if kept and (rule.keeps_step or kept.option is None)]
        # A frozen one has never stepped; what it has is a wrapper's.
        is_frozen = is_new and "step" not in saved and not param.requires_grad
        for name in [] if is_frozen else [*rule.counts_kept, *stored]:
            if saved.get(name) is None:
                yield f"{where}: state {name!r} is missing (it has {', '.join(map(str, saved))})"
        for name, value in saved.items():
            if not _is_own(rule, name):
                if name in Rule.all_state_names():
                    yield f"{where}: {name_of_class} has no state {name!r}"
            elif value is not None:
                kept = own_states.get(name)
                shape = rule.state_shape(entry.group, kept, param.shape) if kept else ()
                problem = state_problem(value, param, shape) if kept else count_problem(value)
                if problem:
                    yield f"{where}: state {name!r} {problem[1]}"
    tensors_of_rules = Rule.all_state_names() - {"step"}  # a user's own entry may well have a step
    strangers = [
        repr(key)
        for key, value in saved_state.items()
        if key not in param_of and isinstance(value, Mapping) and not tensors_of_rules.isdisjoint(value)
    ]
    if strangers:
        yield f"state has keys that are no parameter's: {', '.join(strangers[:3])}{', …' * (len(strangers) > 3)}"


def _state_of(rule: Rule, entry: _Loaded, saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """A parameter's state: the rule's in the form that steps keep them in, others as they are, on its device."""
    own_states = {state.name: state for state in rule.states}
    param, result = entry.param, {}
    for name, value in saved.items():
        if name in own_states and value is not None:
            shape = rule.state_shape(entry.group, own_states[name], param.shape)
            result |= holding(rule, own_states[name], param, shape, value)
        elif _is_own(rule, name):
            if value is not None:
                dtype = torch.float32 if name == "step" else compute_dtype(param)
                result[name] = torch.tensor(float(value), dtype=dtype, device="cpu")
        else:
            result[name] = _copied(value, param.device)
    return result


def _copied(value: Any, device: torch.device) -> Any:
    """A copy, with all tensors in it on a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, device) for item in value)
    if type(value) is dict:
        return {key: _copied(item, device) for key, item in value.items()}
    return deepcopy(value)
