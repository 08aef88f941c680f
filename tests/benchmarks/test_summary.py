"""Medians, ratios of neighbours in time, and the keys that bars are looked up by."""

from benchmarks.loads import (
    AT_LEAST,
    AT_MOST,
    BYTES,
    COLD_START,
    FULL_LOADS,
    LIMIT,
    LOADS,
    met,
    prompt,
)
from benchmarks.summary import Sample, best_peer, grouped, ratios, results, table

DECODE = "decode/bf16/b1"
COLD = "coldstart/bf16"


def sample(key: str, contender: str, repetition: int, value: float, **other: float) -> Sample:
    defaults = {"read_bytes": 2e9, "disk_bytes_per_s": 4e9}
    return Sample(key, contender, repetition, value, **{**defaults, **other})


def test_the_better_peer_has_more_tokens_or_fewer_seconds() -> None:
    runs = grouped(
        [
            sample(key, who, 0, value)
            for key in (DECODE, COLD)
            for who, value in (("ours", 9.0), ("slow", 1.0), ("fast", 2.0))
        ]
    )
    assert best_peer(runs[DECODE], "ours") == "fast"
    assert best_peer(runs[COLD], "ours") == "slow"  # 1 second
    assert best_peer({"ours": runs[DECODE]["ours"]}, "ours") is None


def test_ratios_are_of_the_same_repetition() -> None:
    # The machine got three times slower; each ratio is 2, that of the medians is not.
    values = {("ours", 0): 6.0, ("peer", 0): 3.0, ("ours", 1): 2.0, ("peer", 1): 1.0}
    values |= {("ours", 2): 2.0}  # the peer failed there
    runs = grouped([sample(DECODE, who, number, value) for (who, number), value in values.items()])
    assert ratios(runs, "ours")[DECODE] == 2.0


def test_limit_and_bytes_are_ours_against_the_least() -> None:
    peer = sample(DECODE, "peer", 0, 1.0, least_bytes=1e9)
    # 4 GB/s allow 4 steps/s of 1 GB; 3 of them are 75 %, with twice the bytes.
    ours = sample(DECODE, "ours", 0, 3.0, least_bytes=1e9)
    found = ratios(grouped([peer, ours]), "ours")
    assert found == {DECODE: 3.0, f"{LIMIT}/{DECODE}": 0.75, f"{BYTES}/{DECODE}": 2.0}


def test_a_limit_counts_tokens_of_a_step_and_spares_cold_starts() -> None:
    batch = Sample("decode/bf16/b8", "ours", 0, 16.0, 1e9, 4e9, 1e9, tokens_per_step=8)
    assert batch.of_limit == 0.5
    start = Sample(COLD, "ours", 0, 5.0, 1e9, 4e9, 1e9)
    assert start.of_limit is None
    assert start.over_least is None


def test_results_keep_every_run() -> None:
    runs = [sample(DECODE, "ours", number, value) for number, value in enumerate((3.0, 1.0, 2.0))]
    result = results(grouped(runs))[DECODE]["ours"]
    assert (result["min"], result["median"], result["max"]) == (1.0, 2.0, 3.0)
    assert [run["value"] for run in result["runs"]] == [3.0, 1.0, 2.0]


def test_the_table_says_which_bars_are_met() -> None:
    runs = grouped([sample(DECODE, "ours", 0, 3.1), sample(DECODE, "peer", 0, 2.0)])
    assert any(
        line.split()[:1] == [DECODE] and line.endswith("missed") for line in table(runs, "ours")
    )
    runs = grouped([sample(COLD, "ours", 0, 1.0), sample(COLD, "peer", 0, 2.0)])
    assert any(line.split()[:1] == [COLD] and line.endswith("met") for line in table(runs, "ours"))


def test_every_bar_belongs_to_something_that_is_measured() -> None:
    keys = {
        load.key(work.kind, work.label) for load in (*LOADS, *FULL_LOADS) for work in load.works
    }
    keys |= {load.key(COLD_START) for load in (*LOADS, *FULL_LOADS) if load.cold_start}
    bars = {key.removeprefix(f"{LIMIT}/").removeprefix(f"{BYTES}/") for key in AT_LEAST | AT_MOST}
    assert bars <= keys
    assert {"decode/int4/b8", "prefill/int4/512", "coldstart/int4"} <= keys


def test_bars_are_bounds_of_the_right_side() -> None:
    assert met(DECODE, 1.6) is True
    assert met(DECODE, 1.59) is False
    assert met(COLD, 0.5) is True
    assert met(COLD, 0.51) is False
    assert met("resident/decode/int4/b1", 0.1) is None


def test_prompts_are_the_same_for_everybody_and_differ_by_seed() -> None:
    assert prompt("0/a", 16) == prompt("0/a", 16)
    assert prompt("0/a", 16) != prompt("1/a", 16)
