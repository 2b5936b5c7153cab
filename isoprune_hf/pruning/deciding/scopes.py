"""Rules of single groups: may it be cut, with which groups does it compete, is its ratio fixed.

`resolve_rules` reads them from the patterns of a recipe; `SCOPES` registers the values of `prune.scope`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

from isoprune_hf.errors import RecipeError, UnsupportedArchitectureError
from isoprune_hf.pruning.deciding.settings import PatternSettings
from isoprune_hf.pruning.groups import CoupledGroup

_CUSTOM_PREFIX = "scope:"  # keeps a custom scope apart from a signature of the same text

Value = TypeVar("Value")


class Scope(Protocol):
    """A way to partition groups: those with equal keys compete with each other."""

    def __call__(self, group: CoupledGroup) -> str:
        """Return the key of a group."""
        ...


def isomorphic_scope(group: CoupledGroup) -> str:
    """Return the signature: the groups of one isomorphic class compete."""
    return group.signature


def global_scope(group: CoupledGroup) -> str:
    """Return the same key for every group: all groups compete."""
    return ""


def local_scope(group: CoupledGroup) -> str:
    """Return the name of the group: its channels compete only with each other."""
    return group.name


SCOPES: Mapping[str, Scope] = {"isomorphic": isomorphic_scope, "global": global_scope, "local": local_scope}


@dataclass(frozen=True)
class GroupRule:
    """The rule of one group.

    Args:
        scope: Groups of one scope compete with each other.
        is_free: The group may be cut.
        fixed: Fraction of its channels (in attention: of the dims inside its heads) to remove; None leaves the
            fraction to the ratios or the budget.
    """

    scope: str
    is_free: bool
    fixed: float | None


def resolve_rules(groups: Sequence[CoupledGroup], patterns: PatternSettings) -> dict[str, GroupRule]:
    """Resolve the patterns of a recipe; if several match a group, the first one applies.

    Returns:
        Group name -> its rule.

    Raises:
        UnsupportedArchitectureError: There are no groups.
        RecipeError: A pattern matches no group, or no group may be cut.
    """
    names = [group.name for group in groups]
    if not names:
        raise UnsupportedArchitectureError(
            "the model has no channels that can be cut; `isoprune inspect MODEL` lists the reasons"
        )
    included = _match("include", patterns.include, names) if patterns.include else set(names)
    free = included - _match("exclude", patterns.exclude, names)
    if not free:
        raise RecipeError(
            "prune.include and prune.exclude leave no group that may be cut; name fewer in prune.exclude"
        )
    custom_scopes = _first_match("scopes", patterns.scopes, names)
    ratios = _first_match("ratios", patterns.ratios, names)
    scope_of = SCOPES[patterns.scope]
    return {
        group.name: GroupRule(
            scope=f"{_CUSTOM_PREFIX}{custom_scopes[group.name]}" if group.name in custom_scopes else scope_of(group),
            is_free=group.name in free,
            fixed=ratios.get(group.name),
        )
        for group in groups
    }


def place_in_block(name: str) -> str:
    """Return the name of a group without its block number: equal for the groups at the same place of all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def check_alike(groups: Sequence[CoupledGroup], rules: Mapping[str, GroupRule]) -> None:
    """Check that groups that a uniform layout ties have one size and equal rules.

    Raises:
        RecipeError: Two of them differ; the message names both.
    """
    first = groups[0]
    for group in groups[1:]:
        if (group.channels, group.num_heads) != (first.channels, first.num_heads):
            raise RecipeError(
                f"prune.layout uniform needs equal blocks: {first.name} has {first.channels} channels and "
                f"{first.num_heads} heads, {group.name} has {group.channels} and {group.num_heads}"
            )
        rule, expected = rules[group.name], rules[first.name]
        compared = [
            ("include or prune.exclude", rule.is_free, expected.is_free),
            ("ratios", rule.fixed, expected.fixed),
            ("scopes", _custom_scope(rule), _custom_scope(expected)),
        ]
        for setting, value, other in compared:
            if value != other:
                raise RecipeError(
                    f"prune.layout uniform cuts all blocks alike, and prune.{setting} treats {first.name} and "
                    f"{group.name} differently; name them together, as {place_in_block(group.name)!r}"
                )


def _custom_scope(rule: GroupRule) -> str | None:
    return rule.scope if rule.scope.startswith(_CUSTOM_PREFIX) else None


def _match(setting: str, patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    """Return the names that match any of the patterns; each must match at least one."""
    matched: set[str] = set()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names[:3])
            raise RecipeError(
                f"prune.{setting}: no group matches {pattern!r}; the {len(names)} groups of this model are named like "
                f"{', '.join(near)}"
            )
        matched |= matches
    return matched


def _first_match(setting: str, values: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """Return name -> value of the first pattern that matches it."""
    _match(setting, values, names)
    chosen: dict[str, Value] = {}
    for pattern, value in values.items():
        for name in names:
            if fnmatchcase(name, pattern):
                chosen.setdefault(name, value)
    return chosen
