"""Link scores do not depend on what somebody allows matrix products to be rounded to."""

import pytest
import torch
from support import small_network, train

import chtconv
from chtconv.precision import float32_products, full_precision
from chtconv.scores.api import GRAPHS

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NEW = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch below 2.9 has older names")
CASES = [
    *((predictor, graph, (64, 32, 3, 3)) for predictor in ("ch2_l3n", "ch3_l3n") for graph in GRAPHS),
    *((predictor, "kernel", (64, 32, 3, 3)) for predictor in ("occupancy", "input_degree", "in_bounds")),
    ("ch3_l3n", "kernel", (8, 4, 5, 5)),
    ("ch3_l3p", "layer", (64, 48)),
]


@pytest.fixture
def precision():
    """Sets the precision of matrix products, for this test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def scores(predictor, graph, shape, exact=False, device="cpu"):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.2
    geometry = {"padding": 1} if len(shape) > 2 else {}
    size = 9 if len(shape) > 2 else ()
    return chtconv.link_scores(mask.to(device), size, predictor=predictor, graph=graph, exact=exact, **geometry)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("predictor", "graph", "shape"), CASES)
def test_autocast_changes_no_score(predictor, graph, shape, dtype, exact):
    expected = scores(predictor, graph, shape, exact)
    with torch.autocast("cpu", dtype=dtype):
        found = scores(predictor, graph, shape, exact)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype, "it is on again"
    assert torch.equal(found, expected)


@NEW
@pytest.mark.parametrize("value", ["tf32", "bf16"])
def test_a_setting_that_follows_a_more_general_one_goes_on_doing_so(value):
    general, own = torch.backends.mkldnn, torch.backends.mkldnn.matmul
    before = general.fp32_precision, own.fp32_precision
    try:
        own.fp32_precision = "none"
        general.fp32_precision = value
        with full_precision(torch.device("cpu")):
            assert own.fp32_precision == "ieee"
        assert own.fp32_precision == value
        general.fp32_precision = "ieee"
        assert own.fp32_precision == "ieee"
        own.fp32_precision = value
        with full_precision(torch.device("cpu")):
            assert own.fp32_precision == "ieee"
        assert (own.fp32_precision, general.fp32_precision) == (value, "ieee")
    finally:
        general.fp32_precision, own.fp32_precision = before


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_evolution_under_autocast_is_the_same(graph):
    def run(enabled):
        torch.manual_seed(0)
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topology = chtconv.sparsify(model, optimizer, method="cht", graph=graph, sparsity=0.6, interval=1)
        train(model, optimizer, 1)
        with torch.autocast("cpu", enabled=enabled):
            topology.evolve()
        return topology.masks

    masks, expected = run(True), run(False)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())


@NEW
def test_the_precision_of_products_is_full_within_and_as_before_afterwards(precision):
    precision("medium")
    kinds = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}
    before = {device: kind.fp32_precision for device, kind in kinds.items()}
    assert before == {"cuda": "tf32", "cpu": "bf16"}
    for device, kind in kinds.items():
        with full_precision(torch.device(device)):
            assert kind.fp32_precision == "ieee"
        assert {device: kind.fp32_precision for device, kind in kinds.items()} == before
    assert torch.get_float32_matmul_precision() == "medium"


@NEW
def test_scores_are_computed_in_full_precision(precision, monkeypatch):
    seen = []
    inner = chtconv.scores.api.kernel_graph_scores

    def watched(*arguments):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return inner(*arguments)

    monkeypatch.setattr(chtconv.scores.api, "kernel_graph_scores", watched)
    precision("medium")
    scores("ch3_l3n", "kernel", (8, 4, 3, 3))
    assert seen == ["ieee"]


@CUDA
@pytest.mark.parametrize("graph", GRAPHS)
def test_tf32_changes_no_score_on_a_gpu(graph):
    with float32_products(tf32=False):
        expected = scores("ch3_l3n", graph, (128, 128, 3, 3), device="cuda")
    with float32_products(tf32=True):
        assert torch.equal(scores("ch3_l3n", graph, (128, 128, 3, 3), device="cuda"), expected)
    torch.testing.assert_close(expected.cpu(), scores("ch3_l3n", graph, (128, 128, 3, 3)), rtol=1e-5, atol=0)
