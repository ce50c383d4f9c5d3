"""Independent statements of what the package computes, and strategies that generate what it is asked for."""

import networkx as nx
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from chtconv.geometry import Geometry


def nx_scores(linked: Tensor, predictor: str) -> Tensor:
    """L3n scores of all unlinked pairs by walking every path of length three of a graph, after the definition.

    ``linked`` is a biadjacency matrix; internal links of a community node are counted one by one, as are the links
    to nodes that are neither in the community nor the pair itself.
    """
    rows, columns = linked.shape
    graph = nx.Graph()
    graph.add_nodes_from([("row", i) for i in range(rows)] + [("column", j) for j in range(columns)])
    graph.add_edges_from((("row", i), ("column", j)) for i, j in linked.nonzero().tolist())
    scores = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            u, v = ("row", i), ("column", j)
            if graph.has_edge(u, v):
                continue
            community = {node for path in nx.all_simple_paths(graph, u, v, cutoff=3) for node in path[1:-1]}
            for node in community:
                internal = sum(other in community for other in graph[node])
                external = sum(other not in community and other not in (u, v) for other in graph[node])
                scores[i, j] += (1 + internal) / (1 + external) if predictor == "ch2_l3n" else 1 / (1 + external)
    return scores


def jacobian_biadjacency(mask_CK: Tensor, geometry: Geometry) -> Tensor:
    """Which activations each window of a kernel depends on, from the derivative of torch's own convolution."""
    kernel = tuple(axis.kernel for axis in geometry.axes)
    weight = mask_CK.double().view(1, len(mask_CK), *kernel)
    convolve = [nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d][len(kernel)]
    options = {}
    if kernel:
        options = {
            "stride": tuple(axis.stride for axis in geometry.axes),
            "padding": tuple(axis.padding[0] for axis in geometry.axes),
            "dilation": tuple(axis.dilation for axis in geometry.axes),
        }
    size = (1, len(mask_CK), *geometry.input_size)
    jacobian = torch.autograd.functional.jacobian(lambda x: convolve(x, weight, **options), torch.zeros(size).double())
    return jacobian.flatten(-len(size)).reshape(-1, torch.Size(size).numel())


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Geometries with up to 9 positions and few windows: any stride, padding and dilation, sizes down to 1."""
    n = draw(st.sampled_from([0, 1, 2, 2, 2, 2, 3]))
    kernel = [draw(st.integers(1, {0: 1, 1: 5, 2: 3, 3: 2}[n])) for _ in range(n)]
    stride = [draw(st.integers(1, 3)) for _ in range(n)]
    dilation = [draw(st.integers(1, 2)) for _ in range(n)]
    padding = [draw(st.integers(0, 2)) for _ in range(n)]
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = [draw(st.integers(low, max(low, 4 if n == 3 else 7))) for low in least]
    return Geometry.of(kernel, size, stride=stride, padding=padding, dilation=dilation)


@st.composite
def masks(draw: st.DrawFn, positions: int, kernels: int = 2) -> Tensor:
    """Bool masks [kernels, 1 to 4 channels, positions] of any density, empty and full ones included."""
    channels = draw(st.integers(1, 4))
    density = draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1)))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(kernels, channels, positions, generator=source) < density
