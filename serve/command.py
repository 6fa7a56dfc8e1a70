"""`rwkv-clip serve`: the endpoint on this machine or on a cluster, until it is interrupted."""

import argparse
import errno
import logging
import math
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import ray
from ray import serve
from ray._private import ray_logging
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import DeploymentStatusOverview

from rwkv_clip.config import add_config_options, config_from_args
from rwkv_clip.joining import joining
from rwkv_clip.quiet import QUIET
from rwkv_clip.signals import heeding
from serve.app import build, http_options
from serve.config import ServeConfig, ServeFile
from serve.towers import Handle
from serve.traces import tracing

SUMMARY = "serve image and text embeddings over HTTP"
APPLICATION = "rwkv-clip"
_EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 (compared with, and listened on only where it is asked for)
# Nothing of ours holds an event loop up, so Serve needs no threads of its own between its loop and
# ours, and what its processes say to each other goes straight from one to the other. Serve has no
# other place for this than the environment of every node's Ray.
FEWER_HOPS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # A call carries a request's images, or vectors of all its texts; Serve's own limit is 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(1 << 30),
}
# Seconds that an ingress waits for HAProxies to notice that it ends. Other machines' may take half
# a minute, as Serve has it; this one's takes less than one, and what came is answered before.
_ONE_MACHINE = {"RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2"}
# HAProxy's own limit of connections is 4096, which half-sent requests fill, without any key. Each
# of those takes 16 KiB of its memory.
_CONNECTIONS = 16384
_FILES_PER_CONNECTION = 3  # its two ends, and a pipe's for every fourth
_QUIET_SECONDS = 10.0  # longer than a request may take: the ingress's own 408 comes before
_POLL_SECONDS = 0.2
_ASK_SECONDS = 5.0  # for the director to answer
_REPORTED_SECONDS = 5.0  # from when a request is answered to when its ingress has said so
_SENT_SECONDS = 2.0  # for a proxy to hand the last answer to its client
_FAILURE = re.compile(r"^[\w.]*(?:Error|Exception): .*$", re.MULTILINE)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; 2 where it cannot start.

    What came before is answered first, unless a second SIGINT comes meanwhile.
    """
    # A cluster that runs already is named by RAY_ADDRESS; otherwise one begins here.
    address = os.environ.get("RAY_ADDRESS")
    stop = threading.Event()

    def interrupted(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    # Programs that stop others may send SIGTERM to the process and to its group.
    handlers = {signal.SIGINT: interrupted, signal.SIGTERM: lambda *_: stop.set()}
    with ExitStack() as held:
        try:
            config = config_from_args(ServeFile, args)
            application = build(config)
            _check_host(config.serve)
            tracing(config.serve.traces)
            if not address:  # there, Serve may listen elsewhere already
                held.enter_context(_claimed(config.serve))
        except (ValueError, OSError) as error:
            _tell(f"rwkv-clip serve: {error}")
            return 2
        heed = held.enter_context(heeding(handlers))
        return _serve(config, application, address, stop, heed, held)


def _serve(
    config: ServeFile,
    application: serve.Application,
    address: str | None,
    stop: threading.Event,
    heed: Callable[[], None],
    held: ExitStack,
) -> int:
    """Serve until `stop`, with Ray, after whose start `heed` is called; the exit status.

    An interrupt after `stop` ends it at once. What is to be given back at the end is put into
    `held`.
    """
    fewer_hops()
    _quieten()
    if not address:
        os.environ.update({**QUIET, **_ONE_MACHINE, **_haproxys(config.serve), **os.environ})
    try:
        with joining(address), nullcontext() if address else _kept_from(signal.SIGTERM):
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
            heed()  # again: Ray has put handlers of its own in their place, which abort
    except SystemExit:  # what SIGTERM does until a cluster is joined
        stop.set()
    if stop.is_set():
        ray.shutdown()
        return 0
    shared = bool(serve.status().proxies)  # with what others serve
    deployed = False
    try:
        try:
            if not address:  # a cluster may grow; this machine does not
                _check_resources(config)
            elif not shared:
                held.enter_context(_claimed(config.serve))
            start(config.serve)
            deployed = True
            _come_up(application, stop)
        except ValueError as error:
            _tell(f"rwkv-clip serve: {error}")
            return 2
        except RuntimeError as error:
            _tell(f"rwkv-clip serve: {_reason(error)}")
            return 1
        except RayError as error:
            _tell(f"rwkv-clip serve: Ray Serve does not come up here: {error}")
            return 1
        if not stop.is_set():
            whose = ", where this cluster's Serve listens already" if shared else ""
            _tell(f"serving at {_where(config.serve)}{whose}; stop with Ctrl-C")
            stop.wait()
            _tell(
                "no more requests are taken; those that came are answered; Ctrl-C ends it at once"
            )
    finally:
        try:
            if deployed:
                _take_away(config.serve, shared)
            if not shared:
                # It ends the proxies first: without the application they answer 404.
                serve.shutdown()  # type: ignore[no-untyped-call]
        except KeyboardInterrupt:
            _tell("ended at once; what was under way gets no answer")
            if address:  # a cluster that stays
                with suppress(RayError, RayServeException):  # where Serve has just ended
                    serve.delete(APPLICATION, _blocking=False)
        finally:
            ray.shutdown()
    return 0


@contextmanager
def _kept_from(number: signal.Signals) -> Iterator[None]:
    """Let a signal wait until the block is over; what starts in it never hears of it.

    Whoever stops us may send it to all of our processes, as systemd does, or `timeout` to the
    group. Ray's would end before what came is answered; its daemons know that of SIGINT alone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quieten() -> None:
    """Keep off the terminal what Ray and Serve say of each of their own steps."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Of its last calls, which its own end comes before.
    ray_logging.stdout_deduplicator.skip_re = re.compile("Task ServeController.* failed")


def _where(config: ServeConfig) -> str:
    """Serve's address, which is that of whoever started it."""
    client = _get_global_client()
    options = client.http_config if client else config
    return f"http://{options.host}:{options.port}"


def _take_away(config: ServeConfig, shared: bool) -> None:
    """Wait until what came is answered, and end the application in a Serve that goes on.

    Serve may end towers beside the ingress that still asks them.
    """
    until = time.monotonic() + config.request_seconds + _REPORTED_SECONDS
    pause = threading.Event()
    director: Handle | None = None
    told: set[str] = set()
    while _director_runs() and time.monotonic() < until:
        try:
            director = director or _director()  # once: each handle has a router of its own
            if _ended(director):
                pause.wait(_SENT_SECONDS)
                break
        except Exception as error:  # a busy machine is slow, and a director may die: again
            why = type(error).__name__
            if why not in told:
                told.add(why)
                _tell(f"the director has not answered yet ({why})")
        pause.wait(_POLL_SECONDS)
    if shared:
        with suppress(TimeoutError):
            serve.delete(APPLICATION)


def _director_runs() -> bool:
    """Whether somebody can tell the ingresses; there is no director yet where deploying failed."""
    director = _deployments().get("director")
    return director is not None and director.replica_states.get(ReplicaState.RUNNING, 0) > 0


def _deployments() -> Mapping[str, DeploymentStatusOverview]:
    """How ours stand; empty where there is no application."""
    application = serve.status().applications.get(APPLICATION)
    return application.deployments if application else {}


def _director() -> Handle:
    """The director's handle, whose router has an event loop of its own.

    A pod's environment says that routers share their caller's, and there is none here.
    """
    handle: Handle = serve.get_deployment_handle("director", APPLICATION)
    handle._init(_run_router_in_separate_loop=True)  # type: ignore[no-untyped-call]
    return handle


def _ended(director: Handle) -> bool:
    """Tell the ingresses to end; whether they have answered what came."""
    return bool(director.end.remote().result(timeout_s=_ASK_SECONDS))


def fewer_hops() -> None:
    """Set in this process's environment, where it says nothing else, what Serve's are to get."""
    os.environ.update({**FEWER_HOPS, **os.environ})


def start(config: ServeConfig) -> None:
    """Start Serve's proxies, where they do not run already."""
    serve.start(
        proxy_location="EveryNode",
        http_options=http_options(config),
        tracing_config=tracing(config.traces),
    )


def _come_up(application: serve.Application, stop: threading.Event) -> None:
    """Deploy, and tell what it waits for, until it serves or is not wanted any more.

    Raises:
        RuntimeError: a deployment cannot start.
    """
    deployed: Future[object] = Future()

    def deploy() -> None:
        try:
            deployed.set_result(serve.run(application, name=APPLICATION))
        except Exception as error:
            deployed.set_exception(error)

    # In a thread that nobody waits for: it would hold an interrupt off until everything is up.
    threading.Thread(target=deploy, daemon=True).start()
    told: set[str] = set()
    while not stop.wait(_POLL_SECONDS):
        if deployed.done():
            deployed.result()
            return
        for name, deployment in _deployments().items():
            # One line says what it waits for; more are a failure's trace, which comes to us too.
            if deployment.message and "\n" not in deployment.message and name not in told:
                told.add(name)
                _tell(deployment.message)


def _check_resources(config: ServeFile) -> None:
    """Raise ValueError if the replicas do not fit into what there is."""
    there = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, wanted in config.serve.least(config.storage is not None).items():
        if wanted > there.get(kind, 0):
            raise ValueError(
                f"the replicas hold {wanted:g} {kind}s and this machine has "
                f"{there.get(kind, 0):g}; lower serve.image.{kind.lower()}s and "
                f"serve.text.{kind.lower()}s, or set RAY_ADDRESS to a larger cluster"
            )


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _reason(error: RuntimeError) -> str:
    """Why a deployment did not start, in the words of what failed in it."""
    messages = (one.message for one in _deployments().values())
    failed = [found[-1] for one in messages if (found := _FAILURE.findall(one))]
    return failed[0] if failed else str(error)


def _haproxys(config: ServeConfig) -> dict[str, str]:
    """What HAProxy is to have: as Serve has it, a connection without a word is kept for an hour."""
    if not _behind_haproxy():
        return {}
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _CONNECTIONS if files == resource.RLIM_INFINITY else files // _FILES_PER_CONNECTION
    return {
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(
            math.ceil(config.request_seconds + _QUIET_SECONDS)
        ),
        # It does not start with more than it may open files for.
        "RAY_SERVE_HAPROXY_MAXCONN": str(min(_CONNECTIONS, most)),
    }


def _behind_haproxy() -> bool:
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def _check_host(config: ServeConfig) -> None:
    """Raise ValueError if the proxy would listen on more addresses than were asked for."""
    if _behind_haproxy() and config.host != _EVERY_ADDRESS:
        raise ValueError(
            f"serve.host is {config.host}, but HAProxy listens on every address; set serve.host "
            f"to {_EVERY_ADDRESS}, with keys and a firewall, or unset RAY_SERVE_ENABLE_HA_PROXY"
        )


@contextmanager
def _claimed(config: ServeConfig) -> Iterator[None]:
    """Hold the address to listen on, from before Serve does: two that listen share what comes.

    Raises:
        ValueError: the address cannot be listened on, or another `rwkv-clip serve` holds it.
    """
    where = f"{config.host}:{config.port}"
    with (
        socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe,
        socket.socket(socket.AF_UNIX) as claim,
    ):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
            # A name that is no file's, and goes with the process.
            claim.bind(f"\0rwkv-clip serve {probe.getsockname()[:2]}")
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            unknown = isinstance(error, (UnicodeError, socket.gaierror))  # of the host's name
            if unknown or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"serve.host: {config.host} is no address of this machine ({why}); choose "
                    "127.0.0.1, another one that it has, or 0.0.0.0 for every one"
                ) from error
            raise ValueError(
                f"serve.port: {where} cannot be listened on ({why}); choose another one"
            ) from error
        probe.close()
        yield
