"""The cold start's picture: stages until READY, and first requests with and without warm-up.

Needs matplotlib, of the `bench` extra; without it there is no picture, and it says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.coldstart_first import First, steady
from benchmarks.coldstart_hotset import HotSet, hit_rate
from benchmarks.coldstart_ready import Start

WARMED, UNWARMED, GREY = "#1f5fa8", "#b01030", "#777777"


def draw(
    starts: Sequence[Start], firsts: Sequence[First], hot_set: HotSet | None, path: Path
) -> str:
    """Writes a PNG of what there is.

    Returns:
        What became of it, for people.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        return 'No picture: matplotlib is missing (pip install -e ".[bench]").'
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    num_axes = bool(starts) + len(firsts) + (hot_set is not None)
    figure, axes = plt.subplots(
        1, num_axes, figsize=(6 * num_axes, 5), layout="constrained", squeeze=False
    )
    left = iter(axes[0])
    if starts:
        _stages(next(left), starts)
    for first in firsts:
        _first(next(left), first)
    if hot_set is not None:
        _hot_set(next(left), hot_set)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"Picture: {path}"


def _stages(axis: Any, starts: Sequence[Start]) -> None:
    """The last start of each arm, and the limit beside it."""
    arms = {start.arm: start for start in starts}
    names = list(dict.fromkeys(stage for start in arms.values() for stage in start.stages_s))
    begin = dict.fromkeys(arms, 0.0)
    for name in names:
        seconds = [start.stages_s.get(name, 0.0) for start in arms.values()]
        axis.bar(list(arms), seconds, bottom=list(begin.values()), label=name, width=0.5)
        begin = {arm: at + s for (arm, at), s in zip(begin.items(), seconds, strict=True)}
    for position, start in enumerate(arms.values()):
        axis.plot([position - 0.35, position + 0.35], [start.limit_s] * 2, color=UNWARMED)
    axis.set_title("seconds from process start to READY; the bar in red", fontsize=10)
    # Beside the bars, in their order.
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1],
        labels[::-1],
        fontsize=7,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )


def _first(axis: Any, first: First) -> None:
    for ttfts_s, colour, label in (
        (first.unwarmed_s, UNWARMED, "without warm-up"),
        (first.ttfts_s[-1], WARMED, "after READY"),
    ):
        axis.plot(range(1, len(ttfts_s) + 1), ttfts_s, "o-", ms=3, color=colour, label=label)
    axis.axhline(first.max_ttft_ms / 1000, color=GREY, linestyle="--", label="configured limit")
    axis.axhline(steady(first.ttfts_s[-1]), color=GREY, linestyle=":", label="steady median")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("request")
    axis.set_title(f"time to first token, seconds ({first.arm} of the experts)", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _hot_set(axis: Any, hot_set: HotSet) -> None:
    """Hit rates request by request, all sequences together."""
    for name, colour, label in (
        ("settled", GREY, "a settled server"),
        ("without", UNWARMED, "without a hot set"),
        ("with_", WARMED, "with the hot set"),
    ):
        requests = zip(*(getattr(pair, name) for pair in hot_set.pairs), strict=True)
        rates = [hit_rate(looked) for looked in requests]
        axis.plot(range(1, len(rates) + 1), rates, "o-", ms=3, color=colour, label=label)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("request")
    axis.set_title("experts found on the device, share of wanted ones", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
