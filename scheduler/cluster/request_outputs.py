"""The completions of one request as the outputs that an engine would give."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from xllm_compile.runtime.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, hold
from xllm_compile.runtime.sampling_params import RequestOutputKind, SamplingParams
from xllm_compile.scheduler.cluster.completion import Completion


class RequestOutputs:
    """Collects what the request's completions bring."""

    def __init__(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        self.metrics = RequestMetrics(
            arrival_s=time.monotonic(), ttft_slo_s=_seconds(params.ttft_slo_ms), tpot_slo_s=_seconds(params.tpot_slo_ms)
        )
        self._request_id = request_id
        self._prompt = prompt
        self._kind = params.output_kind
        self._num_left = params.n
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._held: dict[int, CompletionOutput] = {}
        """Everything so far, by completion."""

    def take(self, completion: Completion, output: CompletionOutput) -> RequestOutput | None:
        """What the client gets of it now."""
        self._num_left -= output.finish_reason is not None
        self._prompt_logprobs = self._prompt_logprobs or completion.prompt_logprobs
        if completion.index == 0:
            # The others find the prompt that this one computed.
            self._num_cached_tokens = completion.num_cached_tokens
        is_finished = self._num_left == 0
        if self._kind is RequestOutputKind.DELTA:
            outputs = [output]
        else:
            hold(self._held, output)
            if self._kind is RequestOutputKind.FINAL_ONLY and not is_finished:
                return None
            outputs = [replace(each) for _, each in sorted(self._held.items())]
        return RequestOutput(
            request_id=self._request_id,
            prompt=None,
            prompt_token_ids=self._prompt,
            outputs=outputs,
            finished=is_finished,
            metrics=self.metrics,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )

    def embedded(self, values: Sequence[float]) -> RequestOutput:
        """The only output of a request for an embedding."""
        self.metrics.first_token_s = self.metrics.last_token_s = time.monotonic()
        output = CompletionOutput(index=0, text="", token_ids=[], finish_reason="stop")
        return RequestOutput(
            request_id=self._request_id,
            prompt=None,
            prompt_token_ids=self._prompt,
            outputs=[output],
            finished=True,
            metrics=self.metrics,
            embedding=np.array(values, dtype=np.float32),
        )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
