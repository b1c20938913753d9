import os
import subprocess
import sys
import threading

import pytest

from flaskapp.ops.private_files import kept_secret, make_private, write_private

ASKS = """
import pathlib, sys
from flaskapp.ops.private_files import kept_secret
print(kept_secret(pathlib.Path(sys.argv[1])))
"""


def mode_of(path):
    return path.stat().st_mode & 0o777


@pytest.fixture(autouse=True)
def _an_open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_secret_is_made_once_and_readable_to_its_owner_alone(tmp_path):
    place = tmp_path / "secret"
    first = kept_secret(place)
    assert len(first) == 32
    assert mode_of(place) == 0o600
    assert kept_secret(place) == first
    assert kept_secret(tmp_path / "other") != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "secret"]


def test_of_many_who_make_a_secret_at_once_all_have_the_same(tmp_path):
    words = [sys.executable, "-c", ASKS, str(tmp_path / "secret")]
    asking = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({process.communicate(timeout=20)[0] for process in asking}) == 1


def test_what_is_written_is_never_open_and_never_half(tmp_path):
    place = tmp_path / "record"
    place.write_text("old")
    place.chmod(0o644)
    write_private(place, "new")
    assert (place.read_text(), mode_of(place)) == ("new", 0o600)
    assert list(tmp_path.iterdir()) == [place]


def test_a_folder_that_others_could_read_is_closed_with_all_in_it(tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside"
    outside.write_text("of somebody else")
    outside.chmod(0o644)
    (folder / "redis" / "appendonlydir").mkdir(parents=True)
    for path in (folder / "app.log", folder / "redis" / "appendonlydir" / "appendonly.aof.1"):
        path.write_text("x")
        path.chmod(0o644)
    (folder / "program").write_text("#!/bin/sh\n")
    (folder / "program").chmod(0o755)
    (folder / "link").symlink_to(outside)
    assert make_private(folder)
    modes = {path.name: oct(mode_of(path)) for path in (folder, *folder.rglob("*")) if not path.is_symlink()}
    assert modes == {
        "data": "0o700",
        "redis": "0o700",
        "appendonlydir": "0o700",
        "app.log": "0o600",
        "appendonly.aof.1": "0o600",
        "program": "0o700",
    }
    assert mode_of(outside) == 0o644


def test_files_that_come_and_go_meanwhile_are_no_failure(tmp_path):
    place, is_over = tmp_path / "comes-and-goes", threading.Event()

    def come_and_go():
        while not is_over.is_set():
            place.touch()
            place.unlink()

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        assert all(make_private(tmp_path) for _ in range(300))
    finally:
        is_over.set()
        other.join()


def test_a_file_that_cannot_be_closed_is_reported_and_the_others_are_closed(tmp_path, monkeypatch):
    ours, others = tmp_path / "ours", tmp_path / "others"
    for path in (ours, others):
        path.touch(mode=0o644)
    chmod = os.chmod

    def refuse(path, *arguments, **options):
        if os.fspath(path) == os.fspath(others):
            raise PermissionError(1, "Operation not permitted")
        chmod(path, *arguments, **options)

    monkeypatch.setattr(os, "chmod", refuse)
    assert not make_private(tmp_path)
    assert mode_of(ours) == 0o600
