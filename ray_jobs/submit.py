"""`rwkv-clip submit JOB`: run a job on a cluster, see its words here, and end as it ends.

    rwkv-clip submit pipeline --config configs/yfcc15m-b32.yaml --address http://HEAD:8265

By hand the same is `ray job submit --working-dir . -- python -m ray_jobs.pipeline --config ...`.

Choices:
- The configuration is checked here, so a mistake costs no start on the cluster.
- The configuration alone is sent, and the nodes run the package of their image, with its compiled
  operator. `--code` sends this program's Python files too; they find the image's operator.
- Nodes that have nothing but Ray get the lock file and a wheel, which Ray installs once on each
  node, in an environment that is kept for the next job.
- A second job on the same storage is refused while the first one runs. Once that has ended,
  however it did, the same command goes on where it stopped.
"""

import argparse
import asyncio
import json
import logging
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_jobs.cluster import quieten
from ray_jobs.parcel import ParcelError, chosen_files, code_files, pack
from rwkv_clip.cli import CommandError
from rwkv_clip.config import add_config_options, config_from_args

logger = logging.getLogger(__name__)

SUMMARY = "run a job on a Ray cluster and follow it"
JOBS = ("caption", "embed", "evaluate", "ingest", "pipeline", "synthesize", "train")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_POLL_SECONDS, _AWAY_SECONDS = 1.0, 10.0
_DENIED = {
    True: "the cluster wants a token. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or the file "
    "~/.ray/auth_token",
    False: "the cluster does not take this token. Mend RAY_AUTH_TOKEN, the file that "
    "RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("job", choices=JOBS, metavar="JOB", help=f"one of {', '.join(JOBS)}")
    add_config_options(parser)
    parser.add_argument(
        "--address",
        metavar="URL",
        help=f"of the cluster's dashboard; {' or '.join(_ADDRESS_VARIABLES)} if absent, "
        f"else {DEFAULT_ADDRESS}",
    )
    parser.add_argument("--id", metavar="NAME", help="of the submission; made up if absent")
    parser.add_argument(
        "--no-wait", action="store_true", help="end when the job is taken, and do not follow it"
    )
    sent = parser.add_argument_group("what is sent")
    sent.add_argument(
        "--code", action="store_true", help="send this program's Python files, to run instead of "
        "those that the nodes have installed",
    )  # fmt: skip
    sent.add_argument(
        "--include", action="append", default=[], type=Path, metavar="PATH",
        help="send a file or folder that the configuration names; may be repeated",
    )  # fmt: skip
    sent.add_argument(
        "--requirements", type=Path, metavar="FILE",
        help="install this lock file once on each node, as nodes without our image need",
    )  # fmt: skip
    sent.add_argument(
        "--wheel", type=Path, metavar="FILE",
        help="install this wheel once on each node: the one that `make wheel` leaves in dist/",
    )  # fmt: skip
    sent.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help="set a variable for the job, to its value here if none is given; may be repeated. "
        "Whoever sees the job sees it: secrets belong into the nodes' environment",
    )  # fmt: skip
    held = parser.add_argument_group("what the job's first process holds (its workers hold more)")
    held.add_argument("--entrypoint-num-cpus", type=float, metavar="N", help="CPUs")
    held.add_argument("--entrypoint-num-gpus", type=float, metavar="N", help="GPUs")
    held.add_argument("--entrypoint-memory", type=int, metavar="BYTES", help="memory")
    held.add_argument(
        "--entrypoint-resources", type=_resources, metavar="JSON",
        help='the nodes\' own resources, such as \'{"driver": 1}\'',
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Submit, follow, and give the job's own exit status."""
    storage = _checked(args)
    quieten()
    client = _connect(args.address)
    _refuse_second(client, storage)
    job = _submit(client, args, storage)
    _say(f"{args.job} was submitted as {job}")
    if args.no_wait:
        _say(_hints(client, job))
        return 0
    try:
        return follow(client, job)
    except KeyboardInterrupt:
        _say(f"\n{job} goes on; {_hints(client, job)}")
        raise


def follow(client: JobSubmissionClient, job: str) -> int:
    """Write a job's words to standard output until it ends; its exit status.

    A connection that is lost is made again, and nothing is written twice.
    """
    waiting, written = threading.Event(), 0
    while True:
        written = asyncio.run(_write_words(client, job, written))
        try:
            details = client.get_job_info(job)
        except (requests.RequestException, RuntimeError) as error:  # a gateway's 502, for one
            if f"{job} does not exist" in str(error):  # Ray's words, and no gateway's 404
                _say(
                    f"the cluster does not know {job} any more: its head began anew; the same "
                    "command starts the job again, which goes on where it stopped"
                )
                return 1
            _say(f"the cluster does not answer ({error}); asking again")
            waiting.wait(_AWAY_SECONDS)
            continue
        if details.status.is_terminal():
            return _ended(job, details)
        waiting.wait(_POLL_SECONDS)


def runtime_environment(
    args: argparse.Namespace, parcel: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Ray's runtime environment for the job that the arguments ask for.

    Args:
        args: of the command.
        parcel: the archive that is sent.
        environment: of this process, for variables that are handed on.

    Raises:
        CommandError: a variable that is to be handed on is not there.
    """
    made: dict[str, Any] = {"working_dir": str(parcel)}
    if variables := _variables(args.env, environment):
        made["env_vars"] = variables
    packages = _locked(args.requirements) if args.requirements else []
    if args.wheel:
        packages.append(f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{args.wheel.name}")
    if packages:
        # The lock names every package, and some ask for what must not be installed.
        options = ["--disable-pip-version-check", "--no-cache-dir", "--no-deps"]
        made["pip"] = {"packages": packages, "pip_check": False, "pip_install_options": options}
        made["config"] = {"setup_timeout_seconds": 3600}
    return made


def _checked(args: argparse.Namespace) -> str:
    """The storage of a configuration that is valid and can be run elsewhere."""
    from ray_jobs.pipeline import PipelineConfig  # which imports the stages

    if args.config is None:
        raise CommandError("--config is missing; takes the run's YAML file")
    uri = config_from_args(PipelineConfig, args).storage.uri
    if "://" not in uri and not Path(uri).is_absolute():
        raise CommandError(
            f"storage.uri: {uri} would be a folder of the job's own, which goes with it. Name one "
            "that all nodes reach: --set storage.uri=s3://BUCKET/PREFIX, or an absolute path on a "
            "file system they share"
        )
    return uri


def _connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server; what Ray reads from the environment comes second."""
    held = [os.environ.pop(name, "") for name in _ADDRESS_VARIABLES]
    wanted = address or next(filter(None, held), DEFAULT_ADDRESS)
    if not wanted.startswith(("http://", "https://")):
        raise CommandError(f"--address: {wanted} is not the URL of a dashboard, http://HEAD:8265")
    try:
        return JobSubmissionClient(wanted)
    except AuthenticationError as error:
        missing = "required" in str(error)  # Ray's words for 401; 403 has others
        raise CommandError(f"{wanted}: {_DENIED[missing]}") from error
    except (ConnectionError, requests.RequestException) as error:
        raise CommandError(
            f"{wanted} does not answer; is it the address of the cluster's dashboard, and is its "
            "port open to this machine?"
        ) from error


def _refuse_second(client: JobSubmissionClient, storage: str) -> None:
    """Two jobs in one storage would train into one folder."""
    for details in client.list_jobs():
        held = (details.metadata or {}).get("storage")
        if held == storage and not JobStatus(details.status).is_terminal():
            job = str(details.submission_id)
            raise CommandError(f"{job} is at work on {storage} already; {_hints(client, job)}")


def _submit(client: JobSubmissionClient, args: argparse.Namespace, storage: str) -> str:
    base = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        parcel = Path(folder, "working-dir.zip")
        config = args.config.resolve()
        inside = config.is_relative_to(base.resolve())
        name = config.relative_to(base.resolve()).as_posix() if inside else config.name
        try:
            files = {**chosen_files(args.include, base), name: config}
            if args.code:
                files |= code_files()
            if args.wheel:
                files[args.wheel.name] = args.wheel
            pack(files, parcel)
        except (ParcelError, OSError) as error:
            raise CommandError(str(error)) from error
        overrides = [part for one in args.overrides for part in ("--set", one)]
        command = ["python", "-m", f"ray_jobs.{args.job}", "--config", name, *overrides]
        try:
            return client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=args.id,
                runtime_env=runtime_environment(args, parcel, os.environ),
                metadata={"job": args.job, "storage": storage},
                entrypoint_num_cpus=args.entrypoint_num_cpus,
                entrypoint_num_gpus=args.entrypoint_num_gpus,
                entrypoint_memory=args.entrypoint_memory,
                entrypoint_resources=args.entrypoint_resources,
            )
        except RuntimeError as error:  # Ray's, with the server's answer
            raise CommandError(f"the cluster did not take the job: {error}") from error


async def _write_words(client: JobSubmissionClient, job: str, written: int) -> int:
    """Follow the log to its end, leaving out what was written before; gives the new length."""
    seen = 0
    try:
        async for words in client.tail_job_logs(job):
            fresh = words[max(written - seen, 0) :]
            seen += len(words)
            sys.stdout.write(fresh)
            sys.stdout.flush()
            written = max(written, seen)
    except (aiohttp.ClientError, RuntimeError) as error:  # the latter is Ray's, for the same
        logger.debug("the log of %s broke off: %s", job, error)
    return written


def _ended(job: str, details: JobDetails) -> int:
    """Say how a job ended; its exit status, 1 where it has none."""
    status = JobStatus(details.status)
    if status == JobStatus.SUCCEEDED:
        _say(f"{job} succeeded")
        return 0
    code = details.driver_exit_code
    # Ray's message ends with the last of the words that were written here.
    reason = (details.message or "no reason was given").partition(", last available logs")[0]
    _say(f"{job} {status.value.lower()}: {reason}")
    # A process that a signal ended has a negative status, which no process can exit with.
    return code if code is not None and 0 < code < 256 else 1


def _hints(client: JobSubmissionClient, job: str) -> str:
    at = f"--address {client.get_address()} {job}"
    return f"follow it with `ray job logs --follow {at}`, end it with `ray job stop {at}`"


def _locked(file: Path) -> list[str]:
    """A lock file's packages, without Ray itself: the nodes' own must stay what it is."""
    try:
        lines = [line.partition(" #")[0].strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise CommandError(f"--requirements: {file} cannot be read: {error.strerror}") from error
    return [line for line in lines if line and not line.startswith(("#", "ray=="))]


def _variables(wanted: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for one in wanted:
        name, given, value = one.partition("=")
        if not given and name not in environment:
            raise CommandError(f"--env {name}: is not set here; give it as {name}=VALUE")
        found[name] = value if given else environment[name]
    return found


def _resources(text: str) -> dict[str, float]:
    """Ray's resources from JSON; raises ValueError, which argparse tells."""
    value = json.loads(text)
    return {str(name): float(amount) for name, amount in value.items()}


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
