"""Misuse is named before anything is touched."""

import copy
import gc
import warnings
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from support import mixed_network, small_network, sparse
from torch import nn
from torch.nn.utils import parametrizations

import chtconv
from chtconv.errors import ChtconvWarning, ConfigurationError


def tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model[1].weight = model[0].weight
    return model


def tied_to_an_embedding():
    model = nn.ModuleDict({"embedding": nn.Embedding(50, 16), "head": nn.Linear(16, 50)})
    model["head"].weight = model["embedding"].weight
    return model


def frozen():
    model = small_network()
    model[0].weight.requires_grad_(False)
    return model


def parametrised():
    model = small_network()
    parametrizations.weight_norm(model[3])
    return model


def lazy():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(8, 3))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (small_network, {"sparsity": 1.0}, r"sparsity=1\.0: accepted are numbers from 0"),
        (small_network, {"sparsity": -0.1}, r"sparsity=-0\.1"),
        (small_network, {"sparsity": float("nan")}, r"sparsity=nan"),
        (small_network, {"sparsity": "0.5"}, "sparsity='0.5'"),
        (small_network, {"sparsity": 0.99}, r"layer 0: at sparsity 0\.99 a kernel of 27 positions would hold no link"),
        (
            small_network,
            {"sparsity": 0.998, "allocation": "layer"},
            r"layer 0: at sparsity 0\.998 a layer of 216 positions would hold no link; accepted is less than 0\.997685",
        ),
        (mixed_network, {"sparsity": 0.95}, "layer 5: at sparsity 0.95 a kernel of 9 positions"),
        (small_network, {"sparsity": 0.99, "method": "gmp", "stop": 900}, r"layer 0: at sparsity 0\.99"),
        (small_network, {"method": "gmp", "stop": 900, "initial_sparsity": 1.0}, r"sparsity=1\.0"),
        (small_network, {"method": "rigle"}, "unknown method 'rigle'"),
        (small_network, {"method": "chtsss"}, "did you mean 'chtss'"),
        (small_network, {"predictor": "ch3"}, "did you mean 'ch3_l3n'"),
        (small_network, {"graph": "layr"}, "unknown graph 'layr'"),
        (small_network, {"allocation": "kernels"}, "unknown allocation 'kernels': did you mean 'kernel'"),
        (small_network, {"zeta": 0}, "zeta=0"),
        (small_network, {"zeta": 1.5}, r"zeta=1\.5"),
        (small_network, {"zeta": "a"}, "zeta='a'"),
        (small_network, {"zeta_schedule": "cosin", "stop": 9}, "did you mean 'cosine'"),
        (small_network, {"zeta_schedule": "cosine"}, "needs an end"),
        (small_network, {"interval": 0}, "interval=0"),
        (small_network, {"interval": 1.5}, r"interval=1\.5"),
        (small_network, {"stop": -1}, "stop=-1"),
        (small_network, {"total_steps": 0}, "total_steps=0"),
        (small_network, {"total_steps": True}, "total_steps=True"),
        (small_network, {"method": ["set"]}, r"unknown method \['set'\]"),
        (small_network, {"method": "snfs", "allocation": "kernel"}, "layer 0: .*redistribute=True.*allocation='layer'"),
        (
            small_network,
            {"method": "gmp", "total_steps": 100},
            "never begin, because no evolution falls between .* 100, .* 75",
        ),
        (small_network, {"interval": True}, "interval=True"),
        (small_network, {"layers": [3]}, r"layers=\[\.\.\., 3, \.\.\.\]: accepted are names"),
        (
            small_network,
            {"layers": ["7"], "initial": lambda o, i, n, g: torch.ones(o, i).bool(), "allocation": "layer"},
            r"layer 7: initial=.* with 216 links; accepted is torch\.bool of shape \[4, 54\] with 65",
        ),
        (small_network, {"method": "gmp", "stop": 900, "initial_sparsity": 1.5}, r"^initial_sparsity=1\.5: accepted"),
        (small_network, {"method": "gmp", "stop": 900, "initial_sparsity": "0.5"}, "^initial_sparsity='0.5': accepted"),
        (small_network, {"distribution": ["erk"]}, r"unknown distribution \['erk'\]: .*Accepted: 'uniform', 'erk'"),
        (small_network, {"zeta_schedule": ["cosine"], "stop": 9}, r"unknown zeta schedule \['cosine'\]"),
        (small_network, {"initial": None}, "layer 0: initial=None: accepted are 'random', .*, and functions"),
        (small_network, {"layers": ["7"], "initial": 5}, "layer 7: initial=5: accepted are 'random'"),
        (small_network, {"layers": ["7"], "initial": ["random"]}, r"layer 7: initial=\['random'\]: accepted are"),
        (
            small_network,
            {"layers": ["7"], "initial": lambda o, i, n, g: None},
            r"layer 7: initial=.* gave NoneType; accepted is a tensor, torch\.bool of shape \[4, 54\] with 64 links",
        ),
        (
            small_network,
            {"layers": ["7"], "initial": lambda o, i, n, g: np.ones((o, i), bool)},
            "layer 7: initial=.* gave ndarray; accepted is a tensor",
        ),
        (tied, {}, "layers 0 and 1 share a weight"),
        (tied, {"layers": ["0"]}, "layers 0 and 1 share a weight; leave them out"),
        (tied_to_an_embedding, {"layers": ["*"]}, "layers embedding and head share a weight; leave them out"),
        (frozen, {}, "layer 0: its weight is frozen"),
        (parametrised, {}, "layer 3: its weight is computed from other parameters"),
        (small_network, {"predictor": "ch3_l3p"}, "layer 0: predictor 'ch3_l3p' on the kernel graph"),
    ],
)
def test_misuse_is_named_and_leaves_the_model_alone(model, options, message):
    model = model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=message):
        chtconv.sparsify(model, optimizer, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_layer_that_stands_twice_shares_with_itself_alone():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    topology = sparse(nn.Sequential(layer, nn.ReLU(), layer))[2]
    assert list(topology.masks) == ["0.weight"]


def test_whole_numbers_of_numpy_are_whole_numbers():
    topology = sparse(interval=np.int64(3), total_steps=np.int64(40))[2]
    assert (topology.schedule.interval, topology.schedule.stop) == (3, 30)
    assert type(topology.schedule.interval) is type(topology.schedule.stop) is int


@pytest.mark.parametrize("method", ["chts", "occupancy"])
def test_a_size_without_a_graph_names_the_layer(method):
    model = nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"))
    topology = sparse(model, method=method)[2]
    model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigurationError, match=r"layer 1\.weight: padding_mode='circular' .*, such as 'set'"):
        topology.evolve()


# ---------------------------------------------------------------------------------------- what makes no difference


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("set", {"explore": 0.9}),
        ("cht", {"temperature": 3.0}),
        ("rigl", {"smoothing": 0.5}),
        ("occupancy", {"smoothing": 0.5}),
        ("set", {"kernel_shares": "equal"}),
        ("chts", {"kernel_shares": "equal"}),
        ("static", {"early_stop": 0.5}),
        ("gmp", {"early_stop": 0.5}),
    ],
)
def test_a_value_that_makes_no_difference_is_warned_of_once(name, changes):
    method = chtconv.method(name, **changes)
    (field,) = changes
    with pytest.warns(ChtconvWarning, match=rf"layer 0: {field}=.* makes no difference") as caught:
        sparse(method=method, total_steps=900, layers=["[03]"])
    assert len(caught) == 1
    assert caught[0].filename == str(Path(support.__file__))


def test_smoothing_makes_no_difference_to_what_it_leads_to():
    """Whether a method brings the predictor or not; to other controls it does."""
    smooth = chtconv.method("chts", smoothing=0.5)
    with pytest.warns(ChtconvWarning, match=r"layer 0: smoothing=0\.5 makes no difference .* predictor 'occupancy'"):
        sparse(method=smooth, predictor="occupancy")
    sparse(method=chtconv.method("input_degree", smoothing=0.5), predictor="occupancy")


GEOMETRIES = {
    "3x3": nn.Conv2d(4, 4, 3, padding=1),
    "1x1": nn.Conv2d(4, 4, 1),
    "1x3": nn.Conv2d(16, 16, (1, 3)),
    "1x3, strides 1 and 3": nn.Conv2d(4, 4, (1, 3), stride=(1, 3)),
    "patches": nn.Conv2d(4, 4, 4, stride=4),
    "patches on one axis": nn.Conv2d(16, 16, 2, stride=(1, 2)),
    "stride 2": nn.Conv2d(16, 16, 3, stride=2),
    "stride 3 between dilated": nn.Conv1d(16, 16, 3, stride=3, dilation=2),
    "stride 2 on dilated": nn.Conv1d(16, 16, 2, stride=2, dilation=2),
    "grouped patches": nn.Conv2d(8, 8, 2, stride=2, groups=2),
    "round and round": nn.Conv1d(16, 16, 3, stride=3, padding=1, padding_mode="circular"),
    "transposed": nn.ConvTranspose2d(4, 4, 2, stride=2),
    "transposed 1x1": nn.ConvTranspose2d(4, 4, 1, stride=2),
    "linear": nn.Linear(8, 8),
}


@pytest.mark.parametrize("kind", GEOMETRIES)
def test_a_graph_without_paths_is_warned_of_and_no_other(kind):
    """Those on which every position of random masks has score 0."""
    layer = GEOMETRIES[kind]
    options = {"layers": ["*"], "sparsity": 0.5, "interval": 10**9}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, _, topology = sparse(nn.Sequential(copy.deepcopy(layer)), method="cht", **options)
    model(
        torch.zeros(1, layer.weight.shape[1])
        if kind == "linear"
        else torch.zeros(1, layer.in_channels, *[8] * len(layer.kernel_size))
    )
    topology.evolve()
    assert bool(said) == (topology.records[0]["zero_scores"] == 1)
    sparse(nn.Sequential(copy.deepcopy(layer)), method="set", **options)


def test_all_layers_without_paths_are_named_once_with_the_graph_that_has_them():
    def model():
        return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))

    with pytest.warns(ChtconvWarning, match=r"layers 0, 3: .*no path of length 3 .*graph='layer'") as said:
        sparse(model(), method="chts")
    assert len(said) == 1
    assert said[0].filename == str(Path(support.__file__))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"graph": "layer"}, {"method": "set"}, {"method": "occupancy"}):
            sparse(model(), **options)
        sparse(model(), overrides={"[03]": {"graph": "layer"}})


def test_what_makes_a_difference_somewhere_is_not_warned_of():
    """A warning is an error here."""
    explored = chtconv.method("chts", explore=0.5, smoothing=0.5, temperature=2.0, early_stop=0.5)
    sparse(method=explored)
    sparse(method=chtconv.method("chts", kernel_shares="equal"), allocation="layer")
    for name in chtconv.METHODS:
        assert chtconv.method(name).ignored == ()


def test_a_weight_without_a_shape_is_named():
    model = lazy()
    with pytest.raises(ConfigurationError, match="layer 1: its weight has no shape yet; run a forward pass"):
        chtconv.sparsify(model, torch.optim.SGD(model[0].parameters()))


def test_a_weight_without_values_is_named():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ConfigurationError, match=r"layer 0: its weight is on the meta device.*call model\.to_empty"):
        chtconv.sparsify(model, torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("overrides", [5, {"0": 5}, {0: {"sparsity": 0.5}}])
def test_overrides_that_are_none_are_refused(overrides):
    with pytest.raises(ConfigurationError, match=r"overrides=.*: accepted is a dict from names to dicts"):
        sparse(overrides=overrides)


def test_in_inference_mode_nothing_becomes_sparse():
    model = small_network()
    with torch.inference_mode(), pytest.raises(ConfigurationError, match=r"in torch\.inference_mode\(\): accepted is"):
        chtconv.sparsify(model, torch.optim.SGD(model.parameters()))


def test_sparsify_twice_and_a_foreign_optimizer_are_refused():
    model, optimizer, topology = sparse()
    with pytest.raises(ConfigurationError, match="layer 0 is sparse already; call detach"):
        chtconv.sparsify(model, optimizer)
    with pytest.raises(ConfigurationError, match="layer 0: no optimizer holds its weight"):
        sparse(small_network(), optimizer)
    # With optimizer and topology gone, nothing is left of them.
    del optimizer, topology
    gc.collect()
    sparse(model)


@pytest.mark.parametrize("optimizer", [None, [], "sgd", [torch.optim.SGD]])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(ConfigurationError, match=r"optimizer=.*: accepted is an optimizer of torch, or a list"):
        chtconv.sparsify(small_network(), optimizer)


def test_link_prediction_before_the_first_forward_names_the_layer():
    topology = sparse(method="cht")[2]
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: its input size is unknown"):
        topology.evolve()
    assert topology.evolutions == 0
    sparse(method="set")[2].evolve()
    # A linear layer has no size to wait for.
    sparse(nn.Sequential(nn.Linear(9, 9)), layers=["*"], method="cht")[2].evolve()


def test_state_of_another_topology_is_refused():
    state = sparse(sparsity=0.5)[2].state_dict()
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: the mask to load has 14 to 14 links.*5, as"):
        sparse(sparsity=0.8)[2].load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: the mask to load has 112 to 112 links a layer"):
        sparse(sparsity=0.5, allocation="layer")[2].load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"the sparse layers are \['3\.weight'\]"):
        sparse(layers=["3"])[2].load_state_dict(state)
    between = {"method": "granet", "stop": 1000}
    sparse(sparsity=0.8, initial_sparsity=0.3, **between)[2].load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"14 to 14 links a kernel; accepted are 5 to 8"):
        sparse(sparsity=0.8, initial_sparsity=0.7, **between)[2].load_state_dict(state)
    state["masks"]["0.weight"] = state["masks"]["0.weight"][:, :2]
    with pytest.raises(ConfigurationError, match=r"of shape \[8, 2, 3, 3\]; accepted is torch.bool of shape \[8, 3"):
        sparse(sparsity=0.5)[2].load_state_dict(state)


def test_a_state_that_is_refused_changes_nothing():
    topology = sparse(sparsity=0.5)[2]
    before, state = topology.masks, sparse(sparsity=0.5, seed=1)[2].state_dict()
    state["masks"]["5.weight"] = ~state["masks"]["5.weight"][:, :4]
    with pytest.raises(ConfigurationError):
        topology.load_state_dict(state)
    assert all(torch.equal(mask, before[name]) for name, mask in topology.masks.items())
