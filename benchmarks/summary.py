"""From single samples to medians, ratios and a table. Pure: knows no processes and no files."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks.loads import AT_LEAST, AT_MOST, BYTES, COLD_START, LIMIT, met


@dataclass(frozen=True)
class Sample:
    """One measurement of one contender."""

    key: str
    contender: str
    repetition: int
    value: float
    """tokens/s; of a cold start, seconds."""
    read_bytes: float
    """From disk, a step; of a cold start, in all."""
    disk_bytes_per_s: float
    """The mean of the probes before and after."""
    least_bytes: float | None = None
    """What a step must read; None where nothing must be read, or it is not known."""
    tokens_per_step: int = 1

    @property
    def of_limit(self) -> float | None:
        """Share of the tokens/s that the disk allows for the least bytes."""
        if not self.least_bytes or self.is_cold_start:
            return None
        return self.value * self.least_bytes / self.disk_bytes_per_s / self.tokens_per_step

    @property
    def over_least(self) -> float | None:
        """Bytes read over the least."""
        if not self.least_bytes or self.is_cold_start:
            return None
        return self.read_bytes / self.least_bytes

    @property
    def is_cold_start(self) -> bool:
        return COLD_START in self.key.split("/")


Samples = dict[str, dict[str, list[Sample]]]
"""By key, then by contender."""


def grouped(samples: list[Sample]) -> Samples:
    """Samples by key and contender, both in the order of their first appearance."""
    groups: Samples = {}
    for sample in samples:
        groups.setdefault(sample.key, {}).setdefault(sample.contender, []).append(sample)
    return groups


def best_peer(of_key: dict[str, list[Sample]], ours: str) -> str | None:
    """The peer with the best median; None if there is none."""
    medians = {
        name: statistics.median(sample.value for sample in runs)
        for name, runs in of_key.items()
        if name != ours
    }
    if not medians:
        return None
    is_cold_start = next(iter(of_key.values()))[0].is_cold_start
    return (min if is_cold_start else max)(medians, key=medians.__getitem__)


def ratios(samples: Samples, ours: str) -> dict[str, float]:
    """Ours over the best peer's, and ours against the limit, for every key where both are known.

    A ratio is the median over repetitions, each with the two runs that were neighbours in time.
    """
    found: dict[str, float] = {}
    for key, of_key in samples.items():
        peer, mine = best_peer(of_key, ours), of_key.get(ours, [])
        if peer is not None:
            theirs = {sample.repetition: sample.value for sample in of_key[peer]}
            pairs = [
                sample.value / theirs[sample.repetition]
                for sample in mine
                if sample.repetition in theirs
            ]
            if pairs:
                found[key] = statistics.median(pairs)
        for name, shares in (
            (LIMIT, [sample.of_limit for sample in mine]),
            (BYTES, [sample.over_least for sample in mine]),
        ):
            known = [share for share in shares if share is not None]
            if known:
                found[f"{name}/{key}"] = statistics.median(known)
    return found


def results(samples: Samples) -> dict[str, dict[str, dict[str, object]]]:
    """Median and spread by key and contender, with the runs they are of."""
    return {
        key: {
            name: {
                "median": statistics.median(sample.value for sample in runs),
                "min": min(sample.value for sample in runs),
                "max": max(sample.value for sample in runs),
                "unit": "s" if runs[0].is_cold_start else "tokens/s",
                "read_bytes_per_step": statistics.median(sample.read_bytes for sample in runs),
                "least_bytes_per_step": runs[0].least_bytes,
                "of_limit": _median([sample.of_limit for sample in runs]),
                "over_least_bytes": _median([sample.over_least for sample in runs]),
                "runs": [asdict(sample) for sample in runs],
            }
            for name, runs in of_key.items()
        }
        for key, of_key in samples.items()
    }


def table(samples: Samples, ours: str) -> Iterator[str]:
    """Lines for people: every key and contender, then the ratios and their bars."""
    yield (
        f"{'work':27} {'who':22} {'median':>8} {'min':>8} {'max':>8} unit  "
        f"{'read/step':>9} {'/least':>6} {'of limit':>8} {'disk':>9}"
    )
    for key, of_key in samples.items():
        for name, runs in of_key.items():
            values = [sample.value for sample in runs]
            read = statistics.median(sample.read_bytes for sample in runs)
            disk = statistics.median(sample.disk_bytes_per_s for sample in runs)
            over, share = (
                _median([sample.over_least for sample in runs]),
                _median([sample.of_limit for sample in runs]),
            )
            unit = "s    " if runs[0].is_cold_start else "tok/s"
            yield (
                f"{key:27} {name:22} {statistics.median(values):8.2f} {min(values):8.2f} "
                f"{max(values):8.2f} {unit} {read / 1e6:6.0f} MB "
                f"{'' if over is None else f'{over:.2f}':>6} "
                f"{'' if share is None else f'{share:.0%}':>8} {disk / 1e9:4.2f} GB/s"
            )
    yield ""
    yield f"{'ratio':33} {'ours':>6}  bar"
    for key, ratio in ratios(samples, ours).items():
        verdict = {True: "met", False: "missed", None: ""}[met(key, ratio)]
        bar = f">= {AT_LEAST[key]}" if key in AT_LEAST else ""
        bar = f"<= {AT_MOST[key]}" if key in AT_MOST else bar
        yield f"{key:33} {ratio:6.2f}  {bar:8} {verdict}"


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
