"""Losses over image-text pairs whose gradient is that of the global batch, on any number of ranks.

Contract of both losses, with W ranks, rank r holding b_r rows and N = sum of all b_r:
- every rank returns the loss of the global batch, the same number everywhere;
- an embedding's gradient is W times the derivative of that loss, so that the averaging of DDP and
  FSDP gives each parameter of the encoders its exact derivative (the published code gives 1/W);
- logit_scale's and logit_bias's gradients are the derivatives themselves, alike on every rank.

How: features are gathered without a graph; each rank then has what its own rows' exact derivative
needs (for the contrastive loss also every row's log-sum-exp, N numbers), so no gradient travels.
Derivatives are computed in the forward pass, in row chunks: the largest temporaries are the
gathered features [N, D] and one chunk of logits [c, N] with c * N bounded by `chunk_elements`.
Arithmetic is in float32, or in float64 for float64 input, also under autocast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# 16 MiB of float32 logits at a time: large enough for full matrix-product speed.
CHUNK_ELEMENTS = 1 << 22


class LossAndGradients(NamedTuple):
    """The loss and its gradients, scaled as the module's contract says."""

    loss: Tensor  # scalar
    image_emb: Tensor  # [b, D]
    text_emb: Tensor  # [b, D]
    logit_scale: Tensor  # scalar
    logit_bias: Tensor | None  # scalar; None if no bias was given


@dataclass(frozen=True)
class _Ranks:
    """The ranks that share a global batch, and how many rows each holds."""

    group: dist.ProcessGroup | None
    rank: int
    sizes: list[int]

    @classmethod
    def of(
        cls,
        rows: Tensor,
        group: dist.ProcessGroup | None,
        equal_batches: bool,
        sizes: Sequence[int] | None = None,
    ) -> _Ranks:
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None, 0, [rows.shape[0]])
        world_size, rank = dist.get_world_size(group), dist.get_rank(group)
        if sizes is not None:
            return cls(group, rank, list(sizes))
        if world_size == 1 or equal_batches:
            return cls(group, rank, [rows.shape[0]] * world_size)
        size = torch.tensor([rows.shape[0]], device=rows.device)
        found = [torch.empty_like(size) for _ in range(world_size)]
        dist.all_gather(found, size, group=group)
        return cls(group, rank, cast(list[int], torch.cat(found).tolist()))

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Where this rank's rows start in the global batch."""
        return sum(self.sizes[: self.rank])

    def gather(self, rows: Tensor) -> Tensor:
        """[b, ...] of every rank -> [N, ...], in rank order, without a graph."""
        if self.world_size == 1:
            return rows
        # Collectives want equal shapes: pad to the largest batch, then cut.
        padded = rows.new_zeros((max(self.sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def sum(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values


class PairLoss(nn.Module, ABC):
    """A loss over pairs. Row i of image_emb and row i of text_emb belong together.

    Args:
        group: the process group whose ranks share the global batch; None is the default group, or
            this process alone where torch.distributed is not initialised.
        normalize: L2-normalise embeddings inside (harmless if they already are). False takes them
            as they come.
        equal_batches: every rank promises the same number of rows, which saves one exchange and
            one wait for the device a step. A broken promise hangs or fails in the collective.
        chunk_elements: most logits held at a time.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        normalize: bool = True,
        equal_batches: bool = False,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        super().__init__()
        if chunk_elements < 1:
            raise ValueError(f"chunk_elements is {chunk_elements}; it must be at least 1")
        self.group = group
        self.normalize = normalize
        self.equal_batches = equal_batches
        self.chunk_elements = chunk_elements

    def sizes(self, rows: Tensor) -> list[int]:
        """How many rows each rank holds, in rank order; every rank calls this.

        For those who want to know before they embed, because the global batch may be empty.

        Args:
            rows: [b, ...], what this rank embeds.
        """
        return _Ranks.of(rows, self.group, self.equal_batches).sizes

    def forward(
        self,
        image_emb: Tensor,
        text_emb: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """The global batch's loss, a scalar in float32 (float64 for float64 embeddings).

        Args:
            image_emb, text_emb: [b, D], this rank's rows.
            logit_scale: what similarities are multiplied by (the exponential of the parameter).
            logit_bias: added to the logits of the sigmoid loss; the contrastive loss does not
                depend on a bias and ignores it.
            sizes: what `sizes` gave for these rows, which are then not exchanged again.

        Raises:
            ValueError: the embeddings are not two matrices of one shape, the global batch is
                empty, or logit_scale or logit_bias is not a single number.
        """
        if image_emb.dim() != 2 or image_emb.shape != text_emb.shape:
            raise ValueError(
                "image_emb and text_emb must both be [batch, embedding], got "
                f"{tuple(image_emb.shape)} and {tuple(text_emb.shape)}"
            )
        dtype = _arithmetic(image_emb, text_emb)
        ranks = _Ranks.of(image_emb, self.group, self.equal_batches, sizes)
        if ranks.total == 0:
            raise ValueError("the global batch has no pairs")
        scale = _scalar("logit_scale", logit_scale, image_emb.device, dtype)
        bias = _scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, scale.device, dtype)
        with torch.autocast(image_emb.device.type, enabled=False):
            image, text = image_emb.to(dtype), text_emb.to(dtype)
            if self.normalize:
                image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            inputs = (image, text, scale, bias)
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
                apply: Callable[..., Tensor] = _WithKnownGradients.apply
                return apply(*inputs, self, ranks)
            return self._solve(*inputs, ranks, gradients=False)[0]

    def value_and_gradients(
        self,
        image_emb: Tensor,
        text_emb: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        sizes: Sequence[int] | None = None,
    ) -> LossAndGradients:
        """The loss and its gradients, for embeddings that were computed without a graph.

        The second of GradCache's three steps (arXiv 2101.06983): encode every micro-batch without
        a graph, call this on all of them concatenated, then encode each again and hand its rows of
        the gradient to `torch.autograd.backward`. Embeddings may be made, and this may be called,
        under `torch.inference_mode`; what it returns is not.
        """
        given = [image_emb, text_emb, logit_scale, *([] if logit_bias is None else [logit_bias])]
        dtype = _arithmetic(image_emb, text_emb)
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [_leaf(value, image_emb.device, dtype) for value in given]
            loss = self(*leaves, sizes=sizes)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            bias_gradient = gradients[3] if len(leaves) == 4 else None
            return LossAndGradients(
                loss.detach(), gradients[0], gradients[1], gradients[2], bias_gradient
            )

    @abstractmethod
    def _solve(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        ranks: _Ranks,
        gradients: bool,
    ) -> tuple[Tensor, ...]:
        """(loss,), or (loss, d image, d text, d scale, d bias): plain derivatives, own rows."""

    def _chunks(self, rows: int, columns: int) -> Iterator[slice]:
        step = max(1, self.chunk_elements // max(columns, 1))
        return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class ContrastiveLoss(PairLoss):
    """InfoNCE in both directions (CLIP, arXiv 2103.00020).

    The mean over the N pairs and the two directions of the cross entropy of a row's logits
    scale * (image . text) against its own pair.
    """

    def _solve(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        ranks: _Ranks,
        gradients: bool,
    ) -> tuple[Tensor, ...]:
        all_image, all_text = ranks.gather(torch.stack((image, text), 1)).unbind(1)
        image_lse, image_sums = self._rows(image, all_text, scale, ranks.offset)
        text_lse, text_sums = self._rows(text, all_image, scale, ranks.offset)
        loss, scale_gradient = (ranks.sum(image_sums + text_sums) / (2 * ranks.total)).unbind()
        if not gradients:
            return (loss,)
        all_image_lse, all_text_lse = ranks.gather(torch.stack((image_lse, text_lse), 1)).unbind(1)
        weight = scale / (2 * ranks.total)
        image_gradient = weight * self._pull(
            image, all_text, scale, image_lse, all_text_lse, ranks.offset
        )
        text_gradient = weight * self._pull(
            text, all_image, scale, text_lse, all_image_lse, ranks.offset
        )
        return loss, image_gradient, text_gradient, scale_gradient, torch.zeros_like(bias)

    def _rows(
        self, own: Tensor, other: Tensor, scale: Tensor, offset: int
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of own rows' logits [b]; the sums of cross entropy and its d scale [2]."""
        lse = own.new_empty(own.shape[0])
        sums = own.new_zeros(2)
        for rows in self._chunks(own.shape[0], other.shape[0]):
            similarity = own[rows] @ other.T
            logits = scale * similarity
            lse[rows] = logits.logsumexp(1)
            paired = similarity.diagonal(offset + rows.start)
            expected = torch.linalg.vecdot(torch.exp(logits - lse[rows, None]), similarity)
            sums = sums + torch.stack(
                ((lse[rows] - scale * paired).sum(), (expected - paired).sum())
            )
        return lse, sums

    def _pull(
        self,
        own: Tensor,
        other: Tensor,
        scale: Tensor,
        own_lse: Tensor,
        other_lse: Tensor,
        offset: int,
    ) -> Tensor:
        """(P + Q - 2) other [b, D]: P the softmax over a row, Q over a column, 1 on own pairs."""
        pull = torch.empty_like(own)
        for rows in self._chunks(own.shape[0], other.shape[0]):
            logits = scale * (own[rows] @ other.T)
            softmaxes = torch.exp(logits - own_lse[rows, None]).add_(torch.exp(logits - other_lse))
            pull[rows] = softmaxes @ other
        return pull - 2 * other[offset : offset + own.shape[0]]


class SigmoidLoss(PairLoss):
    """SigLIP's sigmoid loss (arXiv 2303.15343, algorithm 1).

    The sum over all N * N pairings of -log sigmoid(z * (scale * (image . text) + bias)), z being 1
    for pairs and -1 otherwise, divided by N.
    """

    def _solve(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        ranks: _Ranks,
        gradients: bool,
    ) -> tuple[Tensor, ...]:
        all_image, all_text = ranks.gather(torch.stack((image, text), 1)).unbind(1)
        image_pull, sums = self._rows(image, all_text, scale, bias, ranks.offset)
        loss, scale_gradient, bias_gradient = (ranks.sum(sums) / ranks.total).unbind()
        if not gradients:
            return (loss,)
        # The same pairings seen from the texts: their sums are those above.
        text_pull, _ = self._rows(text, all_image, scale, bias, ranks.offset)
        weight = scale / ranks.total
        return loss, weight * image_pull, weight * text_pull, scale_gradient, bias_gradient

    def _rows(
        self, own: Tensor, other: Tensor, scale: Tensor, bias: Tensor, offset: int
    ) -> tuple[Tensor, Tensor]:
        """(sigmoid(logits) - 1 on own pairs) other [b, D]; sums of loss, d scale, d bias [3]."""
        pull = torch.empty_like(own)
        sums = own.new_zeros(3)
        for rows in self._chunks(own.shape[0], other.shape[0]):
            similarity = own[rows] @ other.T
            logits = scale * similarity + bias
            error = torch.sigmoid(logits)
            error.diagonal(offset + rows.start).sub_(1)
            loss = F.softplus(logits).sum() - logits.diagonal(offset + rows.start).sum()
            sums = sums + torch.stack((loss, (error * similarity).sum(), error.sum()))
            pull[rows] = error @ other
        return pull, sums


LOSSES: dict[str, type[PairLoss]] = {"contrastive": ContrastiveLoss, "sigmoid": SigmoidLoss}


def create_loss(name: str, group: dist.ProcessGroup | None = None, **options: Any) -> PairLoss:
    """A loss by name: "contrastive" or "sigmoid"; options are those of `PairLoss`.

    Raises:
        ValueError: there is no loss of that name.
    """
    if name not in LOSSES:
        raise ValueError(f"no loss is called {name!r}; there are {', '.join(sorted(LOSSES))}")
    return LOSSES[name](group, **options)


def contrastive_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    logit_scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`ContrastiveLoss` as a function."""
    return cast(Tensor, ContrastiveLoss(group)(image_emb, text_emb, logit_scale))


def sigmoid_loss(
    image_emb: Tensor,
    text_emb: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`SigmoidLoss` as a function."""
    return cast(Tensor, SigmoidLoss(group)(image_emb, text_emb, logit_scale, logit_bias))


class _WithKnownGradients(torch.autograd.Function):
    """A loss whose derivatives are known with its value: the backward pass only multiplies."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        loss_module: PairLoss,
        ranks: _Ranks,
    ) -> Tensor:
        loss, *gradients = loss_module._solve(image, text, scale, bias, ranks, gradients=True)
        ctx.save_for_backward(*gradients)
        ctx.world_size = ranks.world_size
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: gradients of these would be taken for constants
            raise RuntimeError("the loss has first derivatives only: leave create_graph out")
        image, text, scale, bias = ctx.saved_tensors
        (factor,) = upstream
        shared = factor * ctx.world_size
        return shared * image, shared * text, factor * scale, factor * bias, None, None


def _arithmetic(image_emb: Tensor, text_emb: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, torch.promote_types(image_emb.dtype, text_emb.dtype))


def _leaf(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What a gradient is wanted by, as a tensor that takes one: in its own type, if it has one."""
    own = isinstance(value, Tensor) and value.is_floating_point()
    tensor = torch.as_tensor(value, dtype=None if own else dtype, device=device).detach()
    return (tensor.clone() if tensor.is_inference() else tensor).requires_grad_()


def _scalar(name: str, value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    tensor = torch.as_tensor(value, dtype=dtype, device=device)
    if tensor.numel() != 1:
        raise ValueError(f"{name} must be a single number, got shape {tuple(tensor.shape)}")
    return tensor.reshape(())
