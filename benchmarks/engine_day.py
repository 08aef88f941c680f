"""150,000 requests a day on the mission's hardware, simulated: how they fare, where it saturates.

The busiest hours are run at growing loads for several ways to divide the device's memory, and a
whole day of 150,000 for some of them. `day` says what is real in it, `day_costs` what is assumed.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.day import BIN_S, Day, Simulation, percentile, summary
from benchmarks.day_costs import Hardware
from benchmarks.day_requests import DAY_S, PER_DAY, requests
from moe_server.config import SchedulerConfig

SEED = 1
BUSIEST_S = (13 * 3600.0, 14 * 3600.0)
LOADS = (10_000, 20_000, 40_000, 60_000, 80_000, 100_000, 150_000, 200_000)
"""Requests per day whose busiest hour is run."""
QUICK_LOADS = (20_000, 60_000, 150_000)
SERVED = 0.99
"""A load is sustained where this share of the requests is done in time."""
HOPELESS_BELOW = 0.3
"""Larger loads are not tried behind one of which less is done."""
PROCESSES = 2


@dataclass(frozen=True)
class Arm:
    """One way to divide the device."""

    name: str
    hardware: Hardware
    max_running: int
    has_day: bool = False
    """Whether its whole day is run."""

    @property
    def settings(self) -> SchedulerConfig:
        return SchedulerConfig(max_running=self.max_running)


ARMS = (
    Arm("int4, 24 GiB, 32k KV", Hardware("int4", 32_768, 2048), 32),
    Arm("int4, 24 GiB, 64k KV", Hardware("int4", 65_536, 2048), 64, has_day=True),
    Arm("bf16, 24 GiB, 64k KV", Hardware("bf16", 65_536, 8192), 64),
    Arm("int4, 40 GiB, 64k KV", Hardware("int4", 65_536, 2048, device_gib=40), 64, has_day=True),
)


@dataclass(frozen=True)
class Found:
    """What the simulations say of one arm."""

    arm: Arm
    busiest: Mapping[int, Mapping[str, float]]
    """By requests per day: figures of the busiest hour."""
    day: Mapping[str, float] | None
    """Of 150,000 requests."""
    bins: tuple[Mapping[str, float], ...] = ()
    """Of that day: hour, arrivals per second, TTFT and utilisation."""

    @property
    def sustained_per_day(self) -> int:
        """The largest load that was tried and served; 0 if none was."""
        served = 0
        for load, figures in sorted(self.busiest.items()):
            if figures["done"] < SERVED:
                break
            served = load
        return served

    def results(self) -> dict[str, Any]:
        """For the report."""
        return {
            "hardware": asdict(self.arm.hardware),
            "num_slots": self.arm.hardware.num_slots,
            "hit_rate_b8": round(self.arm.hardware.hit_rate(8), 3),
            "sustained_per_day": self.sustained_per_day,
            "busiest_hour": {str(load): _rounded(each) for load, each in self.busiest.items()},
            "day": None if self.day is None else _rounded(self.day),
        }


def run(*, quick: bool) -> list[Found]:
    """Simulates all arms, on two processes.

    Args:
        quick: Fewer loads, and of the days the busiest hour only.
    """
    with ProcessPoolExecutor(PROCESSES) as pool:
        days = {arm.name: pool.submit(_day, arm) for arm in ARMS if arm.has_day and not quick}
        busiest = pool.map(_busiest, ARMS, [QUICK_LOADS if quick else LOADS] * len(ARMS))
        found = []
        for arm, loads in zip(ARMS, busiest, strict=True):
            day, bins = days[arm.name].result() if arm.name in days else (None, ())
            found.append(Found(arm, loads, day, bins))
    return found


def _busiest(arm: Arm, loads: Iterable[int]) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for load in loads:
        coming = requests(load, SEED, *BUSIEST_S)
        found[load] = summary(Simulation(arm.hardware, arm.settings).run(coming))
        if found[load]["done"] < HOPELESS_BELOW:
            break
    return found


def _day(arm: Arm) -> tuple[dict[str, float], tuple[dict[str, float], ...]]:
    day = Simulation(arm.hardware, arm.settings).run(requests(PER_DAY, SEED))
    return summary(day), tuple(_bins(day))


def _bins(day: Day) -> Iterable[dict[str, float]]:
    for number in range(int(DAY_S // BIN_S)):
        here = [one for one in day.answers if number == one.arrived_s // BIN_S]
        ttft = [one.ttft_s for one in here if one.ttft_s is not None]
        yield {
            "hour": (number + 0.5) * BIN_S / 3600,
            "arrivals_per_s": len(here) / BIN_S,
            "done_per_s": sum(one.end == "done" for one in here) / BIN_S,
            "ttft_p50_s": percentile(ttft, 50),
            "ttft_p99_s": percentile(ttft, 99),
            "utilisation": min(1.0, day.busy_by_bin.get(number, 0.0) / BIN_S),
        }


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in figures.items()}
