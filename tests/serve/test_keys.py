"""Keys: hashed at rest, one answer for whoever has none, limits of those who have."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time

import httpx
import pytest

from pylumiere.cli import main
from pylumiere.errors import InvalidRequest
from pylumiere.serve.keys import Key, KeyRing, RateLimit, append_key, make_key, read_keys
from pylumiere.serve.server import ServeOptions, parse_bytes, parse_seconds, serve

from .conftest import SLOW

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API")


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def cli(*arguments):
    command = [sys.executable, "-P", "-m", "pylumiere.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_without_a_key_nothing_is_learned(serve, ring):
    key, _, keys = ring()
    server = serve(keys=keys)
    id = server.http.post("/v1/videos", json={"prompt": "a"}, headers=bearer(key)).json()["id"]
    wrong = [None, "", "Bearer", "Bearer x y", "Basic " + key, bearer(key[:-1])["Authorization"], "Bearer x" + key,
             "bearer\t" + key + "x", "Bearer " + "x" * 10_000]  # fmt: skip
    paths = [("GET", f"/v1/videos/{id}"), ("GET", "/v1/videos/none"), ("GET", "/v1/videos"), ("POST", "/v1/videos"),
             ("DELETE", f"/v1/videos/{id}"), ("GET", f"/v1/videos/{id}/content"), ("GET", f"/v1/videos/{id}/events"),
             ("GET", "/v1/models"), ("GET", "/v1/none"), ("PUT", "/v1/videos"), ("GET", "/metrics"),
             ("GET", "/openapi.json"), ("GET", "/docs"), ("OPTIONS", "/v1/videos"), ("BREW", "/x")]  # fmt: skip
    answers = set()
    for authorization in wrong:
        for method, path in paths:
            headers = {} if authorization is None else {"Authorization": authorization}
            answer = server.http.request(method, path, headers=headers, content=b"{")
            assert answer.status_code == 401, (authorization, method, path)
            fields = {name: value for name, value in answer.headers.items() if name != "date"}
            answers.add((answer.text, str(sorted(fields.items()))))
    assert len(answers) == 1  # the same bytes for all of them
    for path in ("/", "/healthz", "/readyz", "/assets/page.js"):
        assert server.http.get(path).status_code == 200
    assert server.http.get(f"/v1/videos/{id}", headers=bearer(key)).status_code == 200


def test_owners_do_not_see_each_other(serve, ring):
    key, other, keys = ring()
    server = serve(keys=keys)
    id = server.openai(key).videos.create(prompt="a").id
    for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/remix"), ("DELETE", "")):
        theirs = server.http.request(method, f"/v1/videos/{id}{path}", headers=bearer(other), json={"prompt": "b"})
        none = server.http.request(
            method, f"/v1/videos/{'video_' + 32 * '0'}{path}", headers=bearer(other), json={"prompt": "b"}
        )
        assert theirs.status_code == none.status_code == 404
        assert theirs.text.replace(id, "ID") == none.text.replace("video_" + 32 * "0", "ID")
    assert server.openai(other).videos.list().data == []
    assert [video.id for video in server.openai(key).videos.list()] == [id]


def test_a_key_has_limits(serve, ring):
    key, other, keys = ring(jobs=1, requests_per_minute=60)
    server = serve(keys=keys)
    assert server.http.post("/v1/videos", json={"prompt": "a", **SLOW}, headers=bearer(key)).status_code == 200
    full = server.http.post("/v1/videos", json={"prompt": "a"}, headers=bearer(key))
    assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full" and full.headers["retry-after"]
    assert server.http.post("/v1/videos", json={"prompt": "a"}, headers=bearer(other)).status_code == 200
    statuses = [server.http.get("/v1/models", headers=bearer(key)) for _ in range(70)]
    limited = [answer for answer in statuses if answer.status_code == 429]
    assert limited and limited[0].json()["error"]["code"] == "rate_limited" and limited[0].headers["retry-after"]
    assert server.http.get("/v1/models", headers=bearer(other)).status_code == 200


def test_the_bucket_fills_evenly(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rates, key = RateLimit(), Key("a", b"", requests_per_minute=60)
    assert [rates.take(key) for _ in range(60)] == [0.0] * 60
    assert rates.take(key) == pytest.approx(1.0)
    now[0] += 2.0
    assert [rates.take(key) for _ in range(2)] == [0.0] * 2 and rates.take(key) > 0


def test_every_key_is_compared(monkeypatch):
    compared = []
    monkeypatch.setattr(
        "pylumiere.serve.keys.hmac.compare_digest", lambda a, b: compared.append(b) or a == b
    )  # fmt: skip
    pairs = [make_key(f"k{i}") for i in range(5)]
    keys = [Key(f"k{i}", hashlib.sha256(key.encode()).digest()) for i, (key, _) in enumerate(pairs)]
    ring = KeyRing(keys)
    for i, (key, _) in enumerate(pairs):
        compared.clear()
        assert ring.find(key).name == f"k{i}" and len(compared) == 5
    compared.clear()
    assert ring.find("wrong") is None and len(compared) == 5


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    made = cli("serve-key", "alice", "--file", str(file), "--jobs", "3")
    key = made.stdout.strip()
    assert made.returncode == 0 and key.startswith("pyl-") and key not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    append_key(file, make_key("bob")[1])
    alice, bob = read_keys(file)
    assert (alice.name, alice.jobs, bob.name) == ("alice", 3, "bob")
    assert KeyRing([alice, bob]).find(key) is alice
    again = cli("serve-key", "alice", "--file", str(file))
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "alice" in again.stderr
    assert cli("serve-key", "a b").returncode == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no key"),
        ("# only a comment\n", "no key"),
        ("alice\n", "line 1"),
        ("alice sha256:12\n", "line 1"),
        ("alice sha256:" + "0" * 64 + " jobs=0\n", "jobs"),
        ("alice sha256:" + "0" * 64 + " admin=1\n", "admin"),
        (2 * ("alice sha256:" + "0" * 64 + "\n"), "taken"),
    ],
)
def test_wrong_key_files(tmp_path, text, message):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        read_keys(tmp_path / "keys")


def test_options_that_do_not_fit(tmp_path, capsys):
    with pytest.raises(InvalidRequest, match="api-keys"):
        serve(ServeOptions(host="0.0.0.0", data=tmp_path))
    with pytest.raises(InvalidRequest, match="cannot be read"):
        serve(ServeOptions(api_keys=tmp_path / "none", data=tmp_path))
    with pytest.raises(InvalidRequest, match="cannot listen"):
        serve(ServeOptions(port=1, host="127.0.0.99.1", api_keys=_some_keys(tmp_path), data=tmp_path))
    for arguments in (["--host", "0.0.0.0"], ["--keep-for", "soon"], ["--memory-budget", "much"], ["--model", "none"]):
        assert main(["serve", "--port", "0", "--data", str(tmp_path / "d"), *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1, arguments


def test_only_the_signer_s_bundle_is_served(tmp_path, capsys):
    """The sample is signed, and its graphs are random bytes: whoever trusts the signer comes as far as those."""
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    pytest.importorskip("cryptography", reason="the export extra is not installed")
    from support.fuzzing import write_sample

    from pylumiere.checkpoints.bundle import make_key_pair

    bundle, key = write_sample(tmp_path)
    make_key_pair(tmp_path / "other.pem", tmp_path / "other.pub.pem")
    arguments = ["serve", "--model", str(bundle), "--port", "0", "--data", str(tmp_path / "d"), "--device", "cpu"]
    said = []
    for trusted in (tmp_path / "other.pub.pem", key):
        assert main([*arguments, "--key", str(trusted)]) == 2
        said.append(capsys.readouterr().err)
    assert "signature" in said[0] and "signature" not in said[1], said


def _some_keys(folder):
    append_key(folder / "some", make_key("a")[1])
    return folder / "some"


def test_a_taken_port_is_named(shared_server, tmp_path):
    port = int(shared_server.url.rsplit(":", 1)[1])
    with pytest.raises(InvalidRequest, match=f"port {port}"):
        serve(ServeOptions(port=port, data=tmp_path))


def test_sizes_and_times():
    assert parse_bytes("x", "4GiB") == 4 * 2**30 and parse_bytes("x", "1.5 MB") == 1_500_000
    assert parse_seconds("x", "7d") == 7 * 86400 and parse_seconds("x", "0.5h") == 1800
    for text in ("", "0", "-1", "4 giga", "1e9"):
        with pytest.raises(InvalidRequest):
            parse_bytes("--max-body", text)


def test_a_server_with_keys(process, tmp_path):
    file = tmp_path / "keys"
    key, line = make_key("alice")
    append_key(file, line)
    server = process("--api-keys", str(file), "--host", "0.0.0.0")
    url = server.start().replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/v1/models", headers=bearer(key)).status_code == 200
