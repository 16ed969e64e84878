"""The table: one row a rule. Optimizers, backends, tests, benchmarks and docs iterate over it; nothing else lists rules.

``Rule.hyper`` is the order in which a rule's hyperparameters cross into C++ (its header's ``hyper_names``), and
``Rule.states`` the order of its state slots (its header's ``stores``).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fusedopt.options import OPTIMIZER_OPTIONS
from fusedopt.ranges import BETAS, RANGES, check_range, flag, is_elsewhere, is_sequence, number


@dataclass(frozen=True)
class State:
    """One tensor a rule keeps per parameter: its name in ``state``, and when and how it starts."""

    name: str
    option: str | None = None  # the group option that must be on for the state to exist; None: always
    initial: str | None = None  # the group option that holds its first value; None: 0
    per_row: str | None = None  # the group option under which it has one value per row: shape (rows, 1, …, 1)
    is_scratch: bool = False  # holds nothing from step to step: one that no longer fits its parameter is made anew


@dataclass(frozen=True)
class Rule:
    """One update rule and everything that may be known about it without knowing its formula."""

    name: str  # the function in reference.py, the header in csrc/rules/
    hyper: tuple[str, ...]  # scalars, in ABI order; beta1, beta2, … are group["betas"]
    states: tuple[State, ...]
    paper: str
    optimizers: Mapping[str, str | None]  # the classes of this rule, and each one's twin in torch.optim
    keeps_step: bool = True  # state["step"] exists; without it the count is kept by the plan
    num_sums: int = 0  # over each tensor, of what the rule measures before it updates any element
    norm_weight: str | None = None  # the option under which gradients are taken times their parameters for the norm
    extra: str | None = None  # a 0-d state beside the step count; starts at 1
    own_options: Mapping[str, Any] = field(default_factory=dict)  # options that torch lacks, and their defaults
    takes_sparse: bool = False  # gradients, with sparse="lazy" at least
    still_without: tuple[str, ...] | None = None  # options; with all of them 0, an element of gradient 0 stands still
    cases: tuple[Mapping[str, Any], ...] = ()  # constructor arguments for tests: every option at least once
    errors: tuple[tuple[Mapping[str, Any], str], ...] = ()  # constructor arguments that are refused, and what is said

    @functools.cached_property
    def betas(self) -> tuple[str, ...]:
        """Those of its scalars that a group holds in `betas`."""
        return tuple(name for name in self.hyper if name in BETAS)

    @functools.cached_property
    def counts(self) -> Mapping[str, float]:
        """What it counts per parameter, in 0-d tensors, and its first value. The step count comes first."""
        return {"step": 0.0} if self.extra is None else {"step": 0.0, self.extra: 1.0}

    @functools.cached_property
    def state_names(self) -> frozenset[str]:
        """Everything it keeps in a parameter's state, whatever the options."""
        return frozenset((*self.counts_kept, *(state.name for state in self.states)))

    @functools.cached_property
    def counts_kept(self) -> tuple[str, ...]:
        """Those of its `counts` that are in ``state``."""
        return tuple(name for name in self.counts if name != "step" or self.keeps_step)

    @staticmethod
    @functools.cache
    def all_state_names() -> frozenset[str]:
        """What any rule of the table keeps: it tells states of parameters from what wrappers and users add."""
        return frozenset().union(*(rule.state_names for rule in RULES.values() if rule.optimizers))

    def option(self, group: Mapping[str, Any], name: str) -> Any:
        """A group's option; one of ours that the group does not mention has its default."""
        return group[name] if name in group else self.own_options[name]

    def keeps(self, group: Mapping[str, Any], state: State) -> bool:
        """Whether a group's options ask for a state."""
        if state.option is None:
            return True
        value = self.option(group, state.option)
        if is_elsewhere(value):
            return True  # whatever it is now
        return number(state.option, value) != 0 if state.option in RANGES else flag(state.option, value)

    def stored(self, group: Mapping[str, Any]) -> tuple[State | None, ...]:
        """The state slots of this rule, None where the group's options leave one out."""
        return tuple(state if self.keeps(group, state) else None for state in self.states)

    def is_rowwise(self, group: Mapping[str, Any], state: State) -> bool:
        """Whether a group's options want one value a row of a state."""
        return state.per_row is not None and flag(state.per_row, self.option(group, state.per_row))

    def state_shape(self, group: Mapping[str, Any], state: State, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a state, for a parameter of that shape. A vector's rows are its elements, and a single number is one row."""
        return (*shape[:1], *(1 for _ in shape[1:])) if self.is_rowwise(group, state) else tuple(shape)

    def has_kernels(self, group: Mapping[str, Any]) -> bool:
        """Whether every backend can update it; else only the reference can."""
        return not any(self.is_rowwise(group, state) for state in self.states)

    def variant(self, group: Mapping[str, Any]) -> str:
        """Name of the kernel for a group's options: the rule, then the options that add a state or give it another shape."""
        options = {state.option for state in self.states if state.option and self.keeps(group, state)}
        options |= {state.per_row for state in self.states if self.is_rowwise(group, state)}
        return "_".join([self.name, *sorted(options)])

    def is_sparse_exact(self, group: Mapping[str, Any]) -> bool:
        """Whether it comes to the same to update only those elements whose gradient is not 0."""
        if self.still_without is None:
            return False
        values = [(name, self.option(group, name)) for name in self.still_without]
        return not any(is_elsewhere(value) or number(name, value) != 0 for name, value in values)

    def scalars(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """A group's hyperparameters as floats, in ABI order; a tensor that a device has stays what it is."""
        values = []
        for name in self.hyper:
            label, value = name, None
            if name in BETAS:
                index, betas = BETAS.index(name), group["betas"]
                if not is_sequence(betas) or len(betas) != len(self.betas):
                    raise ValueError(f"betas must be {len(self.betas)} numbers, got {betas!r}")
                label, value = f"betas[{index}]", betas[index]
            else:
                value = self.option(group, name)
            if name not in RANGES:
                values.append(float(flag(label, value)))
            else:
                values.append(value if is_elsewhere(value) else number(label, value))
        return tuple(values)


# The decay of the cases is a power of two: λθ is then exact, and g + λθ keeps its relative accuracy where it cancels.
_ADAM_HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "bias_correction")

RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="sgd",
            hyper=("lr", "momentum", "dampening", "weight_decay", "nesterov"),
            states=(State("momentum_buffer", option="momentum"),),
            paper="Sutskever et al. 2013",
            optimizers={"SGD": "SGD"},
            keeps_step=False,
            takes_sparse=True,
            still_without=("momentum", "weight_decay"),
            cases=(
                {},
                {"momentum": 0.9, "weight_decay": 0.125},
                {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.125},
                {"momentum": 0.9, "nesterov": True, "weight_decay": 0.125, "maximize": True},
            ),
            errors=(
                ({"momentum": -1}, "momentum must be >= 0, got -1"),
                ({"nesterov": True}, "nesterov=True needs momentum > 0 and dampening = 0"),
                ({"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov=True needs"),
            ),
        ),
        Rule(
            name="adagrad",
            hyper=("lr", "lr_decay", "weight_decay", "eps", "eps_inside_sqrt"),
            states=(State("sum", initial="initial_accumulator_value", per_row="rowwise"),),
            paper="Duchi, Hazan, Singer 2011",
            optimizers={"Adagrad": "Adagrad"},
            own_options={"eps_inside_sqrt": False, "rowwise": False},
            takes_sparse=True,
            still_without=("weight_decay",),
            cases=(
                {"weight_decay": 0.125},
                {"lr_decay": 0.1, "weight_decay": 0.125, "initial_accumulator_value": 0.5, "maximize": True},
                {"eps_inside_sqrt": True, "eps": 1e-4, "weight_decay": 0.125},
            ),
            errors=(
                ({"lr_decay": -0.1}, "lr_decay must be >= 0, got -0.1"),
                ({"initial_accumulator_value": -1}, "initial_accumulator_value must be >= 0, got -1"),
            ),
        ),
        Rule(
            name="rmsprop",
            hyper=("lr", "alpha", "eps", "weight_decay", "momentum", "eps_inside_sqrt"),
            states=(
                State("square_avg"),
                State("grad_avg", option="centered"),
                State("momentum_buffer", option="momentum"),
            ),
            paper="Tieleman & Hinton 2012; Graves 2013",
            optimizers={"RMSprop": "RMSprop"},
            own_options={"eps_inside_sqrt": False},
            cases=(
                {"weight_decay": 0.125},
                {"momentum": 0.9, "weight_decay": 0.125, "maximize": True},
                {"centered": True, "weight_decay": 0.125, "eps": 1e-3},
                {"centered": True, "momentum": 0.5, "weight_decay": 0.125, "eps": 1e-3},
                {"eps_inside_sqrt": True, "eps": 1e-4, "weight_decay": 0.125},
                {"eps_inside_sqrt": True, "eps": 1e-4, "weight_decay": 0.125, "centered": True, "momentum": 0.9},
            ),
            errors=(({"alpha": 1.5}, "alpha must be >= 0 and <= 1, got 1.5"),),
        ),
        Rule(
            name="adam",
            hyper=_ADAM_HYPER,
            states=(State("exp_avg"), State("exp_avg_sq"), State("max_exp_avg_sq", option="amsgrad")),
            paper="Kingma & Ba 2015; Loshchilov & Hutter 2019; Reddi et al. 2018",
            optimizers={"Adam": "Adam", "AdamW": "AdamW"},
            own_options={"bias_correction": True},
            takes_sparse=True,
            cases=(
                {"weight_decay": 0.125},
                {"weight_decay": 0.125, "betas": (0.8, 0.95), "maximize": True},
                {"weight_decay": 0.125, "amsgrad": True},
                {"weight_decay": 0.125, "amsgrad": True, "bias_correction": False},
                {"weight_decay": 0.125, "bias_correction": False},
            ),
            errors=(
                ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
                ({"betas": (0.9, 1.0)}, r"betas\[1\] must be >= 0 and < 1, got 1.0"),
                ({"betas": (0.9,)}, "betas must be 2 numbers"),
                ({"eps": float("nan")}, "eps must be >= 0, got nan"),
            ),
        ),
        Rule(
            name="nadam",
            hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
            states=(State("exp_avg"), State("exp_avg_sq")),
            paper="Dozat 2016",
            optimizers={"NAdam": "NAdam"},
            extra="mu_product",
            cases=(
                {"weight_decay": 0.125},
                {"weight_decay": 0.125, "decoupled_weight_decay": True},
                {"weight_decay": 0.125, "momentum_decay": 0.05, "betas": (0.8, 0.95), "maximize": True},
            ),
            errors=(({"momentum_decay": -1}, "momentum_decay must be >= 0, got -1"),),
        ),
        Rule(
            name="lion",
            hyper=("lr", "beta1", "beta2", "weight_decay"),
            states=(State("exp_avg"),),
            paper="Chen et al. 2023",
            optimizers={"Lion": None},
            keeps_step=False,
            cases=({"weight_decay": 0.125}, {"weight_decay": 0.125, "betas": (0.95, 0.98), "maximize": True}),
            errors=(({"betas": (-0.1, 0.9)}, r"betas\[0\] must be >= 0 and < 1, got -0.1"),),
        ),
        Rule(
            name="radam",
            hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay"),
            states=(State("exp_avg"), State("exp_avg_sq")),
            paper="Liu et al. 2020",
            optimizers={"RAdam": "RAdam"},
            cases=(
                {"weight_decay": 0.125},
                {"weight_decay": 0.125, "decoupled_weight_decay": True, "betas": (0.8, 0.95), "maximize": True},
            ),
            errors=(({"betas": (0.9, -1)}, r"betas\[1\] must be >= 0 and < 1, got -1"),),
        ),
        Rule(
            name="adan",
            hyper=("lr", "beta1", "beta2", "beta3", "eps", "weight_decay", "decoupled_weight_decay"),
            states=(State("exp_avg"), State("exp_avg_diff"), State("exp_avg_sq"), State("previous_grad")),
            paper="Xie et al. 2022",
            optimizers={"Adan": None},
            cases=(
                {"weight_decay": 0.125},
                {"weight_decay": 0.125, "decoupled_weight_decay": True, "betas": (0.8, 0.7, 0.9), "maximize": True},
            ),
            errors=(
                ({"betas": (0.9, 0.99)}, "betas must be 3 numbers"),
                ({"betas": (0.9, 0.99, 1.0)}, r"betas\[2\] must be >= 0 and < 1, got 1.0"),
            ),
        ),
        Rule(
            name="lamb",
            hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction", "always_adapt"),
            states=(State("exp_avg"), State("exp_avg_sq")),
            paper="You et al. 2020",
            optimizers={"LAMB": None},
            num_sums=2,
            own_options={"bias_correction": True, "always_adapt": True},
            cases=(
                {"weight_decay": 0.125},
                {"weight_decay": 0.125, "bias_correction": False, "betas": (0.8, 0.95), "maximize": True},
                {"weight_decay": 0.0},
                {"weight_decay": 0.0, "always_adapt": False},
            ),
            errors=(({"always_adapt": 2}, "always_adapt must be True or False, got 2"),),
        ),
        Rule(
            name="stableadamw",
            hyper=("lr", "beta1", "beta2", "eps", "weight_decay"),
            states=(State("exp_avg"), State("exp_avg_sq")),
            paper="Wortsman et al. 2023",
            optimizers={"StableAdamW": None},
            num_sums=1,
            cases=({"weight_decay": 0.125}, {"weight_decay": 0.125, "betas": (0.8, 0.95), "maximize": True}),
            errors=(({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),),
        ),
        Rule(
            name="sam",  # the ascent alone, which the class SAM puts before a step of any other rule
            hyper=("rho", "adaptive"),
            states=(State("old_param", is_scratch=True),),
            paper="Foret et al. 2021; Kwon et al. 2021",
            optimizers={},
            keeps_step=False,
            norm_weight="adaptive",
        ),
    )
}


class Options(NamedTuple):
    """A group's options as a plan needs them."""

    scalars: tuple[Any, ...]  # `Rule.scalars`
    maximize: bool
    variant: str
    is_sparse_exact: bool


def read_options(rule: Rule, group: Mapping[str, Any]) -> Options:
    """A group's options, or ValueError saying which of them is out of which range."""
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported; use torch.optim for it")
    maximize = flag("maximize", group["maximize"])
    variant = rule.variant(group)  # the options that ask for a state, or for another shape of one
    scalars = rule.scalars(group)
    for name, value in zip(rule.hyper, scalars, strict=True):
        if name in RANGES and not is_elsewhere(value):
            check_range(name, value, given=_given(group, name))
    for state in rule.states:
        if state.initial is not None:
            initial = number(state.initial, group[state.initial])
            check_range(state.initial, initial, given=group[state.initial])
    if "nesterov" in rule.hyper and group["nesterov"] and not (group["momentum"] > 0 and group["dampening"] == 0):
        raise ValueError(
            f"nesterov=True needs momentum > 0 and dampening = 0, "
            f"got momentum={group['momentum']}, dampening={group['dampening']}"
        )
    return Options(scalars, maximize, variant, rule.is_sparse_exact(group))


def check_no_own(rule: Rule, group: dict[str, Any], whole: Mapping[str, Any]) -> None:
    """Takes the options of the whole optimizer out of a group, where something that fills groups from `defaults` put them.

    Args:
        whole: the optimizer's own values.

    Raises:
        ValueError: the group's value is another one, which would have no effect.
    """
    for name in [name for name in OPTIMIZER_OPTIONS if name in group]:
        if name not in whole or group[name] != whole[name]:
            to_constructor = f", and pass {name}={group[name]!r} to the constructor"
            remedy = "" if name == "sparse" and not rule.takes_sparse else to_constructor
            raise ValueError(
                f"{name!r} applies to the whole optimizer, a group cannot have its own; remove the key{remedy}"
            )
        del group[name]


def with_lr(rule: Rule, options: Options, lr: float) -> Options:
    """The same options but for the learning rate, on which no other depends; or ValueError if it is out of range."""
    check_range("lr", lr, given=lr)
    index = rule.hyper.index("lr")
    scalars = (*options.scalars[:index], lr, *options.scalars[index + 1 :])
    return Options(scalars, *options[1:])


def _given(group: Mapping[str, Any], name: str) -> Any:
    return group["betas"][BETAS.index(name)] if name in BETAS else group[name]
