"""What the benches of simulations measure, on a small device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.simulation.fixtures import hardware, requests
from xllm_compile.benchmarks.bench_colocation import (
    MODES,
    Setting,
    most_offline_rate,
    run_colocation,
    violations,
)
from xllm_compile.benchmarks.bench_simulate import Targets, role_cases
from xllm_compile.benchmarks.record import read_record
from xllm_compile.benchmarks.simulation.cluster import attainment
from xllm_compile.request_trace import TraceRequest
from xllm_compile.runtime.policies.chunk import StepLoad
from xllm_compile.scheduler.cluster.state import Pool

TARGETS = Targets(ttft_slo_s=1.0, tpot_slo_s=0.05)


@pytest.mark.parametrize("num_instances", [4, 5, 8])
def test_every_case_has_all_instances_and_serves(num_instances):
    cases = role_cases(num_instances)
    assert [case.is_dynamic for case in cases.values()] == [False] * 4 + [True]
    for case in cases.values():
        assert len(case.pools) == num_instances
        assert {Pool.PREFILL, Pool.DECODE} == set(case.pools) or set(case.pools) == {Pool.MIX}
        arrivals = requests(20, 4.0)
        case.cluster(hardware(), TARGETS, 0).run(arrivals)
        assert attainment(arrivals) > 0.9


def test_offline_requests_that_pile_up_are_violations_too():
    arrivals = requests(10, 1.0, offline_share=0.5)
    assert {one.is_offline for one in arrivals} == {True, False}
    for one in arrivals:
        one.first_token_s = one.finished_s = one.arrival_s + 0.5
    assert violations(arrivals) == 0.0
    late = next(one for one in arrivals if not one.is_offline)
    late.first_token_s = late.arrival_s + 2.0
    num_online = sum(not one.is_offline for one in arrivals)
    assert violations(arrivals) == pytest.approx(1 / num_online)
    next(one for one in arrivals if one.is_offline).finished_s = arrivals[-1].arrival_s + 31.0
    assert violations(arrivals) == 1.0


def test_no_policy_serves_more_than_fills_the_devices():
    trace = [TraceRequest(float(at), 300, 20) for at in range(40)]
    setting = Setting(
        hardware=hardware(), pools=(Pool.PREFILL, Pool.DECODE), targets=TARGETS, trace=trace, lengths=trace
    )
    steady = most_offline_rate(setting, 2.0)
    assert steady > most_offline_rate(setting, 4.0) > 0
    assert most_offline_rate(setting, 2.0, grace_s=30.0) > steady


@given(prompt=st.integers(1, 3000), output=st.integers(1, 300), chunk=st.integers(1, 64), batch=st.integers(1, 64))
def test_the_least_time_of_a_request_is_no_more_than_any_way_of_serving_it_takes(prompt, output, chunk, batch):
    device = hardware()
    # Alone in chunks, then decoded as one of a batch of equals.
    load, seconds = StepLoad(), 0.0
    for begin in range(0, prompt, chunk):
        seconds += device.profile.step_s(load.plus(begin, min(chunk, prompt - begin)))
    for at in range(1, output):
        seconds += device.profile.step_s(StepLoad(batch, batch, batch * (prompt + at))) / batch
    assert device.least_s(prompt, output) <= seconds * (1 + 1e-9)


def test_co_location_is_recorded_at_every_online_share(tmp_path):
    trace = tmp_path / "trace.csv"
    lines = [f"2024-05-10 00:00:{at // 10:02}.{at % 10}00000,2048,32" for at in range(400)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    run_colocation(
        [trace],
        tmp_path,
        ["x"],
        name="colocation",
        model="qwen3-8b",
        device="ascend-910b2",
        num_instances=2,
        targets=Targets(ttft_slo_s=2.0, tpot_slo_s=0.1),
        seeds=1,
        num_requests=400,
        lengths=trace,
        tide=None,
        online_shares=(0.5, 1.0),
    )
    record = read_record(tmp_path / "colocation.json")
    half, whole = (record.raw["workloads"]["trace"][f"{share} of them"] for share in ("50%", "100%"))
    for mode in MODES:
        assert half[mode]["median"] > whole[mode]["median"]
    assert whole["co-location"]["median"] > whole["base P/D"]["median"]
    assert half["devices full, steady"] > whole["devices full, steady"]
    bars = {bar.what: bar.value for bar in record.bars}
    ratio = half["co-location"]["median"] / half["base P/D"]["median"]
    assert bars["trace, 50% online: offline requests/s, co-location over base P/D"] == pytest.approx(ratio)
    assert (tmp_path / "colocation.html").read_text().count("<svg") == 1


def test_modes_differ_in_who_gives_way_only():
    trace = [TraceRequest(float(at), 300, 20) for at in range(40)]
    setting = Setting(
        hardware=hardware(), pools=(Pool.PREFILL, Pool.DECODE), targets=TARGETS, trace=trace, lengths=trace
    )
    served = {mode: setting.serve(mode, 2.0, 2.0, 0) for mode in MODES}
    arrivals = {mode: [(one.arrival_s, one.num_prompt_tokens) for one in found] for mode, found in served.items()}
    assert arrivals[MODES[0]] == arrivals[MODES[1]] == arrivals[MODES[2]]
    gives_way = {mode: any(one.is_offline for one in found) for mode, found in served.items()}
    assert gives_way == {MODES[0]: False, MODES[1]: True, MODES[2]: True}
    assert all(violations(found) == 0.0 for found in served.values())
