"""Which parameters of a model decay, as parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

# Those whose parameters can have more than one dimension; all other norms are known by having one.
NORMS = (nn.LayerNorm, nn.RMSNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def param_groups_weight_decay(
    model: nn.Module, weight_decay: float = 0.1, *, decay_embeddings: bool = True, no_decay: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weight decay on matrices and filters, none on norms, biases and vectors.

    A parameter does not decay if it has fewer than two dimensions, belongs to a norm layer, is a bias by its name (one of the
    words between underscores is ``bias``), or is excluded by `decay_embeddings` or `no_decay`. Norm layers of your own are
    known by their vectors; if their parameters have more dimensions, give their names to `no_decay`.

    A tensor that several modules share (tied weights) is there once, under its first name. It does not decay if any of its
    owners excludes it, so that what you exclude is excluded. Frozen parameters are kept: an optimizer passes over them, makes
    no state for them, and trains them from the moment that ``requires_grad`` is set.

    Args:
        model: the model; before something flattens its parameters into vectors, as FSDP1 does.
        weight_decay: of the first group.
        decay_embeddings: whether the weights of ``nn.Embedding`` and ``nn.EmbeddingBag`` decay.
        no_decay: names of parameters that do not decay, as in ``model.named_parameters()``; ``*`` stands for any text.

    Returns:
        At most two groups, ``[{"params": [(name, parameter), ...], "weight_decay": …}, {..., "weight_decay": 0.0}]``;
        one without parameters is left out. The order is that of ``model.named_parameters()``. Optimizers keep the names in
        ``param_names``.

    Raises:
        TypeError: model is no module. ValueError: a name in `no_decay` is no parameter's, or a lazy module has not run yet.

    Example:
        >>> import torch, fusedopt
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> for group in fusedopt.param_groups_weight_decay(model, decay_embeddings=False):
        ...     print(group["weight_decay"], [name for name, _ in group["params"]])
        0.1 ['2.weight']
        0.0 ['0.weight', '1.weight', '1.bias', '2.bias']
        >>> opt = fusedopt.AdamW(fusedopt.param_groups_weight_decay(model), lr=3e-4)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
    patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay)
    unused = set(patterns)
    found: dict[nn.Parameter, tuple[str, bool]] = {}  # by identity: its first name, whether it decays
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, param in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if is_lazy(param):
                raise ValueError(f"model: {name!r} has no shape yet; run the model once before")
            matching = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
            unused -= matching
            is_bias = "bias" in name.rpartition(".")[2].split("_")
            is_excluded = (
                matching or isinstance(module, NORMS) or (isinstance(module, EMBEDDINGS) and not decay_embeddings)
            )
            first_name, decays = found.get(param, (name, True))
            found[param] = first_name, decays and param.dim() >= 2 and not is_bias and not is_excluded
    if unused:
        raise ValueError(f"no_decay: no parameter of the model has the name {', '.join(map(repr, sorted(unused)))}")
    groups = [
        {"params": [(name, param) for param, (name, decays) in found.items() if decays is which], "weight_decay": decay}
        for which, decay in ((True, weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]
