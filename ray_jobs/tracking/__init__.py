"""Runs, metrics and models in MLflow."""

from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.tracking.runs import StageRun, Tracker, TrackingError

__all__ = ["StageRun", "Tracker", "TrackingConfig", "TrackingError"]
