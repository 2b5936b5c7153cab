import pytest

from isoprune_hf.pruning.graph.rules.registry import RuleTable, merge_tables


def test_operation_with_two_rules_is_rejected() -> None:
    first, second = RuleTable(), RuleTable()
    first("view", "reshape")(lambda *_: ())
    second("view")(lambda *_: ())
    with pytest.raises(ValueError, match="view"):
        merge_tables((first, second))


def test_decorator_returns_the_function_itself() -> None:
    rule = RuleTable()

    @rule("view")
    @rule("reshape")
    def regroup() -> None: ...

    assert dict(merge_tables([rule])) == {"view": regroup, "reshape": regroup}
