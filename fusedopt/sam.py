"""SAM and ASAM around any optimizer: an ascent, a second gradient, and the step from where the ascent began."""

from __future__ import annotations

import copyreg
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import torch

from fusedopt import dtensor
from fusedopt.compiler import not_compiled
from fusedopt.errors import UNCHANGED
from fusedopt.interrupts import uninterrupted
from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers import AdamW
from fusedopt.plan import NO_SOURCES, Plan, Request
from fusedopt.ranges import flag
from fusedopt.rules import RULES, read_options
from fusedopt.step import Planned, fail_nonfinite, measured, measured_on_device, step, update
from fusedopt.types import Loss, Params


@dataclass
class Ascent:
    """SAM's state between its two steps. In one object, so that wrappers that derive from the optimizer's class share it."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = field(default_factory=dict)
    sources: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    # Between the two steps the parameters that are away from where they belong, which is in `sources`; else None.
    ascended: list[torch.Tensor] | None = None
    is_asynchronous: bool = False  # whether their device may decide to skip the second step
    is_skipping: bool = False


class SAM(FusedOptimizer):
    r"""Sharpness-aware minimization: a step of ``base`` along the gradient at the worst point near by.

    .. math::
        \hat\theta = \theta + \rho\,\frac{g}{\lVert g \rVert}, \quad g = \nabla L(\theta), \qquad
        \theta \leftarrow \mathrm{base}\bigl(\theta, \nabla L(\hat\theta)\bigr)

    with the norm over all parameters; ASAM (``adaptive``): :math:`\hat\theta = \theta + \rho\,\theta^2 g /
    \lVert \theta g \rVert`. Each step takes two gradients::

        def closure():
            opt.zero_grad()
            loss = loss_function(model(inputs), targets)
            loss.backward()
            return loss

        loss = opt.step(closure)  # calls it twice; or, by hand:

        closure()
        opt.first_step()
        closure()
        opt.second_step()

    The instance is one of ``base`` too: its groups, states, checkpoints, clipping and schedulers are those of ``base``, and
    only the second gradient is clipped. The ascent is one launch after the norm; the step reads the weights that it left
    behind, so that restoring them is no pass of its own. They are exactly what they were, bit for bit, also after a step
    that is skipped, and in no checkpoint. In between `restore` puts them back without a step.

    With a GradScaler: ``scaler.scale(loss).backward(); opt.first_step(); opt.zero_grad();
    scaler.scale(loss_function(...)).backward(); scaler.step(opt); scaler.update()``. The ascent has the same length whatever
    the scale. ``scaler.unscale_(opt)``, if at all, comes after the second ``backward``: the scaler unscales once a step.
    Between the two steps the scaler is always told to call `second_step`, with ``fused=True`` or not: if the gradients
    overflowed, this puts the weights back.

    Args:
        params: as for ``base``.
        base: the class of the optimizer that steps: `fusedopt.AdamW`, `fusedopt.SGD`, …
        rho: ρ, >= 0, how far the ascent goes; a group may have its own, as the option ``"rho"``.
        adaptive: ASAM, for which a ρ ten times as large is usual; a group may have its own ``"adaptive"``.
        base_options: what else ``base`` takes: ``lr=``, ``max_grad_norm=``, …

    Both gradients of a step are of the same batch. With ``nonfinite="skip"`` or ``"error"`` a first gradient that is not finite
    skips the whole step, or raises, with a GradScaler too, and `first_step` waits for the device. Sparse gradients are refused.
    One more tensor per parameter, float32 or float64, is kept for the weights; values that are put into parameters between
    the two steps are lost. Derive classes of your own from ``base`` and pass them to SAM. Wrappers that derive from the class
    of an instance, as Lightning's, work.

    Raises:
        TypeError: ``base`` is no class of fusedopt. ValueError: ``rho`` or ``adaptive``, or an option of ``base``.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = fusedopt.SAM([weight], fusedopt.SGD, rho=0.5, lr=0.1)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (weight * torch.tensor([3.0, 4.0])).square().sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(12.5000, grad_fn=<DivBackward0>)

    Reference: Foret, Kleiner, Mobahi, Neyshabur 2021, arXiv:2010.01412; ASAM: Kwon, Kim, Park, Choi 2021, arXiv:2102.11600,
    with θ as the scale, and no constant added to it.
    """

    _base: ClassVar[type[FusedOptimizer]]

    def __init_subclass__(cls, base: type[FusedOptimizer] | None = None, **kwargs: Any) -> None:
        if base is not None:
            cls._base = base
            cls._whole_options = {**base._whole_options, "rho": 0.05, "adaptive": False}
        elif not hasattr(cls, "_base"):
            raise TypeError("SAM itself has no subclasses; derive a class from the base and pass that to SAM")
        super().__init_subclass__(**kwargs)

    def __new__(cls, params: Params = (), base: type[FusedOptimizer] = AdamW, *args: Any, **kwargs: Any) -> SAM:
        if cls is SAM:
            return super().__new__(_around(base))
        if base not in (AdamW, cls._base):
            raise TypeError(f"SAM: this class is SAM around {cls._base.__name__}; call fusedopt.SAM for {base!r}")
        return super().__new__(cls)

    def __init__(
        self,
        params: Params,
        base: type[FusedOptimizer] = AdamW,
        rho: float = 0.05,
        adaptive: bool = False,
        **base_options: Any,
    ):
        if base_options.get("sparse") is not None:
            raise ValueError("SAM takes no sparse gradients: sparse must be None")
        _check_ascent({"rho": rho, "adaptive": adaptive})
        self._ascent = Ascent()
        self.defaults = {"rho": rho, "adaptive": bool(adaptive)}  # the constructor of ``base`` adds its own
        super().__init__(params, **base_options)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Between the two steps always: a GradScaler that skips the second one would leave the weights at the ascent point."""
        return self._ascent.ascended is not None or self.__dict__.get("_step_supports_amp_scaling", False)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = value

    # ---- options -----------------------------------------------------------------------------------------------

    @property
    def rho(self) -> float:
        """ρ of the groups that have none of their own. May be changed between steps."""
        return self.defaults["rho"]

    @rho.setter
    def rho(self, value: float) -> None:
        _check_ascent({"rho": value, "adaptive": False})
        self.defaults["rho"] = value

    @property
    def adaptive(self) -> bool:
        """Whether the groups that do not say so themselves take ASAM's ascent. May be changed between steps."""
        return self.defaults["adaptive"]

    @adaptive.setter
    def adaptive(self, value: bool) -> None:
        self.defaults["adaptive"] = flag("adaptive", value)

    def _own_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"rho": group.get("rho", self.rho), "adaptive": group.get("adaptive", self.adaptive)}

    # ---- the step ----------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @not_compiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both steps.

        Args:
            closure: computes the loss and its gradients, and returns the loss; called twice, each time with no gradients
                there. None: as `second_step`, after `first_step`; or, where lr is 0 in all groups, a step of ``base``, which
                is how torch.distributed.checkpoint makes the states.

        Returns:
            What the closure returned first.

        Raises:
            RuntimeError: no closure and no `first_step` before; a closure after `first_step`. And as `base`; then the
                parameters are where they were before.
        """
        if self._stalls.answers:
            self._stalls.report()
        if closure is None:
            if self._ascent.ascended is None and any(float(group["lr"]) != 0 for group in self.param_groups):
                raise RuntimeError(
                    f"{type(self).__name__}.step needs a closure, to compute a second gradient, or first_step() before; "
                    f"{UNCHANGED}"
                )
            self._step_back()
            return None
        if self._ascent.ascended is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step: first_step() was called before; second_step() or restore() ends it; {UNCHANGED}"
            )
        loss = self._called(closure)
        try:
            self.first_step()
            if not self._ascent.is_skipping:
                self._called(closure)
            self._step_back()
        except BaseException:
            self.restore()
            raise
        return loss

    def _called(self, closure: Callable[[], Any]) -> Any:
        self.zero_grad()
        with torch.enable_grad():
            return closure()

    @not_compiled
    def first_step(self, zero_grad: bool = False) -> None:
        """The ascent, along the gradients there are.

        Args:
            zero_grad: drop the gradients then.

        Raises:
            RuntimeError: it was called already; or as ``step`` of ``base``. Then nothing has changed.
        """
        if self._ascent.ascended is not None:
            raise RuntimeError(
                f"{type(self).__name__}.first_step: was called before; second_step() or restore() ends it; {UNCHANGED}"
            )
        self._ascend()
        if zero_grad:
            self.zero_grad()

    def _ascend(self) -> None:
        with Planned(self._ascent_request()) as plan:
            active = [entry.owner for entry in plan.active()]
            sources = {param: self._ascent.state[param]["old_param"] for param in active}
            if any(self._ascent.sources.get(param) is not source for param, source in sources.items()):
                # Another object: the plan of the step is out of date.
                self._ascent.sources = {**self._ascent.sources, **sources}
            coef: float | None = 1.0
            on_device = {}
            if plan.asynchronous is not None and self.nonfinite == "propagate":
                norm, _ = measured_on_device(plan, math.inf, None, 1.0, torch.float64)
                inverse = _inverse(norm)
                on_device = {"control": torch.stack([inverse, torch.zeros_like(inverse)])}
            else:
                norm = measured(plan)
                if math.isfinite(norm) or self.nonfinite == "propagate":
                    coef = _inverse(norm)
                elif self.nonfinite == "skip":
                    coef = None
                else:
                    fail_nonfinite(plan)
            with uninterrupted():  # what has ascended must be known to have
                if coef is not None:
                    update(plan, coef, **on_device)
                self._ascent.ascended = active if coef is not None else []
                self._ascent.is_asynchronous = plan.asynchronous is not None
                self._ascent.is_skipping = coef is None

    @not_compiled
    def second_step(self, zero_grad: bool = False) -> None:
        """The step of ``base``, from where `first_step` began, along the gradients there are now.

        Args:
            zero_grad: drop the gradients then.

        Raises:
            RuntimeError: there was no `first_step`; or as ``step`` of ``base``. Then nothing has changed: try again, or
                give it up by `restore`.
        """
        if self._ascent.ascended is None:
            raise RuntimeError(f"{type(self).__name__}.second_step: first_step() comes before; {UNCHANGED}")
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the parameters back where `first_step` took them from; without one it does nothing.

        Raises:
            RuntimeError: a parameter has another shape or device by now. It is left as it is; the others are back.
        """
        fitting, misfits = [], []
        for param in self._ascent.ascended or ():
            old = self._ascent.sources[param]
            fits = (param.shape, param.device) == (old.shape, old.device)
            (fitting if fits else misfits).append((param, old))
        if fitting:
            parts = [[*map(dtensor.part_of, tensors)] for tensors in zip(*fitting, strict=True)]
            torch._foreach_copy_(*parts)
            torch.autograd.graph.increment_version([param for param, _ in fitting if dtensor.is_dtensor(param)])
        self._ascent.ascended, self._ascent.is_skipping = None, False
        for param, old in misfits:
            raise RuntimeError(
                f"{type(self).__name__}.restore: a parameter of shape {tuple(param.shape)} on {param.device} had shape "
                f"{tuple(old.shape)} on {old.device} at first_step; it was left as it is, and all others are back"
            )

    def _step_back(self) -> None:
        """The step of ``base`` from the sources."""
        ascent = self._ascent
        if ascent.is_skipping:
            self._record.count_skip()
            return self.restore()

        def put_back(plan: Plan) -> None:
            if plan.sources is NO_SOURCES:
                self.restore()

        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        request, whole = self._request("step"), self.defaults
        with uninterrupted():  # what is where it belongs must not be brought back again
            if step(request, self._record, self._stalls, whole, scale, found_inf, before=put_back):
                ascent.ascended = None
        self.restore()

    def _can_read_sources(self) -> bool:
        """Whether a step can read the weights where the ascent left them, so that they need not be put back before it."""
        ascent = self._ascent
        # What the device may decide to skip, it must not have to restore.
        is_certain = not ascent.is_asynchronous or (
            self.nonfinite != "skip" and getattr(self, "found_inf", None) is None
        )
        if not is_certain or not ascent.ascended:
            return False
        active = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        return {*map(id, active)} == {*map(id, ascent.ascended)}

    def _request(self, caller: str) -> Request:
        if self._can_read_sources():
            purpose, sources = "step from sources", self._ascent.sources
        else:
            purpose, sources = "step", NO_SOURCES
        return self._request_for(purpose, caller, self.rule, self.param_groups, self.state, sources)

    def _ascent_request(self) -> Request:
        if len(self._ascent.groups) != len(self.param_groups):
            self._ascent.groups = [{} for _ in self.param_groups]
        for own, group in zip(self._ascent.groups, self.param_groups, strict=True):
            kept = ("params", "param_names", "maximize", "capturable")
            own.update({name: group[name] for name in kept if name in group}, **self._own_options(group))
        return self._request_for(
            "ascent", "first_step", RULES["sam"], self._ascent.groups, self._ascent.state, NO_SOURCES
        )

    # ---- copies and checkpoints --------------------------------------------------------------------------------

    def __reduce__(self) -> tuple:
        if type(self) is not _around(self._base):  # a wrapper's class
            return copyreg.__newobj__, (type(self),), self.__getstate__()
        return _made_around, (self._base,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        if self._ascent.ascended is not None:
            raise RuntimeError(f"{type(self).__name__}: it cannot be copied between first_step and second_step")
        return {**super().__getstate__(), "_ascent": Ascent()}

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        _check_ascent(self._own_options(group))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of ``base``. A group's own ρ stays where the checkpoint has none."""
        own = [{name: group[name] for name in ("rho", "adaptive") if name in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            for name, value in options.items():
                group.setdefault(name, value)


def _inverse(norm: Any) -> Any:
    """What gradients are divided by, as in the published code: a norm of 0 gives no NaN."""
    return 1 / (norm + 1e-12)


def _check_ascent(options: Mapping[str, Any]) -> None:
    """Raises ValueError if ρ or the switch between SAM and ASAM is none."""
    read_options(RULES["sam"], {**options, "maximize": False})


@functools.cache
def _around(base: type[FusedOptimizer]) -> type[SAM]:
    """The class of SAM with that base."""
    if (
        not (isinstance(base, type) and issubclass(base, FusedOptimizer))
        or base is FusedOptimizer
        or issubclass(base, SAM)
    ):
        raise TypeError(f"SAM: base must be an optimizer class of fusedopt, such as fusedopt.AdamW, got {base!r}")
    if inspect.unwrap(base.step) is not inspect.unwrap(FusedOptimizer.step):
        raise TypeError(f"SAM: {base.__name__} has a step of its own, which SAM would not call")
    return type("SAM", (SAM, base), {"__doc__": SAM.__doc__, "__module__": SAM.__module__}, base=base)


def _made_around(base: type[FusedOptimizer]) -> SAM:
    """What a copy starts from."""
    return _around(base).__new__(_around(base))
