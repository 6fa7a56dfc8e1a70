"""The runs for GPUs are what README and the operators' guide say of them."""

import re

import pytest
import yaml

from ray_jobs.pipeline import PipelineConfig
from rwkv_clip.config import load_config
from rwkv_clip.evaluation import dataset_names
from tests.infra.manifests import K8S, ROOT

RUNS = [*sorted((ROOT / "configs").glob("*.yaml")), K8S / "overlays/gpu/config/run.yaml"]
ON_GPUS = [path for path in RUNS if "gpus_per_worker" in yaml.safe_load(path.read_text())["train"]]


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_a_run_on_gpus_is_compiled_as_the_measured_one_was(path):
    train = load_config(PipelineConfig, path).train
    assert train.compile
    assert train.precision == "bfloat16"


def test_the_papers_run_has_the_papers_sets(tmp_path):
    text = (ROOT / "configs/yfcc15m-b32.yaml").read_text()
    file = tmp_path / "all.yaml"
    file.write_text(re.sub(r"^  # (?=classification:|  - )", "  ", text, flags=re.MULTILINE))
    evaluation = load_config(PipelineConfig, file).evaluation
    assert [one.name for one in evaluation.retrieval] == ["flickr30k", "coco"]
    assert tuple(one.name for one in evaluation.classification) == dataset_names()
