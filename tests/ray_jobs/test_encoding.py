"""Where encoders compute."""

import pytest
import ray
import torch

from ray_jobs.encoding import ImageEncoder
from rwkv_clip.model import create_model, named_config


@pytest.mark.usefixtures("ray_cluster")
def test_a_process_that_was_given_no_gpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a node with GPUs, which Ray does not hide from tasks that hold none.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ImageEncoder(create_model(named_config("RWKV-CLIP-Tiny"))).device.type == "cpu"


@pytest.mark.usefixtures("ray_cluster")
def test_a_gpu_that_pytorch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [0])
    with pytest.raises(RuntimeError, match="PyTorch sees no GPU on this node"):
        ImageEncoder(create_model(named_config("RWKV-CLIP-Tiny")))
