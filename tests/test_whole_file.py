import errno
import os
import stat

import pytest

from moe_server.whole_file import write_whole


def test_directories_are_made_and_what_was_there_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, b"one")
    write_whole(path, b"two")
    assert path.read_bytes() == b"two"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "fdopen"])
def test_a_write_that_fails_changes_nothing_and_leaves_nothing(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    write_whole(path, b"one")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_left_alone(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(OSError, match="regular"):
            write_whole(path, b"one")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
