"""Jobs in SQLite, results as files. What was accepted is never lost, and what is served is whole.

    DIR/jobs.sqlite3        the records; WAL, every commit synced
    DIR/lock                held by the one process that uses the folder
    DIR/inputs/ID/NAME      a request's pictures, clips and masks as they came, after they were decoded once; until the
                            job fails or goes
    DIR/work/ID/            a result while it is written
    DIR/videos/ID/          a whole result: made in work/, synced, then renamed

A job is queued -> in_progress -> completed or failed. After a kill, `recover` finds jobs in progress: one whose result
was already renamed is completed; the others are queued again, and fail with the reason once they have been started
`MAX_ATTEMPTS` times. A job's time may be limited: one that waits beyond its deadline fails. Names of files are made
from ids that this module drew and, for inputs, from names of fields and numbers of frames; from nothing else that a
client sent.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylumiere.errors import InvalidRequest

MAX_ATTEMPTS = 3
ID = re.compile(r"video_[0-9a-f]{32}")
INPUT = re.compile(r"image|video|mask|keyframe_-?[0-9]{1,7}")
_FACTS = "facts.json"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    token TEXT,
    status TEXT NOT NULL CHECK (status IN ('queued', 'in_progress', 'completed', 'failed')),
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    model TEXT NOT NULL,
    request TEXT NOT NULL,
    plan TEXT NOT NULL,
    inputs TEXT NOT NULL,
    deadline REAL,
    remixed_from TEXT,
    error_code TEXT,
    error_message TEXT,
    bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, seq);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, seq);
CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_token ON jobs (owner, token) WHERE token IS NOT NULL;
"""
_VERSION = 2
# What an older folder lacks. Its pictures are moved before, which may be done twice.
_FROM_VERSION_1 = """
BEGIN IMMEDIATE;
ALTER TABLE jobs ADD COLUMN inputs TEXT NOT NULL DEFAULT '[]';
ALTER TABLE jobs ADD COLUMN deadline REAL;
UPDATE jobs SET inputs='["image"]' WHERE has_image;
ALTER TABLE jobs DROP COLUMN has_image;
PRAGMA user_version=2;
COMMIT;
"""


class QueueFull(Exception):
    """No room for another job: the server's queue is full, or the owner has as many as allowed."""


@dataclass(frozen=True)
class Job:
    """A record.

    Attributes:
        request: fields of a GenerationRequest, the seed among them, so that a second run gives the same bytes.
        plan: concrete values of the clip: num_frames, fps, height, width, seed, sampler, steps, guidance.
        inputs: names of the files that came with the request.
        deadline: when it must be done (a Unix time), or None.
    """

    seq: int
    id: str
    owner: str
    status: str
    created_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    model: str
    request: dict[str, Any]
    plan: dict[str, Any]
    inputs: list[str]
    deadline: float | None
    remixed_from: str | None
    error_code: str | None
    error_message: str | None
    bytes: int

    @property
    def is_active(self) -> bool:
        return self.status in ("queued", "in_progress")


_COLUMNS = ", ".join(Job.__dataclass_fields__)


class Store:
    """All methods may be called from any thread.

    Args:
        folder: made if missing.
        keep_seconds, keep_bytes: retention, of ended jobs and of results; None keeps.

    Raises:
        InvalidRequest: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: str | os.PathLike, *, keep_seconds: float | None = None, keep_bytes: int | None = None):
        self.folder = Path(folder).absolute()
        self.keep_seconds, self.keep_bytes = keep_seconds, keep_bytes
        self._lock = threading.RLock()
        self._readers: Counter[str] = Counter()
        self._doomed: set[str] = set()
        try:
            for part in ("inputs", "work", "videos"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            self._lock_file = open(self.folder / "lock", "ab")  # noqa: SIM115 (held until close)
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise InvalidRequest(f"data folder {str(folder)!r} is in use by another server") from None
        except OSError as error:
            raise InvalidRequest(f"data folder {str(folder)!r} cannot be used: {error.strerror}") from error
        try:
            self._open(self.folder / "jobs.sqlite3")
        except sqlite3.DatabaseError as error:
            self._lock_file.close()
            raise InvalidRequest(f"data folder {str(folder)!r}: jobs.sqlite3 cannot be used: {error}") from error

    def _open(self, path: Path) -> None:
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA secure_delete=ON")  # a deleted prompt is gone
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 1:
            self._update()
        elif version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"its version is {version}; this server knows {_VERSION}")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"PRAGMA user_version={_VERSION}")

    def _update(self) -> None:
        for file in (self.folder / "inputs").glob("*.png"):
            (self.folder / "inputs" / file.stem).mkdir(exist_ok=True)
            os.rename(file, self.folder / "inputs" / file.stem / "image")
        self._db.executescript(_FROM_VERSION_1)

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._lock_file.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ---- records -----------------------------------------------------------------------------------------------------

    def add(
        self,
        owner: str,
        model: str,
        request: dict[str, Any],
        plan: dict[str, Any],
        *,
        inputs: Mapping[str, bytes] | None = None,
        timeout: float | None = None,
        remixed_from: str | None = None,
        token: str | None = None,
        queue_limit: int,
        owner_limit: int,
    ) -> Job:
        """Accepts a job; when this returns, the job is on the disk.

        Args:
            inputs: files that the request needs, by names that `INPUT` allows.
            timeout: seconds from now in which it must be done.
            token: of an owner's request that may be sent twice; the second gets the first one's job.

        Raises:
            QueueFull: `queue_limit` jobs wait, or the owner has `owner_limit` that wait or run.
        """
        id, now, inputs = f"video_{secrets.token_hex(16)}", time.time(), inputs or {}
        try:
            with self._transaction() as db:
                if token is not None and (known := self._one("owner=? AND token=?", owner, token)) is not None:
                    return known
                if db.execute("SELECT count(*) FROM jobs WHERE status='queued'").fetchone()[0] >= queue_limit:
                    raise QueueFull(f"the queue is full: {queue_limit} jobs wait")
                active = "SELECT count(*) FROM jobs WHERE owner=? AND status IN ('queued', 'in_progress')"
                if db.execute(active, (owner,)).fetchone()[0] >= owner_limit:
                    raise QueueFull(f"this key has {owner_limit} jobs that wait or run, which is its limit")
                if inputs:
                    self._write_inputs(id, inputs)
                db.execute(
                    "INSERT INTO jobs (id, owner, token, status, created_at, model, request, plan, inputs, deadline, "
                    "remixed_from) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?)",
                    (id, owner, token, now, model, json.dumps(request), json.dumps(plan), json.dumps(list(inputs)),
                     None if timeout is None else now + timeout, remixed_from),
                )  # fmt: skip
        except BaseException:
            shutil.rmtree(self._inputs(id), ignore_errors=True)
            raise
        return self.get(id, owner)

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """A job by its id; None if there is none, or it is another owner's."""
        if not ID.fullmatch(id):
            return None
        return self._one("id=?", id) if owner is None else self._one("id=? AND owner=?", id, owner)

    def list(self, owner: str, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """A page of an owner's jobs, and whether there are more.

        Raises:
            KeyError: the owner has no job `after`.
        """
        where, values = "owner=?", [owner]
        with self._lock:
            if after is not None:
                start = self.get(after, owner)
                if start is None:
                    raise KeyError(after)
                where += " AND seq<?" if newest_first else " AND seq>?"
                values.append(start.seq)
            order = "DESC" if newest_first else "ASC"
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM jobs WHERE {where} ORDER BY seq {order} LIMIT ?", (*values, limit + 1)
            ).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def claim(self) -> Job | None:
        """Starts the next job: of the owners who wait, the one with the fewest running jobs; then the oldest."""
        with self._transaction() as db:
            row = db.execute(
                "SELECT id FROM jobs AS waiting WHERE status='queued' ORDER BY "
                "(SELECT count(*) FROM jobs WHERE status='in_progress' AND owner=waiting.owner), seq LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET status='in_progress', started_at=?, attempts=attempts+1 WHERE id=?",
                (time.time(), *row),
            )
            return self._one("id=?", *row)

    def requeue(self, id: str, *, is_attempt: bool) -> None:
        """Back into its old place in the queue; or failed, after too many attempts that were its own."""
        with self._transaction() as db:
            if is_attempt:
                self._give_up(db, "id=?", id)
            db.execute(
                "UPDATE jobs SET status='queued', started_at=NULL, attempts=attempts-? WHERE id=? AND "
                "status='in_progress'", (0 if is_attempt else 1, id),
            )  # fmt: skip
            has_failed = self._one("id=? AND status='failed'", id) is not None
        if has_failed:
            self._drop_inputs(id)

    def _give_up(self, db: sqlite3.Connection, where: str, *values: Any) -> None:
        db.execute(
            "UPDATE jobs SET status='failed', ended_at=?, error_code='interrupted', error_message='the server or the "
            f"worker stopped ' || attempts || ' times while this job ran' WHERE {where} AND status='in_progress' "
            "AND attempts>=?", (time.time(), *values, MAX_ATTEMPTS),
        )  # fmt: skip

    def expire(self) -> list[str]:
        """Fails what waits beyond its deadline; returns the ids."""
        with self._transaction() as db:
            now = time.time()
            late = db.execute(
                "SELECT id, deadline-created_at FROM jobs WHERE status='queued' AND deadline<=?", (now,)
            ).fetchall()
            texts = [f"it was not started within its {round(seconds, 3):g} s" for _, seconds in late]
            db.executemany(
                "UPDATE jobs SET status='failed', ended_at=?, error_code='deadline_exceeded', error_message=? "
                "WHERE id=?", [(now, text, id) for text, (id, _) in zip(texts, late, strict=True)],
            )  # fmt: skip
        for id, _ in late:
            self._drop_inputs(id)
        return [id for id, _ in late]

    def next_deadline(self) -> float | None:
        """The earliest of those that wait."""
        with self._lock:
            return self._db.execute("SELECT min(deadline) FROM jobs WHERE status='queued'").fetchone()[0]

    def fail(self, id: str, code: str, message: str) -> bool:
        """False if the job is gone."""
        with self._transaction() as db:
            done = db.execute(
                "UPDATE jobs SET status='failed', ended_at=?, error_code=?, error_message=? WHERE id=? AND "
                "status IN ('queued', 'in_progress')", (time.time(), code, message, id),
            )  # fmt: skip
        if done.rowcount == 1:
            self._drop_inputs(id)
        return done.rowcount == 1

    def delete(self, id: str, owner: str) -> Job | None:
        """Removes a job and its files; files that are being read go when they have been. None if there is no job."""
        with self._transaction() as db:
            job = self.get(id, owner)
            if job is None:
                return None
            db.execute("DELETE FROM jobs WHERE id=?", (id,))
        self._remove_files(id)
        return job

    def counts(self) -> dict[str, int]:
        """Jobs by status."""
        with self._lock:
            found = dict(self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in ("queued", "in_progress", "completed", "failed")}

    def result_bytes(self) -> int:
        with self._lock:
            return self._db.execute("SELECT coalesce(sum(bytes), 0) FROM jobs").fetchone()[0]

    def _one(self, where: str, *values: Any) -> Job | None:
        with self._lock:
            row = self._db.execute(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", values).fetchone()
        return None if row is None else _job(row)

    # ---- files -------------------------------------------------------------------------------------------------------

    def _inputs(self, id: str) -> Path:
        return self.folder / "inputs" / id

    def _write_inputs(self, id: str, inputs: Mapping[str, bytes]) -> None:
        folder = self._inputs(id)
        folder.mkdir()
        for name, data in inputs.items():
            if not INPUT.fullmatch(name):
                raise ValueError(f"no input is called {name!r}")
            self._write(folder / name, data)
        _sync(folder)
        _sync(folder.parent)

    def _drop_inputs(self, id: str) -> None:
        """Of a job that failed; nothing will read them."""
        shutil.rmtree(self._inputs(id), ignore_errors=True)

    def inputs(self, job: Job) -> dict[str, bytes]:
        """The files that came with a request.

        Raises:
            FileNotFoundError: the job was deleted meanwhile.
        """
        return {name: (self._inputs(job.id) / name).read_bytes() for name in job.inputs}

    def start_result(self, id: str) -> Path:
        """An empty folder to write a result into."""
        folder = self.folder / "work" / id
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def complete(self, id: str) -> bool:
        """Gives the result in `start_result`'s folder its name, then ends the job. False if the job is gone."""
        work, final = self.folder / "work" / id, self.folder / "videos" / id
        ended_at, size = time.time(), 0
        for file in work.iterdir():
            _sync(file)
            size += file.stat().st_size
        if self._inputs(id).is_dir():  # they stay, for a remix
            size += sum(file.stat().st_size for file in self._inputs(id).iterdir())
        self._write(work / _FACTS, json.dumps({"ended_at": ended_at, "bytes": size}).encode())
        _sync(work)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)
        _sync(final.parent)
        with self._transaction() as db:
            done = db.execute(
                "UPDATE jobs SET status='completed', ended_at=?, bytes=? WHERE id=? AND status='in_progress'",
                (ended_at, size, id),
            )
        if done.rowcount == 0:
            self._remove_files(id)
        return done.rowcount == 1

    def drop_result(self, id: str) -> None:
        shutil.rmtree(self.folder / "work" / id, ignore_errors=True)

    def lease(self, id: str, owner: str, name: str) -> Path | None:
        """A result's file, which stays until `release`; None if there is no such job or it is not completed."""
        with self._lock:
            job = self.get(id, owner)
            path = self.folder / "videos" / id / name
            if job is None or job.status != "completed" or not path.is_file():
                return None
            self._readers[id] += 1
            return path

    def release(self, id: str) -> None:
        with self._lock:
            self._readers[id] -= 1
            if self._readers[id] > 0:
                return
            del self._readers[id]
            if id not in self._doomed:
                return
            self._doomed.discard(id)
        self._remove_files(id)

    def _remove_files(self, id: str) -> None:
        with self._lock:
            if self._readers.get(id):
                self._doomed.add(id)
                return
        self._drop_inputs(id)
        shutil.rmtree(self.folder / "videos" / id, ignore_errors=True)

    def _write(self, path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    # ---- after a start, and from time to time ------------------------------------------------------------------------

    def recover(self) -> dict[str, int]:
        """Before the first `claim`: settles what an earlier process left. Returns what was done."""
        done = Counter(adopted=0, requeued=0, failed=0)
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        (self.folder / "work").mkdir()
        with self._transaction() as db:
            for (id,) in db.execute("SELECT id FROM jobs WHERE status='in_progress'").fetchall():
                with contextlib.suppress(FileNotFoundError):  # the rename was done, the record was not
                    facts = json.loads((self.folder / "videos" / id / _FACTS).read_bytes())
                    db.execute(
                        "UPDATE jobs SET status='completed', ended_at=?, bytes=? WHERE id=?",
                        (facts["ended_at"], facts["bytes"], id),
                    )
                    done["adopted"] += 1
            before = db.total_changes
            self._give_up(db, "1")
            done["failed"] = db.total_changes - before
            db.execute("UPDATE jobs SET status='queued', started_at=NULL WHERE status='in_progress'")
            done["requeued"] = db.total_changes - before - done["failed"]
            useful = {id for (id,) in db.execute("SELECT id FROM jobs WHERE status!='failed'")}
            completed = {id for (id,) in db.execute("SELECT id FROM jobs WHERE status='completed'")}
        for folder in (self.folder / "videos").iterdir():
            if folder.name not in completed:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in (self.folder / "inputs").iterdir():
            if folder.name not in useful:
                shutil.rmtree(folder, ignore_errors=True)
        return dict(done)

    def expires_at(self, job: Job) -> float | None:
        if self.keep_seconds is None or job.ended_at is None:
            return None
        return job.ended_at + self.keep_seconds

    def sweep(self) -> list[str]:
        """Retention: removes what is too old, then the oldest results until the rest fit; the newest always stays."""
        gone: list[str] = []
        with self._transaction() as db:
            if self.keep_seconds is not None:
                rows = db.execute("SELECT id FROM jobs WHERE ended_at<?", (time.time() - self.keep_seconds,)).fetchall()
                gone += [id for (id,) in rows]
            if self.keep_bytes is not None:
                total = 0
                rows = db.execute(
                    "SELECT id, bytes FROM jobs WHERE status='completed' ORDER BY ended_at DESC, seq DESC"
                )
                for index, (id, size) in enumerate(rows.fetchall()):
                    total += size
                    if index and total > self.keep_bytes and id not in gone:
                        gone.append(id)
            db.executemany("DELETE FROM jobs WHERE id=?", [(id,) for id in gone])
        for id in gone:
            self._remove_files(id)
        return gone


def _job(row: tuple) -> Job:
    values = dict(zip(Job.__dataclass_fields__, row, strict=True))
    for name in ("request", "plan", "inputs"):
        values[name] = json.loads(values[name])
    return Job(**values)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
