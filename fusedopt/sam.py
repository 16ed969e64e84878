"""SAM and ASAM around any optimizer: an ascent, a second gradient, and the step from where the ascent began."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import is_
from typing import Any, ClassVar

import torch

from fusedopt import dtensor
from fusedopt.errors import UNCHANGED
from fusedopt.interrupts import uninterrupted
from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers import AdamW
from fusedopt.plan import Plan, state_dtype
from fusedopt.rules import RULES, flag, read_options


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

    Args:
        params: as for ``base``.
        base: the class of the optimizer that steps: `fusedopt.AdamW`, `fusedopt.SGD`, …
        rho: ρ, >= 0, how far the ascent goes; a group may have its own, as the option ``"rho"``.
        adaptive: ASAM, for which a ρ ten times as large is usual; a group may have its own ``"adaptive"``.
        base_options: what else ``base`` takes: ``lr=``, ``max_grad_norm=``, …

    Both gradients of a step are of the same batch. With ``nonfinite="skip"`` or ``"error"`` a first gradient that is not finite
    skips the whole step, or raises, with a GradScaler too, and `first_step` waits for the device. Sparse gradients are refused.
    One more tensor a parameter, float32 or float64, is kept for the weights; values that are put into parameters between the
    two steps are lost. Classes are derived from ``base``, not from SAM.

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
        if base is None:
            raise TypeError("SAM has no subclasses; derive a class from its base and give it that")
        cls._base = base
        super().__init_subclass__(**kwargs)

    def __new__(cls, params: Iterable = (), base: type[FusedOptimizer] = AdamW, *args: Any, **kwargs: Any) -> SAM:
        return super().__new__(_around(base) if cls is SAM else cls)

    def __init__(
        self,
        params: Iterable,
        base: type[FusedOptimizer] = AdamW,
        rho: float = 0.05,
        adaptive: bool = False,
        **base_options: Any,
    ):
        if base_options.get("sparse") is not None:
            raise ValueError("SAM takes no sparse gradients: sparse must be None")
        self.rho, self.adaptive = rho, adaptive
        self._forget_ascent()
        super().__init__(params, **base_options)

    def _forget_ascent(self) -> None:
        self._ascent: Plan | None = None
        self._ascent_groups: list[dict[str, Any]] = []
        self._ascent_state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        self._sources: dict[torch.Tensor, torch.Tensor] = {}
        # Between the two steps the parameters that are away from where they belong, which is in `_sources`; else None.
        self._ascended: list[torch.Tensor] | None = None
        self._is_skipping = False

    # ---- options -----------------------------------------------------------------------------------------------

    @property
    def rho(self) -> float:
        """ρ of the groups that have none of their own. May be changed between steps."""
        return self._rho

    @rho.setter
    def rho(self, value: float) -> None:
        _check_ascent({"rho": value, "adaptive": False})
        self._rho = value

    @property
    def adaptive(self) -> bool:
        """Whether the groups that do not say so themselves take ASAM's ascent. May be changed between steps."""
        return self._adaptive

    @adaptive.setter
    def adaptive(self, value: bool) -> None:
        self._adaptive = flag("adaptive", value)

    def _own_options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"rho": group.get("rho", self._rho), "adaptive": group.get("adaptive", self._adaptive)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of ``base``; the group may have its own ``"rho"`` and ``"adaptive"``."""
        super().add_param_group(param_group)
        try:
            _check_ascent(self._own_options(self.param_groups[-1]))
        except ValueError as error:
            self.param_groups.pop()
            raise ValueError(f"{type(self).__name__}: param_groups[{len(self.param_groups)}]: {error}") from None

    # ---- the step ----------------------------------------------------------------------------------------------

    @torch.compiler.disable
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
        if closure is None:
            if self._ascended is None and any(float(group["lr"]) != 0 for group in self.param_groups):
                raise RuntimeError(
                    f"{type(self).__name__}.step needs a closure, to compute a second gradient, or first_step() before; "
                    f"{UNCHANGED}"
                )
            self._step_back()
            return None
        if self._ascended is not None:
            raise RuntimeError(
                f"{type(self).__name__}.step: first_step() was called before; second_step() or restore() ends it; {UNCHANGED}"
            )
        loss = self._called(closure)
        try:
            self.first_step()
            if not self._is_skipping:
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

    @torch.compiler.disable
    def first_step(self, zero_grad: bool = False) -> None:
        """The ascent, along the gradients there are.

        Args:
            zero_grad: drop the gradients then.

        Raises:
            RuntimeError: it was called already; or as ``step`` of ``base``. Then nothing has changed.
        """
        if self._ascended is not None:
            raise RuntimeError(
                f"{type(self).__name__}.first_step: was called before; second_step() or restore() ends it; {UNCHANGED}"
            )
        try:
            self._ascend()
        except (ValueError, TypeError):
            if not self._drop_misfits():
                raise
            self._ascend()
        if zero_grad:
            self.zero_grad()

    def _drop_misfits(self) -> bool:
        """Forgets old weights of parameters that have another form now. False: there were none."""
        misfits = [
            param
            for param, kept in self._ascent_state.items()
            for old in kept.values()
            if (old.shape, old.dtype, old.device) != (param.shape, state_dtype(param), param.device)
        ]
        for param in misfits:
            del self._ascent_state[param]
            self._sources.pop(param, None)
        return bool(misfits)

    def _ascend(self) -> None:
        with self._ascent_plan() as plan:
            active = [entry.owner for entry in plan.active()]
            sources = {param: self._ascent_state[param]["old_param"] for param in active}
            if any(self._sources.get(param) is not source for param, source in sources.items()):
                self._sources = {**self._sources, **sources}  # another object: the plan of the step is out of date
            coef: float | None = 1.0
            on_device = {}
            if plan.asynchronous is not None and self.nonfinite == "propagate":
                norm, _ = plan.measure(math.inf, None, 1.0, torch.float64)
                inverse = _inverse(norm)
                on_device = {"control": torch.stack([inverse, torch.zeros_like(inverse)])}
            else:
                norm = plan.grad_norm()
                if math.isfinite(norm) or self.nonfinite == "propagate":
                    coef = _inverse(norm)
                elif self.nonfinite == "skip":
                    coef = None
                else:
                    plan.fail_nonfinite()
            with uninterrupted():  # what has ascended must be known to have
                if coef is not None:
                    plan.update(coef, **on_device)
                self._ascended = active if coef is not None else []
                self._is_skipping = coef is None

    @torch.compiler.disable
    def second_step(self, zero_grad: bool = False) -> None:
        """The step of ``base``, from where `first_step` began, along the gradients there are now.

        Args:
            zero_grad: drop the gradients then.

        Raises:
            RuntimeError: there was no `first_step`; or as ``step`` of ``base``. Then nothing has changed: try again, or
                give it up by `restore`.
        """
        if self._ascended is None:
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
        for param in self._ascended or ():
            old = self._sources[param]
            fits = (param.shape, param.device) == (old.shape, old.device)
            (fitting if fits else misfits).append((param, old))
        if fitting:
            parts = [[*map(dtensor.part_of, tensors)] for tensors in zip(*fitting, strict=True)]
            torch._foreach_copy_(*parts)
            torch.autograd.graph.increment_version([param for param, _ in fitting if dtensor.is_dtensor(param)])
        self._ascended, self._is_skipping = None, False
        for param, old in misfits:
            raise RuntimeError(
                f"{type(self).__name__}.restore: a parameter of shape {tuple(param.shape)} on {param.device} had shape "
                f"{tuple(old.shape)} on {old.device} at first_step; it was left as it is, and all others are back"
            )

    def _step_back(self) -> None:
        """The step of ``base`` from the sources."""
        if self._is_skipping:
            self._clip.count_skip()
            return self.restore()
        grad_scale, found_inf = self._of_scaler()
        with self._planned("step") as plan:
            # What the device may decide to skip, it must not have to restore.
            is_certain = plan.asynchronous is None or (self.nonfinite != "skip" and found_inf is None)
            active = [entry.owner for entry in plan.active()]
            is_same = len(active) == len(self._ascended or ()) and all(map(is_, active, self._ascended or ()))
            reads_sources = bool(self._ascended) and is_certain and is_same
            if not reads_sources:
                self.restore()
            plan.reads_sources, plan.has_updated = reads_sources, False
            try:
                with uninterrupted():  # what is where it belongs must not be brought back again
                    self._clip.step(plan, grad_scale, found_inf)
                    if plan.has_updated:
                        self._ascended = None
            finally:
                plan.reads_sources = False
        self.restore()

    def _planned(self, caller: str) -> Any:
        if self._plan is not None and self._ascended and self._plan.sources is not self._sources:
            self._plan = None
        return self._with_plan(caller, "_plan", self.rule, self.param_groups, self.state, self._sources)

    def _ascent_plan(self) -> Any:
        if len(self._ascent_groups) != len(self.param_groups):
            self._ascent_groups = [{} for _ in self.param_groups]
        for own, group in zip(self._ascent_groups, self.param_groups, strict=True):
            kept = ("params", "param_names", "maximize", "capturable")
            own.update({name: group[name] for name in kept if name in group}, **self._own_options(group))
        return self._with_plan("first_step", "_ascent", RULES["sam"], self._ascent_groups, self._ascent_state, {})

    # ---- copies and checkpoints --------------------------------------------------------------------------------

    def __reduce__(self) -> tuple:
        return _made_around, (self._base,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        if self._ascended is not None:
            raise RuntimeError(f"{type(self).__name__}: it cannot be copied between first_step and second_step")
        return {**super().__getstate__(), "_rho": self._rho, "_adaptive": self._adaptive}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_ascent" not in self.__dict__:
            self._forget_ascent()

    def _group_differences(self, state_dict: dict[str, Any]) -> Iterator[str]:
        yield from super()._group_differences(state_dict)
        for index, group in enumerate(state_dict.get("param_groups") or ()):
            if isinstance(group, Mapping):
                try:
                    _check_ascent(self._own_options(group))
                except ValueError as error:
                    yield f"param_groups[{index}]: {error}"

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
