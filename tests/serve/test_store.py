"""Jobs and results over restarts and kills: nothing lost, nothing half-written; retention; the folder's lock."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import sqlite3
import subprocess
import sys
import time

import httpx
import pytest

from pylumiere.errors import InvalidRequest
from pylumiere.media.video import read_video
from pylumiere.serve.store import MAX_ATTEMPTS, QueueFull, Store

from .chaos import run_chaos
from .conftest import SLOW, wait_until

LIMITS = {"queue_limit": 100, "owner_limit": 100}
PLAN = {"num_frames": 8}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "data")
    yield store
    store.close()


def add(store, owner="alice", **fields):
    return store.add(owner, "tiny", {"prompt": "a", **fields}, PLAN, **LIMITS)


def finish(store, job, size=10):
    (store.start_result(job.id) / "video.mp4").write_bytes(b"x" * size)
    return store.complete(job.id)


def reopened(store):
    store.close()
    again = Store(store.folder)
    return again, again.recover()


# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_job_from_acceptance_to_its_file(store):
    job = add(store, seed=7)
    assert (job.status, job.attempts, job.request) == ("queued", 0, {"prompt": "a", "seed": 7})
    claimed = store.claim()
    assert claimed.id == job.id and claimed.status == "in_progress" and claimed.attempts == 1
    assert store.lease(job.id, "alice", "video.mp4") is None
    assert finish(store, job)
    path = store.lease(job.id, "alice", "video.mp4")
    assert path.read_bytes() == b"x" * 10 and store.get(job.id).bytes == 10
    assert store.lease(job.id, "bob", "video.mp4") is None and store.get(job.id, "bob") is None
    store.release(job.id)
    assert store.delete(job.id, "bob") is None and store.delete(job.id, "alice").id == job.id
    assert not path.exists() and store.claim() is None


def test_owners_take_turns(store):
    many = [add(store, "alice") for _ in range(3)]
    one = add(store, "bob")
    assert [store.claim().id for _ in range(4)] == [many[0].id, one.id, many[1].id, many[2].id]


def test_limits(store):
    add(store)
    with pytest.raises(QueueFull, match="queue"):
        store.add("bob", "tiny", {}, PLAN, queue_limit=1, owner_limit=9)
    with pytest.raises(QueueFull, match="key"):
        store.add("alice", "tiny", {}, PLAN, queue_limit=9, owner_limit=1, inputs={"image": b"png"})
    assert not list((store.folder / "inputs").iterdir())


def test_threads_share_a_store(store):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ids = {job.id for job in pool.map(lambda _: add(store), range(64))}
        claimed = {job.id for job in pool.map(lambda _: store.claim(), range(64))}
    assert claimed == ids and len(ids) == 64


def test_ids_that_are_no_ids_touch_nothing(store):
    (store.folder / "videos" / "x").mkdir()
    for id in ("x", "..", "../videos/x", "video_" + "g" * 32, ""):
        assert store.get(id) is None and store.lease(id, "alice", "video.mp4") is None
        assert store.delete(id, "alice") is None
    assert (store.folder / "videos" / "x").exists()


# ---- a kill at every point -------------------------------------------------------------------------------------------


def test_a_kill_while_it_waits_or_runs(store):
    waiting, running = add(store), add(store)
    assert store.claim().id == waiting.id
    again, done = reopened(store)
    assert done == {"adopted": 0, "requeued": 1, "failed": 0}
    assert [again.claim().id for _ in range(2)] == [waiting.id, running.id]
    assert again.get(waiting.id).attempts == 2
    again.close()


def test_a_kill_while_the_result_is_written(store):
    job = add(store)
    store.claim()
    (store.start_result(job.id) / "video.mp4").write_bytes(b"half")
    again, done = reopened(store)
    assert done["requeued"] == 1 and not list((again.folder / "work").iterdir())
    assert again.lease(job.id, "alice", "video.mp4") is None
    again.close()


def test_a_kill_between_the_file_and_its_record(store):
    job = add(store)
    store.claim()
    finish(store, job)
    with sqlite3.connect(store.folder / "jobs.sqlite3") as db:  # as if the last commit had not been made
        db.execute("UPDATE jobs SET status='in_progress', ended_at=NULL, bytes=0")
    db.close()
    again, done = reopened(store)
    assert done["adopted"] == 1
    assert again.get(job.id).status == "completed" and again.get(job.id).bytes == 10
    assert again.lease(job.id, "alice", "video.mp4").read_bytes() == b"x" * 10
    again.close()


def test_a_kill_between_deletion_and_its_files(store):
    job = store.add("alice", "tiny", {}, PLAN, inputs={"image": b"png", "keyframe_-1": b"png"}, **LIMITS)
    assert store.inputs(job) == {"image": b"png", "keyframe_-1": b"png"}
    store.claim()
    finish(store, job)
    assert store.get(job.id).bytes == 10 + 6  # inputs count
    with sqlite3.connect(store.folder / "jobs.sqlite3") as db:
        db.execute("DELETE FROM jobs")
    db.close()
    again, _ = reopened(store)
    assert not list((again.folder / "videos").iterdir()) and not list((again.folder / "inputs").iterdir())
    again.close()


def test_inputs_without_a_record_go(store):
    """A kill after the files and before the record."""
    kept = store.add("alice", "tiny", {}, PLAN, inputs={"video": b"mp4"}, **LIMITS)
    store._write_inputs("video_" + "0" * 32, {"mask": b"png"})
    again, _ = reopened(store)
    assert [folder.name for folder in (again.folder / "inputs").iterdir()] == [kept.id]
    assert again.inputs(again.get(kept.id)) == {"video": b"mp4"}
    with pytest.raises(ValueError, match="called"):
        again.add("alice", "tiny", {}, PLAN, inputs={"../x": b""}, **LIMITS)
    assert len(list((again.folder / "inputs").iterdir())) == 1
    again.close()


def test_inputs_of_what_failed_go(store):
    jobs = [store.add("alice", "tiny", {}, PLAN, inputs={"mask": b"png"}, timeout=t, **LIMITS) for t in (None, 0.01)]
    store.fail(jobs[0].id, "server_error", "x")
    time.sleep(0.02)
    store.expire()
    assert not list((store.folder / "inputs").iterdir()) and store.get(jobs[0].id).status == "failed"
    worn = store.add("alice", "tiny", {}, PLAN, inputs={"mask": b"png"}, **LIMITS)
    for _ in range(MAX_ATTEMPTS):
        assert store.inputs(worn) == {"mask": b"png"}
        store.claim()
        store.requeue(worn.id, is_attempt=True)
    assert store.get(worn.id).status == "failed" and not list((store.folder / "inputs").iterdir())


def test_what_waits_too_long_fails(store):
    late = store.add("alice", "tiny", {}, PLAN, timeout=0.01, **LIMITS)
    add(store)
    assert store.next_deadline() == late.deadline
    time.sleep(0.02)
    assert store.expire() == [late.id] and store.next_deadline() is None
    assert store.get(late.id).error_code == "deadline_exceeded" and "0.01 s" in store.get(late.id).error_message
    assert store.claim().id != late.id and store.claim() is None


def test_a_folder_of_the_first_version_is_taken_over(store):
    """Its pictures had a column, and lay beside each other."""
    job = store.add("alice", "tiny", {"prompt": "a"}, PLAN, inputs={"image": b"png"}, **LIMITS)
    folder = store.folder
    store.close()
    with sqlite3.connect(folder / "jobs.sqlite3") as db:
        db.execute("ALTER TABLE jobs ADD COLUMN has_image INTEGER NOT NULL DEFAULT 1")
        db.execute("ALTER TABLE jobs DROP COLUMN inputs")
        db.execute("ALTER TABLE jobs DROP COLUMN deadline")
        db.execute("PRAGMA user_version=1")
    db.close()
    (folder / "inputs" / job.id / "image").rename(folder / "inputs" / f"{job.id}.png")
    (folder / "inputs" / job.id).rmdir()
    again = Store(folder)
    again.recover()
    assert again.inputs(again.claim()) == {"image": b"png"}
    again.close()
    Store(folder).close()


def test_a_job_that_stops_the_server_every_time_fails(store):
    job = add(store)
    for attempt in range(MAX_ATTEMPTS):
        assert store.claim().attempts == attempt + 1
        store, done = reopened(store)
    assert done["failed"] == 1 and store.claim() is None
    failed = store.get(job.id)
    assert failed.status == "failed" and failed.error_code == "interrupted" and "3 times" in failed.error_message
    store.close()


def test_a_stop_in_order_is_no_attempt(store):
    job = add(store)
    for _ in range(2 * MAX_ATTEMPTS):
        store.claim()
        store.requeue(job.id, is_attempt=False)
    assert store.claim().attempts == 1
    store.requeue(job.id, is_attempt=True)
    assert store.claim().attempts == 2


def test_a_deleted_job_leaves_no_result(store):
    job = add(store)
    store.claim()
    (store.start_result(job.id) / "video.mp4").write_bytes(b"x")
    store.delete(job.id, "alice")
    assert not store.complete(job.id) and not list((store.folder / "videos").iterdir())


# ---- retention and the folder ----------------------------------------------------------------------------------------


def test_retention_by_age(tmp_path):
    store = Store(tmp_path, keep_seconds=60)
    old, new, waiting = add(store), add(store), add(store)
    for job in (old, new):
        store.claim()
        finish(store, job)
    assert store.expires_at(store.get(new.id)) == pytest.approx(time.time() + 60, abs=5)
    with store._transaction() as db:
        db.execute("UPDATE jobs SET ended_at=ended_at-61 WHERE id=?", (old.id,))
    assert store.sweep() == [old.id] and store.get(old.id) is None and not (tmp_path / "videos" / old.id).exists()
    assert store.get(new.id) and store.get(waiting.id)
    store.close()


def test_retention_by_size_keeps_the_newest(tmp_path):
    store = Store(tmp_path, keep_bytes=25)
    jobs = [add(store) for _ in range(4)]
    for job in jobs:
        store.claim()
        finish(store, job, 10)
    assert set(store.sweep()) == {jobs[0].id, jobs[1].id} and store.result_bytes() == 20
    store.keep_bytes = 1
    assert store.sweep() == [jobs[2].id]
    store.close()


def test_one_process_a_folder(store):
    with pytest.raises(InvalidRequest, match="in use"):
        Store(store.folder)
    code = "import sys; from pylumiere.serve.store import Store; Store(sys.argv[1])"
    other = subprocess.run([sys.executable, "-P", "-c", code, store.folder], capture_output=True, text=True)
    assert "in use by another server" in other.stderr


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="cannot be used"):
        Store(tmp_path / "file")
    (tmp_path / "jobs.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(InvalidRequest, match=r"jobs\.sqlite3"):
        Store(tmp_path)


# ---- the whole server ------------------------------------------------------------------------------------------------


def test_a_restart_in_order(serve):
    first = serve(concurrency=1)
    done = first.create(seed=7)
    first.wait(done)
    content = first.http.get(f"/v1/videos/{done}/content").content
    running, waiting = first.create(**SLOW), first.create(seed=8)
    first.wait(running, "in_progress")
    first.close()
    second = serve(concurrency=1)
    assert second.http.get(f"/v1/videos/{done}/content").content == content
    assert second.wait(running, "in_progress")["status"] == "in_progress"
    second.http.delete(f"/v1/videos/{running}")
    assert second.wait(waiting)["status"] == "completed"


def test_sigterm_ends_in_order_while_clients_listen(process):
    server = process()
    url = server.start()
    id = httpx.post(f"{url}/v1/videos", json={"prompt": "a", **SLOW}).json()["id"]
    with httpx.stream("GET", f"{url}/v1/videos/{id}/events", timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        begun = time.monotonic()
        assert server.kill(signal.SIGTERM) == 0
        assert time.monotonic() - begun < 8
    server.start()
    wait_until(lambda: httpx.get(f"{server.url}/v1/videos/{id}").json()["status"] == "in_progress")


def test_kill_9_under_load(process, tmp_path):
    report = run_chaos(process("--concurrency", "2"), kills=2, clients=3, seconds_between=0.7)
    assert report["accepted"] >= 8 and report["completed"] == report["accepted"], json.dumps(report)
    assert report["lost"] == report["broken"] == 0
    for file in report["files"]:
        (tmp_path / "clip.mp4").write_bytes(file)
        assert read_video(tmp_path / "clip.mp4").frames.shape == (8, 32, 32, 3)
