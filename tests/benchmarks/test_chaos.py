from xllm_compile.benchmarks.bench_chaos import Answer, Disturbance, Prompt, Tally, recoveries_s
from xllm_compile.benchmarks.openai_client import StreamResult


def answer(*token_times):
    result = StreamResult(sent=0.0, token_times=list(token_times), ended=token_times[-1])
    return Answer(prompt=Prompt(token_ids=[1], num_tokens=1, text="a"), gateway="gateway-0", result=result)


def test_recovery_is_the_pause_of_the_streams_that_paused():
    paused = answer(1.0, 1.1, 1.2, 3.2, 3.3, 3.4)
    unhurt = answer(1.0, 1.1, 1.2, 1.3, 1.4)
    later = answer(5.0, 5.1, 5.2)
    tally = Tally(
        answers=[paused, unhurt, later],
        disturbances=[
            Disturbance(kind="instance killed", part="mix-0", at_s=1.25),
            Disturbance(kind="etcd killed", part="etcd", at_s=1.25),
        ],
    )
    assert recoveries_s(tally, "instance killed") == [3.2 - 1.25]
    assert recoveries_s(tally, "instance stopped") == []
