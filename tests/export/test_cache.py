from __future__ import annotations

import os
import threading

import pytest
from pylumiere.export.cache import Cache, key_of

from pylumiere.errors import BundleError

KEY = key_of("plan", {"sm": 89})


def _fill(folder):
    (folder / "a.bin").write_bytes(b"abc")


def test_an_entry_is_built_once(tmp_path):
    cache = Cache(tmp_path / "c")
    folder, hit = cache.get(KEY, _fill)
    assert not hit
    again, hit = cache.get(KEY, lambda out: pytest.fail("built twice"))
    assert hit
    assert again == folder
    assert (again / "a.bin").read_bytes() == b"abc"


def test_two_builds_at_once_share_one_entry(tmp_path):
    built, started = [], threading.Barrier(2)

    def build(out):
        built.append(out)
        _fill(out)

    def ask():
        cache = Cache(tmp_path / "c")
        started.wait()
        cache.get(KEY, build)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_a_damaged_entry_is_built_again(tmp_path, damage):
    cache = Cache(tmp_path / "c")
    folder, _ = cache.get(KEY, _fill)
    path = folder / "a.bin"
    match damage:
        case "flip":
            path.write_bytes(b"abd")
        case "truncate":
            path.write_bytes(b"ab")
        case "remove":
            path.unlink()
        case "add":
            (folder / "b.bin").write_bytes(b"")
    folder, hit = cache.get(KEY, _fill)
    assert not hit
    assert sorted(p.name for p in folder.iterdir()) == ["a.bin", "contents.json"]
    assert path.read_bytes() == b"abc"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    cache = Cache(tmp_path / "c")

    def fail(out):
        _fill(out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get(KEY, fail)
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEY}.lock"]
    assert not cache.get(KEY, _fill)[1]


def test_the_folder_is_the_users_alone(tmp_path):
    cache = Cache(tmp_path / "c")
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    os.chmod(cache.folder, 0o777)
    with pytest.raises(BundleError, match="can be written by others"):
        Cache(cache.folder)


def test_a_link_is_no_cache(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(BundleError, match="not a folder of this user"):
        Cache(tmp_path / "link")


@pytest.mark.parametrize("change", [{"sm": 90}, {"sm": "89"}, {"sm": 89, "precision": "fp16"}])
def test_every_fact_is_part_of_the_key(change):
    assert key_of("plan", change) != KEY
    assert key_of("graph", {"sm": 89}) != KEY
