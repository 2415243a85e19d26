"""Which options of xllm-serve are read by whom: a gateway, an instance, a server alone."""

from collections.abc import Mapping, Sequence

# By parameter name. Of a gateway, in --instances too:
GATEWAY_OPTIONS = frozenset(
    {
        *("host", "port", "grpc_port", "registry_host", "registry_port", "routing", "kv_fetch"),
        *("dynamic_roles", "colocation"),
        *("tls_cert", "tls_key", "tls_client_auth", "allow_unauthenticated"),
        *("batch_dir", "batch_max_lines", "batch_max_file_size", "batch_disk_size"),
    }
)
# Of a gateway and of instances.
SHARED_OPTIONS = frozenset(
    {
        *("served_model_name", "max_model_len", "max_streams", "max_connections", "drain_timeout"),
        *("ttft_slo_ms", "tpot_slo_ms", "tool_call_parser", "reasoning_parser", "log_level"),
        "otlp_traces_endpoint",
    }
)
# In the environment of all, where other users do not see them.
SECRET_OPTIONS = frozenset({"api_keys", "transfer_secret"})
# Say what is served and by which processes. kv_cache_dtype is for --compile, which each process does.
OWN_OPTIONS = frozenset({"instances", "launcher", "use_compile", "artifacts"})
_OF_ANY_PROCESS = OWN_OPTIONS | SECRET_OPTIONS | {"role", "registry", "name", "tls_ca", "kv_cache_dtype"}
# Without a gateway nothing reads them.
_OF_A_GATEWAY_ONLY = ("registry_host", "registry_port", "routing", "kv_fetch", "dynamic_roles", "colocation")


def check_role_options(role: str | None, given: Mapping[str, Sequence[str]]) -> None:
    """given: by parameter name the arguments that the user wrote. Raises ValueError for one that would do nothing."""
    for name, arguments in given.items():
        if role == "gateway" and name not in GATEWAY_OPTIONS | SHARED_OPTIONS | _OF_ANY_PROCESS:
            raise ValueError(
                f"{arguments[0]} is for instances, and a gateway computes nothing; leave it out here, give it to them"
            )
        if role != "gateway" and name in _OF_A_GATEWAY_ONLY:
            where = f"--role {role}" if role else "a server alone"
            raise ValueError(
                f"{arguments[0]} is read by a gateway, not by {where}; give it to --role gateway, or add --instances"
            )
