"""An S3 server on this machine that can be out of order for a while."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import boto3
import requests
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "runs"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": "a-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Server:
    """A bucket's server.

    Attributes:
        endpoint: its URL.
        refused: requests that were answered with 503.
        refuses: asked before every request, with its method and path, whether it is refused.
    """

    endpoint: str
    refused: int = 0
    refuses: Callable[[str, str], bool] = field(default=lambda method, path: False)

    def client(self) -> Any:
        """boto3's."""
        with patch.dict(os.environ, CREDENTIALS):
            return boto3.client("s3", endpoint_url=self.endpoint)

    def objects(self) -> list[str]:
        """Everything that the bucket holds."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [one["Key"] for page in pages for one in page.get("Contents", ())]

    def forbid(self, key: str) -> None:
        """Take away the right to read what is called so, by which S3 judges both requests."""
        denied = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": ["s3:GetObject", "s3:HeadObject"],
            "Resource": f"arn:aws:s3:::{BUCKET}/{key}",
        }
        policy = {"Version": "2012-10-17", "Statement": [denied]}
        put = requests.put(f"{self.endpoint}/{BUCKET}?policy", json=policy, timeout=60)
        put.raise_for_status()


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Tests are silent."""


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server with an empty bucket."""
    real = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if made.refuses(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            made.refused += 1
            _drain(environ)
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN]
        return real(environ, start)

    listening = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Quiet)
    made = Server(f"http://127.0.0.1:{listening.server_port}")
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        requests.post(
            f"{made.endpoint}/moto-api/reset", timeout=60
        )  # what it holds is the process's
        made.client().create_bucket(Bucket=BUCKET)
        yield made
    finally:
        listening.shutdown()
        thread.join()


def _drain(environ: dict[str, Any]) -> None:
    """Read what came with a request, so that its connection can be used again."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
