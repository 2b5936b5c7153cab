import pytest

from isoprune_hf.pruning.graph.axis import (
    Axis,
    concat,
    factors,
    find,
    freeze,
    frozen_axis,
    is_frozen,
    leaves,
    mark_batch,
    pieces,
    product,
)
from isoprune_hf.pruning.graph.trace import ONE
from isoprune_hf.pruning.graph.unify import Conflict, split_at, split_factor, unify


def sizes(axis: Axis) -> list[int]:
    return [leaf.size for leaf in leaves(axis)]


def same(first: Axis, second: Axis) -> bool:
    return [id(leaf) for leaf in leaves(first)] == [id(leaf) for leaf in leaves(second)]


def test_two_leaves_become_one() -> None:
    first, second = Axis(6), Axis(6)
    assert unify(first, second) is find(first) is find(second)
    assert unify(first, second) is find(first)


def test_axes_of_unequal_size_conflict() -> None:
    with pytest.raises(Conflict, match="6 and 4"):
        unify(Axis(6), Axis(4))


@pytest.mark.parametrize("compose", [product, concat])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_leaf_takes_parts_of_composite_axis(compose, is_reversed: bool) -> None:
    whole = compose([Axis(2), Axis(3)])
    leaf = Axis(whole.size)
    unify(*((leaf, whole) if is_reversed else (whole, leaf)))
    assert same(leaf, whole) and sizes(leaf) == [2, 3]


def test_unified_axes_are_refined_together() -> None:
    first, second = Axis(12), Axis(12)
    unify(first, second)
    outer, inner = split_factor(first, 4)
    split_at(inner, [1])
    assert repr(second) == repr(first) == "(3 x (1 + 3))"
    assert [find(factor) for factor in factors(second)] == [find(outer), find(inner)]


def test_products_are_split_into_common_factors() -> None:
    first, second = product([Axis(4), Axis(6)]), product([Axis(2), Axis(12)])
    unify(first, second)
    assert same(first, second) and sizes(first) == [2, 2, 6]


def test_equal_products_are_unified_factor_by_factor() -> None:
    a, b, c, d = Axis(4), Axis(6), Axis(4), Axis(6)
    unify(product([a, b]), product([c, d]))
    assert find(a) is find(c) and find(b) is find(d) and find(a) is not find(b)


@pytest.mark.parametrize(("left", "right"), [((2, 3), (3, 2)), ((4, 9), (6, 6)), ((9, 4), (6, 6))])
def test_products_without_common_factors_conflict(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(Conflict, match="do not fit"):
        unify(product([Axis(size) for size in left]), product([Axis(size) for size in right]))


def test_sums_are_split_at_all_boundaries() -> None:
    first, second = concat([Axis(2), Axis(6)]), concat([Axis(5), Axis(3)])
    unify(first, second)
    assert same(first, second) and sizes(first) == [2, 3, 3]


def test_sum_and_product_share_the_inner_factor() -> None:
    """As in a fused projection: queries, keys and values of three heads with 4 dims each."""
    total, head, dim = concat([Axis(12) for _ in range(3)]), Axis(9), Axis(4)
    unify(total, product([head, dim]))
    assert repr(total) == "(((1 + 1 + 1) x 3) x 4)"
    assert all(repr(part) == "(1 x 3 x 4)" or repr(part) == "(3 x 4)" for part in split_at(total, [12, 24]))
    assert repr(head) == "((1 + 1 + 1) x 3)" and list(leaves(total))[-1] is find(dim)


def test_uneven_pieces_keep_separate_outer_factors() -> None:
    first, second = Axis(8), Axis(12)
    unify(concat([first, second]), product([Axis(5), Axis(4)]))
    assert [repr(first), repr(second)] == ["(2 x 4)", "(3 x 4)"]
    assert list(leaves(first))[1] is list(leaves(second))[1]


def test_product_unifies_with_sum() -> None:
    whole = product([Axis(2), Axis(4)])
    total = unify(whole, concat([Axis(4), Axis(4)]))
    assert repr(total) == "((1 + 1) x 4)"


def test_repeated_piece_ties_both_pieces() -> None:
    part, first, second = Axis(4), Axis(4), Axis(4)
    unify(concat([part, part]), concat([first, second]))
    assert find(first) is find(second) is find(part)


def test_repeated_piece_is_split_in_both_places() -> None:
    part = Axis(4)
    other = concat([Axis(1), Axis(7)])
    unify(concat([part, part]), other)
    assert sizes(part) == [1, 3] and sizes(other) == [1, 3, 1, 3]
    assert list(leaves(other))[:2] == list(leaves(other))[2:]


def test_axis_is_never_part_of_itself() -> None:
    leaf = Axis(3)
    total = concat([Axis(1), leaf])
    leaf.size = 4  # the size of the sum that contains it
    with pytest.raises(Conflict, match="part of itself"):
        unify(leaf, total)


@pytest.mark.parametrize(
    ("axis", "points", "expected"),
    [
        (Axis(8), [3], [3, 5]),
        (Axis(8), [0, 3, 8], [3, 5]),
        (Axis(8), [2, 5], [2, 3, 3]),
        (Axis(8), [], [8]),
        (concat([Axis(3), Axis(5)]), [4], [4, 4]),
        (concat([Axis(3), Axis(5)]), [3], [3, 5]),
        (product([Axis(4), Axis(6)]), [12], [12, 12]),
        (product([Axis(4), Axis(6)]), [18], [18, 6]),
        (product([Axis(2), Axis(4), Axis(3)]), [12], [12, 12]),
    ],
)
def test_split_at_returns_parts_between_points(axis: Axis, points: list[int], expected: list[int]) -> None:
    parts = split_at(axis, points)
    assert [part.size for part in parts] == expected
    assert sum(sizes_of(part) for part in parts) == axis.size


def sizes_of(axis: Axis) -> int:
    return find(axis).size


def test_parts_of_split_product_share_inner_factor() -> None:
    first, second = split_at(product([Axis(4), Axis(6)]), [6])
    assert [sizes(first), sizes(second)] == [[6], [3, 6]]
    assert list(leaves(first))[-1] is list(leaves(second))[-1]


@pytest.mark.parametrize(("parts", "point"), [((2, 12), 6), ((4, 6), 4), ((3, 5), 1)])
def test_split_inside_factor_conflicts(parts: tuple[int, int], point: int) -> None:
    with pytest.raises(Conflict, match=r"inside a factor|do not fit"):
        split_at(product([Axis(size) for size in parts]), [point])


@pytest.mark.parametrize(
    ("axis", "inner", "expected"),
    [
        (Axis(12), 3, [4, 3]),
        (product([Axis(4), Axis(3)]), 6, [2, 2, 3]),
        (concat([Axis(6), Axis(3)]), 3, [2, 1, 3]),
    ],
)
def test_inner_factor_is_split_off(axis: Axis, inner: int, expected: list[int]) -> None:
    low = split_factor(axis, inner)[1]
    assert sizes(axis) == expected
    assert find(low).size == inner


@pytest.mark.parametrize(("axis", "inner"), [(Axis(10), 4), (Axis(10), 0), (concat([Axis(4), Axis(6)]), 5)])
def test_factor_that_does_not_divide_conflicts(axis: Axis, inner: int) -> None:
    with pytest.raises(Conflict):
        split_factor(axis, inner)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_unifying_with_frozen_axis_freezes(is_reversed: bool) -> None:
    first, second = frozen_axis(6, "a reason"), Axis(6)
    unify(*((second, first) if is_reversed else (first, second)))
    assert find(first).frozen == find(second).frozen == "a reason"


def test_frozen_leaf_freezes_all_parts() -> None:
    whole = product([Axis(2), concat([Axis(1), Axis(2)])])
    unify(frozen_axis(6, "a reason"), whole)
    assert is_frozen(whole) and {leaf.frozen for leaf in leaves(whole)} == {"a reason"}


def test_frozen_factor_freezes_only_that_factor() -> None:
    leaf = Axis(6)
    unify(leaf, product([frozen_axis(2, "a reason"), Axis(3)]))
    assert [part.frozen for part in leaves(leaf)] == ["a reason", None]
    assert not is_frozen(leaf)


def test_parts_of_frozen_axis_are_frozen() -> None:
    assert all(is_frozen(part) for part in split_at(frozen_axis(6, "a reason"), [2]))
    assert all(is_frozen(part) for part in split_factor(frozen_axis(6, "a reason"), 2))


def test_first_reason_is_kept() -> None:
    axis = Axis(6)
    for reason in ("first", "second"):
        freeze(axis, reason)
    assert axis.frozen == "first"


@pytest.mark.parametrize("compose", [product, concat])
def test_frozen_parts_compose_to_frozen_leaf(compose) -> None:
    whole = compose([frozen_axis(2, "first"), frozen_axis(3, "second")])
    assert (whole.kind, whole.frozen, whole.size) == ("leaf", "first", 6 if compose is product else 5)
    assert compose([Axis(2), frozen_axis(3, "second")]).kind != "leaf"


def test_nested_parts_are_flattened() -> None:
    a, b, c = Axis(2), Axis(3), Axis(4)
    assert product([a]) is a is concat([a])
    assert factors(product([a, product([b, c])])) == [a, b, c]
    assert pieces(concat([concat([a, b]), c])) == [a, b, c]
    assert product([a, Axis(1), b]).size == 6
    assert factors(product([])) == [] and product([]).size == 1


def test_axis_of_one_element_is_never_tied() -> None:
    """All traces share `ONE`, so it must not be tied to an axis of any of them."""
    unify(ONE, Axis(1))
    unify(Axis(1), ONE)
    unify(concat([Axis(1), Axis(3)]), concat([ONE, Axis(3)]))
    assert find(ONE) is ONE


def test_batch_marks_reach_all_parts() -> None:
    axis = Axis(6)
    mark_batch(axis)
    unify(axis, product([Axis(2), Axis(3)]))
    assert all(leaf.is_batch for leaf in leaves(axis))
    split_factor(head := Axis(6), 3)
    assert not any(leaf.is_batch for leaf in leaves(head))


def test_copy_unified_with_channels_is_no_copy() -> None:
    copy, channels = Axis(4, is_copy=True), Axis(4)
    unify(copy, channels)
    assert not find(copy).is_copy
    both = unify(Axis(4, is_copy=True), Axis(4, is_copy=True))
    assert both.is_copy
