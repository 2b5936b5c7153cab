import json
from pathlib import Path
from typing import Any

from coverage_models import Case
from coverage_table import (
    count_table,
    documented,
    failure_table,
    over_table,
    passed,
    read_rows,
    reason_list,
    share_table,
    unrepaired_table,
    worst_table,
)

CASES = [Case(name, library, "family") for name, library in (("a", "timm"), ("b", "timm"), ("c", "torchvision"))]


def make_row(name: str, *, share: float = 1.0, **default: Any) -> dict[str, Any]:
    """Return a row whose plain cut passes, and whose default does unless `default` says otherwise."""
    done = {"step": "done", "share": share, "cpu_s": 2.0, "peak_mb": 700}
    row = {"name": name, "library": "timm", "family": f"of {name}", "load": {"step": "done"}}
    return row | {"default": done | default, "plain": done}


def test_failures_are_counted_by_kind() -> None:
    rows = {
        "a": make_row("a", kind="traceback", step="score", error="no | such", type="KeyError"),
        "c": make_row("c"),
    }
    assert count_table(CASES, rows, "default")[2:] == [
        "| timm | 2 | 1 | 0 (0.0%) | 0 | 0 | 0 | 1 | 0 |",
        "| torchvision | 1 | 1 | 1 (100.0%) | 0 | 0 | 0 | 0 | 0 |",
        "| all | 3 | 2 | 1 (50.0%) | 0 | 0 | 0 | 1 | 0 |",
    ]
    assert failure_table(rows, "default")[2:] == ["| a | traceback | score | KeyError: no / such |"]
    assert failure_table(rows, "plain") == []


def test_unrepaired_models_are_counted_and_listed() -> None:
    rows = {"a": make_row("a", unrepaired="none is nearest"), "b": make_row("b"), "c": make_row("c")}
    assert count_table(CASES, rows, "default")[2] == "| timm | 2 | 2 | 2 (100.0%) | 1 | 0 | 0 | 0 | 0 |"
    assert count_table(CASES, rows, "plain")[2] == "| timm | 2 | 2 | 2 (100.0%) | 0 | 0 | 0 | 0 |"
    assert unrepaired_table(rows)[2:] == ["| a | none is nearest |"]


def test_model_that_cannot_open_fails_both_ways() -> None:
    load = {"step": "load", "kind": "refused", "type": "RecipeError", "error": "no head"}
    rows = {"a": {"name": "a", "library": "timm", "family": "f", "load": load}}
    for way in ("default", "plain"):
        assert not passed(rows["a"], way)
        assert failure_table(rows, way)[2:] == ["| a | refused | load | RecipeError: no head |"]


def test_row_without_a_way_is_not_counted() -> None:
    rows = {"a": make_row("a"), "c": make_row("c")}
    del rows["a"]["default"]
    assert [count_table(CASES, rows, way)[-1] for way in ("default", "plain")] == [
        "| all | 3 | 1 | 1 (100.0%) | 0 | 0 | 0 | 0 | 0 |",
        "| all | 3 | 2 | 2 (100.0%) | 0 | 0 | 0 | 0 |",
    ]
    assert failure_table(rows, "default") == []


def test_low_shares_are_listed_by_family() -> None:
    rows = {"a": make_row("a", share=0.5), "b": make_row("b", share=0.95)}
    assert share_table(rows)[2:] == ["| timm of a | 1 | 50.0% | 50.0% |"]


def test_worst_models_come_first() -> None:
    rows = {"a": make_row("a", cpu_s=1.0), "b": make_row("b", cpu_s=9.0)}
    assert worst_table(rows, "cpu_s", "CPU s")[2:] == ["| b | 9.0 | 2.0 |", "| a | 1.0 | 2.0 |"]


def test_unreached_budgets_are_listed_with_the_reason() -> None:
    assert over_table({"a": make_row("a", over="the smallest is 60%")})[2:] == ["| a | the smallest is 60% |"]


def test_models_of_one_reason_are_in_one_line() -> None:
    found = reason_list({"a": "texts", "b": "videos", "c": "texts"})
    assert found == ["3 are not in the count:", "", "- a, c: texts", "- b: videos"]


def test_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    rows = [make_row("a", step="cut"), make_row("a")]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows(tmp_path / "rows") == {"a": rows[1]}
    assert read_rows(tmp_path / "none") == {}


def test_tables_of_a_page_are_replaced() -> None:
    page = "a\n<!-- coverage named -->\nold\n<!-- end of coverage named -->\nb\n"
    new = documented(page, "named", "new")
    assert new == "a\n<!-- coverage named -->\n\nnew\n\n<!-- end of coverage named -->\nb\n"
    assert documented(new, "named", "new") == new
