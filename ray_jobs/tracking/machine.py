"""What the driver's machine does, as MLflow's system metrics.

Of a cluster's other nodes Ray has the same, for Prometheus. To log it here, something of ours would
have to run on each of them now and then, and an autoscaler takes no node away where anything runs.
"""

import logging

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


class MachineMetrics(SystemMetricsMonitor):
    """MLflow's monitor, which ends when MLflow once does not answer; this one goes on."""

    def __init__(self, run_id: str, seconds: float, uri: str) -> None:
        # It would say so each time; the runs' own words about MLflow are enough.
        logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.ERROR)
        super().__init__(  # type: ignore[no-untyped-call]
            run_id, sampling_interval=seconds, resume_logging=True, tracking_uri=uri
        )

    def monitor(self) -> None:
        """Sample and log until `finish`; what the thread does."""
        while not self._shutdown_event.is_set():
            super().monitor()  # type: ignore[no-untyped-call]
            self._shutdown_event.wait(self.sampling_interval)
