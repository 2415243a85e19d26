"""Seconds until a request's first token on an instance, and between its tokens.

The work ahead is played in whole steps: prompts fill what its decodes leave of a step, and where a TPOT target is to be
kept no more than keeps it, which is how instances plan (`runtime/local_scheduler.py`). All that waits is ahead, but
prompts that are late where late ones let others go first: they are behind whoever can be in time.
"""

from xllm_compile.runtime.policies.chunk import TARGET_SHARE, StepLoad
from xllm_compile.scheduler.cluster.state import CachedTokens, Instance, RequestShape, StepProfile

# The form of steps of which nothing is known; predictions compare instances then, and say nothing of seconds.
UNKNOWN_PROFILE = StepProfile(num_tokens=(1, 1024), seconds=(1e-3, 1e-2), sequence_s=1e-5, key_s=1e-8, pair_s=1e-9)
# Prompt tokens that a step takes whatever TPOT targets say, as SchedulingRules has it.
_LEAST_CHUNK_TOKENS = 32
# A sequence of which only max_tokens is known, usually far beyond the need, is taken to go on for so many tokens.
_TOKENS_TO_COME = 256
# Computing a token again costs 1; having it on the host or on disk still has to be read.
_HOST_WORTH, _DISK_WORTH = 0.8, 0.4


def profile_of(instance: Instance) -> StepProfile:
    return instance.load.profile or UNKNOWN_PROFILE


def decode_load(instance: Instance) -> StepLoad:
    """A step of what decodes there, without offline sequences: they give way."""
    load = instance.load
    num_seqs = load.num_decoding - load.num_offline_decoding
    return StepLoad(num_seqs, num_seqs, load.num_context_tokens - load.num_offline_context_tokens)


def tokens_spared(cached: CachedTokens, num_prompt_tokens: int) -> int:
    """Prompt tokens whose time a cached prefix spares. The last token is computed in any case."""
    worth = cached.device + _HOST_WORTH * cached.host + _DISK_WORTH * cached.disk
    return max(0, min(int(worth), num_prompt_tokens - 1))


def chunk_tokens(instance: Instance, tpot_slo_s: float | None) -> int:
    """Prompt tokens of a step beside its decodes."""
    decodes = decode_load(instance)
    most = max(1, instance.info.max_num_batched_tokens - decodes.num_tokens)
    if tpot_slo_s is None or decodes.num_tokens == 0:
        return most
    in_time = profile_of(instance).tokens_within(TARGET_SHARE * tpot_slo_s, decodes) - decodes.num_tokens
    return max(min(_LEAST_CHUNK_TOKENS, most), min(in_time, most))


def prefill_s(instance: Instance, num_tokens: int, num_pairs: int, tpot_slo_s: float | None) -> float:
    """Until so many prompt tokens, with so many (query, key) pairs among them, are computed there."""
    if num_tokens <= 0:
        return 0.0
    decodes, profile = decode_load(instance), profile_of(instance)
    num_full, rest = divmod(num_tokens, chunk := chunk_tokens(instance, tpot_slo_s))

    def step_s(tokens: int) -> float:
        return profile.step_s(decodes._replace(num_tokens=decodes.num_tokens + tokens))

    seconds = num_full * step_s(chunk) + profile.pair_s * num_pairs
    return seconds + (step_s(rest) if rest else 0.0)


def ttft_s(instance: Instance, request: RequestShape, cached: CachedTokens | None = None) -> float:
    """From arrival there to the first token, without the instance's correction."""
    load = instance.load
    ahead = load.num_waiting_tokens - (0 if request.is_offline else load.num_offline_waiting_tokens)
    if load.num_late_waiting_tokens and request.ttft_slo_s is not None and not request.is_offline:
        in_time_s = _ttft_s(instance, request, cached, ahead - load.num_late_waiting_tokens)
        if in_time_s * instance.ttft_ratio <= request.ttft_slo_s:
            return in_time_s
    return _ttft_s(instance, request, cached, ahead)


def _ttft_s(instance: Instance, request: RequestShape, cached: CachedTokens | None, ahead: int) -> float:
    """Behind so many prompt tokens."""
    load = instance.load
    # Of equal lengths, since only their sum is known.
    pairs_ahead = ahead * load.num_waiting_tokens // (2 * max(1, load.num_waiting))
    spared = tokens_spared(cached, request.num_prompt_tokens) if cached is not None else 0
    own = request.num_prompt_tokens - spared
    pairs = own * spared + own * own // 2
    under_way_s = profile_of(instance).step_s(decode_load(instance)) / 2 if load.num_running else 0.0
    computing_s = prefill_s(instance, ahead + own, pairs_ahead + pairs, request.tpot_slo_s)
    return under_way_s + room_wait_s(instance, request.num_prompt_tokens) + computing_s


def interval_s(instance: Instance, num_context_tokens: int = 0, num_more: int = 1) -> float:
    """Between tokens, with so many more sequences of so many KV tokens together. Prompts keep to what it leaves."""
    decodes = decode_load(instance)
    num_seqs = decodes.num_seqs + num_more
    load = StepLoad(num_seqs, num_seqs, decodes.num_keys + num_context_tokens)
    return profile_of(instance).step_s(load)


def join_wait_s(instance: Instance) -> float:
    """Until what was prefilled elsewhere can have its next token: a step that computes prompts ends first.

    Where others decode that step keeps their interval; without any it may be as long as prompts fill it.
    """
    load = instance.load
    if load.num_waiting_tokens == 0 or decode_load(instance).num_seqs:
        return 0.0
    return prefill_s(instance, min(load.num_waiting_tokens, chunk_tokens(instance, None)), 0, None)


def room_wait_s(instance: Instance, num_tokens: int) -> float:
    """Until sequences that decode there have ended which hold the KV or the seat that one of so many tokens needs.

    0 with room, and where nothing decodes: what is being prefilled for others gives up its KV by itself.
    """
    load, info, decodes = instance.load, instance.info, decode_load(instance)
    if decodes.num_seqs == 0:
        return 0.0
    tokens_short = load.kv_tokens_used - load.num_offline_context_tokens + num_tokens - info.kv_tokens_total
    seats_short = decodes.num_seqs + 1 - info.max_num_seqs
    if tokens_short <= 0 and seats_short <= 0:
        return 0.0
    share = max(tokens_short / max(1, decodes.num_keys), seats_short / decodes.num_seqs)
    return share * _TOKENS_TO_COME * interval_s(instance, num_more=0)
