"""Runs, metrics and models in MLflow."""

from ray_jobs.tracking.config import TrackingConfig, TrackingError
from ray_jobs.tracking.runs import StageRun, Tracker

__all__ = ["StageRun", "Tracker", "TrackingConfig", "TrackingError"]
