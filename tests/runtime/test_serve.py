"""The service: the answers of cdt-infer, refusals in one line, and an orderly end."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import TOKEN, Served, serving

from cdt_runtime.audit import verify
from cdt_runtime.bundle import Bundle
from cdt_runtime.cli import infer_command
from cdt_runtime.serve.cli import serve_command

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

Shell = Callable[..., tuple[int, str, str]]
MALFORMED = 1000


@pytest.fixture(scope="module")
def place(phantom_dir: Path, bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle of its own, CTs by name, and tiles."""
    folder = tmp_path_factory.mktemp("serve")
    shutil.copytree(bundle_dir, folder / "bundle")
    shutil.copytree(phantom_dir / "new_patient" / "ct", folder / "cts" / "NEW")
    (folder / "cts" / "EMPTY").mkdir()
    return folder


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Served]:
    words = ("--bundle", place / "bundle", "--ct-root", place / "cts", "--max-mb", 2)
    limits = ("--timeout-s", 20, "--backend", "onnxruntime", "--audit", place / "audit.log")
    with serving(*words, *limits, cache=place / "cache") as found:
        yield found


@pytest.fixture(scope="module")
def tiles(phantom_dir: Path) -> list[Path]:
    return sorted((phantom_dir / "new_patient").glob("*.tif"))


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with httpx.Client(base_url=served.url, headers=served.headers, timeout=60) as found:
        yield found


def upload(path: Path, field: str = "tile", name: str | None = None) -> Any:
    return (field, (name or path.name, path.read_bytes()))


def asked(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what differs from run to run."""
    record.pop("timings_ms")
    if record["ct"]:
        record["ct"].pop("cache_hit")
    return record


@pytest.mark.parametrize("ct", [None, "NEW"])
def test_an_answer_is_that_of_cdt_infer(
    client: Any, place: Path, tiles: list[Path], shell: Shell, cache_dir: Path, ct: str | None
) -> None:
    words = [place / "cts" / ct] if ct else ["--no-ct"]
    engine = ("--bundle", place / "bundle", "--backend", "onnxruntime", "--json")
    lines = [json.loads(shell(infer_command, *words, tile, *engine)[1]) for tile in tiles[:2]]
    for tile, line in zip(tiles, lines, strict=False):
        answer = client.post("/v1/classify", files=[upload(tile)], data={"ct": ct} if ct else {})
        assert answer.status_code == 200
        assert asked(answer.json()) == asked(line)


def test_requests_that_come_together_share_a_batch(
    client: Any, served: Served, tiles: list[Path]
) -> None:
    alone = asked(client.post("/v1/classify", files=[upload(tiles[0])]).json())

    def ask(_: int) -> Any:
        return client.post("/v1/classify", files=[upload(tiles[0])])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(64)))
    assert {one.status_code for one in answers} == {200}
    for one in answers:
        found = asked(one.json())
        assert found["label"] == alone["label"]
        assert found["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["cdt_batch_tiles_count"]) < float(lines["cdt_batch_tiles_sum"])
    assert float(lines['cdt_requests_total{path="/v1/classify",status="200"}']) >= 65
    assert float(lines["cdt_in_flight"]) == 1


def test_a_card_is_a_page(client: Any, tiles: list[Path]) -> None:
    answer = client.post("/v1/card", files=[upload(tiles[0])], data={"ct": "NEW"})
    assert answer.status_code == 200
    assert answer.text.startswith("<!doctype html>")
    assert tiles[0].name in answer.text


def test_what_it_is_can_be_asked(client: Any, place: Path) -> None:
    model = client.get("/v1/model").json()
    assert model["classes"] == {"invasion_front": 2, "tumor_stroma": 2}
    assert client.get("/v1/scans").json() == {"scans": ["EMPTY", "NEW"]}
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/classify", "/v1/card", "/v1/enrol", "/v1/model", "/metrics"} <= set(paths)
    docs = client.get("/docs").text
    assert "/docs/files/swagger-ui-bundle.js" in docs
    assert "https://" not in docs
    assert client.get("/docs/files/swagger-ui-bundle.js").status_code == 200
    assert client.get("/health/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/v1/model", "/v1/scans", "/metrics", "/v1/classify", "/gone"])
@pytest.mark.parametrize("token", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN])
def test_without_the_token_nothing_is_said(served: Served, path: str, token: str | None) -> None:
    headers = {"Authorization": token} if token else {}
    answer = httpx.get(served.url.rstrip("/") + path, headers=headers)
    assert answer.status_code == 401
    assert answer.json() == {"error": "give the token: Authorization: Bearer TOKEN"}
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("fields", "name", "said"),
    [
        ({"ct": "gone"}, "tile.tif", "ct: there is no CT of that name: /v1/scans lists them"),
        ({"ct": "../cts/NEW"}, "tile.tif", "ct: there is no CT of that name"),
        ({"ct": "EMPTY"}, "tile.tif", "no DICOM images in EMPTY"),
        ({"mpp": "-1"}, "tile.tif", "mpp: Input should be greater than 0"),
        ({"mpp": "nan"}, "tile.tif", "mpp: Input should be"),
        ({"mpp": "wide"}, "tile.tif", "mpp: Input should be a valid number"),
        ({}, "..", "a file without a usable name"),
    ],
)
def test_a_refusal_is_one_line(
    client: Any, tiles: list[Path], fields: dict[str, str], name: str, said: str
) -> None:
    answer = client.post("/v1/classify", files=[upload(tiles[0], name=name)], data=fields)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(said)
    assert "\n" not in answer.json()["error"]


def test_a_name_with_a_path_in_it_is_its_last_part(client: Any, tiles: list[Path]) -> None:
    answer = client.post("/v1/classify", files=[upload(tiles[0], name="../../etc/mine.tif")])
    assert answer.status_code == 200
    assert answer.json()["tile"] == "mine.tif"


def test_uploads_that_are_no_tile_are_refused(client: Any, tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.tif", tmp_path / "note.tif"
    empty.write_bytes(b"")
    text.write_text("a note")
    for path, said in ((empty, "empty.tif: is empty"), (text, "note.tif: is not a TIFF")):
        answer = client.post("/v1/classify", files=[upload(path)])
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(said)
    answer = client.post("/v1/classify", files=[upload(text), upload(text)])
    assert answer.json()["error"].startswith("note.tif: is given twice")


def raw(port: int, request: bytes, seconds: float = 30.0) -> int:
    """Send bytes as they are; returns the status, 0 where the connection was closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
        try:
            line.sendall(request)
            answer = line.recv(65536)
        except (ConnectionError, BrokenPipeError):
            return 0
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def test_too_much_is_refused_before_it_is_read(served: Served) -> None:
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    form = "Content-Type: multipart/form-data; boundary=b\r\n"
    said = (head + form + "Content-Length: 99999999\r\n\r\n").encode()
    assert raw(served.port, said) == 413
    chunk = b"%x\r\n" % (1 << 20) + b"x" * (1 << 20) + b"\r\n"
    opening = b'--b\r\nContent-Disposition: form-data; name="tile"; filename="t.tif"\r\n\r\n'
    started = b"%x\r\n" % len(opening) + opening + b"\r\n"
    chunked = (head + form + "Transfer-Encoding: chunked\r\n\r\n").encode() + started + chunk * 4
    assert raw(served.port, chunked) in (0, 413)
    lied = (head + form + "Content-Length: many\r\n\r\n").encode()
    assert raw(served.port, lied) == 400


def malformed(source: random.Random, tile: bytes) -> bytes:
    """A request that no answer can be given to."""
    fault = source.randrange(8)
    boundary, field, name = "b", "tile", "t.tif"
    path, method, token = "/v1/classify", "POST", TOKEN
    content = bytes(source.randrange(256) for _ in range(source.randrange(1, 400)))
    more = ""
    if fault == 0:
        content = b"II*\0" + content
    elif fault == 1:
        cut = source.randrange(16, len(tile) // 3)
        content = tile[:cut]
    elif fault == 2:
        field = "".join(source.choices("abcxyz", k=5))
    elif fault == 3:
        name = source.choice(["", "..", "/", "\0", "a/", ".", " "])
    elif fault == 4:
        path = source.choice(["/v1/card", "/v1/enrol", "/v1/nothing", "//", "/static/../x", "/%00"])
    elif fault == 5:
        method = source.choice(["PUT", "DELETE", "GET", "PATCH", "BREW"])
    elif fault == 6:
        token = "".join(source.choices("abc", k=9))
    else:
        key = source.choice(["mpp", "ct", "channels"])
        odd = {"mpp": ["-3", "inf", "1e999", "x"], "ct": ["..", "/etc", "\\", "x" * 999]}
        value = source.choice(odd.get(key, [",,,", "a,a", "x" * 5000]))
        more = f'--b\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
    opening = f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    body = more.encode() + opening.encode("utf-8", "replace") + content + b"\r\n--b--\r\n"
    if source.random() < 0.1:
        boundary = source.choice(["", "c", "b" * 300])
    if source.random() < 0.1:
        body = body[: source.randrange(len(body))]
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: multipart/form-data; boundary={boundary}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    if source.random() < 0.05:
        head = head.replace(
            " HTTP/1.1", source.choice(["", " HTTP/9", " FTP/1.1", "\x07 HTTP/1.1"])
        )
    return head.encode() + body


def test_malformed_requests_are_the_clients_fault_and_memory_stays_flat(
    served: Served, client: Any, tiles: list[Path]
) -> None:
    tile = tiles[0].read_bytes()
    source = random.Random(8)

    def batch(count: int) -> Counter[int]:
        requests = [malformed(source, tile) for _ in range(count)]
        with ThreadPoolExecutor(8) as pool:
            return Counter(pool.map(lambda one: raw(served.port, one), requests))

    batch(100)
    before = served.resident_mib()
    found = batch(MALFORMED)
    after = served.resident_mib()
    assert sum(found.values()) == MALFORMED
    assert {status // 100 for status in found} == {4}, found
    assert after - before < 30
    assert client.post("/v1/classify", files=[upload(tiles[0])]).status_code == 200


def test_a_class_is_enrolled_and_answers_at_once(
    client: Any, served: Served, place: Path, tiles: list[Path]
) -> None:
    files = [upload(tile, "tiles") for tile in tiles[:2]]
    told = client.post("/v1/enrol", files=files, data={"label": "mine", "dry_run": "true"}).json()
    assert told["written"] is False
    assert "mine" not in client.get("/v1/model").json()["classes"]
    told = client.post("/v1/enrol", files=files, data={"label": "mine"}).json()
    assert told["written"] is True
    assert "path" not in told
    model = client.get("/v1/model").json()
    assert model["classes"]["mine"] == 2
    assert model["versions"][-1]["what"] == "added 2 tiles to mine"
    answer = client.post("/v1/classify", files=[upload(tiles[0])]).json()
    assert "mine" in answer["probabilities"]
    assert Bundle.open(place / "bundle").identity == told["bundle"]
    again = client.post("/v1/enrol", files=files, data={"label": "mine"})
    assert again.status_code == 422
    verify(place / "audit.log")


def test_it_ends_in_order(place: Path, tiles: list[Path]) -> None:
    words = ("--bundle", place / "bundle", "--backend", "onnxruntime", "--read-only")
    with serving(*words, cache=place / "cache") as served:
        answers = []

        def ask() -> None:
            answers.append(
                httpx.post(
                    f"{served.url}v1/card",
                    headers=served.headers,
                    files=[upload(tiles[0])],
                    timeout=60,
                ).status_code
            )

        assert httpx.post(f"{served.url}v1/enrol", headers=served.headers).status_code == 404
        asking = threading.Thread(target=ask)
        asking.start()
        while (
            "cdt_in_flight 2.0"
            not in httpx.get(f"{served.url}metrics", headers=served.headers).text
        ):
            time.sleep(0.005)
        served.process.send_signal(signal.SIGTERM)
        asking.join()
        assert answers == [200]
        assert served.process.wait(30) in (0, -signal.SIGTERM)


def test_a_slow_request_is_told_so(place: Path, tiles: list[Path]) -> None:
    words = ("--bundle", place / "bundle", "--backend", "onnxruntime", "--timeout-s", 0.5)
    with serving(*words, cache=place / "cache") as served:
        head = (
            f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000\r\n\r\n--b"
        )
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
            line.sendall(head.encode())
            assert line.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_token_of_its_own_is_in_the_first_line(place: Path) -> None:
    words = ("--bundle", place / "bundle", "--backend", "onnxruntime")
    with serving(*words, cache=place / "cache", token=None) as served:
        url, _, token = served.url.partition("#token=")
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx.get(f"{url}v1/model", headers=headers).status_code == 200
        assert httpx.get(f"{url}v1/model").status_code == 401


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ct-root", "gone"), "--ct-root gone: no such folder"),
        (("--token-file", "gone"), "--token-file gone: can't be read"),
        (("--token-file", "short"), "--token-file short: the token needs at least 16"),
        (("--host", "203.0.113.7"), "--host 203.0.113.7 --port 8765: can't listen there"),
        (("--port", "0", "--bundle", "gone"), "gone"),
        (("--port", "70000"), "Invalid value for '--port'"),
    ],
)
def test_what_can_not_be_served_is_one_line(
    shell: Shell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("abc\n")
    code, out, err = shell(serve_command, *words)
    assert code == 2
    assert out == ""
    assert said in err.splitlines()[-1]
