"""Figures and tables as text."""

import pytest

from isoprune_hf.reporting.tables import on_same_images, results_table, shorten


def test_table_is_aligned_and_missing_figures_are_dashes() -> None:
    rows = {
        "base": {"macs": 4_608_338_304, "params": 22_050_664, "top1": 0.79854, "top5": 0.9495, "loss": 0.91231},
        "pruned": {"gmacs": 1.25, "params": 123_456, "latency_ms": 3.14159},
        "finetuned": {"top1": 1.0, "top5": 0.0},
    }
    assert results_table(rows).splitlines() == [
        "model      GMACs   params  top-1 %  top-5 %    loss  latency ms",
        "base        4.61  22.05 M    79.85    94.95  0.9123           -",
        "pruned      1.25  0.123 M        -        -       -        3.14",
        "finetuned      -        -   100.00     0.00       -           -",
    ]


def test_table_has_only_measured_columns() -> None:
    assert results_table({}) == "model"
    rows = {"50%": {"macs": 2e9, "params": 1e6, "top1": 0.25, "ece": 0.125, "images": 30, "split_images": 1000}}
    assert results_table(rows, title="size", has_details=True).splitlines() == [
        "size  GMACs  params  top-1 %  calibration error %  images",
        "50%    2.00  1.00 M    25.00                12.50      30",
        "Accuracy and loss (sample of 30 of 1,000 images)",
    ]
    rows["50%"]["holdout_seed"] = 0
    assert results_table(rows).endswith("\nAccuracy and loss (30 of 1,000 training images, held out by seed 0)")


def test_sample_of_other_tasks_is_of_figures() -> None:
    rows = {"pruned": {"same_class": 0.5, "pixel_divergence": 0.25, "images": 3, "split_images": 9}}
    assert results_table(rows).splitlines() == [
        "model   pixels as base %  divergence of pixels",
        "pruned             50.00                0.2500",
        "Figures (sample of 3 of 9 images)",
    ]


def test_long_name_loses_its_middle() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 7) == "abc…ijk"


@pytest.mark.parametrize(
    ("first", "second", "are_same"),
    [
        ({"data": "a", "images": 60}, {"data": "a", "images": 60}, True),
        ({"data": "a", "images": 60}, {"data": "b", "images": 60}, False),
        ({"images": 60}, {"data": "b", "images": 60}, True),  # written by an earlier version
        ({"images": 60}, {"data": "b", "images": 6}, False),
        ({"images": 6, "split_images": 60}, {"images": 6}, False),
    ],
)
def test_one_table_shows_one_set_of_images(first: dict, second: dict, are_same: bool) -> None:
    metrics = {"base": first, "pruned": second}
    assert on_same_images(metrics, second) == (metrics if are_same else {"pruned": second})
