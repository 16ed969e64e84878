"""The options of parameter groups, as a plan needs them: validated, and read again only where they changed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

from fusedopt.errors import UNCHANGED
from fusedopt.rules import Options, Rule, check_no_own, read_options, with_lr

Seen = tuple[list, list]  # keys and values of a group


class Groups:
    """The options of all groups of an optimizer.

    Args:
        whole: the options of the whole optimizer.
    """

    def __init__(self, rule: Rule, whole: Mapping[str, Any], num_groups: int):
        self._rule = rule
        self._whole = whole
        self.options: list[Options | None] = [None] * num_groups
        self._seen: list[Seen | None] = [None] * num_groups
        self.scalars: list[tuple[Any, ...]] = []  # for each group its hyperparameters, in the order of `Rule.hyper`
        self.signs: list[float] = []  # for each group what its gradients are multiplied with
        self.is_weighted: list[bool] = []  # for each group whether the norm takes its gradients times their parameters

    def read(self, owner: str, param_groups: list[dict[str, Any]]) -> bool:
        """Takes over hyperparameters, validated where they changed.

        Returns:
            False if the options now select other kernels, or if other gradients may be sparse.

        Raises:
            ValueError, TypeError: naming the group whose options are wrong; then nothing is taken over.
        """
        changed = [index for index, group in enumerate(param_groups) if not _is_as_seen(group, self._seen[index])]
        if not changed:
            return True
        # Replaced only when all groups are valid: a refusal must not lose a change.
        read, seen = [*self.options], [*self._seen]
        for index in changed:
            group = param_groups[index]
            if not isinstance(group, dict):
                kind = type(group).__name__
                raise TypeError(f"{owner}: param_groups[{index}] is a {kind}, not a dict; {UNCHANGED}")
            try:
                check_no_own(self._rule, group, self._whole)
                scheduled = _but_for_lr(group, seen[index])
                if scheduled:
                    read[index], seen[index] = with_lr(self._rule, read[index], group["lr"]), scheduled
                else:
                    read[index], seen[index] = read_options(self._rule, group), _seen(group)
            except (ValueError, TypeError, KeyError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{owner}: param_groups[{index}]: {reason}; {UNCHANGED}") from None
        is_same_kernel = all(
            before is None or (before.variant, before.is_sparse_exact) == (now.variant, now.is_sparse_exact)
            for before, now in zip(self.options, read, strict=True)
        )
        self.options, self._seen = read, seen
        self.scalars = [options.scalars for options in read]
        self.signs = [-1.0 if options.maximize else 1.0 for options in read]
        weight = None if self._rule.norm_weight is None else self._rule.hyper.index(self._rule.norm_weight)
        self.is_weighted = [weight is not None and bool(scalars[weight]) for scalars in self.scalars]
        return is_same_kernel


def _seen(group: dict[str, Any]) -> Seen | None:
    """A group's keys and values; None if an option can change without becoming another object, as a tensor or a list can."""
    options = (value for name, value in group.items() if name not in ("params", "param_names"))
    flat = (item for value in options for item in (value if isinstance(value, tuple) else (value,)))
    is_fixed = all(item is None or type(item) in (float, int, bool, str) for item in flat)
    return ([*group], [*group.values()]) if is_fixed else None


def _is_as_seen(group: dict[str, Any], seen: Seen | None) -> bool:
    """Whether a group holds the very objects that it held when it was `_seen`."""
    return seen is not None and type(group) is dict and [*group] == seen[0] and all(map(is_, group.values(), seen[1]))


def _but_for_lr(group: dict[str, Any], seen: Seen | None) -> Seen | None:
    """What is `_seen` of a group now, if only its learning rate is another, a float: schedulers do that in every step."""
    if seen is None or type(group.get("lr")) is not float:
        return None
    names, values = seen[0], [*seen[1]]
    values[names.index("lr")] = group["lr"]
    return (names, values) if _is_as_seen(group, (names, values)) else None
