"""Compute shares: which partition a device gets, and what a share means on it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxserve.engine.shares import Found, decode_room, detect, split_cores, split_sms

H200 = Found(driver_version=13000, sms=132, lane_sms=8, mps=True)


def test_a_lone_job_has_all_cores_and_two_have_them_by_their_shares() -> None:
    assert split_cores(8, 0.0, 0.0) == (0, 0)
    assert split_cores(8, 0.3, 0.0) == (8, 0)
    assert split_cores(8, 0.0, 0.3) == (0, 8)
    assert split_cores(8, 0.5, 0.5) == (4, 4)
    assert split_cores(8, 0.25, 0.75) == (2, 6)
    assert split_cores(2, 0.5, 1.0) == (1, 1)


def test_decode_jobs_have_equal_parts_of_what_decode_has() -> None:
    assert split_cores(8, 0.0, 0.5, 2) == (0, 4)
    assert split_cores(8, 0.5, 0.5, 2) == (4, 2)
    assert split_cores(8, 0.5, 0.5, 3) == (4, 1)
    assert split_cores(2, 0.5, 0.5, 2) == (1, 1)


def test_no_more_decode_jobs_run_than_cores_are_left_beside_a_prefill_job() -> None:
    assert decode_room(2, 2, 0.0) == 2
    assert decode_room(2, 2, 0.5) == 1
    assert decode_room(8, 2, 0.5) == 2
    assert decode_room(8, 8, 0.75) == 2
    assert decode_room(8, 8, 1.0) == 4
    assert decode_room(1, 1, 0.5) == 1
    assert decode_room(1, 4, 0.0) == 4


@given(cores=st.integers(2, 256), prefill=st.floats(0.01, 1), decode=st.floats(0.01, 1))
def test_two_jobs_share_every_core_and_none_goes_without(cores: int, prefill: float, decode: float) -> None:
    threads = split_cores(cores, prefill, decode)
    assert min(threads) >= 1
    assert sum(threads) == cores


def test_one_core_is_one_thread_each() -> None:
    assert split_cores(1, 0.5, 0.5) == (1, 1)


@given(
    total=st.integers(1, 264),
    share=st.floats(0, 1),
    minimum=st.sampled_from([2, 4, 8]),
    alignment=st.sampled_from([2, 8]),
)
def test_sms_are_split_as_the_device_can(total: int, share: float, minimum: int, alignment: int) -> None:
    try:
        first = split_sms(total, share, minimum, alignment)
    except ValueError:
        assert total < minimum + -(-minimum // alignment) * alignment
        return
    assert first % alignment == 0
    assert minimum <= first <= total - minimum
    least, most = -(-minimum // alignment) * alignment, (total - minimum) // alignment * alignment
    if least <= total * share <= most:
        assert abs(first - total * share) <= alignment / 2, "as near as can be"


def test_a_cpu_has_threads() -> None:
    assert detect("cpu").partition == "threads"
    with pytest.raises(ValueError, match="partition: mps is for a GPU"):
        detect("cpu", wanted="mps")
    with pytest.raises(ValueError, match="device"):
        detect("tpu")


def test_a_gpu_gets_green_contexts_where_there_are_any() -> None:
    offer = detect("cuda:1", H200)
    assert (offer.partition, offer.unused, offer.asked) == ("green_contexts", ("mps",), False)
    assert offer.reason == "CUDA 13.0 driver, 132 SMs: a share is a green context's SMs; not used: mps"


def test_else_time_slices_and_the_reason() -> None:
    for found, reason in (
        (Found(driver_version=12020, sms=132), "no green_contexts: the driver is older than CUDA 12.4"),
        (Found(driver_version=13000, sms=14, lane_sms=8), "14 SMs are too few for two lanes of 8"),
        (Found(missing="device: no bindings"), "no green_contexts: device: no bindings"),
        (Found(driver_version=13000, sms=132), "the driver makes none"),
    ):
        offer = detect("cuda", found)
        assert (offer.partition, offer.unused) == ("none", ())
        assert reason in offer.reason
        assert "no mps: nvidia-cuda-mps-control is not installed" in offer.reason


def test_a_wish_is_met_or_refused_with_the_reason() -> None:
    offer = detect("cuda", H200, "mps")
    assert (offer.partition, offer.unused, offer.asked) == ("mps", ("green_contexts",), True)
    assert "as asked for" in offer.reason
    assert detect("cuda", H200, "none").unused == ("green_contexts", "mps")
    for wanted, reason in (
        ("mps", "nvidia-cuda-mps-control is not installed"),
        ("green_contexts", "older than CUDA 12.4"),
        ("threads", "it is for a CPU"),
    ):
        with pytest.raises(ValueError, match=f"partition: {wanted} cannot be had: .*{reason}"):
            detect("cuda", Found(driver_version=12020, sms=132), wanted)  # type: ignore[arg-type]


def test_the_worker_may_ask_without_torch() -> None:
    code = (
        "import sys, muxserve.engine.shares, muxserve.engine.cuda.probe, muxserve.engine.tables; "
        "print([m for m in ('torch', 'cupy', 'cuda') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
