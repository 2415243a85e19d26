"""What a user wrote and nobody would read is refused."""

import pytest

from xllm_compile.scheduler.role_options import check_role_options
from xllm_compile.scheduler.serve import command, given_arguments


def check(*arguments):
    with command.make_context("xllm-serve", ["model.xllm", *arguments]) as context:
        check_role_options(context.params["role"], given_arguments(context))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--role", "gateway", "--kv-memory", "1GiB"),
        ("--role", "gateway", "--scheduling-policy", "deadline"),
        ("--role", "gateway", "--threads", "4"),
        ("--role", "gateway", "--transfer-host", "10.0.0.1"),
        ("--role", "gateway", "--no-prefix-cache"),
        ("--role", "decode", "--colocation"),
        ("--role", "mix", "--routing", "load"),
        ("--role", "prefill", "--registry-port", "0"),
        ("--dynamic-roles",),
        ("--no-kv-fetch",),
    ],
)
def test_what_would_do_nothing_is_named(arguments):
    option = next(each for each in reversed(arguments) if each.startswith("--"))
    with pytest.raises(ValueError, match=f"^{option} is .*give it to"):
        check(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--kv-memory", "1GiB", "--batch-dir", "batches", "--tls-cert", "c", "--tls-key", "k"),
        ("--role", "gateway", "--registry", "etcd://a:1", "--routing", "load", "--tls-ca", "c", "--batch-dir", "b"),
        ("--role", "gateway", "--compile", "--kv-cache-dtype", "int8", "--max-model-len", "64", "--api-key", "k"),
        ("--role", "decode", "--registry", "a:1", "--kv-memory", "1GiB", "--name", "d", "--transfer", "tcp"),
    ],
)
def test_what_is_read_is_taken(arguments):
    check(*arguments)
