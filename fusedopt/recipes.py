"""The field's settled settings, each with its source: optimizer, parameter groups and schedule in one call.

    recipe = fusedopt.recipes.transformer_pretraining(model, total_steps=10_000, lr=6e-4)
    print(recipe)  # every setting, whether it is yours, and where it comes from
    optimizer, scheduler = recipe

Every setting can be given by keyword, and so can all other options of the optimizer (``nonfinite``, ``backend``, ``amsgrad``,
…) and of the schedule. ``schedule=`` takes another function of `fusedopt.schedules`, which is given what of the recipe's
settings it knows. ``optimizer=`` takes another class, of fusedopt or torch.optim. Unless that is the namesake of the recipe's
own, `lr` has to be given, and betas, momentum and the like are the class's own defaults; only for Lion do the recipes for AdamW
know an lr and a decay.

Weight decay is by `fusedopt.param_groups_weight_decay`: none on norms, biases and vectors, as in BERT's code, Goyal et al. 2017
(batch norm) and He et al. 2019 (biases).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fusedopt import schedules
from fusedopt.optimizers import SGD, Adam, AdamW, Lion
from fusedopt.param_groups import param_groups_weight_decay
from fusedopt.ranges import integer
from fusedopt.sam import SAM

__all__ = ["Recipe", "fine_tuning", "image_from_scratch", "rnn", "transformer_pretraining"]

# Settings of a recipe: name: (value, source).
Settings = Mapping[str, tuple[Any, str]]
LION = "Chen et al. 2023, arXiv:2302.06675: lr 3 to 10 times smaller than AdamW's, decay as much larger"


@dataclass(frozen=True)
class Setting:
    """One setting: its value, where it comes from, and whether the caller gave it in place of that."""

    name: str
    value: Any
    source: str
    is_overridden: bool


OptimizerT = TypeVar("OptimizerT", bound=Optimizer, covariant=True)


class Recipe(tuple[OptimizerT, LRScheduler], Generic[OptimizerT]):
    """What a recipe made: the pair ``optimizer, scheduler``. Prints as a table of its settings.

    Attributes:
        name: of the recipe.
        settings: a `Setting` each.
    """

    name: str
    settings: tuple[Setting, ...]

    def __new__(
        cls, name: str, optimizer: OptimizerT, scheduler: LRScheduler, settings: tuple[Setting, ...]
    ) -> Recipe[OptimizerT]:
        self = super().__new__(cls, (optimizer, scheduler))
        self.name, self.settings = name, settings
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.name, *self, self.settings

    @property
    def optimizer(self) -> OptimizerT:
        """The first of the pair."""
        return self[0]

    @property
    def scheduler(self) -> LRScheduler:
        """The second of the pair."""
        return self[1]

    def __str__(self) -> str:
        rows = [("setting", "value", "source")]
        rows += [(setting.name, _shown(setting.value), setting.source) for setting in self.settings]
        name_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{name:{name_width}}  {value:{value_width}}  {source}" for name, value, source in rows]
        return "\n".join([f"recipe {self.name}", *lines])


@overload
def transformer_pretraining(
    model: nn.Module, total_steps: int, *, optimizer: type[OptimizerT], **overrides: Any
) -> Recipe[OptimizerT]: ...
@overload
def transformer_pretraining(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[AdamW]: ...
def transformer_pretraining(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[Any]:
    """To train a transformer from scratch: AdamW, clipped, with a warmup and a cosine down to a tenth.

    - lr 3e-4: LLaMA 7B and 13B (Touvron et al. 2023, table 2), GPT-3 of 350M parameters (Brown et al. 2020, table 2.1).
      Smaller models take more (GPT-3 of 125M: 6e-4), larger ones less (175B: 6e-5).
    - betas (0.9, 0.95), weight decay 0.1, clipping to 1.0, cosine to 0.1: GPT-3, appendix B, and LLaMA, section 2.3. That the
      cosine should end with training: Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556.
    - eps 1e-8: GPT-3, appendix B.
    - warmup of 0.8 % of the steps: LLaMA, 2000 of about 250,000 (7B: 1T tokens in batches of 4M). Give more for a short
      training.

    Args:
        model: whose parameters are trained.
        total_steps: of the optimizer, >= 1.
        **overrides: settings in place of these, and other options of the optimizer or the schedule.

    Returns:
        A `Recipe`.

    Raises:
        TypeError: a name that neither recipe, optimizer nor schedule knows; the known ones are listed. ValueError: a value out
            of its range.

    Example:
        >>> import torch, fusedopt
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer, scheduler = fusedopt.recipes.transformer_pretraining(model, total_steps=1000, lr=1e-3)
        >>> [(group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
        [(0.1, ['weight']), (0.0, ['bias'])]
        >>> scheduler.get_last_lr()  # the first of 8 steps of warmup
        [0.000125, 0.000125]

    References: arXiv:2005.14165 (GPT-3), arXiv:2302.13971 (LLaMA).
    """
    total_steps = integer("total_steps", total_steps, 1)
    both = "GPT-3, appendix B; LLaMA, section 2.3"
    settings = {
        "optimizer": (AdamW, "LLaMA, section 2.3"),
        "lr": (3e-4, "LLaMA 7B and 13B; GPT-3 350M (125M: 6e-4, 175B: 6e-5)"),
        "betas": ((0.9, 0.95), both),
        "eps": (1e-8, "GPT-3, appendix B"),
        "weight_decay": (0.1, both),
        "max_grad_norm": (1.0, both),
        "schedule": (schedules.warmup_cosine, both),
        "warmup_steps": (round(0.008 * total_steps), "0.8 %: LLaMA 7B, 2000 of about 250,000 steps"),
        "min_lr_ratio": (0.1, both),
    }
    lion = {"lr": (1e-4, LION), "weight_decay": (0.3, LION)}
    return _make("transformer_pretraining", model, total_steps, settings, lion, overrides)


@overload
def fine_tuning(
    model: nn.Module, total_steps: int, *, optimizer: type[OptimizerT], **overrides: Any
) -> Recipe[OptimizerT]: ...
@overload
def fine_tuning(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[AdamW]: ...
def fine_tuning(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[Any]:
    """To fine-tune a pretrained transformer: AdamW with a small lr, clipped, with a warmup and a line down to 0.

    - lr 2e-5: the smallest of the three that BERT was tuned over (5e-5, 3e-5, 2e-5; Devlin et al. 2019, appendix A.3), the
      middle one of RoBERTa (1e-5, 2e-5, 3e-5; Liu et al. 2019, table 10).
    - betas (0.9, 0.999), weight decay 0.01: BERT, appendix A.2, and its code (RoBERTa: 0.1).
    - eps 1e-6, clipping to 1.0, the line down to 0: BERT's code, optimization.py in github.com/google-research/bert.
    - warmup of 10 % of the steps: BERT's code, run_classifier.py (RoBERTa: 6 %).

    Args:
        model: whose parameters are trained; frozen ones are left as they are.
        total_steps: of the optimizer, >= 1.
        **overrides: settings in place of these, and other options of the optimizer or the schedule.

    Returns:
        A `Recipe`.

    Raises:
        TypeError: a name that neither recipe, optimizer nor schedule knows; the known ones are listed. ValueError: a value out
            of its range.

    Example:
        >>> import torch, fusedopt
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer, scheduler = fusedopt.recipes.fine_tuning(model, total_steps=1000, nonfinite="skip")
        >>> optimizer.max_grad_norm, optimizer.nonfinite
        (1.0, 'skip')

    References: arXiv:1810.04805 (BERT), arXiv:1907.11692 (RoBERTa).
    """
    total_steps = integer("total_steps", total_steps, 1)
    settings = {
        "optimizer": (AdamW, "BERT's code"),
        "lr": (2e-5, "BERT, appendix A.3 (to 5e-5); RoBERTa, table 10 (1e-5 to 3e-5)"),
        "betas": ((0.9, 0.999), "BERT, appendix A.2"),
        "eps": (1e-6, "BERT's code"),
        "weight_decay": (0.01, "BERT, appendix A.2 (RoBERTa: 0.1)"),
        "max_grad_norm": (1.0, "BERT's code"),
        "schedule": (schedules.linear, "BERT's code; RoBERTa, table 10"),
        "warmup_steps": (round(0.1 * total_steps), "10 %: BERT's code (RoBERTa: 6 %)"),
        "min_lr_ratio": (0.0, "BERT's code"),
    }
    lion = {"lr": (5e-6, LION), "weight_decay": (0.04, LION)}
    return _make("fine_tuning", model, total_steps, settings, lion, overrides)


@overload
def image_from_scratch(
    model: nn.Module, total_steps: int, *, optimizer: type[OptimizerT], **overrides: Any
) -> Recipe[OptimizerT]: ...
@overload
def image_from_scratch(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[SGD]: ...
def image_from_scratch(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[Any]:
    """To train a convolutional network for images: SGD with momentum, a warmup and a cosine down to 0.

    - lr 0.1 for batches of 256 images, momentum 0.9, weight decay 1e-4: He et al. 2016, section 3.4. For other batches in
      proportion: Goyal et al. 2017, section 2.1.
    - no Nesterov momentum: He et al. 2016; Goyal et al. found both equally effective.
    - no clipping: in none of these.
    - warmup of 5 of 90 epochs: Goyal et al. 2017. Cosine to 0: Loshchilov & Hutter 2017, and He et al. 2019 with this very
      warmup.

    Args:
        model: whose parameters are trained.
        total_steps: of the optimizer, >= 1.
        **overrides: settings in place of these, and other options of the optimizer or the schedule.

    Returns:
        A `Recipe`.

    Raises:
        TypeError: a name that neither recipe, optimizer nor schedule knows; the known ones are listed. ValueError: a value out
            of its range.

    Example:
        >>> import torch, fusedopt
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> optimizer, scheduler = fusedopt.recipes.image_from_scratch(model, total_steps=900, lr=0.4)  # batches of 1024
        >>> [(group["weight_decay"], group["param_names"]) for group in optimizer.param_groups]
        [(0.0001, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]

    References: arXiv:1512.03385 (He et al. 2016), arXiv:1706.02677 (Goyal et al. 2017), arXiv:1608.03983 (Loshchilov & Hutter
    2017), arXiv:1812.01187 (He et al. 2019).
    """
    total_steps = integer("total_steps", total_steps, 1)
    he = "He et al. 2016, section 3.4"
    settings = {
        "optimizer": (SGD, he),
        "lr": (0.1, f"{he}, for batches of 256; in proportion: Goyal et al. 2017"),
        "momentum": (0.9, he),
        "nesterov": (False, f"{he}; both equally effective: Goyal et al. 2017"),
        "weight_decay": (1e-4, he),
        "max_grad_norm": (None, f"none in {he}"),
        "schedule": (schedules.warmup_cosine, "Loshchilov & Hutter 2017; He et al. 2019"),
        "warmup_steps": (round(5 / 90 * total_steps), "5 of 90 epochs: Goyal et al. 2017"),
        "min_lr_ratio": (0.0, "He et al. 2019"),
    }
    return _make("image_from_scratch", model, total_steps, settings, {}, overrides)


@overload
def rnn(model: nn.Module, total_steps: int, *, optimizer: type[OptimizerT], **overrides: Any) -> Recipe[OptimizerT]: ...
@overload
def rnn(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[Adam]: ...
def rnn(model: nn.Module, total_steps: int, **overrides: Any) -> Recipe[Any]:
    """To train a recurrent network: Adam, clipped, with a line down to 0.

    - lr 1e-3, betas (0.9, 0.999), eps 1e-8, no weight decay, no warmup: Kingma & Ba 2015.
    - clipping by norm: Pascanu et al. 2013; to 5.0: Sutskever et al. 2014, for LSTMs. Pascanu et al. had good results from
      half to ten times the mean norm: ``optimizer.grad_norm`` tells.
    - a line down to 0: Defazio et al. 2023.

    Graves 2013 took RMSProp: ``optimizer=fusedopt.RMSprop, lr=1e-4, alpha=0.95, momentum=0.9, centered=True,
    eps=1e-4, eps_inside_sqrt=True``.

    Args:
        model: whose parameters are trained.
        total_steps: of the optimizer, >= 1.
        **overrides: settings in place of these, and other options of the optimizer or the schedule.

    Returns:
        A `Recipe`.

    Raises:
        TypeError: a name that neither recipe, optimizer nor schedule knows; the known ones are listed. ValueError: a value out
            of its range.

    Example:
        >>> import torch, fusedopt
        >>> print(fusedopt.recipes.rnn(torch.nn.LSTM(8, 16), total_steps=1000, max_grad_norm=1.0))
        recipe rnn
        setting        value                      source
        optimizer      fusedopt.optimizers.Adam   Kingma & Ba 2015
        lr             0.001                      Kingma & Ba 2015
        betas          (0.9, 0.999)               Kingma & Ba 2015
        eps            1e-08                      Kingma & Ba 2015
        weight_decay   0.0                        Kingma & Ba 2015
        max_grad_norm  1.0                        given, in place of 5.0: Sutskever et al. 2014; by norm: Pascanu et al. 2013
        schedule       fusedopt.schedules.linear  Defazio et al. 2023
        warmup_steps   0                          Kingma & Ba 2015
        min_lr_ratio   0.0                        Defazio et al. 2023
        total_steps    1000                       given

    References: arXiv:1412.6980 (Kingma & Ba), arXiv:1211.5063 (Pascanu et al.), arXiv:1409.3215 (Sutskever et al.),
    arXiv:2310.07831 (Defazio et al.), arXiv:1308.0850 (Graves).
    """
    total_steps = integer("total_steps", total_steps, 1)
    adam = "Kingma & Ba 2015"
    settings = {
        "optimizer": (Adam, adam),
        "lr": (1e-3, adam),
        "betas": ((0.9, 0.999), adam),
        "eps": (1e-8, adam),
        "weight_decay": (0.0, adam),
        "max_grad_norm": (5.0, "Sutskever et al. 2014; by norm: Pascanu et al. 2013"),
        "schedule": (schedules.linear, "Defazio et al. 2023"),
        "warmup_steps": (0, adam),
        "min_lr_ratio": (0.0, "Defazio et al. 2023"),
    }
    return _make("rnn", model, total_steps, settings, {}, overrides)


def _make(
    recipe: str, model: nn.Module, total_steps: int, settings: Settings, lion: Settings, overrides: dict[str, Any]
) -> Recipe[Any]:
    """Splits settings and overrides among parameter groups, optimizer and schedule, by the names that each one takes."""
    own_cls, schedule = settings["optimizer"][0], overrides.get("schedule", settings["schedule"][0])
    cls = overrides.get("optimizer", own_cls)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"{recipe}: optimizer must be a class of fusedopt or torch.optim, got {cls!r}")
    if issubclass(cls, SAM):
        raise TypeError(
            f"{recipe}: SAM goes around an optimizer; make it of the groups that the recipe for its base made"
        )
    if not inspect.isfunction(schedule):
        raise TypeError(f"{recipe}: schedule must be a function of fusedopt.schedules, got {schedule!r}")
    of_groups = _options(param_groups_weight_decay) - {"model"}
    of_optimizer = _options(cls) - {"params", "weight_decay"}
    of_schedule = _options(schedule) - {"optimizer"}
    known = {"optimizer", "schedule", "max_grad_norm", *of_groups, *of_optimizer, *of_schedule}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise TypeError(
            f"{recipe} with {cls.__name__} and {schedule.__name__} has no setting {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(sorted(known - {'total_steps'}))}"
        )

    if cls.__name__ != own_cls.__name__:  # its namesake in torch.optim is the same optimizer
        own_options = _options(own_cls) - {"weight_decay", "max_grad_norm"}
        settings = {name: setting for name, setting in settings.items() if name not in own_options}
        settings.update(lion if cls is Lion else {})
        if "lr" not in settings.keys() | overrides.keys():
            raise TypeError(f"{recipe} has no lr for {cls.__name__}: give lr=")
    settings = {name: setting for name, setting in settings.items() if name in known}
    values = {name: value for name, (value, _) in settings.items()} | overrides | {"total_steps": total_steps}
    if "max_grad_norm" not in of_optimizer and values["max_grad_norm"] is not None:
        raise ValueError(
            f"{recipe}: {_shown(cls)} does not clip; pass max_grad_norm=None, and call "
            "torch.nn.utils.clip_grad_norm_ before each step"
        )

    groups = param_groups_weight_decay(model, **{name: values[name] for name in values.keys() & of_groups})
    optimizer = cls(groups, **{name: values[name] for name in values.keys() & of_optimizer})
    scheduler = schedule(optimizer, **{name: values[name] for name in values.keys() & of_schedule})
    return Recipe(recipe, optimizer, scheduler, tuple(_rows(values, settings, overrides)))


def _options(function: Callable) -> set[str]:
    return {*inspect.signature(function).parameters}


def _rows(values: dict[str, Any], settings: Settings, overrides: dict[str, Any]) -> Iterator[Setting]:
    for name, value in values.items():
        default, source = settings.get(name, (None, ""))
        is_overridden = name in overrides or name not in settings
        if is_overridden:
            source = f"given, in place of {_shown(default)}: {source}" if source else "given"
        yield Setting(name, value, source, is_overridden)


def _shown(value: Any) -> str:
    if isinstance(value, type):  # from where it can be imported: fusedopt.optimizers, torch.optim
        return f"{value.__module__.rpartition('.')[0]}.{value.__name__}"
    return f"{value.__module__}.{value.__name__}" if inspect.isfunction(value) else repr(value)
