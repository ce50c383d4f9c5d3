"""Independent statements of what the package computes, and strategies that generate what it is asked for."""

from collections.abc import Iterator

import networkx as nx
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from chtconv.errors import ConfigurationError
from chtconv.layers.geometry import Geometry


def communities(linked: Tensor) -> Iterator[tuple[int, int, list, dict]]:
    """Every unlinked pair of a biadjacency matrix: its paths of length three, and (internal, external) by inner node.

    After the definition: networkx walks the paths, and the links of a community node to the community, and to nodes
    that are neither in it nor the pair itself, are counted one by one.
    """
    rows, columns = linked.shape
    graph = nx.Graph()
    graph.add_nodes_from([("row", i) for i in range(rows)] + [("column", j) for j in range(columns)])
    graph.add_edges_from((("row", i), ("column", j)) for i, j in linked.nonzero().tolist())
    for i in range(rows):
        for j in range(columns):
            u, v = ("row", i), ("column", j)
            if graph.has_edge(u, v):
                continue
            paths = list(nx.all_simple_paths(graph, u, v, cutoff=3))
            community = {node for path in paths for node in path[1:-1]}
            degrees = {}
            for node in community:
                internal = sum(other in community for other in graph[node])
                external = sum(other not in community and other not in (u, v) for other in graph[node])
                degrees[node] = internal, external
            yield i, j, paths, degrees


def nx_scores(linked: Tensor, predictor: str) -> Tensor:
    """L3n scores of all unlinked pairs: the sum of a weight over the nodes of the local community."""
    weight = {
        "ch2_l3n": lambda i, e: (1 + i) / (1 + e),
        "ch3_l3n": lambda i, e: 1 / (1 + e),
        "ra_l3n": lambda i, e: 1 / (1 + i + e),
        "cn_l3n": lambda i, e: 1,
    }[predictor]
    scores = torch.zeros(linked.shape, dtype=torch.float64)
    for i, j, _, degrees in communities(linked):
        scores[i, j] = sum(weight(*degree) for degree in degrees.values())
    return scores


def nx_path_scores(linked: Tensor, predictor: str) -> Tensor:
    """L3p scores of all unlinked pairs: the product of a term of each inner node, summed over the paths."""
    scores = torch.zeros(linked.shape, dtype=torch.float64)
    for i, j, paths, degrees in communities(linked):
        term = {node: ((1 + n if predictor == "ch2_l3p" else 1) / (1 + e)) ** 0.5 for node, (n, e) in degrees.items()}
        scores[i, j] = sum(term[path[1]] * term[path[2]] for path in paths)
    return scores


def jacobian_biadjacency(mask_CK: Tensor, geometry: Geometry) -> Tensor:
    """Which inputs each output of a kernel depends on, from the derivative of torch's own layer."""
    kernel = tuple(axis.kernel for axis in geometry.axes)
    weight = mask_CK.double().view(1, len(mask_CK), *kernel)
    options = {
        "stride": tuple(axis.stride for axis in geometry.axes),
        "dilation": tuple(axis.dilation for axis in geometry.axes),
    }

    def layer(x: Tensor) -> Tensor:
        if not kernel:
            return nn.functional.linear(x, weight)
        if geometry.transposed:
            transpose = [nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d]
            grown = [
                axis.size
                - (axis.stride * (axis.windows - 1) - sum(axis.padding) + axis.dilation * (axis.kernel - 1) + 1)
                for axis in geometry.axes
            ]
            before = tuple(axis.padding[0] for axis in geometry.axes)
            weights = weight.transpose(0, 1)
            return transpose[len(kernel) - 1](x, weights, padding=before, output_padding=tuple(grown), **options)
        convolve = [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d][len(kernel) - 1]
        circular = any(axis.circular for axis in geometry.axes)
        pads = [n for axis in reversed(geometry.axes) for n in axis.padding]
        return convolve(nn.functional.pad(x, pads, mode="circular" if circular else "constant"), weight, **options)

    size = (1, len(mask_CK), *geometry.input_size)
    jacobian = torch.autograd.functional.jacobian(layer, torch.zeros(size).double())
    return jacobian.flatten(-len(size)).reshape(-1, torch.Size(size).numel())


@st.composite
def geometries(draw: st.DrawFn, *, large: bool = False) -> Geometry:
    """Geometries with few windows: any stride, padding and dilation, circular and transposed, sizes down to 1.

    Kernels have up to 9 positions, or up to 27 where ``large``.
    """
    n = draw(st.sampled_from([1, 2, 3] if large else [0, 1, 2, 2, 2, 2, 3]))
    most = {0: 1, 1: 11, 2: 5, 3: 3} if large else {0: 1, 1: 5, 2: 3, 3: 2}
    each = {"kernel": most[n], "stride": 3, "dilation": 2, "size": 4 if n == 3 else 7}
    kernel, stride, dilation, size = ([draw(st.integers(1, top)) for _ in range(n)] for top in each.values())
    transposed = draw(st.booleans())
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    if mode == "circular":
        size = [max(s, d * (k - 1) + 1) for s, k, d in zip(size, kernel, dilation, strict=True)]
    least = [0] * n
    if not transposed:
        least = [max(0, d * (k - 1) + 2 - s) // 2 for s, k, d in zip(size, kernel, dilation, strict=True)]
    padding = [draw(st.integers(low, max(low, 2))) for low in least]
    if mode == "circular":
        padding = [min(p, s) for p, s in zip(padding, size, strict=True)]
    extra = [draw(st.integers(0, s - 1)) for s in stride] if transposed else 0
    try:
        return Geometry.of(
            kernel, size, stride=stride, padding=padding, dilation=dilation,
            padding_mode=mode, transposed=transposed, output_padding=extra,
        )  # fmt: skip
    except ConfigurationError:
        assume(False)
        raise


@st.composite
def masks(draw: st.DrawFn, positions: int, kernels: int = 2) -> Tensor:
    """Bool masks [kernels, 1 to 4 channels, positions] of any density, empty and full ones included."""
    channels = draw(st.integers(1, 4))
    density = draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(kernels, channels, positions, generator=source) < density
