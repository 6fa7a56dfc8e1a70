"""The losses' values and gradients are those of the global batch, on any number of processes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rwkv_clip.loss import (
    ContrastiveLoss,
    PairLoss,
    SigmoidLoss,
    contrastive_loss,
    create_loss,
    sigmoid_loss,
)
from tests.processes import run_ranks

Golden = Callable[[str], Path]
# The golden features are stored in float32, hence its tolerances of 1e-7 and 1e-6.
LOG_SCALE, BIAS = 2.659260036932778, -3.0


def plain_contrastive(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


PLAIN = {"contrastive": plain_contrastive, "sigmoid": plain_sigmoid}
NAMES = sorted(PLAIN)


def features(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    image, text = torch.randn(2, rows, 8, generator=generator, dtype=torch.float64).to(dtype)
    return image, text


def value_and_gradients(
    loss: Callable[..., Tensor], image: Tensor, text: Tensor
) -> tuple[Tensor, ...]:
    """The loss and its gradients by image, text, log logit scale and bias."""
    leaves = [image, text, torch.tensor(LOG_SCALE).double(), torch.tensor(BIAS).double()]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = loss(leaves[0], leaves[1], leaves[2].exp(), leaves[3])
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), *gradients


def worker(
    rank: int, folder: Path, name: str, sizes: list[int], image: Tensor, text: Tensor
) -> None:
    loss = create_loss(name, equal_batches=len(set(sizes)) == 1, chunk_elements=12)
    mine = image.split(sizes)[rank], text.split(sizes)[rank]
    result = value_and_gradients(loss, *mine)
    known = value_and_gradients(partial(loss, sizes=loss.sizes(mine[0])), *mine)
    assert all(torch.equal(one, other) for one, other in zip(result, known, strict=True))
    torch.save(result, folder / f"{rank}.pt")


def distributed(
    folder: Path, name: str, sizes: list[int], image: Tensor, text: Tensor
) -> list[tuple[Tensor, ...]]:
    run_ranks(worker, len(sizes), folder, name, sizes, image, text)
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(sizes))]


@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_second_derivatives_are_refused(name: str) -> None:
    image, text = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    value = create_loss(name)(image, text, 2.0, 0.0)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(value, image, create_graph=True)


def golden_case(golden: Golden, case: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors = load_file(golden("clip_loss.safetensors"))
    values = json.loads(golden("clip_loss.json").read_text())["values"]
    prefix = f"{case}/"
    return (
        {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)},
        values[case],
    )


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=tolerance * max(1e-3, expected.abs().max())
    )


@pytest.mark.parametrize("batch", [1, 2, 5, 10])
def test_one_process_equals_the_golden_values(golden: Golden, batch: int) -> None:
    tensors, values = golden_case(golden, f"single_B{batch}")
    image, text = tensors["image"].double(), tensors["text"].double()
    result = value_and_gradients(ContrastiveLoss(), image, text)
    assert result[0].item() == pytest.approx(values["loss"], abs=1e-7)
    assert result[3].item() == pytest.approx(values["grad_log_logit_scale"], abs=1e-6)
    assert_close(result[1], tensors["grad_image"], 1e-6)
    assert_close(result[2], tensors["grad_text"], 1e-6)


def test_two_processes_average_to_the_golden_gradient(golden: Golden, tmp_path: Path) -> None:
    tensors, values = golden_case(golden, "single_B10")
    image, text = tensors["image"].double(), tensors["text"].double()
    ranks = distributed(tmp_path, "contrastive", [5, 5], image, text)
    upstream = load_file(golden("clip_loss.safetensors"))
    for rank, result in enumerate(ranks):
        rows = slice(5 * rank, 5 * rank + 5)
        assert result[0].item() == pytest.approx(values["loss"], abs=1e-7)
        assert result[3].item() == pytest.approx(values["grad_log_logit_scale"], abs=1e-6)
        # A row is on one rank only; DDP's average over two ranks halves its gradient.
        assert_close(result[1] / 2, tensors["grad_image"][rows], 1e-6)
        assert_close(result[2] / 2, tensors["grad_text"][rows], 1e-6)
        # The published default gathers without gradients and falls short by the world size.
        published = upstream[f"world2/local0_grad0/rank{rank}/grad_image"]
        assert_close(published, result[1] / 2, 1e-6)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 4, 2], [3, 0, 2]])
@pytest.mark.parametrize("name", NAMES)
def test_three_processes_equal_one(name: str, sizes: list[int], tmp_path: Path) -> None:
    image, text = features(sum(sizes))
    expected = value_and_gradients(PLAIN[name], image, text)
    ranks = distributed(tmp_path, name, sizes, image, text)
    for value, _, _, scale_gradient, bias_gradient in ranks:
        assert_close(value, expected[0], 1e-12)
        assert_close(scale_gradient, expected[3], 1e-11)
        assert_close(bias_gradient, expected[4], 1e-11)
    for side in (1, 2):
        assert_close(torch.cat([rank[side] for rank in ranks]) / 3, expected[side], 1e-11)


@pytest.mark.parametrize("chunk_elements", [1, 20, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_do_not_change_the_result(name: str, chunk_elements: int) -> None:
    image, text = features(7)
    loss = create_loss(name, chunk_elements=chunk_elements)
    for got, expected in zip(
        value_and_gradients(loss, image, text),
        value_and_gradients(PLAIN[name], image, text),
        strict=True,
    ):
        assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    image, text = features(4)
    inputs = [image, text, torch.tensor(3.0).double(), torch.tensor(-1.0).double()]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(create_loss(name, normalize=False), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_large_scales_stay_finite_and_exact(name: str) -> None:
    image, text = (tensor.float() for tensor in features(6))
    bias = torch.tensor(-10.0)
    got = create_loss(name)(image, text, torch.tensor(100.0), bias)
    expected = PLAIN[name](image.double(), text.double(), torch.tensor(100.0), bias)
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_input_is_accumulated_in_float32(name: str, dtype: torch.dtype) -> None:
    image, text = features(6, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, *gradients = value_and_gradients(create_loss(name), image, text)
    assert value.dtype == torch.float32
    assert gradients[0].dtype == dtype
    expected = value_and_gradients(PLAIN[name], image.double(), text.double())
    rounding = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert_close(value, expected[0], 1e-5)
    assert_close(gradients[0], expected[1], rounding)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name: str) -> None:
    image, text = features(5)
    loss = create_loss(name)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        value_and_gradients(compiled, image, text),
        value_and_gradients(loss, image, text),
        strict=True,
    ):
        assert_close(got, expected, 1e-12)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_grows_with_the_square_of_the_batch(name: str) -> None:
    image, text = features(256)
    with LargestTensor() as largest:
        value_and_gradients(create_loss(name, chunk_elements=1024), image, text)
    assert largest.elements <= 2 * 256 * 8  # both sides' features; all logits are 65536


@pytest.mark.parametrize("name", NAMES)
def test_cached_features_give_the_gradients_of_one_large_batch(name: str) -> None:
    torch.manual_seed(0)
    towers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]).double()
    image, text = features(6)
    scale, bias = torch.tensor(5.0).double(), torch.tensor(-2.0).double()
    PLAIN[name](towers[0](image), towers[1](text), scale, bias).backward()
    expected = [parameter.grad for parameter in towers.parameters()]
    towers.zero_grad()

    with torch.no_grad():
        cached = [
            torch.cat([tower(x) for x in xs.split(2)])
            for tower, xs in zip(towers, (image, text), strict=True)
        ]
    result = create_loss(name).value_and_gradients(cached[0], cached[1], scale, bias)
    for tower, xs, gradient in zip(towers, (image, text), result[1:3], strict=True):
        for x, rows in zip(xs.split(2), gradient.split(2), strict=True):
            tower(x).backward(rows)
    for parameter, gradient in zip(towers.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient, 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", [False, True])
def test_embeddings_may_be_of_inference_mode(name: str, inside: bool) -> None:
    image, text = features(6)
    scale, bias = torch.tensor(5.0).double(), torch.tensor(-2.0).double()
    loss = create_loss(name)
    expected = loss.value_and_gradients(image, text, scale, bias)
    with torch.inference_mode():
        encoded = image.clone(), text.clone()
        got = loss.value_and_gradients(*encoded, scale, bias) if inside else None
    got = got or loss.value_and_gradients(*encoded, scale, bias)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)
        assert not mine.is_inference()


@pytest.mark.parametrize("name", NAMES)
def test_plain_numbers_are_taken_for_what_they_are(name: str) -> None:
    image, text = features(6)
    loss = create_loss(name)
    for scale, bias in ((100, -10), (14.3, -9.7)):
        exact = torch.tensor([scale, bias], dtype=torch.float64).unbind()
        expected = loss.value_and_gradients(image, text, *exact)
        got = loss.value_and_gradients(image, text, scale, bias)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert loss(image, text, scale, bias) == expected.loss


def test_without_gradients_nothing_is_recorded() -> None:
    image, text = features(3)
    with torch.no_grad():
        value = contrastive_loss(image.requires_grad_(), text, 10.0)
    assert not value.requires_grad
    assert_close(value, plain_contrastive(image.detach(), text, torch.tensor(10.0), None), 1e-12)


def test_the_functions_are_the_modules() -> None:
    image, text = features(3)
    assert contrastive_loss(image, text, 3.0) == ContrastiveLoss()(image, text, 3.0)
    assert sigmoid_loss(image, text, 3.0, -1.0) == SigmoidLoss()(image, text, 3.0, -1.0)
    assert all(isinstance(create_loss(name), PairLoss) for name in NAMES)


def test_unusable_input_is_refused_with_its_shape() -> None:
    image, text = features(3)
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(2, 8\)"):
        contrastive_loss(image, text[:2], 1.0)
    with pytest.raises(ValueError, match="no pairs"):
        contrastive_loss(image[:0], text[:0], 1.0)
    with pytest.raises(ValueError, match="logit_scale must be a single number"):
        contrastive_loss(image, text, torch.ones(2))
    with pytest.raises(ValueError, match="'hinge'; there are contrastive, sigmoid"):
        create_loss("hinge")
