"""What a recipe says of single groups: which may be cut, who competes with whom, and fractions fixed by name."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from isoprune_hf.errors import RecipeError
from isoprune_hf.pruning.groups import CoupledGroup
from isoprune_hf.recipes import PruneRecipe


@dataclass(frozen=True)
class Rule:
    """What holds for one group.

    Args:
        scope: Groups of one scope compete with each other.
        is_free: The group may be cut.
        fixed: Fraction of its channels (in attention: of the dims inside its heads) that leaves; None leaves that to
            the ratios or the budget.
    """

    scope: str
    is_free: bool
    fixed: float | None


def resolve_rules(groups: Sequence[CoupledGroup], recipe: PruneRecipe) -> dict[str, Rule]:
    """Read `include`, `exclude`, `scopes` and `ratios` of a recipe; of several patterns that match the first counts.

    Returns:
        Group name -> its rule.

    Raises:
        RecipeError: A pattern matches no group, or nothing is left to cut.
    """
    names = [group.name for group in groups]
    included = _matched("include", recipe.include, names) if recipe.include else set(names)
    free = included - _matched("exclude", recipe.exclude, names)
    if not free:
        raise RecipeError(
            "prune.include and prune.exclude leave no group that may be cut; name fewer in prune.exclude"
        )
    scopes, ratios = _first("scopes", recipe.scopes, names), _first("ratios", recipe.ratios, names)
    own = {"isomorphic": lambda group: group.signature, "global": lambda _: "", "local": lambda group: group.name}
    return {
        group.name: Rule(
            scope=f"scope:{scopes[group.name]}" if group.name in scopes else own[recipe.scope](group),
            is_free=group.name in free,
            fixed=ratios.get(group.name),
        )
        for group in groups
    }


def place_in_block(name: str) -> str:
    """Name of a group without the number of its block: equal for groups at the same place of all blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def check_alike(team: Sequence[CoupledGroup], rules: Mapping[str, Rule]) -> None:
    """Check that groups that a uniform layout keeps alike are of one size, and that the recipe treats them alike.

    Raises:
        RecipeError: Names two that differ.
    """
    first = team[0]
    for group in team[1:]:
        if (group.channels, group.num_heads) != (first.channels, first.num_heads):
            raise RecipeError(
                f"prune.layout uniform needs equal blocks: {first.name} has {first.channels} channels and "
                f"{first.num_heads} heads, {group.name} has {group.channels} and {group.num_heads}"
            )
        rule, known = rules[group.name], rules[first.name]
        asked = [
            ("include or prune.exclude", rule.is_free, known.is_free),
            ("ratios", rule.fixed, known.fixed),
            ("scopes", _own_scope(rule), _own_scope(known)),
        ]
        for setting, value, other in asked:
            if value != other:
                raise RecipeError(
                    f"prune.layout uniform cuts all blocks alike, and prune.{setting} tells {first.name} and "
                    f"{group.name} apart; name them together, as {place_in_block(group.name)!r}"
                )


def _own_scope(rule: Rule) -> str | None:
    return rule.scope if rule.scope.startswith("scope:") else None


def _matched(setting: str, patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    found = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in patterns}
    for pattern, matches in found.items():
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or list(names[:3])
            raise RecipeError(
                f"prune.{setting}: no group matches {pattern!r}; the {len(names)} groups of this model are named like "
                f"{', '.join(near)}"
            )
    return set().union(*found.values())


def _first(setting: str, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    _matched(setting, values, names)
    chosen: dict[str, Any] = {}
    for pattern, value in reversed(values.items()):
        chosen |= {name: value for name in names if fnmatchcase(name, pattern)}
    return chosen
