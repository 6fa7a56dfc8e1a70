"""Doctor tells the truth: about what is here, what is missing, and what is wrong."""

import json
import subprocess
import sys

import pytest
import torch

import rwkv_clip.ops
from rwkv_clip import cli, doctor


def finding(name: str) -> doctor.Finding:
    return next(found for found in doctor.examine() if found.name == name)


def test_the_library_works_here(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "The library works here." in out
    assert torch.__version__ in out


def test_json_holds_what_the_table_shows(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["works"] is True
    names = [entry["name"] for entry in report["findings"]]
    assert {"Python", "PyTorch", "operator", "tokenizer", "Ray", "vLLM", "MLflow"} <= set(names)
    assert all(entry["mend"] for entry in report["findings"] if entry["status"] != "ok")


def test_an_operator_that_computes_wrongly_is_broken(monkeypatch, capsys):
    right = rwkv_clip.ops.wkv6
    monkeypatch.setattr(rwkv_clip.ops, "wkv6", lambda *inputs: right(*inputs) * 1.001)
    assert cli.main(["doctor"]) == 1
    assert "broken: operator's results" in capsys.readouterr().out


def test_without_the_built_operator_the_command_that_builds_it_is_named(monkeypatch):
    info = {"library": None, "cpu": False, "cuda": False, "cpu_capability": "portable"}
    monkeypatch.setattr(rwkv_clip.ops, "build_info", lambda: {**info, "reason": "no _C.so"})
    found = finding("operator")
    assert found.status == "limited"
    assert "no _C.so" in found.detail
    assert "python -m rwkv_clip._build" in found.mend


def test_gpus_that_the_operator_was_not_built_for_are_told(monkeypatch):
    info = {**rwkv_clip.ops.build_info(), "cuda": False}
    monkeypatch.setattr(rwkv_clip.ops, "build_info", lambda: info)
    monkeypatch.setattr(doctor, "_gpus", lambda: [0])
    found = finding("operator")
    assert found.status == "limited"
    assert "on GPUs it runs through the reference" in found.detail
    assert "CUDA_HOME" in found.mend


def test_a_gpu_on_which_the_operator_fails_is_broken_beside_a_cpu_that_works(monkeypatch):
    missing = torch.cuda.device_count()
    monkeypatch.setattr(doctor, "_gpus", lambda: [missing])
    assert finding("operator's results").status == "ok"
    assert finding(f"operator's results on GPU {missing}").status == "broken"


@pytest.mark.parametrize(
    ("command", "status", "detail"),
    [
        ("/usr/bin/env sh", "ok", "at /usr/bin/env sh"),  # as in `ccache g++`
        ("{folder}/broken", "limited", "does not run"),
        ("{folder}/none", "missing", "is not found"),
        ("g++ '-O", "limited", "No closing quotation"),
    ],
)
def test_a_compiler_is_the_build_s_and_may_be_broken(
    tmp_path, monkeypatch, command, status, detail
):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", command.format(folder=tmp_path))
    found = finding("C++")
    assert found.status == status
    assert detail in found.detail


def test_a_missing_library_package_is_broken_and_named(monkeypatch):
    installed = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name == "ftfy" else installed(name)
    )
    found = finding("library packages")
    assert (found.status, found.mend) == ("broken", "pip install ftfy")


def test_a_module_that_cannot_be_imported_is_a_finding_and_not_a_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "rwkv_clip.tokenizer", None)
    found = finding("tokenizer")
    assert found.status == "broken"
    assert "rwkv_clip.tokenizer" in found.detail


@pytest.mark.parametrize("package", ["ray", "mlflow", "transformers"])
def test_what_only_the_jobs_need_may_be_missing(monkeypatch, package):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    names = {"ray": "Ray", "mlflow": "MLflow", "transformers": "transformers"}
    assert finding(names[package]).status == "missing"


def test_heavy_packages_are_not_imported():
    program = (
        "import sys; from rwkv_clip import doctor; doctor.examine();"
        "print(*{'ray', 'vllm', 'mlflow', 'transformers'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout.strip()) == (0, ""), answer.stderr
