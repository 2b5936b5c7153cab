import numpy as np
import pytest

from isoprune_hf.pruning.deciding.rounding import best_units, keep_counts, round_counts, width_step
from isoprune_hf.pruning.groups import CoupledGroup, Member


def ascending(**scores):
    return {name: np.sort(np.asarray(values, dtype=float)) for name, values in scores.items()}


def ones(units):
    return dict.fromkeys(units, 1)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 0.3, 0.45, 0.5, 0.8, 0.9])
def test_exactly_the_rounded_share_is_removed(ratio: float) -> None:
    generator = np.random.default_rng(0)
    units = ascending(a=generator.random(13), b=generator.random(40), c=generator.random(7))
    counts, _ = keep_counts(units, ones(units), ratio)
    assert 60 - sum(counts.values()) == round(60 * ratio)
    # The same by a plain sort: the best of each layer, and of the others those that rank highest.
    ranked = sorted((score, name) for name, scores in units.items() for score in scores[:-1])[: round(60 * ratio)]
    assert counts == {name: len(units[name]) - sum(owner == name for _, owner in ranked) for name in units}


@pytest.mark.parametrize(("channels", "ratio", "leave"), [(10, 0.9, 9), (5, 0.8, 4), (1000, 0.8, 800), (10, 0.25, 2)])
def test_float_error_removes_no_extra_channel(channels: int, ratio: float, leave: int) -> None:
    units = ascending(a=range(channels))
    assert keep_counts(units, {"a": 1}, ratio)[0] == {"a": channels - leave}


def test_ties_remove_no_more_than_asked() -> None:
    units = ascending(a=[0] * 15 + [1] * 5, b=[0] * 15 + [1] * 5)
    assert keep_counts(units, ones(units), 0.25)[0] == {"a": 10, "b": 20}


def test_weak_layer_keeps_its_best_channel() -> None:
    units = ascending(a=range(20), b=range(100, 120))
    assert keep_counts(units, ones(units), 0.5)[0] == {"a": 1, "b": 19}
    assert keep_counts(units, {"a": 8, "b": 8}, 0.5)[0] == {"a": 8, "b": 12}


def test_margin_is_highest_removed_and_lowest_kept() -> None:
    units = ascending(a=[1, 2, 3, 4], b=[2.5, 6, 7, 8])
    assert keep_counts(units, ones(units), 0.375)[1] == {"removed": 2.5, "kept": 3.0}
    assert keep_counts(units, ones(units), 0.0)[1] is None


def test_unit_counts_all_of_its_channels() -> None:
    # 4 units of 3 channels and 4 of 6: half of 36 channels is 18, which 3 + 3 + 6 + 6 gives.
    units = ascending(a=[1, 2, 30, 40], b=[3, 4, 50, 60])
    assert keep_counts(units, ones(units), 0.5, {"a": 3, "b": 6})[0] == {"a": 2, "b": 2}
    # 12 of 36 is not to be had in this order: 3 + 3 + 6 is 12.
    assert keep_counts(units, ones(units), 1 / 3, {"a": 3, "b": 6})[0] == {"a": 2, "b": 3}


def rounded(counts, allowed, **sizes):
    units = {name: np.arange(sizes.get(name, max(widths)), dtype=float) for name, widths in allowed.items()}
    return round_counts(counts, allowed, units, ones(counts))


def test_rounded_widths_keep_the_class_sum() -> None:
    counts = {"a": 13, "b": 22, "c": 29}
    assert rounded(counts, {name: [8, 16, 24, 32] for name in counts}) == {"a": 16, "b": 24, "c": 24}


def test_other_layers_compensate_for_narrow_ones() -> None:
    # The first two cannot be cut and keep 8 channels too many: the third gives them, its weakest first.
    counts, allowed = {"a": 4, "b": 4, "c": 32}, {"a": [8], "b": [8], "c": [8, 16, 24, 32]}
    assert rounded(counts, allowed) == {"a": 8, "b": 8, "c": 24}


def test_rounding_keeps_the_sum_of_channels() -> None:
    counts, allowed = {"a": 12, "b": 12}, {"a": [8, 16], "b": [8, 16]}
    units = {name: np.arange(16.0) for name in counts}
    # Both lose half a step: the one with 12 heads is worth 3 of the other, so raising it overshoots by less than both.
    assert round_counts(counts, allowed, units, {"a": 3, "b": 3}) == {"a": 16, "b": 8}


def test_of_equal_scores_the_lower_index_leaves() -> None:
    assert best_units(np.array([1.0, 2.0, 1.0, 2.0]), 3) == [2, 1, 3]


def test_grouped_channel_counts_once_per_group() -> None:
    four = np.arange(16).reshape(4, 4)
    assert width_step(CoupledGroup("a", "s", 4, (Member("a.weight", 0, four),)), 8) == 2
    assert width_step(CoupledGroup("a", "s", 4, (Member("a.weight", 0, four[:, :1]),)), 8) == 8
    assert width_step(CoupledGroup("a", "s", 4, (Member("a.weight", 0, four),), num_heads=2), 8) == 8
