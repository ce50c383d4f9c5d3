"""A topology in a program: on models, types and layouts of all kinds, loading, copying, leaving."""

import copy
import gc

import pytest
import torch
from support import assert_nothing_off_the_mask, small_network, sparse, train
from torch import nn

import chtconv
from chtconv.errors import ConfigurationError


def test_channels_last_before_and_after():
    for early in (True, False):
        model = small_network()
        if early:
            model = model.to(memory_format=torch.channels_last)
        model, optimizer, topology = sparse(model, interval=1, sparsity=0.8)
        if not early:
            model.to(memory_format=torch.channels_last)
        train(model, optimizer, 3, after=lambda o=optimizer, m=model, t=topology: assert_nothing_off_the_mask(t, m, o))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype):
    model = small_network().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.7, interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8, dtype=dtype)).sum().backward()
        optimizer.step()
        assert_nothing_off_the_mask(topology, model, optimizer)


def test_several_optimizers_count_one_step_when_the_last_has_stepped():
    model = small_network()
    first = torch.optim.SGD(model[:3].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model[3:].parameters(), lr=0.01)
    topology = chtconv.sparsify(model, [first, second], sparsity=0.7, interval=2)
    for _ in range(4):
        first.zero_grad(), second.zero_grad()
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        first.step()
        second.step()
    assert (topology.step_count, topology.evolutions) == (4, 2)
    for name, mask in topology.masks.items():
        assert not dict(model.named_parameters())[name][~mask].any()


def test_detach_gives_the_plain_model_back():
    model, optimizer, topology = sparse(sparsity=0.8)
    train(model, optimizer, 1)
    mask = topology.masks["0.weight"]
    topology.detach()
    assert not model[0].weight[~mask].any()
    assert not any(hasattr(module, "_chtconv_input_size") for module in model.modules())
    train(model, optimizer, 1)
    assert model[0].weight[~mask].any()
    assert topology.step_count == 1
    chtconv.sparsify(model, optimizer)


def test_state_dict_keys_are_those_of_the_plain_model():
    model = small_network()
    keys = list(model.state_dict())
    sparse(model)
    assert list(model.state_dict()) == keys


def test_dense_weights_loaded_without_their_topology_are_an_error_not_a_silent_dense_model():
    model, optimizer, topology = sparse(sparsity=0.8)
    model.load_state_dict(small_network().state_dict())
    optimizer.zero_grad()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: .*topology\.load_state_dict.*enforce"):
        optimizer.step()
    topology.enforce()
    optimizer.step()
    assert_nothing_off_the_mask(topology, model, optimizer)


def test_optimizer_state_of_a_dense_run_is_cut_to_the_mask():
    dense = small_network()
    dense_optimizer = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    train(dense, dense_optimizer, 2)
    model, optimizer, topology = sparse(sparsity=0.8)
    optimizer.load_state_dict(copy.deepcopy(dense_optimizer.state_dict()))
    train(model, optimizer, 1)
    assert_nothing_off_the_mask(topology, model, optimizer)


def test_state_survives_saving_without_pickle(tmp_path):
    model, optimizer, topology = sparse(interval=1)
    train(model, optimizer, 2)
    torch.save(topology.state_dict(), tmp_path / "topology.pt")
    state = torch.load(tmp_path / "topology.pt", weights_only=True)
    assert state["records"] == topology.records
    assert all(torch.equal(mask, topology.masks[name]) for name, mask in state["masks"].items())


@pytest.mark.parametrize("graph", ["kernel", "layer"])
@pytest.mark.parametrize("predictor", ["ch3_l3n", "occupancy", "input_degree"])
def test_every_kind_of_convolution_evolves_on_both_graphs(graph, predictor):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2, padding_mode="circular"),
        nn.Conv2d(6, 6, 7, padding="same", groups=6),
        nn.Conv2d(6, 4, (1, 3), padding=(0, 1), padding_mode="reflect", groups=2),
    )
    model, optimizer, topology = sparse(
        model,
        method="cht",
        sparsity=0.7,
        interval=1,
        graph=graph,
        predictor=predictor,
        overrides={"2": {"sparsity": 0.4}},
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 9, 9)).sum().backward()
        optimizer.step()
        assert_nothing_off_the_mask(topology, model, optimizer)
    assert topology.evolutions == 2
    for name, mask in topology.masks.items():
        links = mask.flatten(1).sum(1)
        assert (links == links[0]).all(), name
    assert all(row["zero_scores"] < 0.9 for row in topology.records)


def test_graph_and_predictor_make_a_difference():
    results = {}
    for graph in ("kernel", "layer"):
        for predictor in ("ch3_l3n", "ch2_l3n", "occupancy"):
            torch.manual_seed(0)
            model, optimizer, topology = sparse(
                method="cht", graph=graph, predictor=predictor, interval=1, sparsity=0.8
            )
            train(model, optimizer, 2)
            results[graph, predictor] = topology.masks["3.weight"]
    assert not torch.equal(results["kernel", "ch3_l3n"], results["layer", "ch3_l3n"])
    assert not torch.equal(results["kernel", "ch3_l3n"], results["kernel", "occupancy"])
    assert torch.equal(results["kernel", "occupancy"], results["layer", "occupancy"])


def test_an_optimizer_that_divides_zero_by_zero_is_refused():
    model = small_network()
    with pytest.raises(ConfigurationError, match="eps=0"):
        chtconv.sparsify(model, torch.optim.Adam(model.parameters(), eps=0.0))
    with pytest.raises(ConfigurationError, match="optimizer=None"):
        chtconv.sparsify(model, None)


@pytest.mark.parametrize("make", [torch.optim.SparseAdam])
def test_optimizers_that_take_no_dense_gradient_are_refused_by_name(make):
    model = small_network()
    with pytest.raises(ConfigurationError, match=make.__name__):
        chtconv.sparsify(model, make(model.parameters()))


def test_a_loop_that_replays_counts_steps_by_hand():
    _model, _, topology = sparse(interval=2, method="set")
    for _ in range(4):
        topology.step()
    assert (topology.step_count, topology.evolutions) == (4, 2)


def test_wrapped_models_draw_the_same_masks_and_load_their_state():
    torch.manual_seed(0)
    plain = small_network()
    wrapped = nn.Module()
    wrapped.module = copy.deepcopy(plain)
    a, b = sparse(plain)[2], sparse(wrapped)[2]
    assert all(torch.equal(mask, b.masks[f"module.{name}"]) for name, mask in a.masks.items())
    b.load_state_dict(a.state_dict())


def test_a_layer_that_happens_to_be_called_module_is_no_wrapper():
    model = nn.Module()
    model.conv, model.module = nn.Conv2d(3, 8, 3), nn.Module()
    model.module.conv = nn.Conv2d(3, 8, 3)
    masks = sparse(model)[2].masks
    assert not torch.equal(masks["conv.weight"], masks["module.conv.weight"])


def test_loading_a_part_of_the_model_is_noticed_too():
    model, optimizer, _ = sparse(sparsity=0.8, method="static")
    model[0].load_state_dict(nn.Conv2d(3, 8, 3, bias=False).state_dict())
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: the weights that were loaded"):
        train(model, optimizer, 1)


def test_inputs_by_keyword_and_without_a_batch():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, images):
            return self.layer(input=images)

    model, _, topology = sparse(Keyword(), sparsity=0.5, method="cht")
    model(torch.zeros(3, 9, 7))
    topology.evolve()
    assert topology._layers[0].input_size == (9, 7)
    assert topology.evolutions == 1


def test_a_sparse_model_is_saved_and_copied_like_any_other(tmp_path):
    model, optimizer, topology = sparse(sparsity=0.8)
    train(model, optimizer, 1)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    twin = copy.deepcopy(model)
    for other in (loaded, twin):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        chtconv.sparsify(other, torch.optim.SGD(other.parameters(), lr=0.1))
    train(model, optimizer, 1)
    assert_nothing_off_the_mask(topology, model, optimizer)


def test_the_model_does_not_own_the_topology_but_the_optimizer_does():
    model, optimizer, topology = sparse(sparsity=0.8, method="static")
    name, mask = next(iter(topology.masks.items()))
    del topology
    gc.collect()
    train(model, optimizer, 2)
    weight = dict(model.named_parameters())[name]
    assert (weight == 0).sum() == (~mask).sum()


def test_a_fused_step_that_a_gradient_scaler_skips_counts_for_nothing():
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    topology = chtconv.sparsify(model, optimizer, sparsity=0.8, interval=1, method="set")
    scaler = torch.amp.GradScaler("cpu")
    for factor, steps in ((float("inf"), 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3, 8, 8)).mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert topology.step_count == topology.evolutions == steps


def test_a_subclass_that_calls_the_step_of_its_parent_counts_once():
    class Mine(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.Adam(small_network().parameters())
    model = small_network()
    model, optimizer, topology = sparse(model, Mine(model.parameters()), interval=2)
    train(model, optimizer, 5)
    assert (topology.step_count, topology.evolutions) == (5, 2)


def test_a_step_that_failed_is_not_counted():
    model, optimizer, topology = sparse(method="set")
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    train(model, optimizer, 3)
    assert topology.step_count == 3


def test_a_state_is_a_snapshot():
    model, optimizer, topology = sparse(interval=1, method="set")
    train(model, optimizer, 2)
    state = topology.state_dict()
    train(model, optimizer, 2)
    topology.records.clear()
    topology.stats()
    topology.load_state_dict(state)
    topology.enforce()
    train(model, optimizer, 1)
    assert [row["evolution"] for row in topology.records if row["layer"] == "0.weight"] == [0, 1, 2]
