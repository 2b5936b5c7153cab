"""Tables and page of `inspect`, for groups and plans written by hand."""

import functools
import re
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from isoprune_hf.pruning.cost.macs import ModelCost
from isoprune_hf.pruning.groups import CoupledGroup, Member
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.pruning.scoring.scores import ImportanceScores
from isoprune_hf.reporting.inspection_page import (
    Inspected,
    build_page,
    show_inspected,
    tabulate_classes,
    tabulate_groups,
    tabulate_plans,
    tabulate_scores,
)

SPECIAL_NAME = "block.<b>&amp;'\"$x_1$"
COST = {"pruned": {"macs": 1_500_000_000, "params": 2_000_000}}


def make_group(name: str, signature: str, channels: int, heads: int = 0) -> CoupledGroup:
    member = Member(f"{name}.weight", 0, np.arange(channels)[:, None])
    return CoupledGroup(name, signature, channels, (member,), heads)


GROUPS = (
    make_group("stem", "Conv2d.out", 8),
    make_group("block.0.attn", "Attention", 8, heads=2),
    make_group("block.0.fc", "Linear.out", 4),
    make_group(SPECIAL_NAME, "Linear.out", 4),
)
PLANS = {
    "first": PruningPlan(
        kept={"stem": (0, 2), "block.0.attn": (4, 5)}, heads={"block.0.attn": (1,)}, achieved=COST, notes=("a <note>",)
    ),
    "second": PruningPlan(kept={SPECIAL_NAME: (0,)}, heads={}, removed_blocks=("block.0",)),
}
SCORES = ImportanceScores(
    {
        "stem": torch.arange(1.0, 9.0),
        "block.0.attn": torch.ones(8),
        "block.0.fc": torch.tensor([0.0, 0.0, 1e-3, 1e-2]),
        SPECIAL_NAME: torch.tensor([1.0, 2.0, 3.0, 4.0]),
    },
    "l1",
    "",
    {},
)
MODEL = Inspected("a <model>", GROUPS, PLANS, SCORES, ModelCost(3_000_000_000, 5_000_000), "At 1.5 GMACs")


def test_tables_show_channels_kept_by_each_plan() -> None:
    assert tabulate_groups(MODEL) == [
        ["group", "class", "before", "first", "second"],
        ["stem", "1", "8", "2", "8"],
        ["block.0.attn", "2", "2 x 4", "1 x 2", "0"],
        ["block.0.fc", "3", "4", "4", "0"],
        [SPECIAL_NAME, "3", "4", "4", "1"],
    ]
    assert tabulate_classes(MODEL) == [
        ["class", "groups", "channels", "widths", "first keeps", "second keeps", "built of"],
        ["1", "1", "8", "8", "25%", "100%", "Conv2d.out"],
        ["2", "1", "8", "2 x 4", "25%", "0%", "Attention"],
        ["3", "2", "8", "4", "100%", "12%", "Linear.out"],
    ]
    assert tabulate_plans(MODEL) == [
        ["plan", "GMACs", "M params", "groups cut", "narrowest", "which is of"],
        ["before", "3.00", "5.00", "", "", ""],
        ["first", "1.50", "2.00", "2", "2 of 8 (25%)", "stem"],
        ["second", "-", "-", "3", "0 of 8 (0%)", "block.0.attn"],
    ]


def test_scores_are_summarised_by_class() -> None:
    assert tabulate_scores(MODEL) == [
        ["class", "lowest", "25 %", "median", "75 %", "highest", "score 0"],
        ["1", "1", "2.75", "4.5", "6.25", "8", "0"],
        ["2", "1", "1", "1", "1", "1", "0"],
        # 0 0 .001 .01 1 2 3 4: the median is halfway from .01 to 1.
        ["3", "0", "0.00075", "0.505", "2.25", "4", "2"],
    ]
    assert MODEL.scores_of([GROUPS[0]], "first").tolist() == [1.0, 3.0]
    assert MODEL.scores_of([GROUPS[1]], "second").tolist() == []


def test_text_has_all_tables_and_no_trailing_blanks() -> None:
    shown = show_inspected(MODEL)
    assert shown.startswith("a <model>: 4 coupled groups in 3 isomorphic classes, 3.00 GMACs, 5.00 M params\n")
    assert "scores by l1\n" in shown and "At 1.5 GMACs\n" in shown
    assert not re.search(r" $", shown, re.MULTILINE)


@functools.cache
def page_of(kind: str) -> str:
    return build_page(PAGES[kind])


PAGES = {"all": MODEL, "no scores": Inspected("m", GROUPS, {"plan": PLANS["first"]}), "alone": Inspected("m", GROUPS)}


@pytest.mark.parametrize("kind", PAGES)
def test_page_is_well_formed_and_names_every_group(kind: str) -> None:
    page = page_of(kind)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    cells = [cell.text for cell in root.iter("th")]
    assert all(cells.count(group.name) >= 1 for group in GROUPS)
    ids = Counter(element.get("id") for element in root.iter() if element.get("id"))
    assert ids and set(ids.values()) == {1}
    # Every id that a picture refers to exists in the page.
    wanted = {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page) for name in pair if name}
    assert wanted <= ids.keys()


@pytest.mark.parametrize("kind", PAGES)
def test_page_loads_and_runs_nothing(kind: str) -> None:
    page = page_of(kind)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base", "form"}
    for element in root.iter():
        for name, value in element.attrib.items():
            assert not name.startswith("on") and name not in ("src", "srcset")
            assert not name.endswith("href") or value.startswith("#")
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_texts_of_the_model_are_escaped() -> None:
    page = page_of("all")
    assert "<b>" not in page and "a <model>" not in page and "a <note>" not in page
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert root.find("body/h1").text == "a <model>"
    assert [item.text for item in root.iter("li")] == ["a <note>"]


def test_page_has_every_colour_in_both_modes() -> None:
    page = page_of("all")
    used = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root \{(.*?)\}", page))
    assert used <= light == dark and "prefers-color-scheme: dark" in page
    style = page.partition("</style>")[0]
    assert not re.findall(r"(?<!--page: )(?<!-)#\w{3,6}\b", re.sub(r":root \{.*?\}", "", style))
