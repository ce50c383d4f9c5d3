"""Links between layers: none is lost, none exceeds its layer, and layers get their share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chtconv.methods.redistribution import redistribute

LAYERS = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 1), st.one_of(st.just(0.0), st.floats(1e-6, 10))), min_size=1, max_size=8
)


def water_filling(room, regrown, shares):
    """Real numbers in proportion to the shares, none above its room: the level at which they sum up, by bisection."""
    low, high = 0.0, 1.0
    positive = [share > 0 for share in shares]
    if not any(positive):
        shares, positive = [1.0] * len(shares), [True] * len(shares)
    while sum(min(space, high * share) for space, share in zip(room, shares, strict=True)) < regrown:
        high *= 2
    for _ in range(200):
        level = (low + high) / 2
        if sum(min(space, level * share) for space, share in zip(room, shares, strict=True)) < regrown:
            low = level
        else:
            high = level
    return [min(space, high * share) for space, share in zip(room, shares, strict=True)]


@given(LAYERS, st.integers(0, 400))
def test_no_link_is_lost_and_no_layer_overflows(layers, regrown):
    sizes, kept, shares = [n for n, _, _ in layers], [int(n * has) for n, has, _ in layers], [s for _, _, s in layers]
    links = redistribute(kept, regrown, shares, sizes)
    assert sum(links) == min(sum(kept) + regrown, sum(sizes))
    assert all(before <= after <= size for before, after, size in zip(kept, links, sizes, strict=True))


@given(LAYERS, st.floats(0, 1))
def test_layers_get_their_share_to_within_a_link(layers, filled):
    """What does not fit into a layer goes to the others in proportion again, while those with a share have room."""
    sizes, kept, shares = [n for n, _, _ in layers], [int(n * has) for n, has, _ in layers], [s for _, _, s in layers]
    room = [size - has for size, has in zip(sizes, kept, strict=True)]
    takes = [space for space, share in zip(room, shares, strict=True) if share > 0] or room
    regrown = int(filled * sum(takes))
    links = redistribute(kept, regrown, shares, sizes)
    wanted = water_filling(room, regrown, shares)
    for before, after, want in zip(kept, links, wanted, strict=True):
        assert abs(after - before - want) < 1 + 1e-6


@pytest.mark.parametrize(
    ("shares", "regrown", "expected"),
    [
        ([3.0, 1.0], 8, [6, 2]),
        ([3.1, 1.9], 5, [3, 2]),
        ([0.9] + [0.01] * 10, 99, [89] + [1] * 10),
        ([0.0, 0.0], 4, [2, 2]),
        ([1.0, 0.0], 4, [4, 0]),
        ([1e-30, 3e-30], 4, [1, 3]),
    ],
)
def test_the_published_rule_where_nothing_saturates(shares, regrown, expected):
    """Dettmers and Zettlemoyer 2019, section 3.2: each layer regrows its share of the mean momentum magnitude."""
    assert redistribute([0] * len(shares), regrown, shares, [1000] * len(shares)) == expected


def test_a_full_layer_passes_on_what_it_cannot_take():
    assert redistribute([9, 0, 0], 10, [8.0, 1.0, 1.0], [10, 100, 100]) == [10, 5, 4]
    # Only where all those with a share are full, the others get something.
    assert redistribute([9, 0, 0], 7, [8.0, 0.0, 0.0], [10, 100, 100]) == [10, 3, 3]
    assert redistribute([1, 1], 100, [1.0, 1.0], [3, 4]) == [3, 4]
