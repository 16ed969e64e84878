"""The public API as a strictly typed program uses it. Checked by tests/test_types.py, never run."""

from collections.abc import Callable
from typing import Any, assert_type

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

import fusedopt
from fusedopt.options import OptimizerOptions

model = torch.nn.Linear(3, 2)
params = model.parameters()

# Construction: every form of parameters, and torch's own arguments.
adamw = fusedopt.AdamW(
    params, lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0, nonfinite="skip", backend="cpu", fused=True
)
fusedopt.AdamW(model.named_parameters(), lr=torch.tensor(1e-3), betas=[0.9, 0.95], sparse="lazy")
fusedopt.SGD([{"params": list(params), "lr": 0.1}], momentum=0.9, nesterov=True, sparse=None)
fusedopt.Adam(params, amsgrad=True, bias_correction=False)
fusedopt.Adagrad(params, rowwise=True).share_memory()
fusedopt.RMSprop(params, centered=True, eps_inside_sqrt=True)
fusedopt.NAdam(params, momentum_decay=4e-3)
fusedopt.RAdam(params, decoupled_weight_decay=True)
fusedopt.Adan(params, betas=(0.98, 0.92, 0.99))
fusedopt.LAMB(params, always_adapt=False)
fusedopt.StableAdamW(params, nonfinite="error")
options: OptimizerOptions = {"max_grad_norm": 1.0, "nonfinite": "skip"}
assert_type(fusedopt.NAdam(params, lr=1e-3, **options), fusedopt.NAdam)
lion = fusedopt.Lion(fusedopt.param_groups_weight_decay(model, 0.1, no_decay=["bias"]))
sam = fusedopt.SAM(params, fusedopt.SGD, rho=0.1, adaptive=True, lr=0.1)


# Training.
def closure() -> torch.Tensor:
    return torch.zeros(())


assert_type(adamw.step(), None)
assert_type(adamw.step(closure), torch.Tensor)
assert_type(adamw.step(lambda: 1.5), float)
assert_type(sam.step(closure), torch.Tensor)
assert_type(sam.first_step(zero_grad=True), None)
sam.second_step()
sam.restore()
adamw.zero_grad(set_to_none=True)
adamw.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
assert_type(adamw.clip_grad_norm_(1.0, error_if_nonfinite=True), torch.Tensor)
assert_type(fusedopt.clip_grad_norm_([adamw, lion], 1.0), torch.Tensor)
assert_type(fusedopt.clip_grad_norm_(adamw, max_norm=1.0), torch.Tensor)
assert_type(adamw.grad_norm, torch.Tensor | None)
assert_type(adamw.skipped_steps, int | torch.Tensor)
assert_type(adamw.max_grad_norm, float | None)
adamw.max_grad_norm = None
adamw.nonfinite = "propagate"
adamw.sparse = "lazy"
sam.rho = 0.2
assert_type(adamw.state_dict(), dict[str, Any])
assert_type(adamw.load_state_dict(adamw.state_dict()), None)
as_torchs: torch.optim.Optimizer = sam
hook: Callable[..., Any] = adamw.step

# Schedules and recipes.
assert_type(fusedopt.schedules.warmup_cosine(adamw, total_steps=10, warmup_steps=2), LambdaLR)
assert_type(fusedopt.schedules.one_cycle(adamw, total_steps=10, warmup_steps=3), OneCycleLR)
optimizer, scheduler = fusedopt.recipes.transformer_pretraining(model, 100, lr=1e-3)
assert_type(optimizer, fusedopt.AdamW)
assert_type(scheduler, LRScheduler)
of_lion, _ = fusedopt.recipes.fine_tuning(model, 100, optimizer=fusedopt.Lion, lr=1e-4)
assert_type(of_lion, fusedopt.Lion)
of_torch, _ = fusedopt.recipes.image_from_scratch(model, 100, optimizer=torch.optim.SGD, lr=0.1)
assert_type(of_torch, torch.optim.SGD)
recipe = fusedopt.recipes.rnn(model, 100)
assert_type(recipe.optimizer, fusedopt.Adam)
assert_type(recipe.settings, tuple[fusedopt.recipes.Setting, ...])
