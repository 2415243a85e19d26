"""From a prompt and its options to a request: tokenised, checked, with all that its sequences need."""

from collections.abc import Callable
from collections.abc import Sequence as Items

from xllm_compile.runtime.detokenizer import make_detokenizer
from xllm_compile.runtime.engine_config import EngineConfig
from xllm_compile.runtime.grammar import Grammar, GrammarCompiler
from xllm_compile.runtime.hand_over import HandOver
from xllm_compile.runtime.memory.prefix_cache import BlockChain
from xllm_compile.runtime.outputs import RequestMetrics
from xllm_compile.runtime.resume import Resume, check_resume, replay
from xllm_compile.runtime.sampler import SamplingState
from xllm_compile.runtime.sampling_params import SamplingParams
from xllm_compile.runtime.sequence import Request, Sequence
from xllm_compile.runtime.speculative.proposer import Speculation
from xllm_compile.runtime.speculative.speculator import Speculator
from xllm_compile.runtime.step import ModelRunner
from xllm_compile.runtime.tokenizer import Tokenizer


class RequestFactory:
    """Changes nothing: requests may be made in any thread."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        max_model_len: int,
        new_chain: Callable[[], BlockChain],
        kv_bytes_per_token: int,
        speculator: Speculator | None,
        clock: Callable[[], float],
    ) -> None:
        self.max_model_len = max_model_len
        self.vocab_size = runner.vocab_size
        self._embedding_size = runner.embedding_size
        self._tokenizer = tokenizer
        self._config = config
        self._grammars = GrammarCompiler(tokenizer, runner.vocab_size)
        self._new_chain = new_chain
        self._kv_bytes_per_token = kv_bytes_per_token
        self._speculator = speculator
        self._clock = clock

    def make(
        self,
        request_id: str,
        prompt: str | Items[int],
        params: SamplingParams,
        prompt_text: str | None = None,
        resume: Resume | None = None,
        hand_over: HandOver | None = None,
    ) -> Request:
        """Tokenise, validate, compile a structured output. prompt_text is shown with a prompt of token ids.

        resume is what the request has generated elsewhere; the request is finished where that was all. hand_over is
        where its KV goes, once there is a token.
        Raises ValueError on a bad prompt or option.
        """
        text = prompt if isinstance(prompt, str) else prompt_text
        token_ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        self.check_prompt(token_ids, num_new=0 if params.pooling else 1)
        self._check_params(params)
        grammar = None if params.structured is None else self._grammars.compile(params.structured)
        # An embedding comes of the prompt alone, which may fill the context.
        room = self.max_model_len - len(token_ids) if params.pooling is None else 1
        request = Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            metrics=RequestMetrics(arrival_s=self._clock()),
            max_output_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
            hand_over=hand_over,
        )
        # What is best effort has the targets that it names itself.
        defaults = (None, None) if params.offline else (self._config.ttft_slo_ms, self._config.tpot_slo_ms)
        ttft_slo_ms, tpot_slo_ms = params.ttft_slo_ms or defaults[0], params.tpot_slo_ms or defaults[1]
        request.metrics.ttft_slo_s = None if ttft_slo_ms is None else ttft_slo_ms / 1e3
        request.metrics.tpot_slo_s = None if tpot_slo_ms is None else tpot_slo_ms / 1e3
        if resume is not None:
            check_resume(resume, params, request.max_output_tokens)
            self._check_token_ids("resume.output_token_ids", resume.output_token_ids)
            request.metrics.is_resumed = len(resume.output_token_ids) > 0
            request.is_begun = resume.is_begun or len(resume.output_token_ids) > 0
            request.reservation_id, request.num_kv_tokens = resume.reservation_id, resume.num_kv_tokens
            if resume.first_token_age_s is not None:
                request.answer_began_s = request.metrics.arrival_s - resume.first_token_age_s
        request.sequences = [self._make_sequence(request, index, grammar) for index in range(params.n)]
        for sequence in request.sequences:
            if resume is not None:
                replay(sequence, resume, self._tokenizer)
            sequence.speculation = self._speculation(sequence)
            if hand_over is not None:
                self._check_hand_over(hand_over, sequence)
        return request

    def _speculation(self, sequence: Sequence) -> Speculation | None:
        request = sequence.request
        if self._speculator is None or request.params.pooling is not None:
            return None
        return self._speculator.start(
            request.params,
            sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            max_output_tokens=request.max_output_tokens,
        )

    def _make_sequence(self, request: Request, index: int, grammar: Grammar | None) -> Sequence:
        params = request.params
        eos_token_ids = () if params.ignore_eos else self._tokenizer.eos_token_ids
        return Sequence(
            request=request,
            index=index,
            token_ids=list(request.prompt_token_ids),
            sampling=SamplingState(
                params,
                request.prompt_token_ids,
                stop_ids=(*eos_token_ids, *params.stop_token_ids),
                index=index,
                matcher=None if grammar is None else grammar.matcher(),
            ),
            chain=self._new_chain(),
            detokenizer=make_detokenizer(
                self._tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
            ),
        )

    def check_prompt(self, token_ids: Items[int], num_new: int) -> None:
        """Raises ValueError when it is no prompt for num_new tokens behind it."""
        if not token_ids:
            raise ValueError("the prompt has 0 tokens, at least 1 is needed; send a non-empty prompt")
        if len(token_ids) + num_new > self.max_model_len:
            more = " and one generated token" if num_new else ""
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens and max_model_len={self.max_model_len} must hold it{more}; "
                "shorten the prompt or build the artifact with a larger max_model_len"
            )
        self._check_token_ids("prompt", token_ids)

    def _check_hand_over(self, hand_over: HandOver, sequence: Sequence) -> None:
        if sequence.request.params.n != 1:
            raise ValueError(f"n={sequence.request.params.n} must be 1 with hand_over; send a request for each")
        fitting = hand_over.num_bytes // self._kv_bytes_per_token
        if sequence.num_tokens > fitting:
            raise ValueError(
                f"hand_over has pages for {fitting} tokens, the request has {sequence.num_tokens};"
                " reserve for the prompt with all that was generated"
            )

    def _check_params(self, params: SamplingParams) -> None:
        if params.pooling is not None and (params.pooling.dimensions or 0) > self._embedding_size:
            raise ValueError(
                f"dimensions={params.pooling.dimensions} is above the {self._embedding_size} of the model's"
                " hidden states; lower it"
            )
        self._check_token_ids("logit_bias", list(params.logit_bias))

    def _check_token_ids(self, what: str, token_ids: Items[int]) -> None:
        for token_id in {min(token_ids), max(token_ids)} if token_ids else ():
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"{what} token id {token_id} is outside the vocabulary of {self.vocab_size} tokens; "
                    "use the tokenizer that belongs to the model"
                )
