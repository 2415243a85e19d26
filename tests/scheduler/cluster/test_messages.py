import random

import pytest

from xllm_compile.runtime.outputs import CompletionOutput, Logprob
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.runtime.structured_output import ReasoningText, StructuredOutput
from xllm_compile.scheduler.cluster.generate_messages import (
    api_error,
    completion_of,
    generate_message,
    prompt_logprobs_of,
)
from xllm_compile.scheduler.cluster.instance_messages import info_message, info_of, load_message, load_of
from xllm_compile.scheduler.cluster.state import InstanceInfo, InstanceLoad, Role, StepProfile
from xllm_compile.scheduler.errors import KINDS_BY_STATUS
from xllm_compile.scheduler.grpc_convert import choice_message, prompt_logprobs_messages, sampling_params_of
from xllm_compile.scheduler.proto import xllm_pb2

REASONING = ReasoningText(start="<think>", end="</think>", is_open=True)

PARAMS = [
    SamplingParams(output_kind=RequestOutputKind.DELTA, max_tokens=3),
    SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=11,
        min_p=0.1,
        presence_penalty=0.3,
        frequency_penalty=-0.3,
        repetition_penalty=1.1,
        seed=-5,
        stop=("a", "b"),
        stop_token_ids=(5, 6),
        include_stop_str_in_output=True,
        ignore_eos=True,
        max_tokens=9,
        min_tokens=2,
        logprobs=0,
        prompt_logprobs=2,
        logit_bias={7: 0.1},
        skip_special_tokens=False,
        output_kind=RequestOutputKind.DELTA,
        priority=-3,
        offline=True,
        ttft_slo_ms=0.3,
        tpot_slo_ms=7.7,
    ),
    *(
        SamplingParams(structured=structured, output_kind=RequestOutputKind.DELTA, max_tokens=3)
        for structured in (
            StructuredOutput.json_schema({"type": "integer"}, REASONING),
            StructuredOutput(kind="json_object", reasoning=REASONING),
            StructuredOutput(kind="regex", source="a+"),
            StructuredOutput(kind="grammar", source='start: "a"'),
            StructuredOutput.choice(["x", "y"]),
        )
    ),
]


@pytest.mark.parametrize("params", PARAMS)
def test_an_instance_reads_the_very_params_that_the_gateway_had(service, params):
    message = generate_message("r", [1, 2], params, params.seed)
    sent = xllm_pb2.GenerateRequest.FromString(message.SerializeToString())
    assert sampling_params_of(sent, service, num_prompt=2) == params
    assert list(sent.token_ids.ids) == [1, 2]


def test_each_completion_is_a_request_of_its_own(service):
    message = generate_message("r", [1], SamplingParams(n=4, top_k=-1), seed=7)
    params = sampling_params_of(message, service, num_prompt=1)
    assert (params.n, params.seed, params.top_k) == (1, 7, 0)


def test_completions_arrive_as_they_were():
    rng = random.Random(0)
    logprobs = [
        {
            token: Logprob(logprob=-float(rank), rank=rank, decoded_token=str(token))
            for rank, token in enumerate((5, 6), 1)
        }
        for _ in range(2)
    ]
    for reason, stop in (("stop", "end"), ("stop", 9), ("stop", None), ("length", None), ("abort", None), (None, None)):
        choice = CompletionOutput(
            index=0,
            text="text",
            token_ids=[5, 6],
            logprobs=rng.choice([logprobs, None]),
            finish_reason=reason,  # type: ignore[arg-type]
            stop_reason=stop,
        )
        found = completion_of(choice_message(choice), 3)
        choice.index = 3
        assert found == choice


def test_prompt_logprobs_arrive_as_they_were():
    entries = [
        None,
        {4: Logprob(logprob=-0.5, rank=2, decoded_token="d"), 3: Logprob(logprob=-0.25, rank=1, decoded_token="c")},
    ]
    assert prompt_logprobs_of(prompt_logprobs_messages([8, 4], entries)) == entries


def test_errors_keep_their_kind_and_details():
    for status, kind in KINDS_BY_STATUS.items():
        error = api_error(xllm_pb2.RunFailure(status=status, message="m", code="c", retry_after_s=3))
        assert (error.kind, error.message, error.code, error.param, error.retry_after_s) == (kind, "m", "c", None, 3)


def test_instances_describe_themselves():
    info = InstanceInfo(
        name="a",
        incarnation="1",
        role=Role.DECODE,
        address="h:1",
        transfers=("shm:x",),
        host="h",
        model_names=("m",),
        weights_key="w",
        kv_layout="l",
        block_tokens=8,
        max_model_len=100,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_tokens_total=1000,
        version="1",
    )
    assert info_of(info_message(info, is_ready=True)) == info
    profile = StepProfile(num_tokens=(1, 8), seconds=(0.5, 1.0), sequence_s=0.1, key_s=0.2, pair_s=0.3)
    for load in (
        InstanceLoad(),
        InstanceLoad(
            num_running=3, ttft_s=0.5, tpot_s=0.1, num_late_waiting_tokens=9, is_draining=True, profile=profile
        ),
    ):
        assert load_of(load_message(load, incarnation="1")) == load
