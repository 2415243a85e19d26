import pytest

from xllm_compile.scheduler.launch.plan import make_plan, parse_instances
from xllm_compile.scheduler.role_options import GATEWAY_OPTIONS, SECRET_OPTIONS, SHARED_OPTIONS
from xllm_compile.scheduler.serve import command, given_arguments


def plan_of(counts, *arguments, **how):
    with command.make_context("xllm-serve", ["model.xllm", *arguments]) as context:
        return make_plan("model.xllm", parse_instances(counts), given_arguments(context), **how)


def contains(arguments, *part):
    return any(arguments[at : at + len(part)] == part for at in range(len(arguments)))


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("2P2D", {"prefill": 2, "decode": 2}),
        ("4M", {"mix": 4}),
        ("1p1d12m", {"prefill": 1, "decode": 1, "mix": 12}),
        ("1M", {"mix": 1}),
    ],
)
def test_counts(text, counts):
    assert parse_instances(text) == counts


@pytest.mark.parametrize("text", ["", "P", "2P", "2D1M", "2P2P1D", "0P1D", "1P1D1E", "2P 2D", "-1M", "4"])
def test_counts_that_are_none_are_named(text):
    with pytest.raises(ValueError, match=f"--instances {text}"):
        parse_instances(text)


def test_what_the_user_wrote_reaches_whom_it_concerns():
    plan = plan_of(
        "1P2D",
        *("--port", "9000", "--routing", "load", "--kv-memory", "1GiB", "--no-warm-up", "--kv-pretouch"),
        *("--max-model-len", "512", "--served-model-name", "a", "--served-model-name", "b", "--threads", "3"),
    )
    gateway = plan.gateway.arguments
    assert gateway[:3] == ("model.xllm", "--role", "gateway")
    assert contains(gateway, "--port", "9000")
    assert contains(gateway, "--routing", "load")
    assert contains(gateway, "--registry-host", "127.0.0.1")
    assert not {"--kv-memory", "--no-warm-up", "--threads", "--colocated"} & set(gateway)
    assert [instance.name for instance in plan.instances] == ["prefill-0", "decode-0", "decode-1"]
    for instance in plan.instances:
        arguments = instance.arguments
        role, _, _ = instance.name.partition("-")
        assert contains(arguments, "--role", role, "--name", instance.name)
        assert contains(arguments, "--port", "0", "--grpc-port", "0", "--host", "127.0.0.1")
        assert contains(arguments, "--kv-memory", str(1 << 30))
        assert contains(arguments, "--colocated", "3")
        assert contains(arguments, "--threads", "3")
        assert {"--no-warm-up", "--kv-pretouch"} <= set(arguments)
        assert "9000" not in arguments
    for process in (plan.gateway, *plan.instances):
        assert contains(process.arguments, "--max-model-len", "512")
        assert contains(process.arguments, "--served-model-name", "a", "--served-model-name", "b")
        # Another xllm-serve takes it.
        with command.make_context("xllm-serve", list(process.arguments)):
            pass


def test_on_several_machines_addresses_are_left_open():
    plan = plan_of("1P1D", "--host", "10.0.0.1", "--threads", "4", is_local=False)
    assert contains(plan.gateway.arguments, "--host", "10.0.0.1")
    assert "--registry-host" not in plan.gateway.arguments
    for instance in plan.instances:
        assert not {"--host", "--colocated"} & set(instance.arguments)


def test_secrets_are_in_no_command_line():
    keys = ("--api-key", "new", "--api-key", "old", "--transfer-secret", "hush")
    plan = plan_of("1P1D", *keys, api_keys=("new", "old"), transfer_secret="hush")
    for process in (plan.gateway, *plan.instances):
        assert not {"new", "old", "hush"} & set(process.arguments)
        assert process.environment["XLLM_API_KEY"] == "new old"
    assert {instance.environment["XLLM_TRANSFER_SECRET"] for instance in plan.instances} == {"hush"}


def test_without_a_secret_of_the_user_instances_get_one_of_their_own():
    first, second = ({each.environment["XLLM_TRANSFER_SECRET"] for each in plan_of("1P1D").instances} for _ in range(2))
    assert len(first) == len(second) == 1
    assert first != second


@pytest.mark.parametrize(
    "arguments",
    [("--role", "mix"), ("--registry", "h:1"), ("--name", "n"), ("--tls-ca", "ca.pem"), ("--transfer-host", "0.0.0.0")],
)
def test_what_does_not_go_together_is_refused(arguments):
    with pytest.raises(ValueError, match=f"{arguments[0]} does not go with --instances"):
        plan_of("2M", *arguments)


def test_the_options_named_here_exist():
    names = {parameter.name for parameter in command.params}
    assert names >= GATEWAY_OPTIONS | SHARED_OPTIONS | SECRET_OPTIONS
