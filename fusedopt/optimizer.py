"""The torch.optim contract: groups, state, checkpoints, hooks, AMP, and `step`. No formula and no memory address here."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch

from fusedopt import backends, clip, dtensor
from fusedopt.errors import UNCHANGED, name_param, named_params, short_dtype
from fusedopt.plan import PARAM_DTYPES, Plan, compute_dtype, instead_of, new_state
from fusedopt.rules import Rule, number, read_options
from fusedopt.sparse import check_mode


class FusedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers: everything but the rule.

    Args:
        params: as for any torch.optim optimizer: tensors, ``(name, tensor)`` pairs, or dicts of groups.
        defaults: the options of a group under torch.optim's names.
        own_options: options that torch.optim does not have. A group mentions one only if it is not at its default, so
            that a checkpoint made with torch's options has exactly torch's keys.
        max_grad_norm: clip to this global 2-norm in every step; None: do not.
        nonfinite: what to do when the gradient norm is NaN or infinite: ``"propagate"`` it as torch does, ``"skip"`` the
            step (counted in `skipped_steps`), or raise an ``"error"`` that names the parameter.
        backend: ``"auto"``, ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``; None: the environment's
            FUSEDOPT_BACKEND, else ``"auto"``.
        sparse: ``"lazy"`` takes sparse gradients that are not exact: rows they do not touch stand still.
    """

    rule: ClassVar[Rule]
    # Tells torch.amp.GradScaler that step() takes grad_scale and found_inf from attributes which the scaler sets.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        defaults: dict[str, Any],
        own_options: Mapping[str, Any],
        max_grad_norm: float | None,
        nonfinite: str,
        backend: str | None,
        sparse: str | None = None,
    ):
        if defaults.get("differentiable"):
            raise RuntimeError(f"{type(self).__name__} does not support differentiable=True; use torch.optim for it")
        self._clip = clip.Clip(max_grad_norm, nonfinite)
        self._backend = backend
        self.sparse = sparse
        resolved = backends.resolve(backend)
        self._plan: Plan | None = None
        self._in_step: dict[int, int] = {}  # process -> the thread that is in a step
        changed = {name: value for name, value in own_options.items() if value != self.rule.own_options[name]}
        super().__init__(params, {**defaults, **changed})
        if resolved == "auto":
            for kind in {param.device.type for group in self.param_groups for param in group["params"]}:
                backends.warn_of_fallback(kind)

    # ---- groups ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does.

        Raises:
            ValueError, TypeError: its options are out of range, or a parameter's dtype is not supported. Nothing is added.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            where = f"{type(self).__name__}: param_groups[{index}]"
            try:
                read_options(self.rule, group)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{where}: {error}") from None
            for i, name, param in named_params(group):
                if param.requires_grad and param.dtype not in PARAM_DTYPES:
                    supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in PARAM_DTYPES)
                    raise TypeError(
                        f"{type(self).__name__}: {name_param(index, i, name, param)}: "
                        f"parameters of this dtype are not supported (supported: {supported})"
                    )
        except BaseException:
            self.param_groups.pop()
            raise

    # ---- the step ----------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError, TypeError, RuntimeError: naming the parameter or option at fault. Then parameters, states and
                step counts are exactly what they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._planned("step") as plan:
            self._clip.step(plan, *self._of_scaler())
        return loss

    def _of_scaler(self) -> tuple[Any, Any]:
        """Set by GradScaler: what to divide gradients by, and whether it found one that is not finite."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _planned(self, caller: str) -> contextlib.AbstractContextManager[Plan]:
        """The plan for the gradients there are now, validated and holding them, for one thread at a time.

        State made for an update that then does not happen is gone again.
        """
        return self._with_plan(caller, "_plan", self.rule, self.param_groups, self.state, {})

    @contextlib.contextmanager
    def _with_plan(
        self,
        caller: str,
        slot: str,
        rule: Rule,
        param_groups: list[dict[str, Any]],
        state: dict[torch.Tensor, dict[str, Any]],
        sources: Mapping[torch.Tensor, torch.Tensor],
    ) -> Iterator[Plan]:
        """The same of any rule, groups and states; between steps the plan is the attribute ``slot``."""
        owner, process, thread, plan = f"{type(self).__name__}.{caller}", os.getpid(), threading.get_ident(), None
        try:
            # One operation, so that no thread can come between. By process, so that a fork during a step leaves the child
            # free; by thread, so that one that an interrupt threw out of its step can go on.
            if self._in_step.setdefault(process, thread) != thread:
                raise RuntimeError(f"{owner}: another thread is in a step of the same optimizer; {UNCHANGED}")
            plan = getattr(self, slot)
            if plan is not None:
                plan.owner = owner
            is_lazy = self.sparse == "lazy"
            if plan is None or plan.is_lazy != is_lazy or not plan.refresh(param_groups, state):
                before = plan
                if before is not None:
                    before.release()
                setattr(self, slot, None)
                plan = Plan(owner, rule, param_groups, state, is_lazy)
                plan.make(param_groups, self._backend, before, sources)  # apart: an interrupt finds the state it made
                if not plan.refresh(param_groups, state):
                    raise RuntimeError(f"{owner}: parameters or gradients changed while they were read; {UNCHANGED}")
                setattr(self, slot, plan)
            yield plan
        finally:
            try:
                if plan is not None:
                    try:
                        plan.release()
                    finally:
                        if plan.discard_fresh_state():
                            setattr(self, slot, None)
            finally:
                if self._in_step.get(process) == thread:
                    del self._in_step[process]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch; also drops a `clip_grad_norm_` that no step has used."""
        super().zero_grad(set_to_none)
        self._clip.forget()

    # ---- clipping ----------------------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> torch.Tensor:
        """Clips by global norm at the next `step`; see `fusedopt.clip_grad_norm_`. Gradients are not written."""
        return clip.clip_grad_norm_(self, max_norm, error_if_nonfinite=error_if_nonfinite)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Global 2-norm of the last unscaled gradients before clipping, 0-d; None before a step or clip computed one."""
        return self._clip.grad_norm

    @property
    def max_grad_norm(self) -> float | None:
        """The limit that every step clips to; None: no clipping. May be changed between steps."""
        return self._clip.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._clip.max_grad_norm = clip.check_max_norm("max_grad_norm", value)

    @property
    def nonfinite(self) -> str:
        """What a NaN or infinite gradient norm does: ``"propagate"``, ``"skip"`` or ``"error"``. May be changed."""
        return self._clip.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: str) -> None:
        self._clip.nonfinite = clip.check_nonfinite(value)

    @property
    def skipped_steps(self) -> int | torch.Tensor:
        """How many steps changed nothing because a gradient was not finite; 0-d where a device decides, without waiting."""
        return self._clip.skipped_steps

    @property
    def backend(self) -> str | None:
        """What was asked for at construction; None: the environment's FUSEDOPT_BACKEND, else ``"auto"``."""
        return self._backend

    @property
    def sparse(self) -> str | None:
        """``"lazy"``: sparse gradients move only the rows they touch; None: they must do so by themselves. May be changed."""
        return self._sparse

    @sparse.setter
    def sparse(self, value: str | None) -> None:
        if check_mode(value) is not None and not self.rule.takes_sparse:
            raise ValueError(f"{type(self).__name__} takes no sparse gradients: sparse must be None, got {value!r}")
        self._sparse = value

    # ---- copies and checkpoints --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_clip": self._clip, "_sparse": self._sparse, "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None
        self.__dict__.setdefault("_in_step", {})
        self.__dict__.setdefault("_sparse", None)  # a pickle of before there was one
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.compiler.disable
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of its twin in torch.optim. The dict is neither changed nor kept.

        States become float32 (float64 for float64 parameters) on their parameter's device, whatever they were saved in.

        Raises:
            ValueError: the checkpoint is of another model or class; the first differences are listed. Then the
                optimizer is unchanged.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{type(self).__name__}.load_state_dict needs a dict, got a {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        differences = [*self._group_differences(state_dict)]
        if not differences:
            param_groups = deepcopy(state_dict["param_groups"])
            pairs = zip(self.param_groups, param_groups, strict=True)
            ids = [
                (saved_id, param, f"param_groups[{g}]['params'][{i}]", {**self.defaults, **saved})
                for g, (group, saved) in enumerate(pairs)
                for i, (saved_id, param) in enumerate(zip(saved["params"], group["params"], strict=True))
            ]
            differences = [*self._state_differences(ids, state_dict["state"])]
        if differences:
            listed = "\n  ".join(differences[:5])
            more = f"\n  and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the checkpoint does not fit this optimizer, "
                f"which is unchanged:\n  {listed}{more}"
            )

        state = defaultdict(dict)
        known = {saved_id for saved_id, *_ in ids}
        for saved_id, param, _, group in ids:
            if saved_id in state_dict["state"]:
                saved = state_dict["state"][saved_id]
                state[param] = {
                    name: self._loaded(param, group, name, value) for name, value in saved.items() if value is not None
                }
        state.update({key: deepcopy(value) for key, value in state_dict["state"].items() if key not in known})
        for group, saved in zip(self.param_groups, param_groups, strict=True):
            saved["params"] = group["params"]
            if "param_names" in group:
                saved.setdefault("param_names", group["param_names"])
        self.__setstate__({"state": state, "param_groups": param_groups})
        self._clip.forget()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _group_differences(self, state_dict: dict[str, Any]) -> Iterator[str]:
        saved_groups, saved_state = state_dict.get("param_groups"), state_dict.get("state")
        if not isinstance(saved_groups, list) or not isinstance(saved_state, Mapping):
            yield "it needs 'param_groups', a list, and 'state', a dict; it is no optimizer's state_dict()"
            return
        if len(saved_groups) != len(self.param_groups):
            yield f"it has {len(saved_groups)} parameter groups, the optimizer {len(self.param_groups)}"
            return
        for g, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list):
                yield f"param_groups[{g}] has no list 'params'"
                continue
            if len(saved["params"]) != len(group["params"]):
                yield f"param_groups[{g}] has {len(saved['params'])} parameters, the optimizer's {len(group['params'])}"
            try:
                read_options(self.rule, {**self.defaults, **saved})
            except (ValueError, TypeError) as error:
                yield f"param_groups[{g}]: {error}"

    def _state_differences(self, ids: list[tuple], saved_state: Mapping[Any, Any]) -> Iterator[str]:
        own_states = {state.name: state for state in self.rule.states}
        scalars = ["step"] * self.rule.keeps_step + [self.rule.extra] * bool(self.rule.extra)
        needed = [*scalars, *(name for name, state in own_states.items() if state.option is None)]
        param_of: dict[Any, torch.Tensor] = {}
        for saved_id, param, where, group in ids:
            if param_of.setdefault(saved_id, param) is not param:
                yield f"{where}: it has the same id, {saved_id!r}, as another parameter"
            saved = saved_state.get(saved_id)
            if saved is None or (isinstance(saved, Mapping) and all(value is None for value in saved.values())):
                continue
            if not isinstance(saved, Mapping):
                yield f"{where}: its state is a {type(saved).__name__}, not a dict"
                continue
            for name in needed:
                if saved.get(name) is None:
                    yield f"{where}: state {name!r} is missing (it has {', '.join(map(str, saved))})"
            for name, value in saved.items():
                is_own = name in own_states or name in ("step", self.rule.extra)
                if not is_own:
                    yield f"{where}: {type(self).__name__} has no state {name!r}"
                elif value is not None:
                    kept = own_states.get(name)
                    shape = self.rule.state_shape(group, kept, param.shape) if kept else ()
                    reason = _misfit(value, param, shape) if kept else _no_count(value)
                    if reason:
                        yield f"{where}: state {name!r} {reason}"

    def _loaded(self, param: torch.Tensor, group: Mapping[str, Any], name: str, value: Any) -> Any:
        """A copy of one saved value in the form that steps keep it in."""
        for state in self.rule.states:
            if state.name == name:
                own = new_state(param, self.rule.state_shape(group, state, param.shape))
                return own.copy_(value)
        if name == "step" or name == self.rule.extra:
            dtype = torch.float32 if name == "step" else compute_dtype(param)
            return torch.tensor(float(value), dtype=dtype, device="cpu")
        return value.detach().clone() if isinstance(value, torch.Tensor) else deepcopy(value)


def _misfit(value: Any, param: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    """Why a saved value cannot become a state of that parameter."""
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.shape != shape:
        return f"has shape {tuple(value.shape)}{instead_of(shape, param)}, the parameter {tuple(param.shape)}"
    problem = dtensor.misplaced(value, param)
    if problem:
        return f"is {problem}"
    if value.layout != torch.strided or value.is_meta:
        return "is on the meta device, it has no values" if value.is_meta else f"has layout {value.layout}"
    is_number = value.is_floating_point() or value.is_complex()
    if not is_number or value.is_complex() != param.is_complex():
        return f"is {short_dtype(value)}, the parameter {short_dtype(param)}"
    return None


def _no_count(value: Any) -> str | None:
    """Why a saved value cannot become a step count, or another scalar that counts up."""
    if isinstance(value, torch.Tensor) and (value.numel() != 1 or value.is_meta):
        return f"has shape {tuple(value.shape)} on {value.device}, not one value"
    try:
        count = number("it", value)
    except ValueError:
        return f"is {value!r}, not a number"
    return None if 0 <= count < math.inf else f"is {count}"
