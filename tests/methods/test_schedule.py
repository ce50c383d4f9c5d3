"""When evolutions come, how much they exchange, and how the density gets from its first to its last value."""

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import FROM, sparse, train, way

import chtconv
from chtconv.errors import ChtconvWarning, ConfigurationError
from chtconv.methods.schedule import DECAYS, DENSITIES, Schedule, density_between

PROGRESS = st.floats(0, 1)


@given(zeta=st.floats(0.01, 1), stop=st.integers(1, 1000), step=st.integers(0, 1000))
def test_zeta_is_constant_or_falls_along_a_cosine_or_a_line_to_stop(zeta, stop, step):
    share = min(step / stop, 1)
    assert Schedule(zeta, "constant", 1, stop).zeta_at(step) == zeta
    assert Schedule(zeta, "linear", 1, stop).zeta_at(step) == pytest.approx(zeta * (1 - share))
    assert Schedule(zeta, "cosine", 1, stop).zeta_at(step) == pytest.approx(zeta * math.cos(math.pi * share / 2) ** 2)


@given(one=st.floats(0, 1.5), other=st.floats(0, 1.5))
def test_every_schedule_is_monotone_and_hits_both_ends(one, other):
    low, high = sorted((one, other))
    for decay in DECAYS.values():
        assert 1 >= decay(low) >= decay(high) >= 0
        assert decay(0) == 1
    for rise in DENSITIES.values():
        assert 0 <= rise(low) <= rise(high) <= 1
        assert rise(1) == rise(1.5) == 1
    assert DENSITIES["cubic"](0) == DENSITIES["sigmoid"](0) == 0
    assert DECAYS["cosine"](1) == DECAYS["linear"](1) == 0


@given(progress=PROGRESS)
def test_densities_go_by_their_formulas(progress):
    assert DENSITIES["cubic"](progress) == pytest.approx(way("gmp", progress))
    assert DENSITIES["sigmoid"](progress) == pytest.approx(way("chtss", progress))
    assert DENSITIES["sigmoid"](progress) == pytest.approx(1 - DENSITIES["sigmoid"](1 - progress))
    assert DENSITIES["constant"](progress) == 1


@given(interval=st.integers(1, 30), stop=st.integers(0, 200))
def test_progress_counts_evolutions_and_the_last_one_has_all_of_it(interval, stop):
    """And never leaves 0 to 1 where somebody evolves by hand at another time."""
    schedule = Schedule(0.3, "constant", interval, stop)
    steps = [step for step in range(1, stop + 50) if schedule.evolves_at(step)]
    assert steps == [step for step in range(1, stop) if step % interval == 0]
    for index, step in enumerate(steps, start=1):
        assert schedule.progress(step) == pytest.approx(index / len(steps))
    if steps:
        assert schedule.progress(steps[-1]) == 1
    assert all(0 <= schedule.progress(step) <= 1 for step in range(stop + 50))


def test_an_end_before_the_first_step_is_over():
    for decay, left in (("constant", 0.3), ("cosine", 0.0), ("linear", 0.0)):
        for stop in (0, 1):
            assert Schedule(0.3, decay, 100, stop).zeta_at(500) == pytest.approx(left, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "mest"}, "zeta stays"),
        ({"method": "set", "overrides": {"3": {"method": "mest"}}}, "layer 3: zeta stays"),
        ({"method": chtconv.method("set", removal="soft_magnitude")}, "delta of its removal stays"),
    ],
)
def test_what_needs_an_end_and_has_none_is_warned_of(options, what):
    with pytest.warns(ChtconvWarning, match=f"{what} what it is, because evolution has no end") as warned:
        sparse(**options)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse(**options, total_steps=1000)
        if "zeta" in what:
            sparse(**options, zeta_schedule="constant")


@pytest.mark.parametrize("length", [{"total_steps": 90}, {"stop": 100}, {"total_steps": 133}, {"stop": 1}])
def test_an_end_before_the_first_evolution_is_warned_of(length):
    with pytest.warns(ChtconvWarning, match="layers 0, 3, 5: no evolution falls between the interval, 100, and stop"):
        model, optimizer, topology = sparse(**length)
    train(model, optimizer, 3)
    assert not any(topology.schedule.evolves_at(step) for step in range(1, 1000))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no evolution falls")
        # None is wanted, or there are some.
        for options in ({"stop": 0}, {"method": "static"} | length, {"stop": 101}, {"interval": 1, "total_steps": 3}):
            sparse(**options)


def test_without_an_end_there_is_no_progress():
    schedule = Schedule(0.3, "constant", 10, None)
    assert [schedule.progress(step) for step in (0, 10, 10**9)] == [0, 0, 0]
    assert schedule.evolves_at(10**9)
    assert not schedule.evolves_at(10**9 + 1)


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
    assert sparse(total_steps=1000, stop=400, zeta_schedule="constant")[2].schedule == Schedule(
        0.3, "constant", 100, 400
    )


def test_methods_bring_their_own_zeta_schedule_where_the_end_is_known():
    assert sparse(method="mest", total_steps=1000)[2].schedule.decay == "linear"
    assert sparse(method="mest")[2].schedule.decay == "constant"
    assert sparse(method="mest", stop=9, zeta_schedule="cosine")[2].schedule.decay == "cosine"
    # That of the method of all layers, whatever single ones are overridden with.
    assert sparse(method="mest", stop=9, overrides={"0": {"method": "set"}})[2].schedule.decay == "linear"
    assert sparse(method="set", stop=9, overrides={"0": {"method": "mest"}})[2].schedule.decay == "cosine"


@pytest.mark.parametrize("allocation", ["kernel", "layer"])
@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_what_is_removed_follows_zeta(decay, allocation):
    model, optimizer, topology = sparse(
        interval=1, stop=8, zeta=0.8, zeta_schedule=decay, method="set", sparsity=0.5, allocation=allocation
    )
    train(model, optimizer, 8)
    removed = [row["removed"] for row in topology.records if row["layer"] == "3.weight"]
    assert len(removed) == 7
    # 8 kernels of 18 links: zeta * 144 removed, give or take one a kernel.
    for step, count in enumerate(removed, start=1):
        share = {"constant": 1, "linear": 1 - step / 8, "cosine": (1 + math.cos(math.pi * step / 8)) / 2}[decay]
        assert abs(count - 0.8 * share * 144) <= (8 if allocation == "kernel" else 1)


@pytest.mark.parametrize("method", FROM)
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_the_last_evolution_before_stop_reaches_the_last_density_exactly(method, sparsity):
    """From above and from below, and not before; afterwards the number of links stays."""
    start = {"initial_sparsity": 0.2} if method == "gmp" and sparsity == 0.3 else {}
    model, optimizer, topology = sparse(
        method=method, sparsity=sparsity, interval=3, stop=11, allocation="layer", **start
    )
    links = [topology.stats()["layers"]["0.weight"]["links"]]
    train(model, optimizer, 14, after=lambda: links.append(topology.stats()["layers"]["0.weight"]["links"]))
    last = round((1 - sparsity) * 8 * 27)
    assert links[9:] == [last] * 6
    assert links[8] != last
    assert links == sorted(links, reverse=links[0] > last)
    train(model, optimizer, 3)
    topology.load_state_dict(topology.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zeta": 0}, "zeta=0: accepted are numbers above 0"),
        ({"zeta": 1.01}, r"zeta=1\.01"),
        ({"zeta": float("nan")}, "zeta=nan"),
        ({"decay": "sine"}, "unknown zeta schedule 'sine'"),
        ({"decay": "linear"}, "'linear' needs an end: give stop or total_steps"),
        ({"interval": 0}, "interval=0: accepted is a whole number"),
        ({"stop": 2.0}, r"stop=2\.0: accepted is a whole number"),
        ({"stop": -1}, "stop=-1"),
    ],
)
def test_schedules_that_cannot_be(values, message):
    with pytest.raises(ConfigurationError, match=message):
        Schedule(**values)


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan"), None, "all"])
def test_an_own_course_has_to_give_shares(share, monkeypatch):
    monkeypatch.setitem(DECAYS, "mine", lambda progress: share)
    with pytest.raises(ConfigurationError, match=f"zeta schedule 'mine' gave {share!r} at progress 0.5: accepted are"):
        Schedule(decay="mine", interval=10, stop=100).zeta_at(50)
    monkeypatch.setitem(DENSITIES, "mine", lambda progress: share)
    with pytest.raises(ConfigurationError, match=f"density schedule 'mine' gave {share!r} at progress 0.5: accepted"):
        density_between(0.5, 0.1, "mine", 0.5)


def test_links_follow_an_own_course(monkeypatch):
    monkeypatch.setitem(DENSITIES, "mine", lambda progress: float(progress >= 0.5))
    assert [density_between(0.5, 0.25, "mine", progress) for progress in (0, 0.49, 0.5, 1)] == [0.5, 0.5, 0.25, 0.25]
