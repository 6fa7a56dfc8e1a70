"""Traces of requests through the deployments, as Ray Serve makes them, to an OpenTelemetry server.

Where they go is told by OpenTelemetry's own variables: OTEL_EXPORTER_OTLP_ENDPOINT, for one.
"""

import os
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from ray.serve.schema import TracingConfig

_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_EXPORTER = "serve.traces:processors"


def tracing(share: float) -> TracingConfig | None:
    """Serve's configuration for a share of requests; None where there are to be no traces.

    Raises:
        ValueError: there are to be some, and no server is named.
    """
    if not share:
        return None
    if not any(os.environ.get(name) for name in _VARIABLES):
        raise ValueError(
            f"serve.traces: is {share:g}, but {_VARIABLES[1]} names no server to send traces to; "
            "set it, or serve.traces to 0"
        )
    return TracingConfig(enabled=True, exporter_import_path=_EXPORTER, sampling_ratio=share)


def processors() -> Sequence[SpanProcessor]:
    """What Serve gives its spans to, in each of its processes."""
    exporter: Any = OTLPSpanExporter()
    return [BatchSpanProcessor(exporter)]
