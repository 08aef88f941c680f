"""The routing benchmark's picture: where the time goes, ours beside naive torch.

Needs matplotlib, of the `bench` extra; without it there is no picture, and it says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.routing_summary import PARTS, Routing

COLOURS = {
    "gate": "#1f5fa8",
    "plan": "#6aa5dc",
    "gather": "#d9a441",
    "combine": "#a8641f",
    "host wait": "#777777",
}
BAR_COLOUR = "#b01030"
TORCH_ALPHA = 0.45


def draw(results: Sequence[Routing], bars: dict[int, float], title: str, path: Path) -> str:
    """Writes one panel of stacked bars for each batch size, as a PNG.

    Returns:
        What became of it, for people.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415
    except ImportError:
        return 'No picture: matplotlib is missing (pip install -e ".[bench]").'
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(max(9.0, 2.7 * len(results) + 1), 5),
        squeeze=False,
        layout="constrained",
    )
    for axis, one in zip(axes[0], results, strict=True):
        _panel(axis, one, bars.get(one.num_tokens))
    axes[0][0].set_ylabel("µs per token over 32 layers")
    handles = [mpl.patches.Patch(color=COLOURS[part], label=part) for part in PARTS]
    handles.append(mpl.lines.Line2D([], [], color=BAR_COLOUR, linestyle="--", label="bar of R - O"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        f"Routing, timed inside R: gate and plan are R - O, gather and combine part of O - D\n"
        f"{title}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"Picture: {path}"


def _panel(axis: Any, one: Routing, bar: float | None) -> None:
    labels, highest = [], bar or 0.0
    stacks = (("ours", one.parts, 1.0), ("naive torch", one.naive_parts, TORCH_ALPHA))
    for place, (name, parts, alpha) in enumerate(stacks):
        bottom = 0.0
        for part in PARTS:
            height = parts.get(part, 0.0)
            axis.bar(place, height, 0.7, bottom, color=COLOURS[part], alpha=alpha)
            bottom += height
        axis.text(place, bottom, _number(bottom), ha="center", va="bottom")
        labels.append(f"{name}\ngate + plan\n{_number(parts['gate'] + parts['plan'])}")
        highest = max(highest, bottom)
    if bar is not None:
        axis.axhline(bar, color=BAR_COLOUR, linestyle="--", linewidth=1.2)
    axis.set_title(f"{one.work}, T = {one.num_tokens}")
    axis.set_xticks(range(len(stacks)), labels)
    axis.set_xlim(-0.6, len(stacks) - 0.4)
    axis.set_ylim(0, highest * 1.12)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
