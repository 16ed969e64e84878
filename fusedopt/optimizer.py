"""The torch.optim contract: groups, state, checkpoints, hooks, AMP, and `step`. No formula and no memory address here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, overload

import torch
from typing_extensions import Unpack

from fusedopt import backends, checkpoint, states
from fusedopt.checks import PARAM_DTYPES, listed
from fusedopt.compiler import not_compiled
from fusedopt.errors import name_param, named_params, warn
from fusedopt.options import (
    OPTIMIZER_OPTIONS,
    SparseOptions,
    check_max_grad_norm,
    check_max_norm,
    check_nonfinite,
    check_sparse,
    describe,
    taken,
)
from fusedopt.plan import NO_SOURCES, Plans, Request
from fusedopt.record import StepRecord
from fusedopt.rules import Rule, check_no_own, read_options
from fusedopt.stalls import StallWatch
from fusedopt.step import Planned, defer_clip, step
from fusedopt.types import Backend, Loss, Nonfinite, Params, Sparse


class FusedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers: everything but the rule.

    Args:
        params: as for any torch.optim optimizer: tensors, ``(name, tensor)`` pairs, or dicts of groups.
        defaults: the options of a group under torch.optim's names.
        own_options: options that torch.optim does not have. A group mentions one only if it is not at its default, so
            that a checkpoint made with torch's options has exactly torch's keys.
        options: those of the whole optimizer (`fusedopt.options`). They are in `defaults`, so that
            ``type(opt)(params, **opt.defaults)`` makes an optimizer like this one, and never in a group.

    With ``fused=True`` among the defaults, a GradScaler leaves unscaling and the check for infinities to `step`, as it does
    for torch's fused optimizers.
    """

    rule: ClassVar[Rule]
    # Names and defaults of the options that are in `defaults`, but not in a group.
    _whole_options: ClassVar[Mapping[str, Any]] = OPTIMIZER_OPTIONS

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        describe(cls)

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        own_options: Mapping[str, Any],
        **options: Unpack[SparseOptions],
    ):
        whole = taken(type(self), options, self.rule.takes_sparse)
        if defaults.get("differentiable"):
            raise RuntimeError(f"{type(self).__name__} does not support differentiable=True; use torch.optim for it")
        resolved = backends.resolve(whole["backend"])
        # What methods modify is in objects, so that wrappers that copy this optimizer's attributes share it.
        self._plans, self._record, self._stalls = Plans(), StepRecord(), StallWatch()
        changed = {name: value for name, value in own_options.items() if value != self.rule.own_options[name]}
        whole["max_grad_norm"] = check_max_grad_norm(whole["max_grad_norm"])
        whole["nonfinite"] = check_nonfinite(whole["nonfinite"])
        self._check_sparse(whole.get("sparse"))
        whole = {**self.__dict__.pop("defaults", {}), **whole}  # a subclass put its own there
        super().__init__(params, {**defaults, **changed, **whole})
        if isinstance(params, ParamGroups):
            self._take_over_options(params)
        self.param_groups = ParamGroups(self.param_groups, self)
        if self.defaults.get("fused"):
            # Tells torch.amp.GradScaler that step() takes grad_scale and found_inf from attributes which the scaler sets.
            self._step_supports_amp_scaling = True
        if resolved == "auto":
            for kind in {param.device.type for group in self.param_groups for param in group["params"]}:
                backends.warn_of_fallback(kind)

    def _group_defaults(self) -> dict[str, Any]:
        """The options in `defaults` that every group has."""
        return {name: value for name, value in self.defaults.items() if name not in self._whole_options}

    def _take_over_options(self, groups: ParamGroups) -> None:
        """Copies the options of the optimizer whose groups these are, where none were given."""
        if groups.rule is not self.rule:
            return
        copied = {
            name: groups.defaults[name]
            for name, default in self._whole_options.items()
            if name in self.defaults and self.defaults[name] == default != groups.defaults.get(name, default)
        }
        self.defaults.update(copied)
        if copied:
            text = ", ".join(f"{name}={value!r}" for name, value in copied.items())
            warn(
                f"{type(self).__name__}: copied {text} from the optimizer that these param_groups belong to; "
                "set the attribute of that name to change it"
            )

    def __repr__(self) -> str:
        options = "".join(
            f"    {name}: {self.defaults[name]}\n" for name in self._whole_options if name in self.defaults
        )
        return f"{super().__repr__().removesuffix(')')}All groups\n{options})"

    # ---- groups ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does.

        Raises:
            ValueError, TypeError: its options are out of range, or a parameter's dtype is not supported. Nothing is added.
        """
        given = set(param_group) if isinstance(param_group, dict) else set()
        try:
            super().add_param_group(param_group)
        finally:  # torch gives a group all defaults, also one that it then refuses
            for name in self._whole_options.keys() - given if isinstance(param_group, dict) else ():
                param_group.pop(name, None)
        index = len(self.param_groups) - 1
        group = self.param_groups[index]
        try:
            where = f"{type(self).__name__}: param_groups[{index}]"
            try:
                self._check_options(group)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{where}: {error}") from None
            for i, name, param in named_params(group):
                if param.requires_grad and param.dtype not in PARAM_DTYPES:
                    raise TypeError(
                        f"{type(self).__name__}: {name_param(index, i, name, param)}: "
                        f"parameters of this dtype are not supported (supported: {listed(PARAM_DTYPES)})"
                    )
            if "betas" in group and not isinstance(group["betas"], tuple):
                group["betas"] = tuple(map(_plain_number, group["betas"]))  # so that checkpoints hold no foreign types
        except BaseException:
            self.param_groups.pop()
            raise

    # ---- the step ----------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @not_compiled
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
        if self._stalls.answers:
            self._stalls.report()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # set by GradScaler
        step(self._request("step"), self._record, self._stalls, self.defaults, scale, found_inf)
        return loss

    def _request(self, caller: str) -> Request:
        """For a plan of the gradients there are now; see `Planned`."""
        return self._request_for("step", caller, self.rule, self.param_groups, self.state, NO_SOURCES)

    def _request_for(
        self,
        purpose: str,
        caller: str,
        rule: Rule,
        param_groups: list[dict[str, Any]],
        state: dict[torch.Tensor, dict[str, Any]],
        sources: Mapping[torch.Tensor, torch.Tensor],
    ) -> Request:
        """The same for any rule, groups and states; between steps the plan is kept under its purpose."""
        whole, owner = self.defaults, f"{type(self).__name__}.{caller}"
        kept = self._plans, purpose, whole.get("backend")
        return Request(*kept, owner, rule, param_groups, state, whole.get("sparse") == "lazy", whole, sources)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch; also drops a `clip_grad_norm_` that no step has used."""
        super().zero_grad(set_to_none)
        self._record.pending = None

    def _make_first_state(self, group: dict[str, Any], param: torch.Tensor) -> None:
        """The state that a parameter starts from, ahead of its first step; what there is stays."""
        state = self.state[param]
        if self.rule.keeps_step:
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
        for kept in self.rule.stored(group):
            if kept is not None and state.get(states.names(self.rule, kept, param)[0]) is None:
                state.update(states.first(self.rule, group, kept, param))

    # ---- clipping ----------------------------------------------------------------------------------------------

    @not_compiled
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> torch.Tensor:
        """Clips by global norm at the next `step`; see `fusedopt.clip_grad_norm_`. Gradients are not written."""
        limit = check_max_norm("max_norm", max_norm)
        with Planned(self._request("clip_grad_norm_")) as plan:
            return defer_clip([plan], [self._record], limit, error_if_nonfinite)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Global 2-norm of the last unscaled gradients before clipping, 0-d; None before a step or clip computed one."""
        return self._record.grad_norm

    @property
    def max_grad_norm(self) -> float | None:
        """The limit that every step clips to; None: no clipping. May be changed between steps."""
        return self.defaults.get("max_grad_norm")

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self.defaults["max_grad_norm"] = check_max_grad_norm(value)

    @property
    def nonfinite(self) -> Nonfinite:
        """What a NaN or infinite gradient norm does: ``"propagate"``, ``"skip"`` or ``"error"``. May be changed."""
        return self.defaults.get("nonfinite", "propagate")

    @nonfinite.setter
    def nonfinite(self, value: Nonfinite) -> None:
        self.defaults["nonfinite"] = check_nonfinite(value)

    @property
    def skipped_steps(self) -> int | torch.Tensor:
        """How many steps changed nothing because a gradient was not finite; 0-d where a device decides, without waiting."""
        return self._record.skipped_steps

    @property
    def backend(self) -> Backend | None:
        """What was asked for at construction; None: the environment's FUSEDOPT_BACKEND, else ``"auto"``."""
        return self.defaults.get("backend")

    @property
    def sparse(self) -> Sparse | None:
        """``"lazy"``: sparse gradients move only the rows they touch; None: they must do so by themselves. May be changed."""
        return self.defaults.get("sparse")

    @sparse.setter
    def sparse(self, value: Sparse | None) -> None:
        self._check_sparse(value)
        if self.rule.takes_sparse:
            self.defaults["sparse"] = value

    def _check_sparse(self, value: Sparse | None) -> None:
        if check_sparse(value) is not None and not self.rule.takes_sparse:
            raise ValueError(f"{type(self).__name__} takes no sparse gradients: sparse must be None, got {value!r}")

    # ---- copies and checkpoints --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        kept = {
            name: self.__dict__[name] for name in ("_record", "_step_supports_amp_scaling") if name in self.__dict__
        }
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_plans", Plans()).kept.clear()
        self.__dict__.setdefault("_stalls", StallWatch())
        self.__dict__.setdefault("_record", StepRecord())
        for group in self.param_groups:
            for name, value in self._group_defaults().items():
                group.setdefault(name, value)
        self.param_groups = ParamGroups(self.param_groups, self)

    def state_dict(self) -> dict[str, Any]:
        """As torch. Where every step clips, one more entry says so, for `load_state_dict` to compare: ``"fusedopt"``."""
        held = self.state
        decoded = {
            param: states.decoded(self.rule, param, held[param])
            for group in self.param_groups
            for param in group["params"]
            if isinstance(held.get(param), dict)
        }
        try:  # hooks and torch see decoded states only
            if any(values is not held[param] for param, values in decoded.items()):
                self.state = defaultdict(dict, {**held, **decoded})
            result = super().state_dict()
        finally:
            self.state = held
        for group in result["param_groups"]:
            for name in OPTIMIZER_OPTIONS:
                group.pop(name, None)  # if something filled groups from `defaults`
        if self.max_grad_norm is not None:
            result["fusedopt"] = {"max_grad_norm": self.max_grad_norm}
        return result

    @not_compiled
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of its twin in torch.optim. The dict is neither changed nor kept.

        States become float32 (float64 for float64 parameters) on their parameter's device, whatever they were saved in.
        Entries that no rule keeps, a wrapper's or your own, are kept as they are, on the parameter's device. Where the groups
        of both sides have the same ``param_names`` in another order, states go by name, else by position as in torch. A step
        count that is in the group, as Apex has it, counts for its parameters.

        Warns:
            UserWarning: the checkpoint clips in every step and this optimizer does not; or one of its groups has an option
                switched on that this class does not have.

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
        target = checkpoint.Target(
            type(self).__name__,
            self.rule,
            self.param_groups,
            self._group_defaults(),
            self.defaults,
            self._check_options,
        )
        saved = checkpoint.read(target, state_dict)
        for message in saved.warnings:  # first: they may be errors, and then nothing has changed
            warn(f"{type(self).__name__}.load_state_dict: {message}")
        self.__setstate__({"state": saved.state, "param_groups": saved.param_groups})
        self._record.pending = None
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError if a group has an option that is out of range, or that no group can have."""
        check_no_own(self.rule, group, self.defaults)
        read_options(self.rule, group)


class ParamGroups(list[dict[str, Any]]):
    """An optimizer's groups, which know its options.

    Some wrappers build an optimizer again from its class and its `param_groups` alone, Horovod's for one. No key of a group
    can tell it then that the first one clipped: torch.distributed.checkpoint would ask every checkpoint for that key.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], optimizer: FusedOptimizer):
        super().__init__(groups)
        self.rule, self.defaults = optimizer.rule, optimizer.defaults

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # a copy is that of another optimizer, which makes its own


def _plain_number(value: Any) -> Any:
    """An element of `betas` as Python's float, unless it is a number of Python's own or a tensor."""
    return value if isinstance(value, (int, torch.Tensor)) or type(value) is float else float(value)
