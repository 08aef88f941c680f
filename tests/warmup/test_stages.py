from moe_server.warmup.stages import RATE_WINDOW_S, StageLog, StageState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_ends_the_one_before_it_and_both_are_timed():
    clock = Clock()
    log = StageLog(clock)
    log.enter("read", 0, 10)
    clock.now += 2
    log.enter("prove")
    clock.now += 3
    read, prove = log.stages
    assert (read.state, prove.state) == (StageState.DONE, StageState.RUNNING)
    assert (log.seconds(read), log.seconds(prove)) == (2, 3)
    log.finish()
    clock.now += 5
    assert log.seconds(prove) == 3
    assert log.running is None


def test_rate_and_eta_are_of_late():
    clock = Clock()
    log = StageLog(clock)
    for second in range(20):
        log.enter("read", 10 * second if second < 10 else 90 + 2 * (second - 9), 200)
        clock.now += 1
    [read] = log.stages
    assert read.bytes_per_s() == 2
    assert read.eta_s() == (200 - read.bytes_done) / 2
    assert len(read.seen) <= RATE_WINDOW_S + 1


def test_no_rate_from_one_look_and_no_eta_when_nothing_is_missing():
    clock = Clock()
    log = StageLog(clock)
    log.enter("read", 5, 10)
    assert log.stages[0].bytes_per_s() == 0
    assert log.stages[0].eta_s() is None
    clock.now += 1
    log.enter("read", 10, 10)
    assert log.stages[0].bytes_per_s() == 5
    assert log.stages[0].eta_s() is None


def test_a_failure_is_told_until_the_stage_is_done():
    log = StageLog(Clock())
    log.enter("read")
    log.fail("no disk")
    assert (log.stages[0].state, log.stages[0].failure) == (StageState.FAILED, "no disk")
    log.enter("read")
    assert (log.stages[0].attempts, log.stages[0].failure) == (2, "no disk")
    log.enter("prove")
    assert [stage.name for stage in log.stages] == ["read", "prove"]
    assert (log.stages[0].state, log.stages[0].failure) == (StageState.DONE, "")


def test_a_failure_between_stages_is_nobodys():
    log = StageLog(Clock())
    log.fail("nothing runs")
    log.finish()
    assert log.stages == []
