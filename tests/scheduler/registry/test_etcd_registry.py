"""What only a registry in another process has: its end and return, compaction, users, TLS, several endpoints."""

import asyncio
import gc
import subprocess
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from tests.scheduler.registry.test_registry import take
from xllm_compile.benchmarks.child_process import free_port
from xllm_compile.benchmarks.etcd_process import ETCD, MISSING, EtcdProcess
from xllm_compile.scheduler.proto import etcd_pb2, etcd_pb2_grpc
from xllm_compile.scheduler.registry.etcd_config import EtcdConfig
from xllm_compile.scheduler.registry.etcd_registry import EtcdRegistry
from xllm_compile.scheduler.registry.memory_registry import MemoryRegistry
from xllm_compile.scheduler.registry.registry import (
    CompactedError,
    Guard,
    LeaseLostError,
    RegistryDeniedError,
    RegistryUnavailableError,
)
from xllm_compile.scheduler.registry.registry_server import RegistryServer, served_registry

pytestmark = pytest.mark.integration

PUT = etcd_pb2.RequestOp(request_put=etcd_pb2.PutRequest(key=b"a"))
DELETE_RANGE = etcd_pb2.RequestOp(request_delete_range=etcd_pb2.DeleteRangeRequest(key=b"a", range_end=b"b"))


def client(*endpoints, **options):
    return EtcdRegistry(EtcdConfig(endpoints=endpoints, **options))


@asynccontextmanager
async def served(port=0, **options):
    """A served registry, as (endpoint, the registry)."""
    async with served_registry() as memory:
        passwords = [options.pop("password")] if "password" in options else []
        server = RegistryServer(memory, passwords=passwords, **options)
        port = await server.start("127.0.0.1", port)
        yield f"127.0.0.1:{port}", memory
        await server.stop()


async def test_etcd_killed_and_started_again_on_its_data(etcd):
    async with client(etcd.endpoint, timeout_s=20) as registry:
        lease_id = await registry.grant_lease(5)
        await registry.put("/k", b"1", lease_id=lease_id)
        changes = registry.watch("/", (await registry.snapshot("/")).revision)
        waiting = asyncio.ensure_future(take(changes, 2))
        await registry.put("/other", b"")
        etcd.kill()
        late = asyncio.ensure_future(registry.put("/k", b"2", lease_id=lease_id))
        await asyncio.to_thread(etcd.start)
        assert await late is not None
        # The watch goes on where it was, without the past.
        assert await waiting == [("/other", b""), ("/k", b"2")]
        await registry.keep_alive(lease_id)
        assert [(e.key, e.value, e.lease_id) for e in (await registry.snapshot("/")).entries] == [
            ("/k", b"2", lease_id),
            ("/other", b"", 0),
        ]
        # And the lease, which survived, still ends.
        assert await take(changes, 1) == [("/k", None)]


async def test_an_etcd_that_lost_its_data_is_noticed(etcd, tmp_path):
    async with client(etcd.endpoint, timeout_s=20) as registry:
        for number in range(5):
            revision = await registry.put("/k", b"%d" % number)
        changes = registry.watch("/", revision)
        waiting = asyncio.ensure_future(anext(changes))
        etcd.kill()
        (tmp_path / "data").rename(tmp_path / "lost")
        await asyncio.to_thread(etcd.start)
        with pytest.raises(CompactedError, match="the registry is at revision 1, and was at 6"):
            async with asyncio.timeout(20):
                await waiting


@pytest.mark.parametrize("user", [{}, {"user": "u", "password": "p"}])
async def test_a_served_registry_that_restarts_is_empty_and_says_so(user):
    async with client(f"127.0.0.1:{(port := free_port())}", timeout_s=20, **user) as registry:
        async with served(port, **user):
            lease_id = await registry.grant_lease(60)
            revision = await registry.put("/k", b"", lease_id=lease_id)
            waiting = asyncio.ensure_future(anext(registry.watch("/", revision)))
            await asyncio.sleep(0)
        async with served(port, **user):
            assert await registry.get("/k") is None
            with pytest.raises(LeaseLostError):
                await registry.keep_alive(lease_id)
            # The lease of another client, who might have got the number of the old one.
            assert await registry.grant_lease(60) > lease_id
            with pytest.raises(CompactedError):
                async with asyncio.timeout(20):
                    await waiting


async def test_calls_that_broke_leave_nothing_behind(etcd, caplog):
    """What gRPC leaves of a call is found by the collector, and asyncio complains of it in the log."""
    async with client(etcd.endpoint, timeout_s=2) as registry:
        lease_id = await registry.grant_lease(30)
        waiting = asyncio.ensure_future(take(registry.watch("/", 0), 1))
        await registry.keep_alive(lease_id)
        etcd.kill()
        with pytest.raises(RegistryUnavailableError):
            await registry.keep_alive(lease_id)
        etcd.start()
        await registry.put("/k", b"1")
        assert await waiting == [("/k", b"1")]
        gc.collect()
        await asyncio.sleep(0)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.skipif(ETCD is None, reason=MISSING)
async def test_a_cluster_of_three_loses_one(tmp_path):
    members = EtcdProcess.cluster(tmp_path, 3)
    try:
        for member in members:
            member.launch()
        for member in members:
            await asyncio.to_thread(member.wait_ready)
        async with client(*(member.endpoint for member in members), timeout_s=20) as registry:
            lease_id = await registry.grant_lease(30)
            revision = await registry.put("/k", b"1", lease_id=lease_id)
            waiting = asyncio.ensure_future(take(registry.watch("/", revision), 1))
            await registry.get("/k")
            # The one that answers this client.
            members[0].kill()
            await registry.put("/k", b"2", lease_id=lease_id)
            assert await waiting == [("/k", b"2")]
            await registry.keep_alive(lease_id)
    finally:
        for member in members:
            member.kill()


async def compact(endpoint, revision):
    async with grpc.aio.insecure_channel(endpoint) as channel:
        await etcd_pb2_grpc.KVStub(channel).Compact(etcd_pb2.CompactionRequest(revision=revision))


async def check_compaction(endpoint):
    async with client(endpoint) as registry:
        first = await registry.put("/k", b"1")
        last = [await registry.put("/k", b"%d" % number) for number in range(5)][-1]
        await compact(endpoint, last)
        with pytest.raises(CompactedError, match="the first left is"):
            async with asyncio.timeout(20):
                await anext(registry.watch("/", first))
        changes = registry.watch("/", (await registry.snapshot("/")).revision)
        await registry.put("/k", b"new")
        assert await take(changes, 1) == [("/k", b"new")]


async def test_compaction_in_etcd(etcd):
    await check_compaction(etcd.endpoint)


async def test_compaction_in_a_served_registry():
    async with served() as (endpoint, _):
        await check_compaction(endpoint)


async def test_the_next_endpoint_is_asked():
    async with served() as (endpoint, _), client(f"127.0.0.1:{free_port()}", endpoint) as registry:
        revision = await registry.put("/k", b"")
        assert await take(registry.watch("/", revision - 1), 1) == [("/k", b"")]


async def test_nobody_answers():
    endpoint = f"127.0.0.1:{free_port()}"
    async with client(endpoint, timeout_s=0.3) as registry:
        for call in (registry.get("/k"), registry.put("/k", b""), registry.grant_lease(1), registry.keep_alive(1)):
            with pytest.raises(RegistryUnavailableError, match=f"registry at {endpoint} within 0.3 s"):
                await call


async def test_a_put_whose_answer_was_lost_is_known_for_our_own():
    class Mute(MemoryRegistry):
        """Does the first put and does not say so."""

        num_puts = 0

        async def put(self, *args, **options):
            revision = await super().put(*args, **options)
            self.num_puts += 1
            if self.num_puts == 1:
                await asyncio.Event().wait()
            return revision

    async with Mute() as memory:
        server = RegistryServer(memory)
        port = await server.start("127.0.0.1", 0)
        async with client(f"127.0.0.1:{port}", timeout_s=2) as registry:
            ours, other = await registry.grant_lease(60), await registry.grant_lease(60)
            absent = Guard(key="/k", revision=0)
            assert await registry.put("/k", b"1", lease_id=ours, guard=absent) == memory.revision
            assert memory.num_puts == 1
            assert await registry.put("/k", b"1", lease_id=other, guard=absent) is None
        await server.stop()


@pytest.mark.parametrize("kind", ["served", "etcd"])
async def test_users(kind, request):
    user = {"user": "root", "password": "secret"}
    if kind == "served":
        async with served(**user) as (endpoint, _):
            await check_users(endpoint, user)
    else:
        etcd = request.getfixturevalue("etcd")
        await enable_auth(etcd.endpoint, user)
        await check_users(etcd.endpoint, user)
        # Its tokens end with it.
        async with client(etcd.endpoint, timeout_s=20, **user) as registry:
            revision = await registry.put("/k", b"")
            waiting = asyncio.ensure_future(take(registry.watch("/", revision), 1))
            await registry.get("/k")
            etcd.kill()
            await asyncio.to_thread(etcd.start)
            await registry.put("/k", b"2")
            assert await waiting == [("/k", b"2")]


async def check_users(endpoint, user):
    async with client(endpoint, **user) as registry:
        revision = await registry.put("/k", b"1")
        assert await take(registry.watch("/", revision - 1), 1) == [("/k", b"1")]
        await registry.keep_alive(await registry.grant_lease(5))
    async with client(endpoint) as registry:
        with pytest.raises(RegistryDeniedError):
            await registry.get("/k")
    async with client(endpoint, user="root", password="guessed") as registry:
        for call in (registry.get("/k"), anext(registry.watch("/", 0))):
            with pytest.raises(RegistryDeniedError, match="the registry refuses the user"):
                await call


async def enable_auth(endpoint, user):
    """By calls that have the form of AuthenticateRequest: two strings."""
    pair = etcd_pb2.AuthenticateRequest
    steps = [
        ("UserAdd", pair(name=user["user"], password=user["password"])),
        ("RoleAdd", pair(name="root")),
        ("UserGrantRole", pair(name=user["user"], password="root")),
        ("AuthEnable", pair()),
    ]
    async with grpc.aio.insecure_channel(endpoint) as channel:
        for method, message in steps:
            await channel.unary_unary(f"/etcdserverpb.Auth/{method}", pair.SerializeToString, bytes)(message)


@pytest.mark.parametrize("kind", ["served", "etcd"])
async def test_a_user_where_there_are_none(kind, request):
    if kind == "etcd":
        await check_no_users(request.getfixturevalue("etcd").endpoint)
    else:
        async with served() as (endpoint, _):
            await check_no_users(endpoint)


async def check_no_users(endpoint):
    async with client(endpoint, user="u", password="p") as registry:
        with pytest.raises(RegistryDeniedError, match="no authentication; leave user and password out"):
            await registry.get("/k")


async def test_tls_with_a_client_certificate(tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    pair = [(key.read_bytes(), cert.read_bytes())]
    credentials = grpc.ssl_server_credentials(pair, root_certificates=cert.read_bytes(), require_client_auth=True)
    async with served(credentials=credentials) as (endpoint, _):
        endpoint = endpoint.replace("127.0.0.1", "localhost")
        files = {"use_tls": True, "ca_file": cert, "cert_file": cert, "key_file": key}
        async with client(endpoint, **files) as registry:
            assert await registry.put("/k", b"") is not None
        for options in ({}, {"use_tls": True}, {"use_tls": True, "ca_file": cert}):
            async with client(endpoint, timeout_s=0.5, **options) as registry:
                with pytest.raises(RegistryUnavailableError):
                    await registry.get("/k")


@pytest.mark.parametrize(
    "ask",
    [
        lambda kv: kv.Range(etcd_pb2.RangeRequest(key=b"a", range_end=b"c")),
        lambda kv: kv.Txn(etcd_pb2.TxnRequest(compare=[etcd_pb2.Compare(key=b"a", target=etcd_pb2.Compare.VALUE)])),
        lambda kv: kv.Txn(etcd_pb2.TxnRequest(success=[PUT, PUT])),
        lambda kv: kv.Txn(etcd_pb2.TxnRequest(success=[DELETE_RANGE])),
    ],
)
async def test_what_a_served_registry_does_not_do_it_says(ask):
    async with served() as (endpoint, memory), grpc.aio.insecure_channel(endpoint) as channel:
        revision = memory.revision
        with pytest.raises(grpc.aio.AioRpcError, match="this registry is in memory: it has no") as refused:
            await ask(etcd_pb2_grpc.KVStub(channel))
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert memory.revision == revision


async def test_a_taken_port_is_named():
    async with served() as (endpoint, _):
        with pytest.raises(OSError, match=f"the registry cannot listen on {endpoint}"):
            async with served(int(endpoint.rpartition(":")[2])):
                pass
