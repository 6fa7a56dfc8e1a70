"""The image's recipe: its rules, its files, and the package that its build stage makes."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rwkv_clip
from rwkv_clip.cli import _parser
from rwkv_clip.config import config_from_args
from serve.config import ServeFile
from tests.infra.dockerfile import (
    DOCKERFILE,
    TARGETS,
    check,
    ignore_patterns,
    ignored,
    instructions,
    lineage,
    stages,
)
from tests.infra.manifests import K8S, ROOT

TEXT = DOCKERFILE.read_text(encoding="utf-8")


def test_the_rules_are_kept():
    assert check(TEXT) == []


MISTAKES = {
    "the newest Python": ("python:3.12.12-slim-bookworm\n", "python:latest\n", "no exact version"),
    "a rough version": ("nvidia/cuda:13.0.1-", "nvidia/cuda:13-", "no exact version"),
    "root": ("USER 1000:1000", "USER root", "its last USER is root"),
    "number of root": ("USER 1000:1000", "USER 0:0", "its last USER is 0:0"),
    "no user": ("USER 1000:1000", "WORKDIR /app", "its last USER is root"),
    "no health check": ("HEALTHCHECK", "LABEL", "no HEALTHCHECK"),
    "no target": ("AS cpu\n", "AS host\n", "there is no target cpu"),
    "a script from the network": (
        "RUN python -m venv",
        "RUN curl https://example.com/x | bash && python -m venv",
        "pipes what it fetches",
    ),
    "lists left behind": (" && rm -rf /var/lib/apt/lists/*", "", "lists are not fetched"),
    "recommended packages": ("--no-install-recommends ", "", "--no-install-recommends"),
    "a pipe that hides failures": (
        'SHELL ["/bin/bash", "-euo", "pipefail", "-c"]\n',
        "RUN ls | head\n",
        "without pipefail",
    ),
    "a file that is not there": ("COPY csrc csrc", "COPY source csrc", "source is not there"),
    "everything": ("COPY csrc csrc", "COPY . .", ". is not there"),
    "a file that is left out": ("COPY csrc csrc", "COPY tests csrc", ".dockerignore leaves out"),
    "a stage that is not there": ("--from=cpu-builder", "--from=build", "there is no stage build"),
    "another lock file": (
        "--requirement requirements/cpu.txt",
        "--requirement requirements/all.txt",
        "requirements/all.txt is no lock file",
    ),
    "no lock file": ("--requirement requirements/cuda.txt", "torch vllm", "pip takes no lock file"),
    "resolved anew": ("pip install --no-deps --requirement", "pip install --requirement",
                      "resolves anew"),
    "a compiler in what runs": ("libnuma1 wget", "g++ wget", "builds in what runs"),
    "a secret": ("PYTHONUNBUFFERED=1", "HF_TOKEN=hf_1", "a secret in the image"),
    "a misspelt instruction": ("WORKDIR /app", "WORKDIRS /app", "is no instruction"),
    "no end": (
        "/opt/rwkv-clip /opt/rwkv-clip\nUSER 1000:1000\n",
        "/opt/rwkv-clip /opt/rwkv-clip \\\n",
        "goes on after the end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_made_on_purpose_is_told(name):
    old, new, told = MISTAKES[name]
    folded = TEXT.replace(" \\\n    &&", " &&")
    assert old in folded
    assert told in "\n".join(check(folded.replace(old, new)))


def test_an_instruction_may_go_on_over_comments_and_lines():
    found = list(instructions("RUN a \\\n  # why\n  && b\nENV X=1\n"))
    assert [(one.line, one.name, one.value) for one in found] == [
        (1, "RUN", "a && b"),
        (4, "ENV", "X=1"),
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_the_default_command_is_one_of_ours_and_its_configuration_is_in_the_image(target):
    line = lineage(target, stages(TEXT))
    (entry,), (command,) = (
        [one for stage in line for one in stage.of(name)] for name in ("ENTRYPOINT", "CMD")
    )
    assert entry.words == ["rwkv-clip"]
    args = _parser(command.words).parse_args(command.words)
    args.config = ROOT / args.config
    config = config_from_args(ServeFile, args)
    assert config.serve.host == "0.0.0.0"
    health = next(one for stage in line for one in stage.of("HEALTHCHECK"))
    assert f"http://127.0.0.1:{config.serve.port}/readyz" in health.value
    copied = [one.words[:-1] for stage in line for one in stage.of("COPY")]
    assert ["configs"] in copied


def test_both_targets_build_the_package_with_the_same_sources():
    cpu, cuda = (
        [one.value for one in lineage(f"{name}-builder", stages(TEXT))[-1].of("COPY")]
        for name in TARGETS
    )
    ours = [value for value in cpu if "requirements" not in value]
    assert ours == [value for value in cuda if not value.startswith(("requirements", "--from"))]


def test_images_are_called_what_manifests_call_them():
    guide = (ROOT / "docs" / "operators-guide.md").read_text()
    used = "\n".join(path.read_text() for path in K8S.rglob("*.yaml"))
    for target in TARGETS:
        tag = f"rwkv-clip:{rwkv_clip.__version__}-{target}"
        assert f"--target {target} --tag {tag} ." in TEXT
        assert tag in guide
        assert f"{rwkv_clip.__version__}-{target}" in used


def test_nothing_that_is_not_needed_is_sent_to_the_builder():
    patterns = ignore_patterns()
    for path in (".git/HEAD", ".venv/bin/python", "outputs/emoji/report.html", "tests/conftest.py",
                 "infra/k8s/base", "rwkv_clip/_C.so", "serve/__pycache__/app.pyc", "keys", ".env",
                 "requirements/cpu.in"):  # fmt: skip
        assert ignored(path, patterns), path
    for path in ("rwkv_clip/cli.py", "serve/page/index.html", "requirements/cuda.txt", "setup.py"):
        assert not ignored(path, patterns), path


def test_the_files_that_are_copied_make_the_whole_package(tmp_path):
    """The wheel's command, without the compiler, on what the builder would see."""
    tree, patterns = tmp_path / "build", ignore_patterns()
    for one in lineage("cpu-builder", stages(TEXT))[-1].of("COPY"):
        for source in one.words[:-1]:
            for file in [ROOT / source, *(ROOT / source).rglob("*")]:
                name = file.relative_to(ROOT)
                if file.is_file() and not ignored(str(name), patterns):
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, tree / name)
    command = next(
        words
        for one in lineage("cpu-builder", stages(TEXT))[-1].of("RUN")
        for words in one.commands
        if "wheel" in words
    )
    arguments = command[command.index("pip") :]
    answer = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=tree,
        env={**os.environ, "RWKV_CLIP_BUILD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for package in ("rwkv_clip", "ray_jobs", "serve"):
        files = {
            str(file.relative_to(ROOT))
            for file in (ROOT / package).rglob("*")
            if file.is_file() and file.suffix not in (".pyc", ".so") and ".cache" not in file.parts
        }
        assert files - packed == set()
    assert Path(wheel).name.startswith(f"rwkv_clip-{rwkv_clip.__version__}-")
