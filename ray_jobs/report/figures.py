"""The report's curves, as SVG that takes the page's colours."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO

from matplotlib.figure import Figure

_LINE, _SECOND = "#2f6f9f", "#b5651d"


def loss_figure(
    history: Sequence[Mapping[str, float]], baseline: Sequence[Mapping[str, float]] = ()
) -> Figure:
    """Loss by step; beside it the rate of pairs and the share of time spent waiting for data."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    loss, rate = figure.subplots(1, 2)
    _plot(loss, history, "loss", _LINE, "this run" if baseline else "loss")
    if baseline:
        _plot(loss, baseline, "loss", _SECOND, "baseline")
        loss.legend(frameon=False)
    loss.set_ylabel("contrastive loss")
    loss.set_ylim(bottom=0)
    _plot(rate, history, "pairs_per_second", _LINE, "pairs")
    rate.set_ylabel("pairs per second")
    rate.set_ylim(bottom=0)
    for axes in (loss, rate):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    return figure


def validation_figure(validations: Sequence[Mapping[str, float]]) -> Figure:
    """Recalls of the validations beside training, by step, in percent."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    directions = (("text_to_image", _LINE), ("image_to_text", _SECOND))
    for direction, colour in directions:
        name = f"validation_{direction}_recall_at_10"
        percent = [{**record, name: 100 * record[name]} for record in validations]
        _plot(axes, percent, name, colour, direction.replace("_", " "))
    axes.legend(frameon=False)
    axes.set_ylabel("validation R@10, %")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    out = StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    element = out.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # Black means the page's text colour, so that the curves can be read on a dark page too.
    return re.sub(r"#000000|\bblack\b", "currentColor", element)


def _plot(
    axes: object, history: Sequence[Mapping[str, float]], name: str, colour: str, label: str
) -> None:
    steps = [record["step"] for record in history]
    values = [record[name] for record in history]
    axes.plot(steps, values, color=colour, label=label, linewidth=1.6)  # type: ignore[attr-defined]
