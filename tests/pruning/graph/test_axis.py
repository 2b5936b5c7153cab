import pytest

from isoprune_hf.pruning.graph.axis import (
    Axis,
    Conflict,
    cut,
    digits,
    find,
    freeze,
    frozen,
    is_frozen,
    join,
    leaves,
    mark_batch,
    product,
    segments,
    split_digit,
    unify,
)
from isoprune_hf.pruning.graph.rules.views import ONE


def sizes(axis: Axis) -> list[int]:
    return [leaf.size for leaf in leaves(axis)]


def same(first: Axis, second: Axis) -> bool:
    return [id(leaf) for leaf in leaves(first)] == [id(leaf) for leaf in leaves(second)]


def test_two_leaves_become_one() -> None:
    first, second = Axis(6), Axis(6)
    assert unify(first, second) is find(first) is find(second)
    assert unify(first, second) is find(first)


def test_axes_of_other_sizes_do_not_meet() -> None:
    with pytest.raises(Conflict, match="6 elements meet 4"):
        unify(Axis(6), Axis(4))


@pytest.mark.parametrize("put", [product, join])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_leaf_takes_the_parts_of_what_it_meets(put, is_reversed: bool) -> None:
    whole = put([Axis(2), Axis(3)])
    leaf = Axis(whole.size)
    unify(*(whole, leaf)[:: -1 if is_reversed else 1])
    assert same(leaf, whole) and sizes(leaf) == [2, 3]


def test_where_a_leaf_is_refined_all_follow() -> None:
    first, second = Axis(12), Axis(12)
    unify(first, second)
    outer, inner = split_digit(first, 4)
    cut(inner, [1])
    assert repr(second) == repr(first) == "(3 x (1 + 3))"
    assert [find(digit) for digit in digits(second)] == [find(outer), find(inner)]


def test_products_are_split_at_the_common_digits() -> None:
    first, second = product([Axis(4), Axis(6)]), product([Axis(2), Axis(12)])
    unify(first, second)
    assert same(first, second) and sizes(first) == [2, 2, 6]


def test_products_of_the_same_digits_are_unified_digit_by_digit() -> None:
    a, b, c, d = Axis(4), Axis(6), Axis(4), Axis(6)
    unify(product([a, b]), product([c, d]))
    assert find(a) is find(c) and find(b) is find(d) and find(a) is not find(b)


@pytest.mark.parametrize(("left", "right"), [((2, 3), (3, 2)), ((4, 9), (6, 6)), ((9, 4), (6, 6))])
def test_products_without_a_common_digit_are_a_conflict(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with pytest.raises(Conflict, match="do not fit"):
        unify(product([Axis(size) for size in left]), product([Axis(size) for size in right]))


def test_sums_are_cut_at_all_points() -> None:
    first, second = join([Axis(2), Axis(6)]), join([Axis(5), Axis(3)])
    unify(first, second)
    assert same(first, second) and sizes(first) == [2, 3, 3]


def test_a_sum_makes_the_outer_digit_of_a_product_a_sum_and_shares_the_inner() -> None:
    """Queries, keys and values of three heads, 4 dims each."""
    total, head, dim = join([Axis(12) for _ in range(3)]), Axis(9), Axis(4)
    unify(total, product([head, dim]))
    assert repr(total) == "(((1 + 1 + 1) x 3) x 4)"
    assert all(repr(part) == "(1 x 3 x 4)" or repr(part) == "(3 x 4)" for part in cut(total, [12, 24]))
    assert repr(head) == "((1 + 1 + 1) x 3)" and list(leaves(total))[-1] is find(dim)


def test_a_sum_of_uneven_segments_keeps_their_digits_apart() -> None:
    first, second = Axis(8), Axis(12)
    unify(join([first, second]), product([Axis(5), Axis(4)]))
    assert [repr(first), repr(second)] == ["(2 x 4)", "(3 x 4)"]
    assert list(leaves(first))[1] is list(leaves(second))[1]


def test_a_product_meets_a_sum_either_way() -> None:
    whole = product([Axis(2), Axis(4)])
    total = unify(whole, join([Axis(4), Axis(4)]))
    assert repr(total) == "((1 + 1) x 4)"


def test_a_sum_of_one_segment_twice_ties_both_parts_of_the_other() -> None:
    part, first, second = Axis(4), Axis(4), Axis(4)
    unify(join([part, part]), join([first, second]))
    assert find(first) is find(second) is find(part)


def test_a_sum_of_shared_segments_is_cut_alike_in_both() -> None:
    part = Axis(4)
    other = join([Axis(1), Axis(7)])
    unify(join([part, part]), other)
    assert sizes(part) == [1, 3] and sizes(other) == [1, 3, 1, 3]
    assert list(leaves(other))[:2] == list(leaves(other))[2:]


def test_an_axis_is_no_part_of_itself() -> None:
    leaf = Axis(3)
    total = join([Axis(1), leaf])
    leaf.size = 4  # as wide as the sum that holds it
    with pytest.raises(Conflict, match="would be a part of itself"):
        unify(leaf, total)


@pytest.mark.parametrize(
    ("axis", "points", "expected"),
    [
        (Axis(8), [3], [3, 5]),
        (Axis(8), [0, 3, 8], [3, 5]),
        (Axis(8), [2, 5], [2, 3, 3]),
        (Axis(8), [], [8]),
        (join([Axis(3), Axis(5)]), [4], [4, 4]),
        (join([Axis(3), Axis(5)]), [3], [3, 5]),
        (product([Axis(4), Axis(6)]), [12], [12, 12]),
        (product([Axis(4), Axis(6)]), [18], [18, 6]),
        (product([Axis(2), Axis(4), Axis(3)]), [12], [12, 12]),
    ],
)
def test_a_cut_gives_the_parts_between_the_points(axis: Axis, points: list[int], expected: list[int]) -> None:
    parts = cut(axis, points)
    assert [part.size for part in parts] == expected
    assert sum(sizes_of(part) for part in parts) == axis.size


def sizes_of(axis: Axis) -> int:
    return find(axis).size


def test_the_parts_of_a_cut_product_share_the_inner_digit() -> None:
    first, second = cut(product([Axis(4), Axis(6)]), [6])
    assert [sizes(first), sizes(second)] == [[6], [3, 6]]
    assert list(leaves(first))[-1] is list(leaves(second))[-1]


@pytest.mark.parametrize(("parts", "point"), [((2, 12), 6), ((4, 6), 4), ((3, 5), 1)])
def test_a_cut_inside_a_digit_is_a_conflict(parts: tuple[int, int], point: int) -> None:
    with pytest.raises(Conflict, match=r"lies inside a digit|do not fit"):
        cut(product([Axis(size) for size in parts]), [point])


@pytest.mark.parametrize(
    ("axis", "inner", "expected"),
    [
        (Axis(12), 3, [4, 3]),
        (product([Axis(4), Axis(3)]), 6, [2, 2, 3]),
        (join([Axis(6), Axis(3)]), 3, [2, 1, 3]),
    ],
)
def test_a_digit_is_split_off(axis: Axis, inner: int, expected: list[int]) -> None:
    low = split_digit(axis, inner)[1]
    assert sizes(axis) == expected
    assert find(low).size == inner


@pytest.mark.parametrize(("axis", "inner"), [(Axis(10), 4), (Axis(10), 0), (join([Axis(4), Axis(6)]), 5)])
def test_a_digit_that_does_not_fit_is_a_conflict(axis: Axis, inner: int) -> None:
    with pytest.raises(Conflict):
        split_digit(axis, inner)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_what_meets_a_frozen_axis_freezes(is_reversed: bool) -> None:
    pair = frozen(6, "a reason"), Axis(6)
    unify(*pair[:: -1 if is_reversed else 1])
    assert all(find(axis).frozen == "a reason" for axis in pair)


def test_a_frozen_leaf_freezes_all_parts_of_what_it_meets() -> None:
    whole = product([Axis(2), join([Axis(1), Axis(2)])])
    unify(frozen(6, "a reason"), whole)
    assert is_frozen(whole) and {leaf.frozen for leaf in leaves(whole)} == {"a reason"}


def test_a_frozen_digit_freezes_its_part_alone() -> None:
    leaf = Axis(6)
    unify(leaf, product([frozen(2, "a reason"), Axis(3)]))
    assert [part.frozen for part in leaves(leaf)] == ["a reason", None]
    assert not is_frozen(leaf)


def test_a_frozen_axis_stays_frozen_where_it_is_refined() -> None:
    assert all(is_frozen(part) for part in cut(frozen(6, "a reason"), [2]))
    assert all(is_frozen(part) for part in split_digit(frozen(6, "a reason"), 2))


def test_the_first_reason_stays() -> None:
    axis = Axis(6)
    for reason in ("first", "second"):
        freeze(axis, reason)
    assert axis.frozen == "first"


@pytest.mark.parametrize("put", [product, join])
def test_frozen_parts_make_one_frozen_leaf(put) -> None:
    whole = put([frozen(2, "first"), frozen(3, "second")])
    assert (whole.kind, whole.frozen, whole.size) == ("leaf", "first", 6 if put is product else 5)
    assert put([Axis(2), frozen(3, "second")]).kind != "leaf"


def test_nested_parts_lie_flat_and_a_single_one_is_itself() -> None:
    a, b, c = Axis(2), Axis(3), Axis(4)
    assert product([a]) is a is join([a])
    assert digits(product([a, product([b, c])])) == [a, b, c]
    assert segments(join([join([a, b]), c])) == [a, b, c]
    assert product([a, Axis(1), b]).size == 6
    assert digits(product([])) == [] and product([]).size == 1


def test_one_element_is_never_tied() -> None:
    """All traces share `ONE`: it must not become an axis of any of them."""
    unify(ONE, Axis(1))
    unify(Axis(1), ONE)
    unify(join([Axis(1), Axis(3)]), join([ONE, Axis(3)]))
    assert find(ONE) is ONE


def test_batch_marks_stay_in_all_parts() -> None:
    axis = Axis(6)
    mark_batch(axis)
    unify(axis, product([Axis(2), Axis(3)]))
    assert all(leaf.is_batch for leaf in leaves(axis))
    split_digit(head := Axis(6), 3)
    assert not any(leaf.is_batch for leaf in leaves(head))


def test_a_copy_that_meets_channels_is_no_copy() -> None:
    copy, channels = Axis(4, is_copy=True), Axis(4)
    unify(copy, channels)
    assert not find(copy).is_copy
    both = unify(Axis(4, is_copy=True), Axis(4, is_copy=True))
    assert both.is_copy
