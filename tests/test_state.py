"""The state of a server made of those of its models."""

import random

import pytest

from moe_server.state import ServerState, StateFeed, joint_feed

READINESS = {
    ServerState.FAILED: 0,
    ServerState.STARTING: 1,
    ServerState.LOADING: 2,
    ServerState.WARMING: 3,
    ServerState.DRAINING: 4,
    ServerState.READY: 5,
}


@pytest.mark.parametrize("seed", range(20))
async def test_a_joint_feed_tells_the_least_ready_state_and_each_change_of_it_once(seed):
    choose = random.Random(seed)
    feeds = [StateFeed() for _ in range(choose.randint(1, 4))]
    joint = joint_feed(feeds)
    with joint.watch() as watcher:
        expected = [ServerState.STARTING]
        for _ in range(40):
            choose.choice(feeds).publish(choose.choice(list(ServerState)))
            least = min((feed.current for feed in feeds), key=READINESS.__getitem__)
            assert joint.current is least
            if least is not expected[-1]:
                expected.append(least)
        assert [await watcher.next() for _ in expected] == expected
        assert not watcher._unread


async def test_it_begins_with_what_the_feeds_have():
    ready, loading = StateFeed(), StateFeed()
    ready.publish(ServerState.READY)
    loading.publish(ServerState.LOADING)
    assert joint_feed([ready, loading]).current is ServerState.LOADING
    assert joint_feed([ready]).current is ServerState.READY
