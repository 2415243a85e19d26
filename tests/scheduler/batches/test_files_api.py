"""Files over HTTP: uploaded, listed, read, deleted, expired; and what is refused."""

import os

import httpx
import pytest

from tests.scheduler.batches.batch_fixtures import jsonl, line
from xllm_compile.scheduler.batches.api import disabled_routes
from xllm_compile.scheduler.http_api import build_app

CONTENT = jsonl([line("a"), line("b")])


def uploads(server):
    return sorted(path.name for path in (server.folder / "files").iterdir())


async def test_a_file_is_kept_as_it_was_sent(server):
    content = bytes(range(256)) * 9000
    uploaded = (await server.upload(content)).json()
    now = int(server.clock.now)
    assert uploaded == {
        "id": uploaded["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": now,
        "expires_at": now + 30 * 24 * 3600,
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert uploads(server) == [uploaded["id"]]
    assert server.folder.stat().st_mode & 0o077 == 0, "others on the machine may read it"
    assert (await server.client.get(f"/v1/files/{uploaded['id']}")).json() == uploaded
    response = await server.client.get(f"/v1/files/{uploaded['id']}/content")
    assert response.content == content and response.headers["content-length"] == str(len(content))


async def test_names_of_users_are_no_paths(server):
    files = {"file": ("../../etc/pass\r\nwd\x00", b"x")}
    uploaded = (await server.client.post("/v1/files", data={"purpose": "batch"}, files=files)).json()
    assert "\n" not in uploaded["filename"] and "\x00" not in uploaded["filename"]
    assert uploads(server) == [uploaded["id"]]
    for path in ("/v1/files/..%2f..%2fetc%2fpasswd/content", "/v1/files/%2e%2e", f"/v1/files/{uploaded['id']}%00"):
        assert (await server.client.get(path)).status_code == 404


async def test_pages_and_purposes(server):
    ids = [(await server.upload(CONTENT)).json()["id"] for _ in range(3)]
    ended = await server.ended((await server.create(CONTENT))["id"])
    assert (await server.client.get("/v1/files")).json()["data"][0]["id"] == ended["output_file_id"]
    page = (await server.client.get("/v1/files?purpose=batch_output")).json()
    assert [file["filename"] for file in page["data"]] == [f"{ended['id']}_output.jsonl"]
    page = (await server.client.get("/v1/files?purpose=batch&order=asc&limit=2")).json()
    assert [file["id"] for file in page["data"]] == ids[:2] and page["has_more"]
    page = (await server.client.get(f"/v1/files?purpose=batch&order=asc&after={ids[1]}")).json()
    assert [file["id"] for file in page["data"]] == [ids[2], ended["input_file_id"]] and not page["has_more"]


async def test_deleted_files_are_gone(server):
    ended = await server.ended((await server.create(CONTENT))["id"])
    for file_id in (ended["input_file_id"], ended["output_file_id"]):
        deleted = await server.client.delete(f"/v1/files/{file_id}")
        assert deleted.json() == {"id": file_id, "object": "file", "deleted": True}
        for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
            response = await server.client.get(path)
            assert response.status_code == 404 and response.json()["error"]["code"] == "file_not_found"
        assert (await server.client.delete(f"/v1/files/{file_id}")).status_code == 404
    assert uploads(server) == []


async def test_the_input_of_an_open_batch_is_not_deleted(server, runner):
    runner.gate.clear()
    created = await server.create(CONTENT)
    response = await server.client.delete(f"/v1/files/{created['input_file_id']}")
    assert response.status_code == 409 and created["id"] in response.json()["error"]["message"]
    runner.gate.set()
    await server.ended(created["id"])
    assert (await server.client.delete(f"/v1/files/{created['input_file_id']}")).status_code == 200


async def test_files_expire(server):
    lifetime = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    short = (await server.upload(CONTENT, **lifetime)).json()
    long = (await server.upload(CONTENT)).json()
    assert short["expires_at"] == short["created_at"] + 3600
    server.clock.now += 3600
    assert (await server.client.get(f"/v1/files/{short['id']}")).status_code == 404
    assert [file["id"] for file in (await server.client.get("/v1/files")).json()["data"]] == [long["id"]]
    await server.stop()
    await server.start()
    await server.upload(CONTENT)
    assert short["id"] not in uploads(server) and long["id"] in uploads(server)


async def test_outputs_expire(server):
    expiry = {"anchor": "created_at", "seconds": 7200}
    ended = await server.ended((await server.create(CONTENT, output_expires_after=expiry))["id"])
    server.clock.now += 7200
    assert (await server.client.get(f"/v1/files/{ended['output_file_id']}/content")).status_code == 404
    assert (await server.client.get(f"/v1/files/{ended['input_file_id']}")).status_code == 200


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "fine-tune"}, {"file": ("a", b"x")}, "purpose"),
        ({"purpose": "batch"}, {"other": (None, b"x")}, "other"),
        ({"purpose": "batch"}, {"file": (None, b"x")}, "file"),
        ({"purpose": "batch", "expires_after[seconds]": "3600"}, {"file": ("a", b"x")}, "expires_after"),
        (
            {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "5"},
            {"file": ("a", b"x")},
            "expires_after",
        ),
        ({"purpose": "b" * 2000}, {"file": ("a", b"x")}, "purpose"),
    ],
)
async def test_bad_forms_are_refused_and_leave_nothing(server, data, files, param):
    response = await server.client.post("/v1/files", data=data, files=files)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert uploads(server) == []


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=file; filename=a\r\n\r\nxx"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Type: text/plain\r\n\r\nxx\r\n--b--"),
    ],
)
async def test_what_is_no_form_is_refused(server, content_type, body):
    response = await server.client.post("/v1/files", content=body, headers={"content-type": content_type})
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_form"
    assert uploads(server) == []


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_a_file_that_is_too_large_is_refused_as_it_comes(start, is_chunked):
    server = await start(max_file_bytes=100_000)
    assert (await server.upload(b"x" * 100_000)).status_code == 200
    if not is_chunked:
        refused = await server.upload(b"x" * 200_000)
    else:
        num_read = 0

        async def body():
            nonlocal num_read
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            while True:
                num_read += 10_000
                yield b"x" * 10_000

        headers = {"content-type": "multipart/form-data; boundary=b"}
        refused = await server.client.post("/v1/files", content=body(), headers=headers)
        assert num_read <= 120_000
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "file_too_large"
    assert "--batch-max-file-size" in refused.json()["error"]["message"]
    assert len(uploads(server)) == 1


async def test_too_many_lines_are_refused(start):
    server = await start(max_lines=3)
    ended = await server.ended((await server.create([line(f"{number}") for number in range(4)]))["id"])
    assert ended["status"] == "failed"
    (error,) = ended["errors"]["data"]
    assert error["line"] == 4 and "--batch-max-lines" in error["message"]


async def test_one_server_has_the_folder(start):
    await start()
    with pytest.raises(ValueError, match=rf"in use by another server \(process {os.getpid()} on "):
        await start()


async def test_what_a_process_that_died_left_is_cleared(server):
    kept = (await server.upload(CONTENT)).json()["id"]
    await server.stop()
    # Written, and killed before it was in the database; half written; deleted there and not yet here.
    for name in ("file-unknown", "file-other.part"):
        (server.folder / "files" / name).write_bytes(b"x")
    await server.start()
    assert uploads(server) == [kept]


async def test_without_a_folder_it_says_which_option_gives_one(service):
    transport = httpx.ASGITransport(app=build_app(service, disabled_routes()))
    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    for method, path in [("POST", "/v1/files"), ("GET", "/v1/files/file-1/content"), ("POST", "/v1/batches")]:
        response = await client.request(method, path)
        assert response.status_code == 404
        assert "--batch-dir" in response.json()["error"]["message"]
