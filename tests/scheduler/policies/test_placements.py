from tests.scheduler.policies.instances import instance, request
from xllm_compile.scheduler.cluster.state import Placement, Pool
from xllm_compile.scheduler.policies.placements import Placements

PAIR = Placement(prefill="p", decode="d", num_cached_tokens=100)


def loads(placements, now, age=1.0):
    fleet = [instance("p", Pool.PREFILL, load_age_s=age), instance("d", Pool.DECODE, load_age_s=age)]
    return [one.load for one in placements.added(fleet, now)]


def test_what_was_placed_counts_on_both_instances_until_they_report_it():
    placements = Placements()
    placements.place("r", request(1000), PAIR, now=10.0)
    prefill, decode = loads(placements, 10.1)
    assert (prefill.num_waiting, prefill.num_waiting_tokens, prefill.num_decoding) == (1, 900, 0)
    assert (decode.num_waiting, decode.num_decoding, decode.num_context_tokens) == (0, 1, 1000)
    assert prefill.kv_tokens_used == decode.kv_tokens_used == 1000
    # Reports made a second later know of the prompt and of the reservation, not yet of the decoding.
    prefill, decode = loads(placements, 11.1, age=0.1)
    assert (prefill.num_waiting, prefill.kv_tokens_used) == (0, 0)
    assert (decode.num_decoding, decode.kv_tokens_used) == (1, 0)


def test_decoding_counts_until_a_report_behind_the_first_token():
    placements = Placements()
    placements.place("r", request(1000), PAIR, now=10.0)
    placements.first_token("r", 12.0)
    assert loads(placements, 12.5, age=0.6)[1].num_decoding == 1
    assert loads(placements, 12.5, age=0.1)[1].num_decoding == 0


def test_a_report_made_at_the_very_time_does_not_know_yet():
    placements = Placements()
    placements.place("r", request(1000), PAIR, now=10.0)
    assert loads(placements, 10.0, age=0.0)[0].num_waiting == 1
    assert loads(placements, 10.2, age=0.0)[0].num_waiting == 0


def test_on_one_instance_a_request_waits_and_will_decode():
    placements = Placements()
    placements.place("r", request(1000), Placement(prefill="p", decode="p"), now=10.0)
    prefill, decode = loads(placements, 10.1)
    assert (prefill.num_waiting, prefill.num_decoding, prefill.kv_tokens_used) == (1, 1, 1000)
    assert decode == instance("d").load


def test_ended_requests_and_those_placed_anew_count_no_more():
    placements = Placements()
    for name in "abc":
        placements.place(name, request(1000, is_offline=True), PAIR, now=10.0)
    assert loads(placements, 10.1)[0].num_offline == 3
    placements.finished("a")
    placements.finished("a")
    placements.place("b", request(1000), Placement(prefill="d", decode="d"), now=10.0)
    prefill, decode = loads(placements, 10.1)
    assert (prefill.num_waiting, decode.num_waiting, decode.num_decoding) == (1, 1, 2)
    placements.gone("p")
    assert loads(placements, 10.1)[0].num_waiting == 0
    placements.finished("c")
    placements.first_token("c", 10.2)
    assert loads(placements, 10.1)[1].num_decoding == 1
