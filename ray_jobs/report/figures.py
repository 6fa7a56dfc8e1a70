"""The report's curves, as SVG that takes the page's colours."""

import html
import re
from collections.abc import Mapping, Sequence
from io import StringIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_LINE, _SECOND = "#2f6f9f", "#b5651d"
_SIZE = (4.5, 3.0)  # inches: one can be read at a phone's width, and two stand side by side
_FEW = 20  # points that are marked each; of a single one no line can be seen

Records = Sequence[Mapping[str, float]]


def loss_figure(history: Records, baseline: Records = (), told: str = "baseline") -> Figure:
    """Loss by step, perhaps beside that of another training, which is called as told."""
    figure, axes = _figure("contrastive loss")
    _plot(axes, history, "loss", _LINE, "this run")
    if baseline:
        _plot(axes, baseline, "loss", _SECOND, told)
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    return figure


def rate_figure(history: Records) -> Figure:
    """Pairs per second by step."""
    figure, axes = _figure("pairs per second")
    _plot(axes, history, "pairs_per_second", _LINE, "pairs")
    axes.set_ylim(bottom=0)
    return figure


def validation_figure(validations: Records) -> Figure:
    """Recalls of the validations beside training, by step, in percent."""
    figure, axes = _figure("validation R@10, %")
    directions = (("text_to_image", _LINE), ("image_to_text", _SECOND))
    for direction, colour in directions:
        name = f"validation_{direction}_recall_at_10"
        percent = [{**record, name: 100 * record[name]} for record in validations]
        _plot(axes, percent, name, colour, direction.replace("_", " "))
    axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    element = out.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # Black means the page's text colour, so that the curves can be read on a dark page too. That of
    # texts is not written but SVG's default, which is therefore set for the whole.
    element = re.sub(r"#000000|\bblack\b", "currentColor", element)
    for colour, variable in ((_LINE, "--line-1"), (_SECOND, "--line-2")):
        element = element.replace(colour, f"var({variable})")
    told = html.escape(f"{figure.axes[0].get_ylabel()} by step")
    return element.replace("<svg", f'<svg fill="currentColor" role="img" aria-label="{told}"', 1)


def _figure(label: str) -> tuple[Figure, Axes]:
    """A figure of something by step."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _plot(axes: Axes, history: Records, name: str, colour: str, label: str) -> None:
    steps = [record["step"] for record in history]
    values = [record[name] for record in history]
    marker = "o" if len(steps) <= _FEW else ""
    axes.plot(
        steps,
        values,
        color=colour,
        label=label,
        linewidth=1.6,
        marker=marker,
        markersize=4,
        clip_on=False,  # half a mark would be at the edge
    )
    if len(steps) == 1:
        axes.set_xticks(steps)  # nothing was recorded on either side
