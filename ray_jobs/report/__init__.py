"""The report: one HTML page that tells what a run did, with nothing to load from elsewhere."""

from ray_jobs.report.collect import Report, StageTime, collect, examples
from ray_jobs.report.figures import loss_figure
from ray_jobs.report.page import render

__all__ = ["Report", "StageTime", "collect", "examples", "loss_figure", "render"]
