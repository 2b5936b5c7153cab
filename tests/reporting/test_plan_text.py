"""Plans and their differences as text."""

from dataclasses import replace

from isoprune_hf.pruning.forecast import Forecast
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.plan_text import describe_forecast, diff_plans, show_plan

PLAN = PruningPlan(
    kept={"blocks.10.mlp": (0, 1, 2), "blocks.2.mlp": (4, 5), "blocks.2.attn": (0, 1, 8, 9)},
    heads={"blocks.2.attn": (0, 2)},
    removed_blocks=("blocks.11", "blocks.3"),
    margins={"mlp": {"removed": 0.12345678, "kept": 0.25}, "attention": {"removed": None, "kept": 3.0}},
    notes=("The classes attention and mlp share no budget.",),
    achieved={"base": {"macs": 4_000_000_000, "params": 20_000_000}, "pruned": {"macs": 1_000_000_000, "params": 9e6}},
    settings={"ratio": 0.5, "target_macs": None, "sample": {"images": 64, "ids_sha256": "ab" * 32}, "exclude": []},
    fingerprint="0123456789abcdef" * 4,
)


def test_plan_without_sizes_shows_kept_numbers() -> None:
    assert show_plan(PLAN, title="plan.json") == "\n".join(
        [
            "plan of plan.json, version 1, made on weights 0123456789ab",
            "",
            "settings: ratio 0.5, sample.images 64, sample.ids_sha256 abababababab",
            "",
            "cost        GMACs  M params",
            "base         4.00     20.00",
            "pruned       1.00      9.00",
            "share kept  25.0%     45.0%",
            "",
            "groups that are cut  channels  heads  dims of a head",
            "blocks.2.attn               4      2               2",
            "blocks.2.mlp                2",
            "blocks.10.mlp               3",
            "",
            "removed blocks: blocks.3, blocks.11",
            "",
            "margins    best removed  worst kept",
            "mlp              0.1235        0.25",
            "attention             -           3",
            "",
            "notes",
            "  The classes attention and mlp share no budget.",
        ]
    )


def test_plan_with_sizes_shows_shares_in_network_order() -> None:
    sizes = {"stem": (8, 0), "blocks.10.mlp": (12, 0), "blocks.2.attn": (16, 4), "blocks.2.mlp": (8, 0)}
    lines = show_plan(PLAN, title="here", sizes=sizes).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("groups"))
    assert lines[start : start + 5] == [
        "groups that are cut  channels  stay   heads  dims of a head",
        "blocks.10.mlp         3 of 12   25%",
        "blocks.2.attn         4 of 16   25%  2 of 4          2 of 4",
        "blocks.2.mlp           2 of 8   25%",
        "groups that are not cut: 1",
    ]


def test_plan_without_pruned_groups_says_so() -> None:
    assert show_plan(PruningPlan(kept={}, heads={}), title="x").splitlines() == [
        "plan of x, version 1, made on weights without a fingerprint",
        "",
        "no group is cut",
    ]


def test_equal_plans_have_no_difference() -> None:
    assert diff_plans(PLAN, PruningPlan.from_json(PLAN.to_json()), ("a", "b")) == ""


def test_difference_counts_channels_kept_by_both() -> None:
    other = replace(
        PLAN,
        kept={"blocks.2.mlp": (4, 5), "blocks.2.attn": (0, 1, 4, 5, 8, 9), "blocks.10.mlp": (2, 3)},
        heads={"blocks.2.attn": (0, 1, 2)},
        removed_blocks=("blocks.3", "blocks.5"),
        settings={**PLAN.settings, "ratio": 0.25, "target_macs": "50%"},
        achieved={**PLAN.achieved, "pruned": {"macs": 2_000_000_000, "params": 9e6}},
    )
    assert diff_plans(PLAN, other, ("a", "b")) == "\n".join(
        [
            "A: a",
            "B: b",
            "",
            "                               A           B",
            "settings.ratio               0.5        0.25",
            "settings.target_macs           -         50%",
            "achieved.pruned.macs  1000000000  2000000000",
            "",
            "kept channels  A  B  in both  Jaccard",
            "blocks.2.attn  4  6        4     0.67",
            "blocks.10.mlp  3  2        1     0.25",
            "groups: 2 differ, 1 equal",
            "",
            "kept heads       A      B",
            "blocks.2.attn  0 2  0 1 2",
            "",
            "blocks removed in A only: blocks.11",
            "",
            "blocks removed in B only: blocks.5",
        ]
    )


def test_group_that_one_plan_omits_keeps_all() -> None:
    other = replace(PLAN, kept={name: kept for name, kept in PLAN.kept.items() if name != "blocks.2.mlp"})
    assert diff_plans(PLAN, other, ("a", "b")).splitlines()[3:5] == [
        "kept channels  A    B  in both  Jaccard",
        "blocks.2.mlp   2  all        2",
    ]


def test_any_small_difference_is_shown() -> None:
    close = replace(PLAN, settings={**PLAN.settings, "ratio": 0.5 + 1e-12})
    assert "settings.ratio" in diff_plans(PLAN, close, ("a", "b"))
    assert "also different: notes" in diff_plans(PLAN, replace(PLAN, notes=()), ("a", "b"))
    assert "also different: margins" in diff_plans(PLAN, replace(PLAN, margins={}), ("a", "b"))


def test_forecast_is_one_line_with_the_sum() -> None:
    passes = {"rotate": 1.0, "score": 3.0, "repair": 4.5, "evaluate": 0.0}
    cost = Forecast(
        1200, passes, products=1.5, pass_seconds=10, weight_bytes=10**9, score_bytes=2 * 10**9, stored_bytes=0
    )
    assert describe_forecast(cost) == (
        "estimate for 1,200 images: rotate 1 pass (10 s), score 3 passes (30 s), repair 4.5 passes (60 s), at least "
        "2 min in all; memory: weights 1 GB, a scored micro-batch 2 GB"
    )
