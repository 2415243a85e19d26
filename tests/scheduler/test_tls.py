"""Certificates: what is refused before anything starts, and who gets through to real servers."""

import asyncio
import subprocess
from functools import partial

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.scheduler.certificates import Authority
from tests.scheduler.registry.instances import instance
from xllm_compile.scheduler.cluster.registry_address import parse_registry
from xllm_compile.scheduler.http_server import HttpServer
from xllm_compile.scheduler.process import bind_socket
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.liveness import Answer
from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.probe import probe_health
from xllm_compile.scheduler.registry.registry import RegistryDeniedError, RegistryUnavailableError
from xllm_compile.scheduler.registry.registry_server import RegistryServer
from xllm_compile.scheduler.tls import TlsConfig

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(ca):
    return ca.issue("server")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Another authority."""
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


def options(**given):
    return {"tls_cert": None, "tls_key": None, "tls_ca": None, "tls_client_auth": False, **given}


def test_good_files_are_taken(ca, server):
    tls = TlsConfig.from_options(options(tls_cert=server.cert, tls_key=server.key, tls_ca=ca.cert))
    assert tls.is_served
    assert not TlsConfig.from_options(options()).is_served


def test_bad_files_and_combinations_are_named(ca, server, tmp_path):
    other = ca.issue("other")
    empty, missing, locked = tmp_path / "empty.pem", tmp_path / "missing.pem", tmp_path / "locked.key"
    empty.write_text("no certificate")
    lock = ["openssl", "ec", "-in", str(server.key), "-aes128", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(lock, check=True, capture_output=True)
    for given, message in (
        ({"tls_cert": server.cert}, "--tls-cert .* needs --tls-key"),
        ({"tls_key": server.key}, "--tls-key .* needs --tls-cert"),
        (
            {"tls_cert": server.cert, "tls_key": server.key, "tls_client_auth": True},
            "--tls-client-auth needs .*--tls-ca",
        ),
        ({"tls_cert": server.cert, "tls_key": other.key}, "are no certificate .* and its key: .*MISMATCH"),
        ({"tls_cert": empty, "tls_key": server.key}, "empty.pem and .* are no certificate"),
        ({"tls_cert": missing, "tls_key": server.key}, "cannot read .*missing.pem: No such file"),
        ({"tls_cert": server.cert, "tls_key": locked}, "--tls-key is encrypted"),
        ({"tls_ca": empty}, "--tls-ca .*empty.pem holds no certificate"),
        ({"tls_ca": missing}, "cannot read .*missing.pem"),
    ):
        with pytest.raises(ValueError, match=message):
            TlsConfig.from_options(options(**given))


async def serve_http(tls, then):
    """What `then` returns for the URL of a server that says 200 to everything."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    http = HttpServer(app, max_connections=8, tls=tls)
    with bind_socket("127.0.0.1", 0) as bound:
        serving = asyncio.create_task(http.serve(sockets=[bound]))
        await http.ready.wait()
        try:
            return await then(f"https://127.0.0.1:{bound.getsockname()[1]}")
        finally:
            http.should_exit = True
            await serving


async def ask(url, *, tls):
    async with httpx.AsyncClient(verify=tls.client_context()) as client:
        return (await client.get(url)).text


async def test_http_shows_its_certificate_and_checks_clients_where_asked(ca, server, stranger):
    plain = ca.tls(server)
    assert await serve_http(plain, partial(ask, tls=ca.tls())) == "hello"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await serve_http(plain, partial(ask, tls=stranger.tls()))
    mutual = ca.tls(server, client_auth=True)
    assert await serve_http(mutual, partial(ask, tls=ca.tls(ca.issue("client")))) == "hello"
    for client in (ca.tls(), TlsConfig(ca_file=ca.cert, **vars_of(stranger.issue("client")))):
        # TLS 1.3 tells the client of the refusal only once it reads.
        with pytest.raises((httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)):
            await serve_http(mutual, partial(ask, tls=client))


def vars_of(issued):
    return {"cert_file": issued.cert, "key_file": issued.key}


async def probe(info, tls):
    return await probe_health(info, tls.channel_credentials())


async def test_probes_of_instances_over_tls(ca, server, stranger):
    grpc_server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, grpc_server)
    credentials = ca.tls(server, client_auth=True).server_credentials()
    info = instance(address=f"127.0.0.1:{grpc_server.add_secure_port('127.0.0.1:0', credentials)}")
    await grpc_server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    assert await probe(info, ca.tls(ca.issue("gateway"))) is Answer.SERVING
    for tls in (TlsConfig(), ca.tls(), stranger.tls(stranger.issue("gateway"))):
        assert await probe(info, tls) is Answer.NONE
    await grpc_server.stop(0)


async def test_a_registry_over_tls_takes_both_keys_while_they_change(ca, server, stranger):
    async with MemoryRegistry() as memory:
        credentials = ca.tls(server).server_credentials()
        registry = RegistryServer(memory, user="xllm", passwords=("new", "old"), credentials=credentials)
        address = f"127.0.0.1:{await registry.start('127.0.0.1', 0)}"

        async def put(api_key, tls):
            config = parse_registry(address, api_key=api_key, tls=tls).config
            async with EtcdRegistry(config) as client:
                return await client.put("/k", b"")

        for key in ("new", "old"):
            assert await put(key, ca.tls()) is not None
        with pytest.raises(RegistryDeniedError):
            await put("older", ca.tls())
        with pytest.raises(RegistryUnavailableError, match=rf"{address} .*not issued by the CA of --tls-ca"):
            await put("new", stranger.tls())
        with pytest.raises(RegistryUnavailableError, match=address):
            await put("new", TlsConfig())
        await registry.stop()


async def test_a_certificate_for_another_host_is_said_to_be_one(ca):
    elsewhere = ca.issue("elsewhere", san="DNS:elsewhere.example")
    async with MemoryRegistry() as memory:
        registry = RegistryServer(memory, credentials=ca.tls(elsewhere).server_credentials())
        address = f"127.0.0.1:{await registry.start('127.0.0.1', 0)}"
        async with EtcdRegistry(parse_registry(address, api_key=None, tls=ca.tls()).config) as client:
            with pytest.raises(RegistryUnavailableError, match="does not name the host of this address"):
                await client.get("/k")
        await registry.stop()
