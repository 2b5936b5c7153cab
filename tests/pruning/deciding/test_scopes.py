import numpy as np
import pytest

from isoprune_hf.errors import RecipeError, UnsupportedArchitectureError
from isoprune_hf.pruning.deciding.scopes import GroupRule, resolve_rules
from isoprune_hf.pruning.deciding.settings import AllocationSettings
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.recipes import PruneRecipe


def group(name: str, signature: str) -> CoupledGroup:
    return CoupledGroup(name, signature, 4, (Member(f"{name}.weight", 0, np.arange(4)[:, None]),))


GROUPS = [group("stem", "s"), group("blocks.0.mlp", "m"), group("blocks.1.mlp", "m"), group("blocks.10.mlp", "m")]


def rules(**settings) -> dict[str, GroupRule]:
    return resolve_rules(GROUPS, AllocationSettings.from_recipe(PruneRecipe(criterion="taylor", **settings)).patterns)


def test_scope_is_class_model_or_group() -> None:
    assert [rule.scope for rule in rules().values()] == ["s", "m", "m", "m"]
    assert {rule.scope for rule in rules(scope="global").values()} == {""}
    assert [rule.scope for rule in rules(scope="local").values()] == [g.name for g in GROUPS]


def test_custom_scope_removes_groups_from_their_class() -> None:
    found = rules(scopes={"blocks.0.*": "early", "stem": "early"})
    assert found["blocks.0.mlp"].scope == found["stem"].scope != "m"
    assert found["blocks.1.mlp"].scope == found["blocks.10.mlp"].scope == "m"


def test_custom_scope_differs_from_equal_signature() -> None:
    found = rules(scopes={"stem": "m"})
    assert found["stem"].scope != found["blocks.1.mlp"].scope


def test_excluded_groups_are_not_free() -> None:
    free = {name for name, rule in rules(include=["blocks.*"], exclude=["*.1.*"]).items() if rule.is_free}
    assert free == {"blocks.0.mlp", "blocks.10.mlp"}
    assert all(rule.is_free for rule in rules().values())


def test_first_matching_pattern_applies() -> None:
    found = rules(ratios={"blocks.0.*": 0.1, "blocks.*": 0.4})
    assert [rule.fixed for rule in found.values()] == [None, 0.1, 0.4, 0.4]
    found = rules(ratios={"blocks.*": 0.4, "blocks.0.*": 0.1})
    assert [rule.fixed for rule in found.values()] == [None, 0.4, 0.4, 0.4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"include": ["blks.0.mlp"]},
            r"prune\.include: no group matches 'blks\.0\.mlp'; .* blocks\.0\.mlp",
        ),
        ({"exclude": ["Stem"]}, r"prune\.exclude: no group matches 'Stem'"),
        ({"ratios": {"stem": 0.1, "nowhere": 0.2}}, r"prune\.ratios: no group matches 'nowhere'"),
        ({"scopes": {"x*": "y"}}, r"prune\.scopes: no group matches 'x\*'"),
        ({"include": ["stem"], "exclude": ["st*"]}, "leave no group that may be cut"),
    ],
)
def test_pattern_without_match_is_refused(settings, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        rules(**settings)


def test_model_without_groups_is_refused_by_name() -> None:
    settings = AllocationSettings.from_recipe(PruneRecipe(criterion="l1")).patterns
    with pytest.raises(UnsupportedArchitectureError, match="isoprune inspect"):
        resolve_rules([], settings)
