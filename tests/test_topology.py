"""sparsify() and Topology: what is refused, what is recorded, loading, leaving."""

import copy
import gc

import pytest
import torch
from test_contract import assert_nothing_off_the_mask, small_network, train
from torch import nn
from torch.nn.utils import parametrizations

import chtconv
from chtconv.errors import ConfigurationError
from chtconv.schedule import Schedule


def sparse(model=None, optimizer=None, **options):
    model = model or small_network()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, chtconv.sparsify(model, optimizer, **options)


@pytest.mark.parametrize("interval", [1, 3])
def test_evolution_runs_by_itself_every_interval_until_stop(interval):
    model, optimizer, topology = sparse(interval=interval, stop=7)
    train(model, optimizer, 10)
    expected = [step for step in range(1, 7) if step % interval == 0]
    assert sorted({row["step"] for row in topology.records}) == expected
    assert topology.evolutions == len(expected)


def test_total_steps_stop_at_three_quarters_with_cosine():
    topology = sparse(total_steps=1000)[2]
    assert topology.schedule == Schedule(0.3, "cosine", 100, 750)
    assert topology.schedule.zeta_at(375) == pytest.approx(0.15)
    assert sparse()[2].schedule == Schedule(0.3, "constant", 100, None)


def test_zeta_falls_along_a_cosine():
    model, optimizer, topology = sparse(interval=1, stop=8, zeta=0.8, method="set", sparsity=0.5)
    train(model, optimizer, 8)
    removed = [row["removed"] for row in topology.records if row["layer"] == "3.weight"]
    assert len(removed) == 7
    # 8 kernels of 18 links: zeta * 144 removed, give or take one a kernel.
    for step, count in enumerate(removed, start=1):
        assert abs(count - topology.schedule.zeta_at(step) * 144) <= 8
    assert removed[0] > 100
    assert removed[-1] < 15


def test_the_record_agrees_with_the_masks():
    model, optimizer, topology = sparse(method="cht", sparsity=0.6, zeta=0.4, interval=10**9)
    train(model, optimizer, 2)
    for _ in range(3):
        before = {name: mask.clone() for name, mask in topology.masks.items()}
        topology.evolve()
        rows = {row["layer"]: row for row in topology.records if row["evolution"] == topology.evolutions - 1}
        for name, mask in topology.masks.items():
            row = rows[name]
            assert row["links"] == mask.sum()
            assert row["new"] == (mask & ~before[name]).sum()
            assert row["removed"] == row["new"] + row["rechosen"]
            assert row["overlap"] == pytest.approx(row["rechosen"] / max(1, row["removed"]))
            empty = (mask.flatten(2).sum(2) == 0).float().mean()
            assert row["empty_slices"] == pytest.approx(empty.item())
    # On a 1x1 convolution no two windows share an activation, so every score is 0.
    assert all(row["zero_scores"] == 1 for row in topology.records if row["layer"] == "5.weight")
    assert all(row["zero_scores"] < 0.8 for row in topology.records if row["layer"] == "0.weight")


def test_stats_count_links_and_everything_ever_explored():
    model, optimizer, topology = sparse(method="set", sparsity=0.5, interval=1)
    ever = {name: mask.clone() for name, mask in topology.masks.items()}

    def note():
        for name, mask in topology.masks.items():
            ever[name] |= mask

    train(model, optimizer, 4, after=note)
    stats = topology.stats()
    size = sum(mask.numel() for mask in ever.values())
    assert stats["itop"] == pytest.approx(sum(int(mask.sum()) for mask in ever.values()) / size)
    assert stats["itop"] > 1 - stats["sparsity"]
    assert stats["links"] == sum(int(mask.sum()) for mask in topology.masks.values())
    assert stats["sparsity"] == pytest.approx(1 - stats["links"] / size)
    assert stats["layers"]["0.weight"]["shape"] == [8, 3, 3, 3]
    assert 0 <= stats["layers"]["0.weight"]["overlap"] <= 1


def test_layers_are_chosen_by_pattern():
    assert set(sparse(layers=["[35]"])[2].masks) == {"3.weight", "5.weight"}
    with pytest.raises(ConfigurationError, match=r"layers='features\.\*' matches no layer; .* 0, 3, 5, 7"):
        sparse(layers=["features.*"])
    with pytest.raises(ConfigurationError, match="accepted is a list"):
        sparse(layers="0")


def test_input_sizes_follow_the_images():
    model, _optimizer, topology = sparse(nn.Sequential(nn.Conv2d(3, 4, 3)), method="cht", sparsity=0.5)
    model(torch.zeros(1, 3, 9, 7))
    topology.evolve()
    model(torch.zeros(1, 3, 4, 5))
    topology.evolve()
    assert topology._layers[0].input_size == (4, 5)
    assert topology.evolutions == 2


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


def test_one_and_three_dimensional_convolutions():
    for layer, image in ((nn.Conv1d(4, 6, 5), (2, 4, 20)), (nn.Conv3d(3, 4, 2), (2, 3, 5, 5, 5))):
        model, optimizer, topology = sparse(nn.Sequential(layer), sparsity=0.6, interval=1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(image)).sum().backward()
            optimizer.step()
        assert topology.evolutions == 2
        assert topology.records[-1]["zero_scores"] < 0.8


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


def test_state_of_another_topology_is_refused():
    state = sparse(sparsity=0.5)[2].state_dict()
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: the mask to load has 14 to 14 links.*5, as"):
        sparse(sparsity=0.8)[2].load_state_dict(state)
    with pytest.raises(ConfigurationError, match=r"the sparse layers are \['3\.weight'\]"):
        sparse(layers=["3"])[2].load_state_dict(state)
    state["masks"]["0.weight"] = state["masks"]["0.weight"][:, :2]
    with pytest.raises(ConfigurationError, match=r"of shape \[8, 2, 3, 3\]; accepted is torch.bool of shape \[8, 3"):
        sparse(sparsity=0.5)[2].load_state_dict(state)


def test_state_survives_saving_without_pickle(tmp_path):
    model, optimizer, topology = sparse(interval=1)
    train(model, optimizer, 2)
    torch.save(topology.state_dict(), tmp_path / "topology.pt")
    state = torch.load(tmp_path / "topology.pt", weights_only=True)
    assert state["records"] == topology.records
    assert all(torch.equal(mask, topology.masks[name]) for name, mask in state["masks"].items())


def tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    model[1].weight = model[0].weight
    return model


def frozen():
    model = small_network()
    model[0].weight.requires_grad_(False)
    return model


def parametrised():
    model = small_network()
    parametrizations.weight_norm(model[3])
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (small_network, {"sparsity": 1.0}, r"sparsity=1\.0: accepted are numbers from 0"),
        (small_network, {"sparsity": -0.1}, r"sparsity=-0\.1"),
        (small_network, {"sparsity": float("nan")}, r"sparsity=nan"),
        (small_network, {"sparsity": 0.99}, r"layer 0: at sparsity 0\.99 a kernel of 27 positions would hold no link"),
        (small_network, {"method": "rigle"}, "unknown method 'rigle'"),
        (small_network, {"method": "chtss"}, "did you mean 'chts'"),
        (small_network, {"predictor": "ch3"}, "did you mean 'ch3_l3n'"),
        (small_network, {"graph": "layr"}, "unknown graph 'layr'"),
        (small_network, {"zeta": 0}, "zeta=0"),
        (small_network, {"zeta": 1.5}, r"zeta=1\.5"),
        (small_network, {"zeta_schedule": "cosin", "stop": 9}, "did you mean 'cosine'"),
        (small_network, {"zeta_schedule": "cosine"}, "needs an end"),
        (small_network, {"interval": 0}, "interval=0"),
        (small_network, {"interval": 1.5}, r"interval=1\.5"),
        (small_network, {"stop": -1}, "stop=-1"),
        (small_network, {"total_steps": 0}, "total_steps=0"),
        (small_network, {"layers": []}, r"layers=\[\] chooses no layer"),
        (small_network, {"sparsity": "0.5"}, "sparsity='0.5'"),
        (small_network, {"zeta": "a"}, "zeta='a'"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {}, "has no convolution"),
        (tied, {}, "layers 0 and 1 share a weight"),
        (frozen, {}, "layer 0: its weight is frozen"),
        (parametrised, {}, "layer 3: its weight is computed from other parameters"),
        (small_network, {"predictor": "ch3_l3p"}, "layer 0: predictor 'ch3_l3p' on the kernel graph"),
    ],
)
def test_misuse_is_named_and_leaves_the_model_alone(model, options, message):
    model = model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ConfigurationError, match=message):
        chtconv.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("graph", ["kernel", "layer"])
@pytest.mark.parametrize("predictor", ["ch3_l3n", "occupancy", "input_degree"])
def test_every_kind_of_convolution_evolves_on_both_graphs(graph, predictor):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2, padding_mode="circular"),
        nn.Conv2d(6, 6, 7, padding="same", groups=6),
        nn.Conv2d(6, 4, (1, 3), padding=(0, 1), padding_mode="reflect", groups=2),
    )
    model, optimizer, topology = sparse(
        model, method="cht", sparsity=0.7, interval=1, graph=graph, predictor=predictor, layers=None
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


def test_sparsify_twice_and_a_foreign_optimizer_are_refused():
    model, optimizer, _ = sparse()
    with pytest.raises(ConfigurationError, match="layer 0 is sparse already; call detach"):
        chtconv.sparsify(model, optimizer)
    with pytest.raises(ConfigurationError, match="layer 0: no optimizer holds its weight"):
        sparse(small_network(), optimizer)


def test_an_optimizer_that_divides_zero_by_zero_is_refused():
    model = small_network()
    with pytest.raises(ConfigurationError, match="eps=0"):
        chtconv.sparsify(model, torch.optim.Adam(model.parameters(), eps=0.0))
    with pytest.raises(ConfigurationError, match="optimizer=None"):
        chtconv.sparsify(model, None)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, torch.optim.Adafactor, torch.optim.SparseAdam])
def test_optimizers_without_state_by_weight_are_refused_by_name(make):
    model = small_network()
    with pytest.raises(ConfigurationError, match=make.__name__):
        chtconv.sparsify(model, make(model.parameters()))


def test_link_prediction_before_the_first_forward_names_the_layer():
    topology = sparse(method="cht")[2]
    with pytest.raises(ConfigurationError, match=r"layer 0\.weight: its input size is unknown"):
        topology.evolve()
    sparse(method="set")[2].evolve()


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


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_closures_that_write_gradients_themselves(noise, keyword):
    model, optimizer, topology = sparse(sparsity=0.8, method="static")

    def closure():
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient + noise
        return loss

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss.item() > 0
    assert_nothing_off_the_mask(topology, model, optimizer)


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


def test_exact_scores_evolve_to_the_same_masks_with_any_number_of_threads():
    masks = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            model, _, topology = sparse(method="chts", sparsity=0.7, exact=True, interval=10**9)
            model(torch.zeros(1, 3, 8, 8))
            for _ in range(3):
                topology.evolve()
            masks.append(topology.masks)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
