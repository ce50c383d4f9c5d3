"""Understanding link scores: each statistic against brute force, invariances, and the command line to its end."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from chtconv import ConfigurationError, link_scores, sparsify
from chtconv.cli import main
from chtconv.explain import ScoreStatistics, explain, score_statistics
from chtconv.explain.distribution import effective_candidates, spread
from chtconv.explain.layers import masked_layers
from chtconv.explain.report import report, sentences
from chtconv.explain.sources import layers_of_run
from chtconv.explain.ties import chance_of_choice, expected_overlap, links_to_regrow, ties
from chtconv.explain.variance import r_squared
from chtconv.methods import regrowth
from chtconv.selection import Count, take_largest

ROOT = Path(__file__).parents[1]
OPTIONS = """
    --help --layer --predictor --graph --zeta --tau --out
    --shape --input-size --stride --padding --dilation --groups --sparsity --seed
"""
Run = Callable[..., tuple[int, str, str]]


def random_mask(*shape: int, density: float = 0.3, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def few_values(kernels: int, positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores that tie often, and which of them are candidates: at least one in each kernel."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (kernels, positions), generator=draw) / 3
    allowed = torch.rand(kernels, positions, generator=draw) < 0.7
    allowed[:, 0] = True
    return scores.float(), allowed


# Ties


@given(st.integers(0, 10_000), st.integers(0, 3))
def test_chance_of_choice_is_the_mean_over_all_orders_of_ties(seed: int, wanted: int) -> None:
    scores, allowed = few_values(1, 5, seed)
    candidates = allowed[0].nonzero()[:, 0].tolist()
    count = min(wanted, len(candidates))
    chosen = np.zeros(5)
    orders = list(itertools.permutations(candidates))
    for order in orders:
        ranked = sorted(order, key=lambda i: -float(scores[0, i]))  # sorted keeps the order of equal ones
        chosen[ranked[:count]] += 1 / len(orders)
    found = chance_of_choice(scores, allowed, torch.tensor([count]))
    np.testing.assert_allclose(found[0].numpy(), chosen, atol=1e-12)


def test_chance_of_choice_is_how_often_regrowth_chooses() -> None:
    scores, allowed = few_values(1, 12, 3)
    draw = torch.Generator().manual_seed(0)
    count = Count(4, torch.zeros(2000, 1, dtype=torch.bool))
    keys = regrowth.highest_score(scores.expand(2000, -1).contiguous(), draw)
    counts = take_largest(keys, allowed.expand(2000, -1), count).float().mean(0)
    found = chance_of_choice(scores, allowed, torch.tensor([4]))[0]
    assert 0 < found.max() <= 1
    torch.testing.assert_close(counts.double(), found, atol=0.04, rtol=0)


@given(st.integers(0, 10_000))
def test_ties_by_counting(seed: int) -> None:
    scores, allowed = few_values(3, 8, seed)
    count = torch.tensor([1, 2, 3]).minimum(allowed.sum(1))
    at_cut = drawn = tied = positive = unscored = 0
    for row, keep, n in zip(scores.tolist(), allowed.tolist(), count.tolist(), strict=True):
        values = sorted((value for value, kept in zip(row, keep, strict=True) if kept), reverse=True)
        lowest = values[n - 1]
        level, places = values.count(lowest), values[:n].count(lowest)
        if places < level:
            at_cut, drawn = at_cut + level, drawn + places
        above = [value for value in values if value > 0]
        positive += len(above)
        tied += sum(above.count(value) > 1 for value in above)
        unscored += max(0, n - len(above))
    found = ties(scores, allowed, count)
    assert found.at_cut == pytest.approx(at_cut / int(allowed.sum()))
    assert found.drawn == pytest.approx(drawn / int(count.sum()))
    assert found.positive == pytest.approx(tied / positive if positive else 0)
    assert found.unscored == pytest.approx(unscored / int(count.sum()))


def test_scores_that_differ_by_rounding_errors_tie() -> None:
    everywhere, one = torch.ones(1, 2, dtype=torch.bool), torch.tensor([1])
    assert ties(torch.tensor([[1.0, 1.0 + 2**-22]]), everywhere, one).positive == 1
    assert ties(torch.tensor([[1.0, 1.0 + 2**-13]]), everywhere, one).positive == 0


def test_links_to_regrow_are_rounded_up_and_find_room() -> None:
    mask = torch.arange(40).expand(3, -1) < torch.tensor([[30], [1], [40]])
    assert links_to_regrow(mask, 0.1).tolist() == [3, 1, 0]
    assert links_to_regrow(mask, 1.0).tolist() == [10, 1, 0]


def test_overlap_is_certain_without_ties_and_a_lottery_with_them() -> None:
    everywhere, two = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
    rising, level = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4)
    assert expected_overlap(rising, rising, everywhere, two) == 1
    assert expected_overlap(rising, -rising + 5, everywhere, two) == 0
    assert expected_overlap(rising, level, everywhere, two) == 0.5
    assert expected_overlap(level, level, everywhere, two) == 0.5


# Distribution


@given(st.integers(0, 10_000), st.sampled_from([0.5, 1.0, 3.0]))
def test_effective_candidates_by_hand(seed: int, tau: float) -> None:
    scores, allowed = few_values(3, 6, seed)
    shares = []
    for row, keep in zip(scores.tolist(), allowed.tolist(), strict=True):
        weights = [value**tau for value, kept in zip(row, keep, strict=True) if kept]
        p = (
            [weight / sum(weights) for weight in weights if weight]
            if any(weights)
            else [1 / len(weights)] * len(weights)
        )
        shares.append(math.exp(-sum(x * math.log(x) for x in p)) / len(weights))
    assert effective_candidates(scores, allowed, tau) == pytest.approx(sum(shares) / 3, rel=1e-6)


def test_effective_candidates_of_tiny_scores_and_of_kernels_without_room() -> None:
    scores = torch.tensor([[1e-30, 1e-30, 1e-30], [1.0, 2.0, 3.0]])
    allowed = torch.tensor([[True, True, True], [False, False, False]])
    assert effective_candidates(scores, allowed, 20.0) == pytest.approx(1)


def test_spread() -> None:
    values = torch.rand(1001, generator=torch.Generator().manual_seed(1)) + 0.5
    found = spread(values)
    assert found is not None
    assert found.variation == pytest.approx(float(values.std(correction=0) / values.mean()), rel=1e-5)
    assert found.quartiles == pytest.approx([float(values.sort().values[i]) for i in (0, 250, 500, 750, 1000)])
    assert int(found.counts.sum()) == 1001
    assert (float(found.edges[0]), float(found.edges[-1])) == (found.quartiles[0], found.quartiles[-1])
    assert spread(torch.empty(0)) is None


# Variance


def r_squared_by_numpy(scores: Tensor, disabled: Tensor, regressors: list[Tensor]) -> float:
    """Least squares with a column for each kernel, over a row for each disabled position."""
    kernel, channel, position = disabled.nonzero(as_tuple=True)
    target = scores[kernel, channel, position].numpy()
    dummies = nn.functional.one_hot(kernel, len(scores)).double().numpy()
    columns = np.column_stack([dummies, *(x[kernel, channel].numpy() for x in regressors)])

    def residual(matrix: np.ndarray) -> float:
        fitted = matrix @ np.linalg.lstsq(matrix, target, rcond=None)[0]
        return float(((target - fitted) ** 2).sum())

    return 1 - residual(columns) / residual(dummies)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_explained_variance_is_that_of_least_squares(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 5, 4, generator=draw, dtype=torch.float64)
    disabled = torch.rand(3, 5, 4, generator=draw) < 0.7
    one, two = torch.rand(2, 3, 5, generator=draw, dtype=torch.float64) * 9
    for regressors in ([one], [two], [one, two], [one, one * 2 + 1]):
        expected = r_squared_by_numpy(scores, disabled, regressors)
        assert r_squared(scores, disabled, regressors) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("groups", "graph"), [(1, "kernel"), (1, "layer"), (2, "kernel"), (2, "layer")])
def test_explained_variance_of_a_layer(groups: int, graph: str) -> None:
    mask = random_mask(8, 6, 3, 3)
    found = score_statistics(mask, 8, padding=1, groups=groups, graph=graph)
    scores = link_scores(mask, 8, padding=1, groups=groups, graph=graph).flatten(2).double()
    slices = mask.sum((2, 3)).double()
    channels = slices.view(groups, -1, 6).sum(1, keepdim=True).expand(-1, 8 // groups, -1).reshape(8, 6)
    for value, regressors in (
        (found.explained.occupancy, [slices]),
        (found.explained.input_degree, [channels]),
        (found.explained.both, [slices, channels]),
    ):
        assert value == pytest.approx(r_squared_by_numpy(scores, ~mask.flatten(2), regressors), abs=1e-6)


@pytest.mark.parametrize("rule", ["occupancy", "input_degree"])
def test_a_control_explains_itself(rule: str) -> None:
    explained = score_statistics(random_mask(8, 6, 3, 3), 8, padding=1, predictor=rule).explained
    assert getattr(explained, rule) == pytest.approx(1)
    assert explained.both == pytest.approx(1)


def test_depthwise_layers_have_one_cheap_rule_twice() -> None:
    explained = score_statistics(random_mask(12, 1, 3, 3), 8, padding=1, groups=12).explained
    # One slice a kernel: nothing varies within a kernel that counting links could explain.
    assert (explained.occupancy, explained.input_degree, explained.both) == (0, 0, 0)


# A layer


def test_means_and_zero_scores_by_loops() -> None:
    mask = random_mask(4, 6, 3, 3, density=0.15)
    mask[1, 2] = True  # a slice without candidates
    scores = link_scores(mask, 8, padding=1, groups=2).masked_fill(mask, math.nan).double()
    found = score_statistics(mask, 8, padding=1, groups=2)
    torch.testing.assert_close(found.means.position, scores.nanmean((0, 1)))
    torch.testing.assert_close(found.means.output_channel, scores.nanmean((1, 2, 3)))
    torch.testing.assert_close(found.means.slice, scores.nanmean((2, 3)), equal_nan=True)
    by_input = scores.view(2, 2, 6, 9).nanmean((1, 3)).flatten()
    torch.testing.assert_close(found.means.input_channel, by_input)
    assert found.zero_scores == pytest.approx(float((scores[~mask] == 0).double().mean()))
    assert (found.links, found.candidates) == (int(mask.sum()), int((~mask).sum()))
    assert bool(found.means.slice[1, 2].isnan())


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.15, 0.5]))
@settings(max_examples=30)
def test_reach_is_what_differences_of_links_lead_to(seed: int, density: float) -> None:
    mask = random_mask(3, 5, 3, 3, density=density, seed=seed)
    places, reached = 0, 0
    for kernel in mask:
        slices = [[tuple(at) for at in piece.nonzero().tolist()] for piece in kernel]
        steps = {(c[0] - b[0], c[1] - b[1]) for links in slices for b in links for c in links if b != c}
        for links in filter(None, slices):
            free = {(i, j) for i in range(3) for j in range(3)} - set(links)
            places += len(free)
            reached += len(free & {(a[0] + step[0], a[1] + step[1]) for a in links for step in steps})
    if not (~mask).any():
        return
    found = score_statistics(mask, 12, padding=1)
    assert found.reach == (pytest.approx(reached / places) if places else None)
    # Nothing but places beside links has a score at all.
    assert round((1 - found.zero_scores) * found.candidates) == reached


def test_reach_of_other_graphs_and_masks() -> None:
    mask = random_mask(8, 6, 3, 3, density=0.05)
    layer = score_statistics(mask, 12, padding=1, graph="layer").reach
    assert layer is not None
    assert layer > score_statistics(mask, 12, padding=1).reach
    assert score_statistics(mask, 12, padding=1, predictor="occupancy").reach == 1
    full = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    full[:, 0] = True
    assert score_statistics(full, 12, padding=1).reach is None
    assert score_statistics(random_mask(8, 6, 1, 1), 12).reach is None


def numbers(found: ScoreStatistics) -> dict[str, object]:
    return {
        "zero": found.zero_scores,
        "reach": found.reach,
        "effective": found.effective_candidates,
        "overlap": found.overlap,
        **vars(found.ties),
        **vars(found.explained),
    }


@given(st.integers(0, 10_000), st.sampled_from(["kernel", "layer"]))
@settings(max_examples=20)
def test_the_order_of_channels_changes_nothing(seed: int, graph: str) -> None:
    mask = random_mask(4, 5, 3, 3, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    out, into = torch.randperm(4, generator=draw), torch.randperm(5, generator=draw)
    options = {"padding": 1, "graph": graph, "versus": ("ch2_l3n", "kernel")}
    one, other = score_statistics(mask, 6, **options), score_statistics(mask[out][:, into], 6, **options)
    assert numbers(other) == pytest.approx(numbers(one), abs=1e-5)
    torch.testing.assert_close(other.means.position, one.means.position)
    torch.testing.assert_close(other.means.output_channel, one.means.output_channel[out])
    torch.testing.assert_close(other.means.slice, one.means.slice[out][:, into], equal_nan=True)


def test_a_transposed_layer_has_its_output_channels_second() -> None:
    mask = random_mask(6, 4, 3, 3)
    found = score_statistics(mask, 5, stride=2, padding=1, transposed=True, output_padding=1)
    assert (len(found.means.output_channel), len(found.means.input_channel)) == (4, 6)
    assert found.means.slice.shape == (4, 6)


def test_a_layer_without_any_score_samples_like_set() -> None:
    found = score_statistics((torch.arange(6) < 2).expand(4, 6)[:, :, None, None], 8)
    assert (found.zero_scores, found.spread, found.effective_candidates) == (1, None, 1)
    assert (found.ties.at_cut, found.ties.drawn, found.ties.unscored) == (1, 1, 1)
    assert found.explained.both is None


def test_exact_scores_are_those_of_any_number_of_threads() -> None:
    mask = random_mask(6, 5, 3, 3)
    some, exact = (score_statistics(mask, 8, padding=1, exact=exact) for exact in (False, True))
    assert exact.zero_scores == some.zero_scores
    assert exact.explained.occupancy == pytest.approx(some.explained.occupancy)


def test_a_linear_layer() -> None:
    found = score_statistics(random_mask(20, 30), (), graph="layer", predictor="ch3_l3p")
    assert found.means.position.shape == ()
    assert found.zero_scores < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zeta": 0.0}, r"zeta=0.0: accepted is a number above 0 and at most 1"),
        ({"zeta": 1.5}, r"zeta=1.5"),
        ({"zeta": math.nan}, r"zeta=nan"),
        ({"tau": 0}, r"tau=0: accepted is a finite number above 0"),
        ({"tau": math.inf}, r"tau=inf"),
        ({"predictor": "ch4"}, r"unknown predictor 'ch4'"),
        ({"versus": ("ch3_l3n", "kernal")}, r"unknown graph 'kernal'"),
    ],
)
def test_what_a_layer_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        score_statistics(random_mask(4, 4, 3, 3), 8, **options)


def test_a_mask_without_candidates_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"mask of shape \[2, 2\] has no disabled position"):
        score_statistics(torch.ones(2, 2, dtype=torch.bool), ())


# A model


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.up(self.norm(self.first(images))).mean((2, 3)))


def test_layers_of_a_model_are_seen_as_they_are_called() -> None:
    model = Mixed()
    model.norm.eval()
    masks = {f"{name}.weight": random_mask(*getattr(model, name).weight.shape) for name in ("head", "up", "first")}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = masked_layers(model, masks, torch.randn(2, 3, 16, 12))
    assert [*layers] == ["first.weight", "up.weight", "head.weight"]
    assert [layer.input_size for layer in layers.values()] == [(16, 12), (8, 6), ()]
    assert layers["up.weight"].arguments["transposed"]
    assert (model.training, model.norm.training, model.first.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_are_called_by_keyword_are_seen() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(input=self.first(input=images).mean((2, 3)))

    model = ByKeyword()
    masks = {name: random_mask(*model.get_parameter(name).shape) for name in ("first.weight", "head.weight")}
    layers = masked_layers(model, masks, torch.zeros(1, 3, 9, 7))
    assert [layer.input_size for layer in layers.values()] == [(9, 7), ()]


def test_explain_of_a_topology_scores_as_it_does() -> None:
    model = Mixed()
    topology = sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), layers=["first"], sparsity=0.8)
    found = explain(model, topology.masks, torch.zeros(1, 3, 16, 16), graph="layer", zeta=0.5)["first.weight"]
    alone = score_statistics(topology.masks["first.weight"], 16, stride=2, padding=1, graph="layer", zeta=0.5)
    assert numbers(found) == numbers(alone)


def test_explain_goes_by_the_names_of_the_model_whatever_wraps_it() -> None:
    model, images = Mixed(), torch.zeros(1, 3, 16, 16)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = sparsify(compiled, optimizer, layers=["*first"], sparsity=0.8)
    assert list(topology.masks) == ["_orig_mod.first.weight"]
    assert list(explain(model, topology.masks, images)) == ["first.weight"]
    alone = {"first.weight": topology.masks["_orig_mod.first.weight"]}
    assert list(explain(compiled, alone, images)) == ["_orig_mod.first.weight"]


def test_what_a_model_refuses() -> None:
    model, images = Mixed(), torch.zeros(1, 3, 8, 8)
    for name, shape, message in (
        ("firts.weight", (8, 3, 3, 3), "unknown layer 'firts.weight': did you mean 'first.weight'"),
        ("first.weight", (8, 3, 5, 5), r"layer first.weight: the mask has shape \[8, 3, 5, 5\]; accepted is \[8, 3, 3"),
        ("unused.weight", (3, 3, 1, 1), "layer unused.weight: the model does not call it"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            explain(model, {name: random_mask(*shape)}, images)
    with pytest.raises(ConfigurationError, match=r"layer first: .*path-based"):
        explain(model, {"first.weight": random_mask(8, 3, 3, 3)}, images, predictor="ch3_l3p", graph="layer")
    assert explain(model, {"first.weight": torch.ones(8, 3, 3, 3, dtype=torch.bool)}, images) == {}


# The report


def test_columns_stand_below_their_headings_whatever_the_names() -> None:
    found = {name: score_statistics(random_mask(6, 5, 3, 3), 8) for name in ("a.weight", "features.13.shortcut.weight")}
    header, *rows = report(found).splitlines()[2:5]
    assert [row.index("6x5x3x3") for row in rows] == [header.index("shape") - 2] * 2
    assert {len(row) for row in rows} == {len(header)}
    assert len(report({"features.13": found["a.weight"]}).splitlines()[2]) == 100


def test_sentences_say_what_the_numbers_mean() -> None:
    even = score_statistics(random_mask(64, 64, 3, 3), 8, padding=1, graph="layer")
    rich = score_statistics(random_mask(32, 32, 3, 3), 8, padding=1)
    none = score_statistics(random_mask(8, 8, 1, 1), 8)
    assert sentences({"a": even})[0].startswith("On the layer graph CHTs samples a nearly like SET (effective cand")
    assert sentences({"a": even, "b": even})[0].startswith("On the layer graph CHTs samples all layers nearly")
    few = score_statistics(random_mask(32, 32, 3, 3, density=0.05), 8, padding=1)
    told = sentences({"rich": rich, "none": none, "few": few})
    assert [line for line in told if "most candidates have score 0 in few (a share of 0." in line]
    assert [line for line in told if "every score is 0 in none:" in line]
    assert [line for line in told if "fewer than half of the free positions beside links in few (a share of 0." in line]
    assert [line for line in told if "how many links a slice has in rich (R² 0.7" in line]
    assert max(map(len, report({f"features.{i}.weight": even for i in range(9)}).splitlines())) <= 100


# The command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny run that went by another predictor and graph than the defaults."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    tiny = ["--width", "0.0625", "--head", "16", "--batch-size", "1024", "--threads", "1", "--epochs", "1"]
    assert main(["train", *tiny, "--predictor", "ch2_l3n", "--graph", "layer", "--out", str(folder)]) == 0
    return folder


def copy_of(run: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in run.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_options_are_those_that_are_promised(chtconv: Run) -> None:
    code, out, _ = chtconv("explain", "--help")
    assert code == 0
    assert {word.strip("[],") for word in out.split() if word.lstrip("[").startswith("--")} == set(OPTIONS.split())


def test_help_loads_no_matplotlib() -> None:
    code = (
        "import sys, contextlib\nfrom chtconv.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['explain', '--help'])\nprint('matplotlib' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_run_is_explained_by_what_it_went_by(chtconv: Run, finished: Path) -> None:
    code, out, error = chtconv("explain", str(finished))
    assert (code, error) == (0, "")
    assert out.startswith("ch2_l3n on the layer graph\n")
    summary = json.loads((finished / "summary.json").read_text())
    rows = [line.split() for line in out.splitlines() if line.startswith("features.")]
    names = [name.removesuffix(".weight") for name in summary["layers"]]
    assert [row[0] for row in rows[: len(names)]] == names
    assert [int(row[2].replace(",", "")) for row in rows[: len(names)]] == [
        row["links"] for row in summary["layers"].values()
    ]
    assert "nearly like SET (effective candidates 0.9" in " ".join(out.split())


def test_a_run_of_a_control_is_explained_by_what_it_counted(chtconv: Run, finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"method": "occupancy"}))
    assert chtconv("explain", str(run), "--layer", "features.40")[1].startswith("occupancy on the layer graph\n")
    words = ("explain", str(run), "--layer", "features.40", "--predictor", "cn_l3n")
    assert chtconv(*words)[1].startswith("cn_l3n on the layer graph\n")


def test_what_a_run_mixed_into_its_scores_is_said(chtconv: Run, finished: Path, tmp_path: Path) -> None:
    def last_line(smoothing: float | None) -> str:
        run = copy_of(finished, tmp_path / f"run-{smoothing}")
        config = json.loads((run / "config.json").read_text()) | {"smoothing": smoothing}
        (run / "config.json").write_text(json.dumps(config))
        return chtconv("explain", str(run), "--layer", "features.40")[1].splitlines()[-1]

    assert last_line(0.25).startswith("The run dealt 25% of each kernel's scores out by the links of slices")
    assert last_line(None) == last_line(0.0)


def test_layers_of_a_run_see_the_sizes_that_training_sees(finished: Path) -> None:
    _, layers = layers_of_run(finished, [])
    assert [layer.input_size[0] for layer in layers.values()] == [32] * 2 + [16] * 2 + [8] * 3 + [4] * 3 + [2] * 3
    assert layers["features.0.weight"].mask.shape[1] in (1, 3)


def test_options_come_before_what_the_run_went_by(chtconv: Run, finished: Path) -> None:
    words = ["--layer", "features.4*", "features.0.weight", "--graph", "kernel", "--predictor", "ch3_l3n"]
    code, out, _ = chtconv("explain", str(finished), *words, "--zeta", "0.5", "--tau", "2")
    assert code == 0
    assert out.startswith("ch3_l3n on the kernel graph\n")
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("features.")]
    assert rows == ["features.0", "features.40"]
    mask = layers_of_run(finished, ["features.40"])[1]["features.40.weight"].mask
    found = score_statistics(mask, 2, padding=1, zeta=0.5, tau=2)
    row = next(line.split() for line in out.splitlines() if line.startswith("features.40"))
    assert found.reach is not None
    values = (found.zero_scores, found.reach, found.ties.at_cut, found.ties.drawn, found.effective_candidates)
    assert row[3:8] == [f"{value:.1%}" for value in values]


def test_a_picture_of_each_kind(chtconv: Run, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = chtconv("explain", str(finished), "--layer", "features.0", "features.14", "--out", "scores.png")
    assert (code, out.splitlines()[-1]) == (0, "picture: scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    for shape in ("6,4", "6,4,1,1", "6,4,5", "4,2,2,2,2"):
        size = ["--input-size", "6"] if shape.count(",") > 1 else []
        assert chtconv("explain", "--shape", shape, *size, "--sparsity", "0.6", "--out", "one.svg")[0] == 0
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()
    code, _, error = chtconv("explain", "--shape", "6,4", "--sparsity", "0.5", "--out", "nowhere/one.png")
    assert (code, "cannot write nowhere/one.png" in error) == (2, True)


def test_a_random_mask_without_a_run(chtconv: Run) -> None:
    words = ["explain", "--shape", "16,8,3,3", "--input-size", "9,7", "--padding", "1", "--sparsity", "0.75"]
    code, out, _ = chtconv(*words)
    assert code == 0
    assert out == chtconv(*words, "--seed", "0")[1] != chtconv(*words, "--seed", "1")[1]
    assert "16x8x3x3       288" in out
    assert chtconv(*words, "--groups", "2", "--stride", "2", "--dilation", "2")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "neither a run nor --shape was given: accepted are the folder of a run"),
        ("run --shape 4,4", "both a run and --shape were given"),
        ("run --sparsity 0.5", "--sparsity goes with --shape only"),
        ("run --input-size 8", "--input-size goes with --shape only"),
        ("--shape 4,4 --layer a", "--layer goes with the folder of a run only"),
        ("nowhere", "cannot read nowhere/config.json"),
        ("--shape 4", "--shape 4: accepted are output channels, input channels"),
        ("--shape 4,x", "--shape 4,x: accepted are whole numbers, at least 1, with commas between."),
        ("--shape 4,0", "--shape 4,0"),
        ("--shape 4,4,3,3", "--shape with kernel axes needs --input-size"),
        ("--shape 4,4,3,3 --input-size 8,8,8", "accepted are one number, or one for each of 2 axes"),
        ("--shape 4,4,3,3 --input-size 2", "layer the mask: a kernel of 3"),
        ("--shape 4,4 --sparsity 0.99", "layer --shape: at sparsity 0.99 a kernel of 4 positions would hold no link"),
        ("--shape 4,4 --sparsity 0", "no layer has a disabled position"),
        ("--shape 4,4 --sparsity 1", "sparsity=1.0: accepted is a number, at least 0 and below 1."),
        ("--shape 5,4 --sparsity 0.5 --groups 2", "groups=2 does not divide"),
        ("--shape 4,4 --zeta 0", "zeta=0.0: accepted is a number, above 0 and at most 1."),
        ("--shape 4,4 --tau inf", "tau=inf: accepted is a number, above 0."),
        ("--shape 4,4 --graph kernal", "unknown graph 'kernal': did you mean 'kernel'?"),
        ("--shape 4,4 --predictor ch3_l3", "unknown predictor 'ch3_l3': did you mean 'ch3_l3"),
        ("--shape 4,4 --predictr x", "unknown option '--predictr': did you mean '--predictor'?"),
        ("--shape 4,4 --out a.txt", "--out 'a.txt': accepted is a file that ends in .png, .pdf, .svg."),
    ],
)
def test_bad_input_is_answered_in_one_line_and_leaves_nothing(
    chtconv: Run, tmp_path: Path, words: str, message: str
) -> None:
    code, out, error = chtconv("explain", *words.split())
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert error.startswith("chtconv: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(chtconv: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, error = chtconv("explain", "--shape", "4,4", "--out", "a.png")
    assert (code, out, "pip install 'chtconv[plot]'" in error) == (2, "", True)


def test_runs_that_cannot_be_explained(chtconv: Run, finished: Path, tmp_path: Path) -> None:
    code, _, error = chtconv("explain", str(finished), "--layer", "feature.14")
    assert (code, "unknown layer 'feature.14': did you mean 'features.14'?" in error) == (2, True)
    run = copy_of(finished, tmp_path / "run")
    for content, message in (
        (b"not safetensors", "cannot read run/masks.safetensors"),
        (safetensors.torch.save({}), "run is a dense run: it has no masks"),
        (safetensors.torch.save({"features.0.weight": torch.ones(4, 3, 3, 3)}), "features.0.weight is torch.float32"),
        (
            safetensors.torch.save({"features.0.weight": torch.ones(9, 9, 3, 3, dtype=torch.bool)}),
            "layer features.0.weight: the mask has shape [9, 9, 3, 3]",
        ),
        (safetensors.torch.save({"other.weight": torch.ones(2, 2, dtype=torch.bool)}), "unknown layer 'other.weight'"),
    ):
        (run / "masks.safetensors").write_bytes(content)
        code, _, error = chtconv("explain", "run")
        assert (code, message in error) == (2, True), error
    (run / "masks.safetensors").unlink()
    assert "run holds no masks.safetensors: accepted is a complete run" in chtconv("explain", "run")[2]
    copy = copy_of(finished, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"")
    assert "cannot read features.0.weight in copy/model.safetensors" in chtconv("explain", "copy")[2]


def test_a_layer_without_room_is_left_out_by_name(chtconv: Run, finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path / "run")
    masks = safetensors.torch.load_file(run / "masks.safetensors")
    masks["features.0.weight"][:] = True
    (run / "masks.safetensors").write_bytes(safetensors.torch.save(masks))
    code, out, _ = chtconv("explain", "run")
    assert (code, "features.0 has no disabled position" in out) == (0, True)
