"""Algorithms 1 and 2: what the solver finds is what a line-by-line reading of the paper finds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

import pytest

from muxserve.placement.solver.equations import Member, equation_1, rates_at, throughput
from muxserve.placement.solver.paper import algorithm_1, candidates, paper
from muxserve.placement.solver.workload import Model, Workload
from tests.placement.solver.inputs import COSTS, random_workload, workload

Reference = tuple[float, list[tuple[int, list[str]]]]


def reference_candidates(model: Model, degree: int, usable: int) -> list[float]:
    """Algorithm 2 for one degree: the least share that suffices, as a list of one or none."""
    for share in sorted(COSTS.shares(model.model, degree)):
        served = throughput([Member(model, model.rate, share)], degree, usable, COSTS)
        if served is not None and served[0] >= model.rate * (1 - 1e-9):
            return [share]
    return []


def partitions(gpus: int) -> Iterator[tuple[int, ...]]:
    """Ways to write a number as an ordered sum of mesh sizes."""
    if gpus == 0:
        yield ()
    for size in (1, 2, 4, 8):
        if size <= gpus:
            for rest in partitions(gpus - size):
                yield (size, *rest)


def reference(workload: Workload) -> Reference:
    """Algorithm 1, one line after the other, over every ordered cut of every node."""
    usable = workload.nodes[0].usable_bytes

    def key(model: Model) -> float:
        return model.shape.parameters * model.rate * (model.prompt_tokens + model.output_tokens)

    models = sorted(workload.models, key=key, reverse=True)
    shares: dict[tuple[str, int], float] = {}
    for model in models:
        largest = max(node.gpus for node in workload.nodes)
        degrees = [d for d in COSTS.degrees(model.model, model.shape) if d <= largest]
        found = {d: reference_candidates(model, d, usable) for d in degrees}
        for degree in degrees:
            if found[degree]:
                shares[model.name, degree] = found[degree][0]
            elif not any(found.values()):
                shares[model.name, degree] = 1.0
    best: Reference = (-1.0, [])
    for cut in product(*(list(partitions(node.gpus)) for node in workload.nodes)):
        meshes: list[tuple[int, list[Member]]] = [(size, []) for sizes in cut for size in sizes]
        for model in models:
            gains = []
            for number, (size, members) in enumerate(meshes):
                if (model.name, size) not in shares:
                    continue
                member = Member(model, model.rate, shares[model.name, size])
                before = throughput(members, size, usable, COSTS)
                after = throughput([*members, member], size, usable, COSTS)
                if before is not None and after is not None:
                    gains.append((sum(after) - sum(before), -number, member))
            if gains:
                _, number, member = max(gains, key=lambda gain: gain[:2])
                meshes[-number][1].append(member)
        served = sum(sum(throughput(members, size, usable, COSTS) or [0]) for size, members in meshes)
        if served > best[0] + 1e-9:
            best = (served, [(size, [m.model.name for m in members]) for size, members in meshes])
    return best


@pytest.mark.parametrize("seed", range(12))
def test_algorithm_1_is_that_of_the_paper(seed: int) -> None:
    source = random.Random(seed)
    work = random_workload(source, source.randint(1, 5), source.choice((1, 2, 4)))
    served, units = algorithm_1(work, COSTS)
    expected, _ = reference(work)
    assert served == pytest.approx(expected)
    assert sum(
        sum(throughput(members, mesh.size, work.nodes[0].usable_bytes, COSTS) or [0])
        for mesh, members in units
    ) == pytest.approx(served)


def test_two_nodes_are_cut_as_one_would_by_hand() -> None:
    work = workload({"a": ("llama-30b", 9), "b": ("llama-7b", 4), "c": ("llama-13b", 3)}, nodes=2, gpus=2)
    assert algorithm_1(work, COSTS)[0] == pytest.approx(reference(work)[0])


def test_equation_3_is_what_it_says() -> None:
    work = workload({"a": ("llama-7b", 1000), "b": ("llama-13b", 0.5)})
    members = [Member(model, model.rate, 1.0) for model in work.models]
    served = rates_at(members, [64, 8], 1, COSTS)
    prefills = COSTS.prefill("llama-7b", 1, 1.0, 64, 100) + COSTS.prefill("llama-13b", 1, 1.0, 8, 100)
    assert served[0] == pytest.approx(64 / (prefills + 200 * COSTS.decode("llama-7b", 1, 1.0, 64, 200)))
    assert served[1] == 0.5


def test_a_unit_whose_weights_do_not_fit_serves_nothing() -> None:
    work = workload({"a": ("llama-30b", 1), "b": ("llama-13b", 1)})
    members = [Member(model, model.rate, 1.0) for model in work.models]
    assert throughput(members, 1, work.nodes[0].usable_bytes, COSTS) is None


def test_algorithm_2_takes_the_fewest_sms_that_suffice() -> None:
    work = workload({"cold": ("llama-7b", 0.5), "hot": ("llama-7b", 1e6)})
    usable = work.nodes[0].usable_bytes
    cold = candidates(work.models[0], (1, 2, 4), usable, COSTS)
    assert [c.degree for c in cold] == [1, 2, 4]
    assert {c.share for c in cold} == {0.3}
    hot = candidates(work.models[1], (1, 2, 4), usable, COSTS)
    assert [(c.degree, c.share) for c in hot] == [(1, 1.0), (2, 1.0), (4, 1.0)]


def test_no_model_is_in_two_units() -> None:
    work = random_workload(random.Random(3), 5, 4)
    names = [placed.name for unit in paper(work, COSTS).units for placed in unit.models]
    assert len(names) == len(set(names))


def test_the_sum_over_units_never_exceeds_the_rates() -> None:
    for seed in range(5):
        work = random_workload(random.Random(seed), 4, 4)
        assert equation_1(paper(work, COSTS), work, COSTS) <= work.rate + 1e-6
