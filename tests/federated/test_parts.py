"""Fleets, budgets, frontiers, selection, data and narrow models, each on its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphplan.device import Device
from graphplan.errors import BudgetError, InfeasibleBudget
from graphplan.federated import DEFAULT_FLEET, METHODS, FederatedError, Frontier, FrontierCache, RunConfig, read_fleet
from graphplan.federated.budget import predict, read_budget
from graphplan.federated.data import load, partition
from graphplan.federated.fleet import draw
from graphplan.federated.plans import Execution, Planner
from graphplan.federated.selection import Candidate, MemoryAwareUcb, Oort
from graphplan.federated.shrink import shrink
from graphplan.federated.task import batches, task_of
from models_zoo import MODELS


@pytest.fixture(scope="module")
def frontier(device: str) -> Frontier:
    config = RunConfig(model="models_zoo:cnn", points=6, time_limit=300.0)
    return Planner(task_of(config), Execution(), config, {"": Device.load(device)}).frontier("")


# -- fleets -----------------------------------------------------------------------------------------------------


def test_members_follow_the_shares_and_the_seed() -> None:
    classes = read_fleet(DEFAULT_FLEET)
    members = draw(classes, 100, 7)
    assert [sum(m.of == c for m in members) for c in classes] == [40, 40, 20]
    assert members == draw(classes, 100, 7) != draw(classes, 100, 8)
    for m in members:
        low, high = m.of.memory
        assert 1000 * low <= m.budget_bytes(1000, 7, 3, 1) + 1 <= 1000 * high + 1


def test_a_class_with_wobble_loses_at_most_that_share() -> None:
    (calm,) = read_fleet(DEFAULT_FLEET.split('[[class]]\nname = "middle"')[0])
    wobbly = replace(draw((calm,), 1, 0)[0], of=replace(calm, wobble=0.5))
    still = replace(wobbly, of=calm).budget_bytes(10**6, 0, 0, 1)
    seen = [wobbly.budget_bytes(10**6, 0, 0, r) for r in range(50)]
    assert len(set(seen)) > 40
    assert all(still // 2 <= b <= still for b in seen)


def test_the_clock_counts_both_links_and_the_speed() -> None:
    member = draw(read_fleet(DEFAULT_FLEET), 5, 0)[0]
    of = replace(member.of, speed=0.5, uplink_mbps=8.0, downlink_mbps=4.0)
    assert replace(member, of=of).seconds(10, 200_000_000, 1_000_000, 2_000_000) == pytest.approx(2 + 2 + 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("share = 0.4", "shares = 0.4"), "unknown keys"),
        (("share = 0.4", ""), "missing keys"),
        (("[0.2, 0.6]", "[0.6, 0.2]"), "write \\[low, high\\]"),
        (("[0.2, 0.6]", '["64 parsecs", "1GB"]'), "unknown unit"),
        (("speed = 0.25", "speed = 0"), "must be positive"),
        (("[[class]]", "[class"), "not TOML"),
    ],
)
def test_a_fleet_that_cannot_be_meant_is_refused(change: tuple[str, str], said: str) -> None:
    with pytest.raises(FederatedError, match=said):
        read_fleet(DEFAULT_FLEET.replace(*change))


# -- budgets ----------------------------------------------------------------------------------------------------


def test_a_budget_comes_from_the_file_else_the_config_else_free_memory(tmp_path: Path) -> None:
    file = tmp_path / "budget"
    file.write_text("3MiB\n")
    assert read_budget({"memory-budget-file": str(file), "memory-budget": "1MiB"}) == (3 << 20, "file")
    assert read_budget({"memory-budget": "1MiB"}) == (1 << 20, "node config")
    assert read_budget({"memory-budget": 12345}) == (12345, "node config")
    free, source = read_budget({})
    assert free > 1 << 20
    assert source == "free memory"
    for wrong in ({"memory-budget": "lots"}, {"memory-budget": "-1MiB"}, {"memory-budget-file": str(tmp_path / "no")}):
        with pytest.raises(BudgetError):
            read_budget(wrong)


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=40))
def test_the_prediction_is_careful(observed: list[int]) -> None:
    found = predict(observed)
    assert min(observed[-8:]) <= found <= observed[-1]


# -- the frontier -----------------------------------------------------------------------------------------------


@given(share=st.floats(0.01, 2.0))
def test_a_frontier_answers_with_the_fastest_plan_that_fits(share: float, frontier: Frontier) -> None:
    budget = int(share * frontier.peaks[-1])
    fitting = [p for p in frontier.plans if p.peak_bytes <= budget]
    assert frontier.answers(np.array([budget]))[0] == frontier.index(budget) == len(fitting) - 1
    if not fitting:
        with pytest.raises(InfeasibleBudget) as caught:
            frontier.at(budget)
        assert caught.value.minimum_bytes == frontier.peaks[0]
        assert frontier.below(budget, 3) == ()
        return
    assert frontier.at(budget) is min(fitting, key=lambda p: p.cost_ns)
    spares = frontier.below(budget, 3)
    assert spares[0] is frontier.at(budget)
    assert [p.peak_bytes for p in spares] == sorted({p.peak_bytes for p in spares}, reverse=True)


def test_a_frontier_out_of_order_is_refused(frontier: Frontier) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Frontier(frontier.plans[::-1])


def test_the_cache_solves_each_class_once(frontier: Frontier) -> None:
    made: list[object] = []

    def make(key: object) -> Frontier:
        made.append(key)
        return frontier

    cache = FrontierCache(make)
    for key in "aab":
        assert all(cache.get(key).at(b).peak_bytes == b for b in frontier.peaks)
    assert made == ["a", "b"]


# -- selection --------------------------------------------------------------------------------------------------


def _candidates(count: int) -> list[Candidate]:
    return [
        Candidate(i, 10 + i, tuple(10 if c == i % 5 else 0 for c in range(5)), 0.5 + i / 100, 1.0 + i % 7, 1.0)
        for i in range(count)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_every_selection_is_seeded_and_asks_each_client_once(name: str) -> None:
    pool = _candidates(20)
    for count in (1, 5, 20, 30):
        one, same = METHODS[name].selector(3), METHODS[name].selector(3)
        for server_round in range(1, 4):
            chosen = one.choose(server_round, pool, count)
            assert chosen == same.choose(server_round, pool, count)
            assert len(chosen) == len(set(chosen)) == min(count, 20)
            for client in chosen:
                one.observe(server_round, client, 1.0 + client)
                same.observe(server_round, client, 1.0 + client)
    assert METHODS[name].selector(3).choose(1, [], 4) == []


def test_memory_aware_selection_covers_the_classes_and_comes_round_to_everyone() -> None:
    pool, selector = _candidates(20), MemoryAwareUcb(0)
    met: set[int] = set()
    for server_round in range(1, 9):
        chosen = selector.choose(server_round, pool, 5)
        assert {i % 5 for i in chosen} == set(range(5))  # one client of each class
        met.update(chosen)
        for i in chosen:
            selector.observe(server_round, i, 1.0)
    assert met == set(range(20))


def test_small_memory_costs_utility_and_does_not_exclude() -> None:
    labels = (5, 5)
    pool = [Candidate(i, 10, labels, m, 1.0, 1.0) for i, m in enumerate((0.3, 1.0))]
    selector = MemoryAwareUcb(0)
    for i in (0, 1):
        selector.observe(1, i, 1.0)
    assert selector.choose(2, pool, 1) == [1]
    assert sorted(selector.choose(2, pool, 2)) == [0, 1]


def test_oort_prefers_high_loss_and_avoids_stragglers() -> None:
    pool = [Candidate(i, 10, (10,), 1.0, 100.0 if i == 3 else 1.0, 1.0) for i in range(6)]
    selector = Oort(0)
    for i in range(6):
        selector.observe(1, i, 9.0 if i in (2, 3) else 1.0)
    assert selector.choose(2, pool, 1) == [2]


# -- data and models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.1", "pathological:2"])
def test_partitions_split_every_example_once(spec: str) -> None:
    labels = load("digits").labels
    shares = partition(labels, spec, 10, 3)
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(len(labels)))
    assert all(torch.equal(a, b) for a, b in zip(shares, partition(labels, spec, 10, 3), strict=True))
    classes = [len(labels[s].unique()) for s in shares]
    assert (max(classes) <= 2) == (spec == "pathological:2")


def test_batches_have_one_shape_and_see_everything() -> None:
    share = load("digits").take(torch.arange(21))
    found = list(batches(share, 8, 2, "s"))
    assert [tuple(labels.shape) for _, labels in found] == [(8,)] * 6
    first = torch.cat([images for images, _ in found[:3]])[:21]
    assert torch.equal(first.flatten(1).sort(dim=0).values, share.images.flatten(1).sort(dim=0).values)


def test_synthetic_data_says_so() -> None:
    assert load("synthetic").synthetic
    assert not load("digits").synthetic
    assert tuple(load("synthetic").images.shape[1:]) == (3, 32, 32)


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet18", "mobilenet_v2", "vgg16_bn"])
@pytest.mark.parametrize("ratio", [0.5, 0.1875])
def test_narrow_models_keep_their_interface(name: str, ratio: float) -> None:
    entry = MODELS[name]
    model, inputs = entry.build_small(), entry.example_small(batch=2).inputs
    narrow = shrink(model, ratio, inputs)
    assert narrow(*inputs).shape == model(*inputs).shape
    count, narrow_count = (sum(p.numel() for p in m.parameters()) for m in (model, narrow))
    assert narrow_count < 0.75 * count * ratio**0.5
    entry.loss(narrow(*inputs), entry.example_small(batch=2).targets).backward()
