"""Parameter groups by weight decay, and the recipes: the papers' numbers, each of which can be replaced."""

import copy
import doctest
import importlib
import pickle
import re
import warnings

import pytest
import torch
from helpers import SPECS, assert_same_bits, make_params
from torch import nn

import fusedopt
from fusedopt import param_groups_weight_decay, recipes, schedules


class OwnNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


class Zoo(nn.Module):
    """One of each kind, and two owners of the embedding."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 4))
        self.place = self.position
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.relative_bias = nn.Parameter(torch.randn(3, 2))
        self.token = nn.Embedding(9, 4)
        self.bag = nn.EmbeddingBag(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm((3, 4))
        self.rms = nn.RMSNorm((3, 4))
        self.own = OwnNorm()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
        self.again = self.conv
        self.lstm = nn.LSTM(4, 3)
        self.head = nn.Linear(4, 9)
        self.head.weight = self.token.weight


MATRICES = ["attention.in_proj_weight", "attention.out_proj.weight", "conv.0.weight"]
MATRICES += ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]


def names(groups):
    return {group["weight_decay"]: [name for name, _ in group["params"]] for group in groups}


def test_matrices_decay_and_norms_biases_and_vectors_do_not():
    model = Zoo()
    groups = names(param_groups_weight_decay(model, 0.3))
    assert [*groups] == [0.3, 0.0]
    assert groups[0.3] == ["position", "token.weight", "bag.weight", *MATRICES]
    assert groups[0.0] == [name for name, _ in model.named_parameters() if name not in groups[0.3]]
    assert {"scale", "relative_bias", "attention.bias_k", "norm.weight", "rms.weight", "own.gain"} < {*groups[0.0]}


def test_tied_tensor_is_there_once_and_does_not_decay_if_an_owner_excludes_it():
    model = Zoo()
    assert names(param_groups_weight_decay(model, 0.3, decay_embeddings=False))[0.3] == ["position", *MATRICES]
    by_second_name = names(param_groups_weight_decay(model, 0.3, no_decay=["head.weight", "again.0.*", "place"]))
    assert {"position", "token.weight", "conv.0.weight"} < {*by_second_name[0.0]}
    for groups in (by_second_name, names(param_groups_weight_decay(model, 0.3))):
        assert sorted([*groups[0.3], *groups[0.0]]) == sorted(name for name, _ in model.named_parameters())


def test_names_given_do_not_decay():
    groups = names(param_groups_weight_decay(Zoo(), 0.3, no_decay=("pos*", "attention.*")))
    assert groups[0.3] == ["token.weight", "bag.weight", *MATRICES[2:]]
    with pytest.raises(ValueError, match=r"no_decay: no parameter of the model has the name 'Pos\*', 'tokens'"):
        param_groups_weight_decay(Zoo(), no_decay=("attention.*", "tokens", "Pos*"))


def test_no_group_is_empty():
    assert names(param_groups_weight_decay(nn.Linear(2, 3, bias=False))) == {0.1: ["weight"]}
    assert names(param_groups_weight_decay(nn.BatchNorm1d(2))) == {0.0: ["weight", "bias"]}
    assert param_groups_weight_decay(nn.ReLU()) == []


def test_frozen_parameter_has_no_state_and_is_trained_once_it_is_free():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    groups = param_groups_weight_decay(model)
    assert names(groups) == {0.1: ["0.weight", "1.weight"], 0.0: ["0.bias", "1.bias"]}
    optimizer = fusedopt.AdamW(groups, lr=0.1)
    frozen = model[0].weight.detach().clone()
    for is_free in (False, True):
        model[0].requires_grad_(is_free)
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (model[0].weight in optimizer.state) is is_free
        assert torch.equal(model[0].weight, frozen) is not is_free


@pytest.mark.parametrize("cls", [*(spec.cls for spec in SPECS), torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_keep_the_names_and_decay_the_first_group_only(cls):
    model = Zoo()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = cls(param_groups_weight_decay(model, 0.3), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["position", "token.weight", "bag.weight", *MATRICES]
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert torch.equal(param, before[name]) is (group["weight_decay"] == 0), name


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got a generator"):
        param_groups_weight_decay(nn.Linear(2, 3).parameters())
    with pytest.raises(ValueError, match=r"model: '0.weight' has no shape yet; run the model once before"):
        param_groups_weight_decay(nn.Sequential(nn.LazyLinear(3)))


# ---- recipes -------------------------------------------------------------------------------------------------------

RECIPES = {name: getattr(recipes, name) for name in recipes.__all__ if name != "Recipe"}
every_recipe = pytest.mark.parametrize("name", RECIPES)
# As the papers have them: class, options of a group, limit of the norm, steps of warmup of 9000, last lr.
PAPERS = {
    "transformer_pretraining": (
        fusedopt.AdamW,
        {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
        1.0,
        72,
        3e-5,
    ),
    "fine_tuning": (
        fusedopt.AdamW,
        {"lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01},
        1.0,
        900,
        0.0,
    ),
    "image_from_scratch": (
        fusedopt.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": False, "dampening": 0, "weight_decay": 1e-4},
        None,
        500,
        0.0,
    ),
    "rnn": (fusedopt.Adam, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}, 5.0, 1, 0.0),
}


def lr_at(optimizer, scheduler, step):
    """The lr of a step, from 1, of a run that has begun."""
    optimizer.step()
    while scheduler.last_epoch < step - 1:
        scheduler.step()
    return scheduler.get_last_lr()[0]


@every_recipe
def test_settings_are_the_papers(name):
    cls, options, max_grad_norm, warmup, last_lr = PAPERS[name]
    recipe = RECIPES[name](nn.Linear(3, 2), 9000)
    optimizer, scheduler = recipe
    assert optimizer is recipe.optimizer and scheduler is recipe.scheduler
    assert type(optimizer) is cls and optimizer.max_grad_norm == max_grad_norm
    lr = options["lr"]
    decayed, rest = optimizer.param_groups
    assert (decayed["param_names"], rest["param_names"], rest["weight_decay"]) == (["weight"], ["bias"], 0)
    assert {name: {**decayed, "lr": decayed["initial_lr"]}[name] for name in options} == options
    assert not any(setting.is_overridden for setting in recipe.settings if setting.name != "total_steps")
    assert scheduler.get_last_lr() == pytest.approx([lr / warmup] * 2)
    if warmup > 1:
        assert lr_at(optimizer, scheduler, warmup - 1) == pytest.approx(lr * (warmup - 1) / warmup)
    assert lr_at(optimizer, scheduler, warmup) == lr
    assert lr_at(optimizer, scheduler, warmup + 1) < lr
    assert lr_at(optimizer, scheduler, 8999) > last_lr
    assert lr_at(optimizer, scheduler, 9000) == pytest.approx(last_lr)


def test_cosine_and_line_are_where_the_papers_have_them():
    """Halfway from warmup to end both are halfway; a quarter of the way the line is lower."""
    for name, at_a_quarter in (
        ("transformer_pretraining", 0.1 + 0.9 * (1 + 0.5**0.5) / 2),
        ("image_from_scratch", (1 + 0.5**0.5) / 2),
        ("fine_tuning", 0.75),
        ("rnn", 0.75),
    ):
        optimizer, scheduler = RECIPES[name](nn.Linear(3, 2), 401, lr=1.0, warmup_steps=1)
        assert lr_at(optimizer, scheduler, 101) == pytest.approx(at_a_quarter), name


OTHER = {
    "lr": 0.01,
    "betas": (0.8, 0.97),
    "eps": 1e-5,
    "momentum": 0.7,
    "nesterov": True,
    "weight_decay": 0.2,
    "max_grad_norm": 0.3,
    "warmup_steps": 7,
    "min_lr_ratio": 0.25,
    "optimizer": fusedopt.NAdam,
    "schedule": schedules.one_cycle,
}


@every_recipe
def test_every_setting_can_be_replaced(name):
    """It reaches the optimizer or the schedule, and the table says that it is the caller's; all others stay."""
    default = RECIPES[name](nn.Linear(3, 2), 100)
    for setting in default.settings:
        if setting.name == "total_steps":
            continue
        other = OTHER[setting.name]
        extra = {"optimizer": {"lr": 0.5}, "schedule": {"warmup_steps": 7}}.get(setting.name, {})
        recipe = RECIPES[name](nn.Linear(3, 2), 100, **{setting.name: other}, **extra)
        optimizer, scheduler = recipe
        group = {**optimizer.param_groups[0], "lr": optimizer.param_groups[0]["initial_lr"]}
        if setting.name in group:
            assert group[setting.name] == other
        elif setting.name == "max_grad_norm":
            assert optimizer.max_grad_norm == other
        elif setting.name == "warmup_steps":
            assert lr_at(optimizer, scheduler, 6) < lr_at(optimizer, scheduler, 7) == group["lr"]
        elif setting.name == "min_lr_ratio":
            assert lr_at(optimizer, scheduler, 100) == 0.25 * group["lr"]
        elif setting.name == "optimizer":
            assert type(optimizer) is other
        else:
            assert isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR)
        rows = {row.name: row for row in recipe.settings}
        assert {row.name for row in recipe.settings if row.is_overridden} == {setting.name, "total_steps", *extra}
        assert rows[setting.name].value == other
        assert rows[setting.name].source.startswith("given, in place of ")
        assert rows[setting.name].source.endswith(setting.source)
        if setting.name not in ("optimizer", "schedule"):
            assert all(row in recipe.settings for row in default.settings if row.name != setting.name)


def test_table_shows_every_setting_its_value_and_its_source():
    lines = str(recipes.transformer_pretraining(nn.Linear(3, 2), 1000, lr=1e-3, nonfinite="skip")).split("\n")
    assert lines[0] == "recipe transformer_pretraining"
    rows = {row[0]: row[1:] for row in (re.split(r" {2,}", line) for line in lines[1:])}
    assert rows["setting"] == ["value", "source"]
    assert rows["optimizer"] == ["fusedopt.optimizers.AdamW", "LLaMA, section 2.3"]
    assert rows["lr"][0] == "0.001" and rows["lr"][1].startswith("given, in place of 0.0003: LLaMA 7B and 13B;")
    assert rows["schedule"] == ["fusedopt.schedules.warmup_cosine", "GPT-3, appendix B; LLaMA, section 2.3"]
    assert rows["warmup_steps"][0] == "8"
    assert rows["nonfinite"] == ["'skip'", "given"]
    assert rows["total_steps"] == ["1000", "given"]


@every_recipe
def test_other_options_of_optimizer_groups_and_schedule_pass_through(name):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    optimizer, _ = RECIPES[name](
        model, 100, nonfinite="skip", backend="reference", maximize=True, decay_embeddings=False, no_decay=["1.weight"]
    )
    assert (optimizer.nonfinite, optimizer.backend) == ("skip", "reference")
    (group,) = optimizer.param_groups
    assert group["maximize"] and group["weight_decay"] == 0


@every_recipe
def test_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(TypeError) as error:
        RECIPES[name](nn.Linear(3, 2), 100, learning_rate=1, beta=2)
    message = str(error.value)
    assert message.startswith(f"{name} with ") and "has no setting 'beta', 'learning_rate'; it has " in message
    listed = message.partition("it has ")[2].split(", ")
    assert {"lr", "weight_decay", "max_grad_norm", "nonfinite", "backend", "warmup_steps", "no_decay"} < {*listed}
    assert not {"params", "model", "total_steps", "self"} & {*listed}


def test_what_another_schedule_does_not_know_is_dropped_or_refused():
    pretraining, model = recipes.transformer_pretraining, nn.Linear(3, 2)
    wsd = pretraining(model, 1000, schedule=schedules.warmup_stable_decay, decay_steps=200)
    assert lr_at(*wsd, 800) == 3e-4 > lr_at(*wsd, 801) > lr_at(*wsd, 1000) == pytest.approx(3e-5)
    endless = pretraining(model, 1000, schedule=schedules.inverse_sqrt)
    assert [row.name for row in endless.settings[-2:]] == ["warmup_steps", "total_steps"]
    assert lr_at(*endless, 32) == pytest.approx(3e-4 / 2)  # after 8 steps of warmup
    with pytest.raises(TypeError, match=r"with AdamW and inverse_sqrt has no setting 'min_lr_ratio'"):
        pretraining(model, 1000, schedule=schedules.inverse_sqrt, min_lr_ratio=0.1)
    with pytest.raises(TypeError, match=r"schedule must be a function of fusedopt.schedules, got 'linear'"):
        pretraining(model, 1000, schedule="linear")


def test_another_class_has_its_own_defaults_and_needs_an_lr():
    pretraining, model = recipes.transformer_pretraining, nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"transformer_pretraining has no lr for NAdam: give lr="):
        pretraining(model, 100, optimizer=fusedopt.NAdam)
    optimizer, _ = pretraining(model, 100, optimizer=fusedopt.NAdam, lr=0.01, momentum_decay=0.01)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["momentum_decay"], group["initial_lr"]) == ((0.9, 0.999), 0.01, 0.01)
    assert (group["weight_decay"], optimizer.max_grad_norm) == (0.1, 1.0)
    with pytest.raises(TypeError, match=r"with SGD and warmup_cosine has no setting 'betas'"):
        pretraining(model, 100, optimizer=fusedopt.SGD, lr=0.1, betas=(0.9, 0.99))
    for value in ("AdamW", fusedopt.AdamW(model.parameters()), nn.Linear):
        with pytest.raises(TypeError, match=r"optimizer must be a class of fusedopt or torch.optim, got "):
            pretraining(model, 100, optimizer=value)


def test_lion_takes_less_lr_and_more_decay_than_adamw():
    """3 to 10 times, by its paper; the same lr × decay to a third."""
    for name in ("transformer_pretraining", "fine_tuning"):
        lion, _ = RECIPES[name](nn.Linear(3, 2), 100, optimizer=fusedopt.Lion)
        adamw, _ = RECIPES[name](nn.Linear(3, 2), 100)
        group, other = lion.param_groups[0], adamw.param_groups[0]
        assert group["betas"] == (0.9, 0.99)
        assert 3 <= other["initial_lr"] / group["initial_lr"] * (1 + 1e-9) <= 10
        assert 3 <= group["weight_decay"] / other["weight_decay"] * (1 + 1e-9) <= 10
        given, _ = RECIPES[name](nn.Linear(3, 2), 100, optimizer=fusedopt.Lion, lr=0.5)
        assert given.param_groups[0]["initial_lr"] == 0.5
    with pytest.raises(TypeError, match=r"rnn has no lr for Lion"):
        recipes.rnn(nn.Linear(3, 2), 100, optimizer=fusedopt.Lion)


def test_namesake_in_torch_has_the_same_settings_but_does_not_clip():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"torch.optim.AdamW does not clip; pass max_grad_norm=None, and call"):
        recipes.transformer_pretraining(model, 100, optimizer=torch.optim.AdamW)
    theirs, scheduler = recipes.transformer_pretraining(
        model, 100, optimizer=torch.optim.AdamW, max_grad_norm=None, fused=True
    )
    ours, _ = recipes.transformer_pretraining(model, 100)
    assert type(theirs) is torch.optim.AdamW and scheduler.get_last_lr() == [3e-4, 3e-4]
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {**a, "fused": True, "foreach": None}.keys() == b.keys()
        assert all(a[key] == b[key] for key in ("lr", "betas", "eps", "weight_decay", "param_names"))
    with pytest.raises(TypeError, match=r"has no setting 'nonfinite'"):
        recipes.transformer_pretraining(model, 100, optimizer=torch.optim.AdamW, max_grad_norm=None, nonfinite="skip")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"total_steps": 0}, ValueError, "total_steps must be an integer >= 1, got 0"),
        ({"total_steps": 10.0}, ValueError, "total_steps must be an integer >= 1, got 10.0"),
        ({"total_steps": "9"}, ValueError, "total_steps must be an integer >= 1, got '9'"),
        ({"lr": -1}, ValueError, "lr must be >= 0, got -1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be >= 0, got -1"),
        ({"warmup_steps": 10}, ValueError, "warmup_steps must be at most total_steps, got 10 > 9"),
        ({"min_lr_ratio": 2}, ValueError, "min_lr_ratio must be in [0, 1], got 2"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be > 0"),
        ({"model": [nn.Parameter(torch.ones(2))]}, TypeError, "model must be a torch.nn.Module, got a list"),
    ],
)
@every_recipe
def test_bad_value_is_named(name, arguments, error, message):
    with pytest.raises(error) as caught:
        RECIPES[name](**{"model": nn.Linear(3, 2), "total_steps": 9, **arguments})
    assert message in str(caught.value)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 6)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


@pytest.mark.parametrize(
    "name, make, overrides",
    [
        ("transformer_pretraining", lambda: nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True), {"lr": 3e-3}),
        ("fine_tuning", lambda: nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True), {"lr": 1e-3}),
        ("image_from_scratch", lambda: nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5)), {}),
        ("rnn", Recurrent, {"lr": 0.01}),
    ],
)
def test_training_by_a_recipe_lowers_the_loss_without_a_warning(name, make, overrides):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        model, x, y = make(), torch.randn(16, 5, 6), torch.randn(16, 5, 6)
        optimizer, scheduler = RECIPES[name](model, 60, **overrides)
        losses = []
        for _ in range(60):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_resumed_recipe_is_the_one_that_never_stopped(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(7, 3)
        return model, *recipes.transformer_pretraining(model, 20)

    def train(model, optimizer, scheduler, steps):
        for step in steps:
            model(make_params(((5, 7),), seed=step)[0]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return model.parameters()

    straight = train(*make(), range(20))
    stopped = make()
    train(*stopped, range(9))
    torch.save([part.state_dict() for part in stopped], tmp_path / "checkpoint.pt")
    resumed = make()
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert_same_bits(straight, train(*resumed, range(9, 20)))


@pytest.mark.parametrize("module", ["recipes", "param_groups"])
def test_docstring_examples_run(module):
    module = importlib.import_module(f"fusedopt.{module}")
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 3


@every_recipe
def test_every_number_is_in_the_docstring_with_its_paper(name):
    doc = RECIPES[name].__doc__
    for heading in ("Args:", "Returns:", "Raises:", "Example:", "References: arXiv:"):
        assert heading in doc
    for setting in RECIPES[name](nn.Linear(3, 2), 100).settings:
        for number in re.findall(r"\b\d+(?:\.\d+|e-\d+)\b", repr(setting.value).replace("e-0", "e-")):
            assert float(number) in {*map(float, re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", doc))}, (setting.name, number)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda recipe: pickle.loads(pickle.dumps(recipe))])
def test_recipe_can_be_copied(duplicate):
    recipe = fusedopt.recipes.rnn(torch.nn.LSTM(2, 3), 10)
    again = duplicate(recipe)
    assert type(again) is type(recipe) and (again.name, again.settings) == (recipe.name, recipe.settings)
    optimizer, scheduler = again
    assert again.optimizer is optimizer and scheduler.optimizer is optimizer and str(again) == str(recipe)
