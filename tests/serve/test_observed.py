"""What the endpoint tells of itself: numbers, traces, and what may be closed."""

import socket
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from ray import serve

from serve import ingress, traces
from serve.config import ServeFile
from serve.keys import VARIABLE
from serve.metrics import merged
from tests.ray_jobs.killing import wait_until
from tests.serve.small import data_uri, picture


def test_numbers_of_requests_and_towers_are_told(client):
    body = {"input": ["a", data_uri(picture(0))]}
    assert client.post("/v1/embeddings", json=body).status_code == 200
    assert client.post("/v1/classify", json={}).status_code == 400
    wanted = [
        'ray_rwkv_clip_requests_total{', 'route="/v1/embeddings"', 'status="400"',
        'model_version="1"', 'tower="image"', 'tower="text"', "ray_rwkv_clip_batch_size_bucket",
        "ray_rwkv_clip_queue_wait_ms_sum", "ray_rwkv_clip_preprocess_ms_count",
        "ray_rwkv_clip_inference_ms_sum", "ray_rwkv_clip_request_ms_bucket", "ray_serve_",
    ]  # fmt: skip

    def missing() -> list[str]:
        text = client.get("/metrics").text
        return [one for one in wanted if one not in text]

    wait_until(lambda: not missing(), "all numbers")
    told = client.get("/metrics").headers["content-type"]
    assert told.startswith("text/plain; version=0.0.4")


def test_expositions_of_several_nodes_are_one():
    head = "# HELP ray_serve_a what it is\n# TYPE ray_serve_a counter\n"
    one = head + 'ray_serve_a{node="1"} 1.0\n# TYPE ray_other gauge\nray_other 3\n'
    two = head + 'ray_serve_a{node="2"} 2.0\n'
    both = head + 'ray_serve_a{node="1"} 1.0\nray_serve_a{node="2"} 2.0\n'
    assert merged([one, "", two]) == both


def test_a_client_that_left_and_a_path_that_is_not_there_are_counted(client, endpoint):
    place = urlsplit(endpoint)
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: {place.netloc}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )

    def told() -> bool:
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(head.encode())
            # By then the ingress has the one before it too.
            assert client.get("/never/a/path").status_code == 404
            assert client.get("/v1/classify").status_code == 405
        text = client.get("/metrics").text
        counted = [
            line for line in text.splitlines() if line.startswith("ray_rwkv_clip_requests_total")
        ]
        assert not any("never" in line for line in counted)
        wanted = [("/v1/embeddings", 499), ("other", 404), ("other", 405)]
        return all(
            any(f'route="{route}"' in line and f'status="{status}"' in line for line in counted)
            for route, status in wanted
        )

    wait_until(told, "all that was asked for")


@pytest.mark.parametrize("closed", ["docs", "metrics"])
def test_what_is_closed_is_not_there(ray_cluster, closed, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    config = ServeFile.model_validate({"serve": {"model": "somewhere", closed: False}})
    plain = ingress.Ingress.__bases__[0]  # the class without Serve around it
    made = plain(config, None, None, None, None, keyed=False)
    with TestClient(made.__serve_build_asgi_app__()) as client:
        paths = {"docs": ["/docs", "/openapi.json"], "metrics": ["/metrics"]}[closed]
        answers = [client.get(path) for path in paths]
        assert [answer.status_code for answer in answers] == [404] * len(paths)
        # Nobody is sent to what is closed.
        open_docs = closed != "docs"
        assert all(
            ("/docs" in answer.json()["error"]["message"]) == open_docs for answer in answers
        )
        if open_docs:
            assert "/metrics" not in client.get("/openapi.json").json()["paths"]


def test_traces_go_where_opentelemetrys_variables_say(monkeypatch):
    assert traces.tracing(0) is None
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="names no server"):
        traces.tracing(0.5)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    config = traces.tracing(0.5)
    assert config is not None
    assert (config.enabled, config.sampling_ratio) == (True, 0.5)
    (processor,) = serve._private.utils.import_attr(config.exporter_import_path)()
    assert isinstance(processor, BatchSpanProcessor)
    processor.shutdown()
