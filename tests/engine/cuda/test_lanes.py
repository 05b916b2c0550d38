"""Lanes: shares as multiprocessors that two jobs do not have in common, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxserve.engine.cuda.driver import Driver, DriverError
from muxserve.engine.cuda.green import GreenContexts
from muxserve.engine.cuda.lanes import Lane, Partition, TimeSlices
from muxserve.engine.cuda.probe import open_partition, probe
from muxserve.engine.cuda.runtime import CudaRuntime, DeviceError
from muxserve.engine.shares import Found, detect
from tests.engine.cuda.fake_driver import FakeDriver, Sm


@pytest.fixture
def api() -> Iterator[FakeDriver]:
    """An H200's; at the end nothing is left of what was made on it."""
    fake = FakeDriver()
    yield fake
    fake.check()


@pytest.fixture
def driver(api: FakeDriver) -> Iterator[Driver]:
    found = Driver(api, 0)
    yield found
    found.close()
    found.close()


@pytest.fixture
def green(driver: Driver) -> Iterator[GreenContexts]:
    partition = GreenContexts(driver)
    yield partition
    partition.close()
    partition.close()


def sms_of(api: FakeDriver, lane: Lane) -> Sm:
    """Those of the green context that the lane's stream belongs to."""
    context = api.streams[lane.handle]
    assert context is not None
    return api.contexts[context]


def test_two_jobs_have_the_sms_of_their_shares_and_none_in_common(
    api: FakeDriver, green: GreenContexts
) -> None:
    expected = {
        (0.9, 0.1): (120, 12),
        (0.8, 0.2): (104, 28),
        (0.7, 0.3): (96, 36),
        (0.6, 0.4): (80, 52),
        (0.5, 0.5): (64, 68),
        (0.4, 0.6): (56, 76),
        (0.3, 0.7): (40, 92),
    }
    for shares, counts in expected.items():
        lanes = green.lanes(*shares)
        assert (lanes.prefill.sms, lanes.decode.sms) == counts
        first, rest = sms_of(api, lanes.prefill), sms_of(api, lanes.decode)
        assert (first.smCount, rest.smCount) == counts
        assert first.first + first.smCount <= rest.first
        assert rest.first + rest.smCount <= api.sms


def test_another_share_is_another_lane_and_makes_nothing(api: FakeDriver, green: GreenContexts) -> None:
    contexts, streams = dict(api.contexts), dict(api.streams)
    lanes = [green.lanes(share / 100, 1 - share / 100) for share in range(1, 100)]
    assert (api.contexts, api.streams) == (contexts, streams)
    assert len(contexts) == 14
    assert len({pair.prefill for pair in lanes}) == 7
    assert green.lanes(0.61, 0.39) == green.lanes(0.6, 0.4) == green.lanes(0.3, 0.2)
    assert green.lanes(0.05, 0.95) == green.lanes(0.3, 0.7), "the nearest that there is"


def test_a_lone_job_has_the_whole_device_and_no_green_context(api: FakeDriver, green: GreenContexts) -> None:
    prefill, decode = green.lanes(0.2, 0).prefill, green.lanes(0, 0.2).decode
    assert prefill.sms == decode.sms == 132
    assert api.streams[prefill.handle] is api.streams[decode.handle] is None
    assert prefill.handle != decode.handle, "else a decode job that comes along waits for the prefill job"


@pytest.mark.parametrize("kind", [GreenContexts, TimeSlices])
def test_decode_goes_first_where_both_wait(api: FakeDriver, driver: Driver, kind: type[TimeSlices]) -> None:
    partition: Partition = kind(driver)
    lanes = partition.lanes(0.5, 0.5)
    assert api.priorities[lanes.decode.handle] < api.priorities[lanes.prefill.handle]
    partition.close()


def test_time_slices_share_all_sms_whatever_the_shares(api: FakeDriver, driver: Driver) -> None:
    partition = TimeSlices(driver)
    assert partition.name == "none"
    assert partition.lanes(0.9, 0.1) == partition.lanes(0, 1)
    assert {lane.sms for lane in (partition.lanes(1, 0).prefill, partition.lanes(1, 0).decode)} == {132}
    for shares in ((-0.1, 0.5), (0.5, 1.1), (float("nan"), 1)):
        with pytest.raises(ValueError, match=r"share: .* is not in"):
            partition.lanes(*shares)
    partition.close()
    assert not api.streams


def test_a_jobs_work_on_its_new_lane_waits_for_that_on_its_old_one(
    api: FakeDriver, green: GreenContexts
) -> None:
    alone, shared = green.lanes(0, 1).decode, green.lanes(0.7, 0.3).decode
    green.order(alone, shared)
    green.order(shared, shared)
    assert api.waits == [(shared.handle, alone.handle)]


@given(
    sms=st.integers(16, 264),
    share=st.floats(0.01, 0.99),
    wanted=st.lists(st.floats(0.05, 0.95), min_size=1, max_size=9),
)
def test_on_any_device_two_lanes_never_have_more_than_it_has(
    sms: int, share: float, wanted: list[float]
) -> None:
    api = FakeDriver(sms=sms)
    driver = Driver(api, 0)
    green = GreenContexts(driver, wanted)
    lanes = green.lanes(share, 1 - share)
    assert min(lanes.prefill.sms, lanes.decode.sms) >= 8
    assert lanes.prefill.sms + lanes.decode.sms <= sms
    assert lanes.prefill.sms % 8 == 0
    green.close()
    driver.close()
    api.check()


def test_too_few_sms_for_two_lanes_are_refused() -> None:
    api = FakeDriver(sms=15)
    driver = Driver(api, 0)
    with pytest.raises(DeviceError, match="partition: 15 SMs are too few for two lanes of at least 8"):
        GreenContexts(driver)
    driver.close()
    api.check()


@pytest.mark.parametrize("most", range(14))
def test_a_context_that_cannot_be_made_takes_those_before_it_along(most: int) -> None:
    api = FakeDriver(most_contexts=most)
    driver = Driver(api, 0)
    with pytest.raises(DriverError, match="cuGreenCtxCreate: CUDA_ERROR_OUT_OF_MEMORY"):
        GreenContexts(driver)
    assert not api.contexts
    assert not api.streams
    driver.close()
    api.check()


def test_a_driver_of_cuda_12_does_not_say_what_it_rounds_to_but_the_documentation_does() -> None:
    class Old(FakeDriver):
        def _cuDeviceGetDevResource(self, device: int, kind: int) -> Any:
            class Raw:
                class sm:
                    smCount = 132

            return Raw

    resource = Driver(Old(version=12040), 0).sm_resource()
    assert (resource.sms, resource.minimum, resource.alignment) == (132, 8, 8)


@pytest.mark.parametrize(
    ("absent", "reason"),
    [("cuDeviceGetDevResource", "cuDeviceGetDevResource"), ("cuDevSmResourceSplitByCount", "not found")],
)
def test_a_driver_without_the_entry_points_is_one_without_green_contexts(absent: str, reason: str) -> None:
    api = FakeDriver(version=12020, absent=frozenset({absent}))
    found = probe(0, api)
    assert (found.driver_version, found.sms, found.lane_sms) == (12020, 132, 0)
    assert reason in found.missing
    assert detect("cuda", found).partition == "none"
    api.check()


def test_a_probe_finds_what_there_is_and_leaves_nothing() -> None:
    api = FakeDriver()
    found = probe(0, api, mps_program="sh")
    assert found == Found(driver_version=13000, sms=132, lane_sms=8, mps=True)
    api.check()
    assert "cuDeviceGet: CUDA_ERROR_INVALID_DEVICE" in probe(1, api, "absent-program").missing
    assert not probe(1, api, "absent-program").mps
    api.check()


def test_a_machine_without_bindings_or_a_driver_is_found_to_have_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    found = probe(0)
    assert (found.driver_version, found.lane_sms) == (0, 0)
    assert "install muxserve[cuda]" in found.missing


def test_what_is_chosen_is_opened_and_says_why(driver: Driver, api: FakeDriver) -> None:
    offer = detect("cuda", probe(0, api, "absent-program"))
    partition, reason = open_partition(offer, driver)
    assert (partition.name, partition.sms) == ("green_contexts", 132)
    assert reason.startswith("CUDA 13.0 driver, 132 SMs: a share is a green context's SMs")
    partition.close()
    offer = detect("cuda", probe(0, api, "sh"), "mps")
    partition, _ = open_partition(offer, driver)
    assert partition.name == "mps"
    partition.close()


def test_green_contexts_that_do_not_work_leave_time_slices_unless_they_were_asked_for() -> None:
    api = FakeDriver(most_contexts=3)
    driver = Driver(api, 0)
    partition, reason = open_partition(detect("cuda", probe(0, api)), driver)
    assert partition.name == "none"
    assert "but cuGreenCtxCreate: CUDA_ERROR_OUT_OF_MEMORY: jobs share all SMs by time slices" in reason
    partition.close()
    with pytest.raises(DeviceError, match="partition: green contexts cannot be made: cuGreenCtxCreate"):
        open_partition(detect("cuda", probe(0, api), "green_contexts"), driver)
    driver.close()
    api.check()


@pytest.fixture
def real(cuda: CudaRuntime) -> Iterator[Partition]:
    """Whatever this machine's GPU offers."""
    driver = Driver.load(0)
    partition, _ = open_partition(detect("cuda", probe(0)), driver)
    yield partition
    partition.close()
    driver.close()


WHERE = """
extern "C" __global__ void where(int* out) {
    unsigned sm;
    asm("mov.u32 %0, %%smid;" : "=r"(sm));
    long long start = clock64();
    while (clock64() - start < 100000) {}
    out[blockIdx.x] = sm;
}
"""


class Where:
    """Work that finds out from the hardware on which SMs it runs: blocks enough for all, some time each."""

    def __init__(self) -> None:
        import cupy

        self._kernel = cupy.RawKernel(WHERE, "where")
        self._out = cupy.full(4096, -1, dtype=cupy.int32)
        self._kernel((1,), (1024,), (self._out,))  # compiled and loaded before anything is captured
        cupy.cuda.Device().synchronize()

    def put(self) -> None:
        """On CuPy's current stream."""
        self._kernel((4096,), (1024,), (self._out,))

    def seen(self) -> set[int]:
        """Once that has ended."""
        return set(self._out.get().tolist())


@pytest.mark.gpu
def test_on_a_gpu_each_lane_runs_on_its_own_sms(real: Partition) -> None:
    import cupy

    where = Where()
    for share in (0.9, 0.5, 0.3):
        used = []
        lanes = real.lanes(share, 1 - share)
        for lane in (lanes.prefill, lanes.decode):
            with cupy.cuda.Stream.from_external(lane):
                where.put()
            lane.stream.synchronize()
            used.append(where.seen())
            assert len(used[-1]) <= lane.sms
        if real.name == "green_contexts":
            assert not used[0] & used[1]


@pytest.mark.gpu
def test_on_a_gpu_a_graph_stays_on_the_sms_of_its_capture(real: Partition) -> None:
    import cupy

    where, lane, alone = Where(), real.lanes(0.5, 0.5).decode, real.lanes(0, 1).decode
    with cupy.cuda.Stream.from_external(lane) as stream:
        stream.begin_capture()
        where.put()
        graph = stream.end_capture()
    with cupy.cuda.Stream.from_external(alone) as stream:
        graph.launch()
        stream.synchronize()
    assert len(where.seen()) <= lane.sms


@pytest.mark.gpu
def test_on_a_gpu_order_holds_between_lanes(real: Partition) -> None:
    import torch

    first, then = real.lanes(0.5, 0.5).prefill, real.lanes(0, 1).decode
    data = torch.zeros(1 << 26, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(first.stream):
        for _ in range(20):
            data += 1
    real.order(first, then)
    with torch.cuda.stream(then.stream):
        data *= 2
    then.stream.synchronize()
    assert data.min().item() == data.max().item() == 40
