"""The file that says which experts were wanted, and everything that can be wrong with it."""

import asyncio
import errno
import json
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from moe_server.checkpoint import read_checkpoint
from moe_server.messages import NO_HOT_SET, HotSet
from moe_server.warmup.hot_set import (
    ForeignError,
    HotSetKeeper,
    UnusableError,
    decode,
    default_path,
    encode,
    fingerprint,
)
from tests.tiny import Tiny

HOT_SET = HotSet([10.0, 2.5], [[0.5, 0.25, 0.0], [1.0, 0.125, 1 / 3]])
MINE = "0123abcd"
TINY = Tiny()


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("tiny"))


def hot_set_of(checkpoint) -> HotSet:
    choose = random.Random(0)
    shares = [[choose.random() for _ in range(TINY.experts)] for _ in range(TINY.layers)]
    return HotSet([100.0] * TINY.layers, shares)


def test_what_was_written_is_read():
    assert decode(encode(HOT_SET, MINE), MINE, 2, 3) == HOT_SET


def test_no_damage_goes_unnoticed():
    whole = encode(HOT_SET, MINE)
    choose = random.Random(1)
    for position in range(len(whole)):
        spoilt = bytearray(whole)
        spoilt[position] ^= 1 << choose.randrange(8)
        with pytest.raises(UnusableError):
            decode(bytes(spoilt), MINE, 2, 3)
    for length in range(len(whole) - 1):
        with pytest.raises(UnusableError):
            decode(whole[:length], MINE, 2, 3)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (encode(HOT_SET, "another"), "another checkpoint"),
        (encode(HOT_SET, MINE).replace(b'"version":1', b'"version":2'), "version 2"),
        (encode(HotSet([1.0], [[0.5] * 3]), MINE), "2 layers with 3 experts"),
        (encode(HotSet([1.0, 1.0], [[0.5] * 3, [7.0] * 3]), MINE), "2 layers with 3 experts"),
        (b'{"format":"moe-server hot set"' + b"[" * 100_000, "damaged"),
        (b"", "empty"),
    ],
)
def test_what_does_not_fit_says_why(content, why):
    with pytest.raises(UnusableError, match=why) as caught:
        decode(content, MINE, 2, 3)
    assert not isinstance(caught.value, ForeignError)


def test_something_else_is_foreign():
    with pytest.raises(ForeignError, match="no hot set"):
        decode(json.dumps({"model": "x"}).encode(), MINE, 2, 3)


def test_a_copy_has_the_same_fingerprint_and_another_model_has_not(path, tmp_path):
    shutil.copytree(path, tmp_path / "copy")
    other = replace(TINY, seed=5).write(tmp_path / "other")
    prints = [fingerprint(read_checkpoint(one)) for one in (path, tmp_path / "copy", other)]
    assert prints[0] == prints[1] != prints[2]


def test_files_are_kept_below_the_user_s_state(monkeypatch):
    assert default_path("x", {"XDG_STATE_HOME": "/s"}) == Path("/s/moe-server/hot-set/x.json")
    monkeypatch.setenv("HOME", "/h")
    expected = Path("/h/.local/state/moe-server/hot-set/x.json")
    assert default_path("x", {}) == default_path("x", {"XDG_STATE_HOME": "no/root"}) == expected


async def test_a_keeper_tells_what_it_kept_and_the_next_one_reads_it(path, tmp_path):
    checkpoint = read_checkpoint(path)
    file, told = tmp_path / "new" / "hot.json", hot_set_of(checkpoint)
    keeper = HotSetKeeper(checkpoint, str(file))
    assert await keeper.latest() == NO_HOT_SET
    keeper.keep(told)
    await keeper.saved()
    assert await keeper.latest() == told
    assert await HotSetKeeper(checkpoint, str(file)).latest() == told


async def test_the_last_one_told_is_written_however_many_come(path, tmp_path, monkeypatch):
    checkpoint = read_checkpoint(path)
    go_on, written = threading.Event(), []

    def slow(_path, content):
        go_on.wait()
        written.append(content)

    monkeypatch.setattr("moe_server.warmup.hot_set.write_whole", slow)
    keeper = HotSetKeeper(checkpoint, str(tmp_path / "hot.json"))
    await keeper.latest()
    for visits in (1.0, 2.0, 3.0):
        keeper.keep(HotSet([visits] * 2, hot_set_of(checkpoint).shares))
        await asyncio.sleep(0)
    go_on.set()
    await keeper.saved()
    found = [decode(one, fingerprint(checkpoint), 2, 8).visits[0] for one in written]
    assert found == [1.0, 3.0]


@pytest.mark.parametrize("content", [b"", encode(HOT_SET, "another"), encode(HOT_SET, MINE)[:99]])
async def test_an_unusable_file_of_ours_is_told_about_and_replaced(path, tmp_path, content):
    checkpoint, file = read_checkpoint(path), tmp_path / "hot.json"
    file.write_bytes(content)
    keeper = HotSetKeeper(checkpoint, str(file))
    with capture_logs() as logs:
        assert await keeper.latest() == NO_HOT_SET
    [line] = logs
    assert line["log_level"] == "warning"
    assert line["path"] == str(file)
    assert line["why"]
    keeper.keep(hot_set_of(checkpoint))
    await keeper.saved()
    assert await HotSetKeeper(checkpoint, str(file)).latest() == hot_set_of(checkpoint)


async def test_a_file_of_somebody_else_s_is_never_overwritten(path, tmp_path):
    checkpoint, file = read_checkpoint(path), tmp_path / "config.json"
    file.write_text("{}")
    for target in (file, tmp_path):
        keeper = HotSetKeeper(checkpoint, str(target))
        with capture_logs() as logs:
            assert await keeper.latest() == NO_HOT_SET
        assert "will not be overwritten" in logs[0]["why"]
        keeper.keep(hot_set_of(checkpoint))
        await keeper.saved()
    assert file.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [file]


async def test_a_disk_that_is_full_costs_one_warning_until_it_takes_something(
    path, tmp_path, monkeypatch
):
    checkpoint, file = read_checkpoint(path), tmp_path / "hot.json"
    keeper = HotSetKeeper(checkpoint, str(file))
    await keeper.latest()

    async def told(visits: float) -> None:
        keeper.keep(HotSet([visits] * 2, hot_set_of(checkpoint).shares))
        await keeper.saved()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with capture_logs() as logs:
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setattr("moe_server.warmup.hot_set.write_whole", full)
                await told(1.0)
                await told(2.0)
            await told(3.0)
    assert [line["log_level"] for line in logs] == ["warning"] * 2
    assert (await HotSetKeeper(checkpoint, str(file)).latest()).visits == [3.0] * 2


async def test_a_checkpoint_that_cannot_be_read_any_more_costs_a_warning(path, tmp_path):
    shutil.copytree(path, tmp_path / "copy")
    checkpoint = read_checkpoint(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    keeper = HotSetKeeper(checkpoint, "auto")
    with capture_logs() as logs:
        assert await keeper.latest() == NO_HOT_SET
    assert logs[0]["why"] == "No such file or directory"
    keeper.keep(hot_set_of(checkpoint))
    await keeper.saved()
