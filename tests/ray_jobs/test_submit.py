"""Jobs submitted to a real cluster that asks for a token, and parcels that are not sent."""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobSubmissionClient
from ray.runtime_env import RuntimeEnv

from ray_jobs.parcel import LIMIT_BYTES, ParcelError, chosen_files, code_files, pack
from ray_jobs.storage import Storage
from ray_jobs.submit import configure, follow, runtime_environment
from rwkv_clip.cli import CommandError, main
from rwkv_clip.ops import build_info
from tests.ray_jobs.clusters import ROOT, Cluster, cluster, free_port

TOKEN = "a-token-of-this-test-alone-0123456789"
COMMAND = Path(sys.executable).with_name("rwkv-clip")
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """A cluster with a job server and a token."""
    with cluster(cpus=1, token=TOKEN, jobs=True) as made:
        yield made


def config_file(folder: Path, **changes: Any) -> Path:
    config = {
        "storage": {"uri": str(folder / "storage")},
        "tracking": None,
        "train_data": {"source": {"kind": "emoji", "limit": 20}, "cpus_per_task": 0.2},
        **changes,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def submit(guarded: Cluster, *arguments: object, **environment: str) -> Any:
    command = [COMMAND, "submit", *arguments, "--address", guarded.dashboard]
    return subprocess.run(
        [str(part) for part in command],
        env={**guarded.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_job_is_followed_to_its_end(guarded: Cluster, tmp_path: Path) -> None:
    done = submit(guarded, "ingest", "--config", config_file(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "20 pairs to train, 0 rejected" in done.stdout
    assert "succeeded" in done.stderr
    assert Storage.at(tmp_path / "storage").exists("pairs/train/manifest.json")


def test_a_job_that_the_cluster_has_forgotten_is_not_waited_for(guarded, capsys):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    client = JobSubmissionClient(guarded.dashboard, headers=headers)
    assert follow(client, "raysubmit_forgotten") == 1
    assert "does not know raysubmit_forgotten any more" in "".join(capsys.readouterr())


def test_a_job_that_fails_gives_its_words_and_its_status(guarded: Cluster, tmp_path: Path) -> None:
    done = submit(guarded, "train", "--config", config_file(tmp_path), "--code")
    assert done.returncode == 2
    assert "'train' was not ingested to its end; run ingest" in done.stdout
    assert done.stdout.count("run ingest") == 1
    assert "failed: Job entrypoint command failed with exit code 2" in done.stderr


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RAY_AUTH_TOKEN": "another-token-that-is-wrong-0123456789"}, "does not take this token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token. Set RAY_AUTH_MODE=token"),
    ],
    ids=["wrong", "none"],
)
def test_a_token_that_is_wrong_or_missing_is_told(guarded, tmp_path, environment, told):
    done = submit(guarded, "ingest", "--config", config_file(tmp_path), **environment)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_rays_own_command_sends_code_that_finds_the_nodes_operator(guarded: Cluster) -> None:
    if not build_info()["library"]:
        pytest.skip("the library is not built")
    program = (
        "import os, rwkv_clip.ops as ops, ray_jobs; print('OPERATOR', ops.build_info()['library']);"
        "print('CODE', ray_jobs.__file__); print('SENT', *sorted(os.listdir()))"
    )
    command = [RAY, "job", "submit", "--address", guarded.dashboard, "--working-dir", ROOT]
    done = subprocess.run(
        [*map(str, command), "--", "python", "-c", program],
        env=guarded.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert told["OPERATOR"] == build_info()["library"]
    assert "working_dir_files" in told["CODE"]
    sent = set(told["SENT"].split())
    assert {"configs", "ray_jobs", "rwkv_clip", "serve"} <= sent
    assert not {"tests", "csrc", "docs", ".git", ".venv", "outputs"} & sent


def test_a_second_job_on_a_storage_is_refused_while_the_first_runs(guarded, tmp_path, monkeypatch):
    path = config_file(tmp_path)
    # It waits for a CPU that the cluster does not have, until it is stopped.
    first = submit(
        guarded, "ingest", "--config", path, "--no-wait", "--id", "first",
        "--entrypoint-num-cpus", 64,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    second = submit(guarded, "ingest", "--config", path)
    assert second.returncode == 2
    assert "first is at work on" in second.stderr
    assert f"ray job stop --address {guarded.dashboard} first" in second.stderr


def test_mistakes_are_told_before_anything_is_sent(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # put back, as submit takes it out
    nowhere = ["--address", f"http://127.0.0.1:{free_port()}"]
    path = config_file(tmp_path, trian={})
    assert main(["submit", "ingest", "--config", str(path), *nowhere]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
    path = config_file(tmp_path, storage={"uri": "outputs/run"})
    assert main(["submit", "ingest", "--config", str(path), *nowhere]) == 2
    assert "storage.uri: outputs/run would be a folder of the job's own" in capsys.readouterr().err
    path = config_file(tmp_path)
    assert main(["submit", "ingest", "--config", str(path), *nowhere]) == 2
    assert "does not answer; is it the address of the cluster's dashboard" in (
        capsys.readouterr().err
    )


def test_a_parcel_holds_code_and_no_library(tmp_path):
    files = code_files()
    assert {"rwkv_clip/cli.py", "ray_jobs/submit.py", "ray_jobs/report/page.html.j2"} <= set(files)
    assert not [name for name in files if name.endswith((".so", ".pyc"))]
    size = pack(files, tmp_path / "one.zip")
    assert size < 1_000_000
    pack(dict(reversed(files.items())), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_a_parcel_that_is_too_large_is_refused_with_its_largest_files(tmp_path):
    (tmp_path / "data").mkdir()
    for name, size in {"weights.bin": 900_000, "notes.txt": 1000, "more.bin": 600_000}.items():
        (tmp_path / "data" / name).write_bytes(os.urandom(size))
    files = chosen_files([Path("data")], tmp_path)
    assert pack(files, tmp_path / "parcel.zip") < LIMIT_BYTES
    with pytest.raises(
        ParcelError, match=r"takes 1\.0 MiB.*data/weights\.bin 0\.9 MiB, data/more\.bin 0\.6 MiB"
    ):
        pack(files, tmp_path / "parcel.zip", limit=1024**2)


def test_what_is_included_must_be_there_and_below_the_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    with pytest.raises(ParcelError, match="nothing does not exist"):
        chosen_files([Path("nothing")], tmp_path)
    with pytest.raises(ParcelError, match="is not below"):
        chosen_files([tmp_path], tmp_path / "inside")


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    configure(parser)
    return parser.parse_args(["pipeline", *given])


def test_the_lock_file_and_the_wheel_are_installed_once_on_each_node(tmp_path):
    wheel = tmp_path / "rwkv_clip-0.1.0-py3-none-linux_x86_64.whl"
    wanted = arguments("--requirements", str(ROOT / "requirements/cpu.txt"), "--wheel", str(wheel))
    pack({wheel.name: ROOT / "pyproject.toml"}, tmp_path / "parcel.zip")
    made = runtime_environment(wanted, tmp_path / "parcel.zip", {})
    packages = made["pip"]["packages"]
    assert "torch==2.13.0" in packages
    assert not [one for one in packages if one.startswith(("ray==", "#", "-"))]
    assert packages[-1] == f"${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{wheel.name}"
    assert "--no-deps" in made["pip"]["pip_install_options"]
    assert RuntimeEnv(**made).pip_config()["pip_check"] is False


def test_variables_are_handed_on_by_name(tmp_path):
    wanted = arguments("--env", "HERE", "--env", "THERE=a=b")
    made = runtime_environment(wanted, tmp_path / "parcel.zip", {"HERE": "1", "SECRET": "2"})
    assert made["env_vars"] == {"HERE": "1", "THERE": "a=b"}
    with pytest.raises(CommandError, match="--env HERE: is not set here"):
        runtime_environment(wanted, tmp_path / "parcel.zip", {})
