"""The simulated day's picture: the day by the hour, and the busiest hour by the load.

Needs matplotlib, of the `bench` extra; without it there is no picture, and it says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.day_requests import PER_DAY
from benchmarks.engine_day import SERVED, Found

COLOURS = ("#6aa5dc", "#1f5fa8", "#b01030", "#3c8a4a")
GREY = "#777777"


def draw(found: Sequence[Found], path: Path) -> str:
    """Writes a PNG.

    Returns:
        What became of it, for people.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        return 'No picture: matplotlib is missing (pip install -e ".[bench]").'
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, 3, figsize=(16, 8.5), layout="constrained")
    arms = list(zip(found, COLOURS, strict=True))
    _loads(axes[0][0], arms, "done", "done in time, share of requests")
    axes[0][0].axhline(SERVED, color=GREY, linestyle="--", linewidth=1)
    _loads(axes[0][1], arms, "ttft_p99_s", "time to first token, seconds: p99 (line), p50 (dots)")
    _loads(axes[0][2], arms, "tpot_p99_s", "time per output token, seconds: p99 (line), p50 (dots)")
    for axis, name in ((axes[0][1], "ttft_p50_s"), (axes[0][2], "tpot_p50_s")):
        for one, colour in arms:
            axis.plot(*_points(one, name), ":", color=colour)
        axis.set_yscale("log")
    _day(axes[1], arms)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "Simulated: Mixtral 8x7B on one A100, the real scheduler, steps at the roofline.\n"
        f"Above: the busiest hour by requests per day. Below: a day of {PER_DAY:,} requests."
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Picture: {path}"


def _points(one: Found, name: str) -> tuple[list[int], list[float]]:
    return list(one.busiest), [figures[name] for figures in one.busiest.values()]


def _loads(axis: Any, arms: Sequence[tuple[Found, str]], name: str, title: str) -> None:
    for one, colour in arms:
        label = f"{one.arm.name} ({one.arm.hardware.num_slots} of 256 experts)"
        axis.plot(*_points(one, name), "o-", color=colour, label=label)
    axis.axvline(PER_DAY, color=GREY, linestyle=":", linewidth=1)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("requests per day")
    axis.xaxis.set_major_formatter(lambda x, _position: f"{x / 1000:.0f}k")
    axis.spines[["top", "right"]].set_visible(False)


def _day(axes: Any, arms: Sequence[tuple[Found, str]]) -> None:
    titles = ("requests per second: come (grey), done", "TTFT, seconds: p99, p50", "utilisation")
    for one, colour in arms:
        if not one.bins:
            continue
        hours = [each["hour"] for each in one.bins]

        def plot(axis: Any, name: str, style: str, colour: str) -> None:
            axis.plot(hours, [each[name] for each in one.bins], style, color=colour)  # noqa: B023

        plot(axes[0], "arrivals_per_s", "-", GREY)
        plot(axes[0], "done_per_s", "-", colour)
        plot(axes[1], "ttft_p99_s", "-", colour)
        plot(axes[1], "ttft_p50_s", ":", colour)
        plot(axes[2], "utilisation", "-", colour)
    axes[1].set_yscale("log")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("hour of the day")
        axis.set_xlim(0, 24)
        axis.set_xticks(range(0, 25, 4))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    axes[2].set_ylim(0, 1.05)
