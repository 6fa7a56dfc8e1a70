"""The application: the ingress, the two towers behind it, what searches, and who directs them.

`rwkv-clip serve --config FILE` runs it, and so does `serve run serve.app:application config=FILE`.
"""

import json
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from rwkv_clip.config import load_config
from serve.config import EncoderConfig, SearchConfig, ServeConfig, ServeFile
from serve.encoders import Encoder
from serve.index import Index, find_index
from serve.ingress import RETRY_SECONDS, Ingress
from serve.keys import Keys
from serve.messages import TOWERS
from serve.registry import find_model
from serve.succession import Director

# Requests that an ingress takes in to tell them that there are too many, without reading them; as
# many wait in a proxy. Above, Serve's own 429 is a plain text that none of our numbers counts.
_BURST = 1024
_LONGER = 5.0  # seconds that Serve waits after an answer should have been there


def application(arguments: dict[str, Any]) -> serve.Application:
    """The application for `serve run serve.app:application config=FILE`, and for Serve's files.

    Args:
        arguments: `config`, the run's file; other names are as `--set` takes them, and values as
            it does or as Serve's file has them, `null` among them.
    """
    named = dict(arguments)
    file = named.pop("config", None)
    overrides = [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in named.items()
    ]
    return build(load_config(ServeFile, Path(file) if file else None, overrides))


def build(config: ServeFile) -> serve.Application:
    """The application.

    Raises:
        ModelError: there is no model to serve.
        SearchError: what is to be searched cannot be read.
        ValueError: there are to be keys, and there are none.
    """
    keyed = Keys().needed
    place = find_model(config)
    find_index(config)
    director = director_deployment().bind(config, place)
    image, text = (_encoder(tower, config.serve).bind(tower, config, director) for tower in TOWERS)
    searched = config.serve.search if config.storage else None
    index = _index(searched).bind(config) if searched else None
    return _ingress(config.serve).bind(config, director, image, text, index, keyed)


def director_deployment() -> serve.Deployment:
    """Of the director."""
    return serve.deployment(
        name="director",
        max_ongoing_requests=1000,
        # Serve takes this again when its file has no user_config any more; without one of ours it
        # would tell the director nothing.
        user_config={},
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},  # a line a second from every replica
    )(Director)


def _ingress(config: ServeConfig) -> serve.Deployment:
    settings = config.ingress
    return serve.deployment(
        name="ingress",
        max_ongoing_requests=settings.max_ongoing + _BURST,
        max_queued_requests=_BURST,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        ray_actor_options={"num_cpus": settings.cpus},
        graceful_shutdown_timeout_s=config.request_seconds + _LONGER,
        **_replicas(settings.replicas, settings.max_replicas),
    )(Ingress)


def _encoder(tower: str, config: ServeConfig) -> serve.Deployment:
    settings: EncoderConfig = getattr(config, tower)
    return serve.deployment(
        name=tower,
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        graceful_shutdown_timeout_s=config.request_seconds + _LONGER,
        health_check_period_s=5,
        **_replicas(settings.replicas, settings.max_replicas),
    )(Encoder)


def _index(settings: SearchConfig) -> serve.Deployment:
    return serve.deployment(
        name="index",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_ongoing,
        max_queued_requests=settings.max_queued,
        ray_actor_options={"num_cpus": settings.cpus},
    )(Index)


def _replicas(least: int, most: int | None) -> dict[str, Any]:
    if most is None:
        return {"num_replicas": least}
    return {"autoscaling_config": AutoscalingConfig(min_replicas=least, max_replicas=most)}


def http_options(config: ServeConfig) -> dict[str, Any]:
    """Of Serve's proxies."""
    return {
        "host": config.host,
        "port": config.port,
        "request_timeout_s": config.request_seconds + _LONGER,
    }
