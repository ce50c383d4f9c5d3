"""Which layers are sparse, and what is different in some: choices, overrides, allocations, distributions, starts."""

import pytest
import torch
from support import kernels, mixed_network, small_network, sparse, train
from torch import nn

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.initial.bipartite import small_world
from chtconv.layers.find import find_layers


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "0 3 5 6 8"),
        (["*"], "0 3 5 6 8 10"),
        (["[35]"], "3 5"),
        (["10", "0"], "0 10"),
        ([nn.Conv2d], "0 3 5 6"),
        ([nn.ConvTranspose2d, nn.Linear], "8 10"),
        ([nn.Linear, "3"], "3 10"),
        ([nn.Module], "0 3 5 6 8 10"),
        ((nn.Linear,), "10"),
        (lambda name, module: getattr(module, "groups", 1) > 1, "3 5 8"),
        (lambda name, module: name.startswith("1"), "10"),
    ],
)
def test_layers_are_chosen_by_name_type_or_predicate(choice, expected):
    assert list(find_layers(mixed_network(), choice)) == expected.split()
    assert list(sparse(mixed_network(), layers=choice)[2].masks) == [f"{name}.weight" for name in expected.split()]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (["features.*"], r"layers='features\.\*' matches no layer; those of the model are 0, 3, 5, 7"),
        ([nn.Conv3d], "Conv3d.* matches no layer"),
        ([nn.BatchNorm2d], "BatchNorm2d.* matches no layer"),
        (["1"], "layers='1' matches no layer"),
        ("0", r"layers='0': accepted is a list, such as \['0'\]"),
        (nn.Conv2d, "accepted is a list"),
        ([], r"layers=\[\] chooses no layer"),
        (lambda name, module: False, "chooses none of 0, 3, 5, 7"),
    ],
)
def test_choices_that_choose_nothing(choice, message):
    with pytest.raises(ConfigurationError, match=message):
        sparse(layers=choice)


def test_without_a_convolution_linear_layers_must_be_asked_for():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ConfigurationError, match=r"Sequential has no convolution; .*layers=\[torch\.nn\.Linear\]"):
        sparse(model)
    assert list(sparse(model, layers=[nn.Linear])[2].masks) == ["0.weight"]
    assert list(sparse(nn.Conv2d(3, 4, 3))[2].masks) == ["weight"]


def test_overrides_make_layers_different_and_the_last_one_wins():
    overrides = {
        "*": {"sparsity": 0.5},
        "[35]": {"method": "set", "allocation": "layer"},
        "5": {"sparsity": 0.25, "method": chtconv.method("rigl")},
        "0": {"predictor": "occupancy", "graph": "layer"},
    }
    model, optimizer, topology = sparse(sparsity=0.9, method="cht", overrides=overrides, interval=1, layers=["[0-5]"])
    settings = {layer.module_name: layer.settings for layer in topology._layers}
    assert [s.sparsity for s in settings.values()] == [0.5, 0.5, 0.25]
    assert [s.method.regrowth for s in settings.values()] == ["highest_score", "uniform", "gradient"]
    assert [s.allocation for s in settings.values()] == ["kernel", "layer", "layer"]
    assert [(s.predictor, s.graph) for s in settings.values()] == [("occupancy", "layer")] + [("ch3_l3n", "kernel")] * 2
    train(model, optimizer, 3)
    links = [int(mask.sum()) for mask in topology.masks.values()]
    assert links == [8 * round(0.5 * 27), round(0.5 * 8 * 36), round(0.75 * 48)]
    assert topology.evolutions == 3
    assert topology.stats()["layers"]["0.weight"]["zero_scores"] is not None
    assert topology.stats()["layers"]["3.weight"]["zero_scores"] is None


def test_a_layer_can_stay_as_it_is_while_others_evolve():
    model, optimizer, topology = sparse(method="chts", overrides={"0": {"method": "static"}}, interval=1)
    first = topology.masks
    train(model, optimizer, 3)
    assert torch.equal(topology.masks["0.weight"], first["0.weight"])
    assert not torch.equal(topology.masks["3.weight"], first["3.weight"])
    assert {row["layer"] for row in topology.records} == {"3.weight", "5.weight"}


def test_methods_with_their_own_predictor_keep_it():
    topology = sparse(method="cht", overrides={"3": {"method": "input_degree", "predictor": "ch2_l3n"}})[2]
    assert [layer.settings.predictor for layer in topology._layers] == ["ch3_l3n", "input_degree", "ch3_l3n"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"x*": {"sparsity": 0.1}}, r"overrides\['x\*'\] matches no sparse layer; those of the model are 0, 3, 5"),
        ({"7": {"sparsity": 0.1}}, r"overrides\['7'\] matches no sparse layer"),
        ({"0": {"sparsty": 0.1}}, "unknown override of '0' 'sparsty': did you mean 'sparsity'"),
        ({"0": {"zeta": 0.1}}, "unknown override of '0' 'zeta'.*Accepted: 'sparsity', 'method'"),
        ({"0": {"method": "rigle"}}, "unknown method 'rigle'"),
        ({"0": {"sparsity": 1.0}}, r"sparsity=1\.0"),
        ({"3": {"sparsity": 2}}, "^layer 3: sparsity=2: accepted are numbers from 0 up to"),
        ({"3": {"sparsity": "x"}}, "^layer 3: sparsity='x': accepted are numbers from 0 up to"),
        ({"0": {"sparsity": 0.99}}, r"layer 0: at sparsity 0\.99 a kernel of 27 positions would hold no link"),
        ({"0": {"predictor": "ch3_l3p"}}, "layer 0: predictor 'ch3_l3p' on the kernel graph"),
        ({"0": {"allocation": "layr"}}, "unknown allocation 'layr': did you mean 'layer'"),
        ({"3": {"method": "snfs", "allocation": "kernel"}}, "layer 3: .*accepted is allocation='layer'"),
        ({"3": {"method": "gmp"}}, "layer 3: the density schedule 'cubic' needs an end"),
        ({"3": {"initial": "small_world"}}, "layer 3: initial='small_world' is defined for linear layers"),
    ],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(ConfigurationError, match=message):
        sparse(overrides=overrides)


@pytest.mark.parametrize("allocation", ["kernel", "layer"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_erk_has_the_links_of_the_sparsity_over_all_layers_that_take_part(sparsity, allocation):
    model, _, topology = sparse(
        mixed_network(), layers=["*"], sparsity=sparsity, distribution="erk", allocation=allocation,
        overrides={"6": {"sparsity": 0.25}},
    )  # fmt: skip
    masks = topology.masks
    own = masks.pop("6.weight")
    assert own.sum() == 0.75 * own.numel()
    total, rows = sum(mask.numel() for mask in masks.values()), 0
    modules = dict(model.named_modules())
    densities, raw = {}, {}
    for name, mask in masks.items():
        rows += len(kernels(mask, modules[name[:-7]])) if allocation == "kernel" else 1
        densities[name] = int(mask.sum()) / mask.numel()
        module = modules[name[:-7]]
        outputs = len(kernels(mask, module))
        sizes = [outputs, mask.numel() // outputs // mask[0, 0].numel(), *mask.shape[2:]]
        raw[name] = sum(sizes) / mask.numel()
    # Every kernel, or layer, is rounded to a whole link.
    assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx((1 - sparsity) * total, abs=rows / 2)
    sparse_ones = [name for name, density in densities.items() if density < 1]
    assert len(sparse_ones) > 1
    scale = {name: densities[name] / raw[name] for name in sparse_ones}
    for name, value in scale.items():
        slack = 0.5 / (masks[name].numel() if allocation == "layer" else masks[name].numel() / 8) / raw[name] * 2
        assert value == pytest.approx(sum(scale.values()) / len(scale), rel=0.15, abs=slack)


def test_erk_from_a_denser_start_and_unknown_distributions():
    """A falling density starts as what is that dense all the time, in every layer."""
    falling = sparse(method="granet", distribution="erk", sparsity=0.8, stop=1000)[2].stats()
    constant = sparse(method="set", allocation="layer", distribution="erk", sparsity=0.5)[2].stats()
    assert falling["sparsity"] == pytest.approx(0.5, abs=0.02)
    densities = [[layer["density"] for layer in stats["layers"].values()] for stats in (falling, constant)]
    assert densities[0] == pytest.approx(densities[1], abs=0.05)
    assert max(densities[0]) - min(densities[0]) > 0.2
    with pytest.raises(ConfigurationError, match="unknown distribution 'erdos'"):
        sparse(distribution="erdos")


@pytest.mark.parametrize("initial", ["small_world", "receptive_field", lambda o, i, n, g: small_world(o, i, n, 0.0, g)])
def test_initial_topologies_of_linear_layers(initial):
    model = nn.Sequential(nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 6))
    model, optimizer, topology = sparse(
        model, layers=[nn.Linear], initial=initial, sparsity=0.8, method="set", allocation="layer", interval=1
    )
    assert [int(mask.sum()) for mask in topology.masks.values()] == [96, round(0.2 * 72)]
    random = sparse(copy_of(model), layers=[nn.Linear], sparsity=0.8, allocation="layer")[2]
    assert not torch.equal(topology.masks["0.weight"], random.masks["0.weight"])
    optimizer.zero_grad()
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    assert [int(mask.sum()) for mask in topology.masks.values()] == [96, round(0.2 * 72)]


def copy_of(model):
    return nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)))


def test_initial_topologies_that_cannot_be():
    linear = nn.Sequential(nn.Linear(40, 12))
    with pytest.raises(ConfigurationError, match="unknown initial topology 'small'"):
        sparse(linear, layers=["*"], initial="small")
    with pytest.raises(ConfigurationError, match="layer 0: initial='small_world' is defined for linear layers"):
        sparse(small_network(), initial="small_world")
    uneven = {"initial": lambda o, i, n, g: (torch.arange(o * i) < n).view(o, i), "layers": ["*"]}
    with pytest.raises(ConfigurationError, match=r"layer 0: .*same number of links; accepted is allocation='layer'"):
        sparse(linear, **uneven)
    assert sparse(linear, allocation="layer", **uneven)[2].masks["0.weight"].sum() == round(0.3 * 480)
    sparse(nn.Sequential(nn.Conv2d(16, 12, 1)), initial="small_world", allocation="layer")


def test_layers_with_a_sparsity_or_an_allocation_of_their_own_are_not_pruned_with_the_others():
    overrides = {"0": {"sparsity": 0.5}, "5": {"allocation": "kernel"}}
    model, optimizer, topology = sparse(
        mixed_network(), method="granet", sparsity=0.8, allocation="model", overrides=overrides, interval=1, stop=5
    )
    train(model, optimizer, 6)
    links = {name: int(mask.sum()) for name, mask in topology.masks.items()}
    assert links.pop("0.weight") == round(0.5 * 216)
    assert topology.masks["5.weight"].flatten(1).sum(1).tolist() == [round(0.2 * 9)] * 8
    assert links.pop("5.weight") == 16
    assert sum(links.values()) == sum(round(0.2 * topology.masks[name].numel()) for name in links)
    assert any(number != round(0.2 * topology.masks[name].numel()) for name, number in links.items())


@pytest.mark.parametrize("method", ["granet", "chtss"])
def test_a_layer_with_a_sparsity_of_its_own_starts_no_sparser_than_it_ends(method):
    """Unless it is said where to start."""
    options = {"method": method, "sparsity": 0.9, "stop": 1000, "overrides": {"0": {"sparsity": 0.0}}}
    _, _, topology = sparse(**options)
    assert topology.masks["0.weight"].all()
    assert topology.stats()["layers"]["3.weight"]["sparsity"] == 0.5
    started = sparse(initial_sparsity=1 / 3, **options)[2]
    assert started.stats()["layers"]["0.weight"]["sparsity"] == pytest.approx(1 / 3)
    sparser = sparse(**options | {"overrides": {"0": {"sparsity": 0.8}}})[2]
    assert sparser.stats()["layers"]["0.weight"]["links"] == 8 * round(0.5 * 27)


def test_density_schedules_need_a_start_and_an_end_and_constant_ones_have_none():
    with pytest.raises(ConfigurationError, match="layer 0: the density schedule 'cubic' needs an end"):
        sparse(method="gmp")
    with pytest.raises(ConfigurationError, match="layer 0: the density schedule 'cubic' needs a start"):
        sparse(method=chtconv.method("set", density="cubic"), stop=1000)
    with pytest.raises(ConfigurationError, match=r"layer 0: initial_sparsity=0\.1 with a method of constant density"):
        sparse(method="set", initial_sparsity=0.1)
    with pytest.raises(ConfigurationError, match=r"layer 0: from sparsity 0\.9 to 0\.7 links would have to come"):
        sparse(method="gmp", stop=1000, initial_sparsity=0.9)
    assert sparse(method="gmp", stop=1000, initial_sparsity=0.25)[2].stats()["sparsity"] == pytest.approx(
        0.25, abs=0.02
    )


def test_input_sizes_are_the_last_in_training_or_else_in_evaluation():
    model, _, topology = sparse(nn.Sequential(nn.Conv2d(3, 4, 3)), method="cht", sparsity=0.5)
    (layer,) = topology._layers
    assert layer.input_size is None
    model.eval()
    for size in ((20, 30), (9, 7)):
        model(torch.zeros(1, 3, *size))
        assert layer.input_size == size
    model.train()
    model(torch.zeros(1, 3, 5, 4))
    assert layer.input_size == (5, 4)
    model.eval()
    model(torch.zeros(1, 3, 40, 40))
    assert layer.input_size == (5, 4)
    model.train()
    model(torch.zeros(1, 3, 6, 6))
    assert layer.input_size == (6, 6)


def test_a_frozen_batch_norm_and_other_modules_in_evaluation_change_nothing():
    """What counts is the mode of the layer itself."""
    model, _, topology = sparse(method="cht")
    model[1].eval()
    model(torch.zeros(2, 3, 8, 8))
    model.eval()
    model(torch.zeros(2, 3, 8, 8)[..., :6, :6].repeat(1, 1, 2, 2)[..., :8, :8])
    assert [layer.input_size for layer in topology._layers] == [(8, 8), (8, 8), (3, 3)]


def test_a_sparsity_of_its_own_takes_no_part_in_erk_whatever_it_is():
    def links(own):
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        overrides = {"3": {"sparsity": own}}
        masks = chtconv.sparsify(model, optimizer, sparsity=0.8, distribution="erk", overrides=overrides).masks
        return {name: int(mask.sum()) for name, mask in masks.items()}

    assert links(0.8) == links(0.801)


def test_the_zeta_schedule_is_that_of_the_general_method():
    for overrides in (None, {"0": {"method": "static"}}):
        model = small_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topology = chtconv.sparsify(model, optimizer, method="mest", total_steps=1000, overrides=overrides)
        assert topology.schedule.decay == "linear"
