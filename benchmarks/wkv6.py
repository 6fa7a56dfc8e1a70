"""The WKV6 operator against plain PyTorch: the scan that defines it, and the best dense forms.

    python benchmarks/wkv6.py               # float32 on the CPU, and CUDA where there is one
    python benchmarks/wkv6.py --device cuda # CUDA alone
    python benchmarks/wkv6.py --all-isas    # the CPU's slower instruction sets as well

Every form is compared with the reference in float64 first, outputs and all gradients (of sequences
above 512 tokens the outputs alone); a wrong one is an error, and nothing gets a time.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from _common import header, interleaved, machine, refuse_unless, relative_error, row, verdict
from torch import Tensor

from rwkv_clip.ops import build_info, reference, wkv6

Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

SHAPES = ((64, 49, 8, 80), (64, 77, 10, 64))
CUDA_SHAPES = {  # B, T, H, N: an excellent kernel's microseconds forward and backward, on an H200
    (512, 49, 8, 80): (45, 82),
    (512, 77, 10, 64): (70, 128),
    (128, 196, 8, 80): (48, 90),
    (32, 1024, 8, 80): (110, 220),
}
LENGTHS = (256, 512, 1024, 2048, 4096)
TOKENS = 4096  # in a batch of the lengths above
GRADIENT_TOKENS = 512  # the scan's graph, which has the gradients, takes 12 GB a head at 4096
SCAN_TARGET, DENSE_TARGET, CUDA_TARGET = 20.0, 2.0, 1.5


def split(u: Tensor, *sequences: Tensor) -> list[Tensor]:
    """[B, T, C] -> [B * H, T, N]."""
    H, N = u.shape
    B, T, _ = sequences[0].shape
    return [x.view(B, T, H, N).transpose(1, 2).reshape(B * H, T, N) for x in sequences]


def join(y: Tensor, B: int) -> Tensor:
    """[B * H, T, N] -> [B, T, C]."""
    BH, T, N = y.shape
    return y.view(B, BH // B, T, N).transpose(1, 2).reshape(B, T, BH // B * N)


def own(r: Tensor, k: Tensor, u: Tensor) -> Tensor:
    """The diagonal of the attention, [B * H, T, T]."""
    bonus = u.repeat(len(r) // len(u), 1)[:, None]
    return torch.diag_embed((r * bonus * k).sum(-1))


def dense_exact(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """One decay for every pair and channel: sums of logarithms, so nothing overflows."""
    B = len(r)
    r, k, v, w = split(u, r, k, v, w)
    T = r.shape[1]
    log_decay = -torch.exp(w)
    total = torch.cumsum(log_decay, dim=1)
    before = total - log_decay
    # The logarithm of the product strictly between t and s, whichever comes first.
    forward = before[:, :, None] - total[:, None]
    backward = before[:, None] - total[:, :, None]
    t, s = torch.arange(T)[:, None, None], torch.arange(T)[None, :, None]
    between = torch.where(t > s, forward, backward).masked_fill(t == s, -torch.inf)
    attention = torch.einsum("btj,bsj,btsj->bts", r, k, torch.exp(between))
    return join((attention + own(r, k, u)) @ v, B)


def dense_by_levels(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """One masked product for each bit in which t and s can differ; see docs/wkv6.md."""
    B = len(r)
    r, k, v, w = split(u, r, k, v, w)
    T = r.shape[1]
    log_decay = -torch.exp(w)
    position = torch.arange(T)
    attention = own(r, k, u)
    for level in range((T - 1).bit_length()):
        half = 1 << level
        padded = torch.nn.functional.pad(log_decay, (0, 0, 0, -T % half)).unflatten(1, (-1, half))
        total = padded.cumsum(2)
        before = total - padded  # of the half, up to the token
        after = total[:, :, -1:] - total  # behind the token, to the half's end
        right = (position // half % 2 == 1)[:, None]
        factor = torch.exp(
            torch.where(right, before.flatten(1, 2)[:, :T], after.flatten(1, 2)[:, :T])
        )
        highest = (position[:, None] ^ position) // half == 1
        attention = attention + ((r * factor) @ (k * factor).transpose(1, 2)) * highest
    return join(attention @ v, B)


def dense_by_tiles(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, tile: int = 8) -> Tensor:
    """Pairs inside a tile exactly, pairs of tiles factored at the edges of the tiles between them.

    The products of r and k are one batched product a distance of tiles.
    """
    B = len(r)
    r, k, v, w = split(u, r, k, v, w)
    T = r.shape[1]
    r_, k_, w_ = (torch.nn.functional.pad(x, (0, 0, 0, -T % tile)) for x in (r, k, -torch.exp(w)))
    r_, k_, w_ = (x.unflatten(1, (-1, tile)) for x in (r_, k_, w_))
    tiles = r_.shape[1]
    total = w_.cumsum(2)
    before, after, whole = total - w_, total[:, :, -1:] - total, total[:, :, -1]
    t, s = torch.arange(tile)[:, None, None], torch.arange(tile)[None, :, None]
    forward = before[:, :, :, None] - total[:, :, None]
    backward = before[:, :, None] - total[:, :, :, None]
    between = torch.where(t > s, forward, backward).masked_fill(t == s, -torch.inf)
    inside = torch.einsum("bctj,bcsj,bctsj->bcts", r_, k_, torch.exp(between))
    blocks = [[inside.new_zeros(())] * tiles for _ in range(tiles)]
    for i in range(tiles):
        blocks[i][i] = inside[:, i]
    r_before, r_after = r_ * torch.exp(before), r_ * torch.exp(after)
    k_before, k_after = k_ * torch.exp(before), k_ * torch.exp(after)
    edges = torch.nn.functional.pad(whole.cumsum(1), (0, 0, 1, 0))
    for distance in range(1, tiles):
        middle = torch.exp(edges[:, distance:-1] - edges[:, 1:-distance])[:, :, None]
        later = (r_before[:, distance:] * middle) @ k_after[:, :-distance].transpose(2, 3)
        earlier = (r_after[:, :-distance] * middle) @ k_before[:, distance:].transpose(2, 3)
        for i in range(tiles - distance):
            blocks[i + distance][i], blocks[i][i + distance] = later[:, i], earlier[:, i]
    attention = torch.cat([torch.cat(row, dim=2) for row in blocks], dim=1)[:, :T, :T]
    return join((attention + own(r, k, u)) @ v, B)


def inputs_of(shape: tuple[int, int, int, int], **kwargs: Any) -> list[Tensor]:
    """r, k, v, w, u, gy, with the decays of a freshly initialised model and faster ones."""
    B, T, H, N = shape
    r, k, v, gy = (torch.randn(B, T, H * N, **kwargs) for _ in range(4))
    w = -6 + 6 * torch.rand(B, T, H * N, **kwargs)
    u = torch.randn(H, N, device=r.device, dtype=torch.float32)
    return [r, k, v, w, u, gy]


def both_ways(operator: Operator, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:5]]
    y = operator(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[5])]


def verify(name: str, operator: Operator, shape: tuple[int, int, int, int], limit: float) -> None:
    """On one sample of the shape."""
    inputs = inputs_of((1, *shape[1:]))
    expected = both_ways(reference.wkv6, [x.double() for x in inputs])
    results = both_ways(operator, inputs)
    error = max(relative_error(x, y) for x, y in zip(results, expected, strict=True))
    refuse_unless(f"{name} at T = {shape[1]}, N = {shape[3]}", error, limit)


def verify_forward(operator: Operator, T: int, N: int, limit: float) -> None:
    """On one head of one sequence, whose gradients nobody can afford to compare."""
    inputs = inputs_of((1, T, 1, N))[:5]
    with torch.no_grad():
        expected = reference.wkv6(*(x.double() for x in inputs))
        error = relative_error(operator(*inputs), expected)
    refuse_unless(f"operator, forward alone, at T = {T}, N = {N}", error, limit)


def against_pytorch(all_isas: bool) -> None:
    dense: dict[str, Operator] = {
        "dense, exact": dense_exact,
        "dense, by levels": dense_by_levels,
        "dense, by tiles": dense_by_tiles,
    }
    isas = ("avx2", "portable") if all_isas else ()
    for shape in SHAPES:
        verify("operator", wkv6, shape, 2e-6)
        for isa in isas:
            with with_isa(isa):
                verify(f"operator, {isa}", wkv6, shape, 2e-6)
        for name, form in dense.items():
            verify(name, form, shape, 1e-4)
    tables = []
    for shape in SHAPES:
        inputs = inputs_of(shape)
        works: dict[str, Callable[[], object]] = {"operator": partial(both_ways, wkv6, inputs)}
        for isa in isas:
            works[f"operator, {isa}"] = partial(one_isa, isa, inputs)
        works["scan (the reference)"] = partial(both_ways, reference.wkv6, inputs)
        for name, form in dense.items():
            works[name] = partial(both_ways, form, inputs)
        tables.append(interleaved(works, repeats=5))
    table(tables)


@contextmanager
def with_isa(isa: str) -> Iterator[None]:
    os.environ["RWKV_CLIP_ISA"] = isa
    try:
        yield
    finally:
        del os.environ["RWKV_CLIP_ISA"]


def one_isa(isa: str, inputs: list[Tensor]) -> list[Tensor]:
    with with_isa(isa):
        return both_ways(wkv6, inputs)


def table(measured: list[dict[str, float]]) -> None:
    """Both shapes, and the operator's targets: the least of the two counts."""
    print("\nfloat32, forward and backward\n")
    header("B, T, H, N", *measured[0])
    scans, dense = [], []
    for shape, times in zip(SHAPES, measured, strict=True):
        ratios = {name: time / times["operator"] for name, time in times.items()}
        cells = [
            f"{1e3 * time:.{1 if name.startswith('operator') else 0}f} ms"
            + ("" if name == "operator" else f" ({_ratio(ratios[name])} x)")
            for name, time in times.items()
        ]
        row(", ".join(map(str, shape)), *cells)
        scans.append(ratios["scan (the reference)"])
        dense.append(min(ratio for name, ratio in ratios.items() if name.startswith("dense")))
    print()
    header("times as fast as", "at least", "target", "")
    for name, least, target in (
        ("the scan", min(scans), SCAN_TARGET),
        ("the best dense form", min(dense), DENSE_TARGET),
    ):
        row(name, f"{_ratio(least)} x", f"{target:.0f} x", verdict(least >= target))


def _ratio(value: float) -> str:
    return f"{value:.{1 if value < 20 else 0}f}"


def by_length() -> None:
    """Time a token, which an attention over all pairs would let grow.

    Without a target: that is of the encoder, and encoders.py measures it there.
    """
    H, N = 8, 80
    works: dict[str, Callable[[], object]] = {}
    for T in LENGTHS:
        if T <= GRADIENT_TOKENS:
            verify("operator", wkv6, (1, T, H, N), 5e-6)
        else:
            verify_forward(wkv6, T, N, 5e-6)
        inputs = inputs_of((TOKENS // T, T, H, N))
        works[f"forward {T}"] = partial(wkv6, *inputs[:5])
        works[f"both {T}"] = partial(both_ways, wkv6, inputs)
    times = interleaved(works, repeats=9)
    print(f"\n{TOKENS} tokens of {H} heads of {N}, float32\n")
    header("tokens a sequence", "forward, microseconds a token", "forward and backward")
    for T in LENGTHS:
        row(f"{T}", *(f"{times[f'{way} {T}'] / TOKENS * 1e6:.2f}" for way in ("forward", "both")))


def microseconds(work: Callable[[], object], repeats: int = 30) -> float:
    """The median by CUDA's own clock, with a cold second-level cache."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        work()
    times: list[float] = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def on_cuda() -> None:
    backward = torch.ops.rwkv_clip.wkv6_backward
    for shape in CUDA_SHAPES:
        inputs = inputs_of(shape, device="cuda", dtype=torch.bfloat16)
        sample = [x[:1].float().cpu() if i != 4 else x.cpu() for i, x in enumerate(inputs)]
        expected = both_ways(reference.wkv6, [x.double() for x in sample])
        results = both_ways(wkv6, [x if i == 4 else x[:1] for i, x in enumerate(inputs)])
        error = max(relative_error(x.cpu(), y) for x, y in zip(results, expected, strict=True))
        refuse_unless(f"bfloat16 at {shape}", error, 1e-2)
    print(f"\n{torch.cuda.get_device_name()}, bfloat16, microseconds forward / backward\n")
    header("B, T, H, N", "operator", '"excellent"', "times that", "target", "")
    for shape, (good, good_back) in CUDA_SHAPES.items():
        inputs = inputs_of(shape, device="cuda", dtype=torch.bfloat16)
        one = microseconds(partial(wkv6, *inputs[:5]))
        two = microseconds(partial(backward, inputs[5], *inputs[:5]))
        row(
            ", ".join(map(str, shape)),
            f"{one:.0f} / {two:.0f}",
            f"{good} / {good_back}",
            f"{one / good:.2g} / {two / good_back:.2g}",
            f"{CUDA_TARGET}",
            verdict(max(one / good, two / good_back) <= CUDA_TARGET),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all-isas", action="store_true", help="time AVX2 and portable code too")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="one of them alone")
    arguments = parser.parse_args()
    if build_info()["library"] is None:
        raise SystemExit("the operator was not built: python -m rwkv_clip._build")
    has_cuda = torch.cuda.is_available() and build_info()["cuda"]
    if arguments.device == "cuda" and not has_cuda:
        raise SystemExit("no GPU, or the operator was built without CUDA: rwkv-clip doctor")
    torch.manual_seed(0)
    print(machine())
    if arguments.device != "cuda":
        against_pytorch(arguments.all_isas)
        by_length()
    if arguments.device != "cpu" and has_cuda:
        on_cuda()


if __name__ == "__main__":
    main()
