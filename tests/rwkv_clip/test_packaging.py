"""The wheel: what is in it, how it is tagged, and that it works where the sources are not.

One wheel with the operator and one without are built once a session, from a copy of the tree, so
that nothing built in place can leak into them.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = (
    "csrc",
    "ray_jobs",
    "rwkv_clip",
    "serve",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

pytestmark = pytest.mark.slow

CHECK = """
import sys
# Only what was installed here counts: not the checkout that the environment has installed.
kept = [one for one in sys.meta_path if "__editable__" not in getattr(one, "__module__", "")]
sys.meta_path = kept
import logging, torch, rwkv_clip
from rwkv_clip.ops import build_info, reference, wkv6
inputs = [torch.randn(2, 9, 32) for _ in range(4)] + [torch.randn(2, 16)]
assert torch.allclose(wkv6(*inputs), reference.wkv6(*inputs), atol=1e-4)
assert rwkv_clip.tokenize(["a dog"]).shape == (1, 77)
assert rwkv_clip.__file__.startswith(sys.argv[1]), rwkv_clip.__file__
print(build_info()["library"])
"""


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_sources(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy(source, folder / name)
    return folder


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    return run(command, copy_sources(folder), **environment)


def only_wheel(folder: Path) -> Path:
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    # A checkout and a PyTorch whose paths need quoting, as users have them.
    folder = tmp_path_factory.mktemp("$wheel's checkout")
    (folder / "site packages").mkdir()
    (folder / "site packages" / "torch").symlink_to(Path(torch.__file__).parent)
    built = build_wheel(folder, RWKV_CLIP_CUDA="0", PYTHONPATH=str(folder / "site packages"))
    assert built.returncode == 0, built.stdout + built.stderr
    return only_wheel(folder)


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    built = build_wheel(folder, RWKV_CLIP_BUILD="0")
    assert built.returncode == 0, built.stdout + built.stderr
    return only_wheel(folder)


def install(wheel: Path, folder: Path) -> Path:
    """Install into an empty folder; what the wheel needs comes from the environment."""
    installed = run([*PIP, "install", "--no-deps", "--target", str(folder), str(wheel)], folder)
    assert installed.returncode == 0, installed.stderr
    return folder


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    program = [sys.executable, "-c", CHECK, str(folder)]
    answer = run(program, elsewhere, PYTHONPATH=str(folder))
    assert answer.returncode == 0, answer.stderr
    return answer


def test_the_wheel_holds_the_operator_and_serves_every_python(wheel):
    assert wheel.name.startswith("rwkv_clip-")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "rwkv_clip/_C.so" in names
    assert "rwkv_clip/py.typed" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks"))]


@pytest.mark.parametrize("pattern", ["serve/page/*", "ray_jobs/report/*.j2", "rwkv_clip/**/*.json"])
def test_the_wheel_holds_the_files_that_are_no_code(wheel, pattern):
    wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()}
    assert wanted
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_the_installed_wheel_works_elsewhere_with_its_operator(wheel, tmp_path):
    answer = check(install(wheel, tmp_path))
    assert answer.stdout.strip() == str(tmp_path / "rwkv_clip" / "_C.so")
    assert "_build" not in answer.stderr


def test_the_installed_command_answers(wheel, tmp_path):
    install(wheel, tmp_path)
    command = [sys.executable, str(tmp_path / "bin" / "rwkv-clip"), "doctor"]
    answer = run(command, tmp_path, PYTHONPATH=str(tmp_path))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert str(tmp_path / "rwkv_clip" / "_C.so") in answer.stdout


def test_without_the_operator_the_wheel_is_pure_and_works_by_the_reference(pure_wheel, tmp_path):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert "rwkv_clip/_C.so" not in zipfile.ZipFile(pure_wheel).namelist()
    answer = check(install(pure_wheel, tmp_path))
    assert answer.stdout.strip() == "None"
    assert answer.stderr.count("rwkv_clip._build") == 1


def test_building_in_an_installation_without_sources_says_what_to_do(pure_wheel, tmp_path):
    install(pure_wheel, tmp_path)
    command = [sys.executable, "-m", "rwkv_clip._build"]
    answer = run(command, tmp_path, PYTHONPATH=str(tmp_path))
    assert answer.returncode != 0
    assert "csrc" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_compile_that_fails_leaves_no_wheel(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    copy_sources(folder)
    for source in (folder / "csrc").rglob("*.cpp"):
        source.write_text("")  # nobody waits for what compiles
    (folder / "csrc" / "broken.cpp").write_text("this is not C++\n")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    built = run(command, folder, RWKV_CLIP_CUDA="0")
    assert built.returncode != 0
    assert not list(folder.glob("dist/*.whl"))
    assert "broken.cpp" in built.stdout + built.stderr
    for setting in ("RWKV_CLIP_BUILD=0", "RWKV_CLIP_CUDA=0"):
        assert setting in built.stdout + built.stderr


def test_the_source_archive_holds_what_the_build_needs(tmp_path):
    copy_sources(tmp_path)
    program = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    built = run([sys.executable, "-c", program], tmp_path)
    assert built.returncode == 0, built.stderr
    listing = run(["tar", "-tzf", *map(str, (tmp_path / "dist").glob("*.tar.gz"))], tmp_path)
    names = {name.partition("/")[2] for name in listing.stdout.split()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[ch]*")}
    assert sources
    assert sources | {"setup.py", "LICENSE", "rwkv_clip/_build.py"} <= names
