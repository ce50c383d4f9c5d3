"""Moving links between layers: sparse momentum (Dettmers and Zettlemoyer 2019, section 3.2)."""

from collections.abc import Sequence


def redistribute(kept: Sequence[int], regrown: int, shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Links of each layer after so many regrew in all of them together, in proportion to their shares.

    What does not fit into a layer goes to the others, in proportion again. Whole numbers by largest remainder.

    Args:
        kept: links of each layer after removal.
        regrown: number of links to regrow in all layers together.
        shares: what a layer gets in proportion to, at least 0; all alike where none is positive.
        sizes: positions of each layer.

    Returns:
        Links of each layer; their sum is that of ``kept`` plus ``regrown``, or of ``sizes`` where that is less.

    >>> redistribute([10, 10], 10, [3.0, 1.0], [100, 100]), redistribute([10, 10], 10, [3.0, 1.0], [12, 100])
    ([18, 12], [12, 18])
    """
    links = list(kept)
    left = min(regrown, sum(sizes) - sum(kept))
    while left > 0:
        room = [size - has for size, has in zip(sizes, links, strict=True)]
        weights = [share if space else 0.0 for share, space in zip(shares, room, strict=True)]
        if sum(weights) <= 0:
            weights = [float(space > 0) for space in room]
        wanted = [left * weight / sum(weights) for weight in weights]
        full = [space if want >= space else 0 for want, space in zip(wanted, room, strict=True)]
        given = full if any(full) else _largest_remainder(wanted, left)
        links = [has + more for has, more in zip(links, given, strict=True)]
        left -= sum(given)
    return links


def _largest_remainder(wanted: Sequence[float], total: int) -> list[int]:
    """Whole numbers with this sum, each less than 1 from what is wanted."""
    given = [int(want) for want in wanted]
    order = sorted(range(len(wanted)), key=lambda i: given[i] - wanted[i])
    for i in order[: total - sum(given)]:
        given[i] += 1
    return given
