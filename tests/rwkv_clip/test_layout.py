"""The architecture rule: csrc <- rwkv_clip <- ray_jobs, and rwkv_clip <- serve. Nothing else."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = {
    "PIL",
    "ftfy",
    "instant_clip_tokenizer",
    "numpy",
    "pydantic",
    "rwkv_clip",
    "safetensors",
    "simplejpeg",
    "torch",
    "yaml",
}
BUILD = {"ninja"}  # what only the build script may use
OPERATOR_AND_MODEL = {"numpy", "rwkv_clip", "safetensors", "torch"}
REST = ("pydantic", "yaml", "PIL", "simplejpeg", "ftfy", "instant_clip_tokenizer")
FOREIGN = ("ray", "mlflow", "vllm", "transformers", "torchvision", "timm", "ray_jobs", "serve")


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The top-level packages a file imports, wherever in it, those for type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "rwkv_clip" if node.level else (node.module or "").partition(".")[0]


def foreign(path: Path, allowed: set[str]) -> set[str]:
    return set(imported(path)) - allowed - set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", modules("rwkv_clip"), ids=lambda path: path.stem)
def test_the_library_imports_only_its_own_dependencies(path):
    assert not foreign(path, LIBRARY | BUILD if path.stem == "_build" else LIBRARY)


@pytest.mark.parametrize(
    "path", modules("rwkv_clip/ops", "rwkv_clip/model"), ids=lambda path: path.stem
)
def test_operator_and_model_need_only_torch_numpy_and_safetensors(path):
    assert not foreign(path, OPERATOR_AND_MODEL)


def test_jobs_and_server_do_not_import_each_other():
    assert not [path for path in modules("ray_jobs") if "serve" in imported(path)]
    assert not [path for path in modules("serve") if "ray_jobs" in imported(path)]


def test_the_operators_sources_include_nothing_of_python():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert sources
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "Python.h" not in text, path
        assert "pybind11" not in text, path


def run_without(blocked: tuple[str, ...], program: str) -> None:
    """Run a program in a fresh interpreter where importing the blocked packages fails."""
    prelude = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
    answer = subprocess.run(
        [sys.executable, "-c", prelude + program], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr


def test_every_module_imports_where_ray_mlflow_vllm_and_transformers_are_absent():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in modules("rwkv_clip")
    ]
    run_without(FOREIGN, f"import importlib; [importlib.import_module(n) for n in {names!r}]")


def test_operator_and_model_import_where_the_rest_of_the_library_is_absent():
    program = (
        "import torch, rwkv_clip.ops, rwkv_clip.model;"
        "torch.ops.rwkv_clip.wkv6; rwkv_clip.create_model; rwkv_clip.load_checkpoint"
    )
    run_without(REST + FOREIGN, program)


def test_importing_the_package_imports_nothing_heavy():
    run_without(("torch", "numpy", *REST, *FOREIGN), "import rwkv_clip; rwkv_clip.__version__")


def test_model_and_images_import_without_pytorchs_compiler():
    """It takes a process longer to import than PyTorch itself."""
    program = "import rwkv_clip.model, rwkv_clip.transforms"
    run_without(("torch._dynamo", "torch._inductor"), program)


def test_what_holds_no_model_imports_where_pytorch_and_mlflow_are_absent():
    served = "serve.ingress, serve.index"
    handed_out = "ray_jobs.ingest, ray_jobs.synthesis.captioner, ray_jobs.training.batches"
    run_without(("torch", "mlflow"), f"import {served}, {handed_out}")


def test_every_public_name_is_there_and_an_unknown_one_is_an_attribute_error():
    import rwkv_clip

    assert all(getattr(rwkv_clip, name) is not None for name in rwkv_clip.__all__)
    assert set(rwkv_clip.__all__) <= set(dir(rwkv_clip))
    with pytest.raises(AttributeError, match="create_modle"):
        _ = rwkv_clip.create_modle
