"""The report: one HTML page that tells what a run did, with nothing to load from elsewhere."""

from ray_jobs.report.collect import Report, StageTime, collect, examples
from ray_jobs.report.figures import loss_figure, rate_figure, validation_figure
from ray_jobs.report.page import render
from ray_jobs.report.times import StageTimes

__all__ = [
    "Report",
    "StageTime",
    "StageTimes",
    "collect",
    "examples",
    "loss_figure",
    "rate_figure",
    "render",
    "validation_figure",
]
