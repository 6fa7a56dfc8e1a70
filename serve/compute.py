"""What a tower computes with: its device, precision and threads, and whether it is compiled."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from rwkv_clip.config import Precision
from rwkv_clip.model import RWKVCLIP
from rwkv_clip.precision import products_in, round_weights
from serve.config import EncoderConfig
from serve.messages import Tower, Vectors
from serve.models import check_model, sample_input
from serve.registry import ModelError

Encode = Callable[[Tensor], Tensor]


class Compute:
    """Computes a tower's vectors.

    Args:
        tower: which.
        settings: its own.

    Attributes:
        broken: what the GPU said, once it computes nothing more in this process.

    Raises:
        ValueError: it is to be on a GPU, and there is none.
    """

    def __init__(self, tower: Tower, settings: EncoderConfig) -> None:
        self.tower, self.settings = tower, settings
        if settings.gpus and not torch.cuda.is_available():
            raise ValueError(
                f"serve.{tower}.gpus: is {settings.gpus:g}, and PyTorch sees no GPU on this node; "
                "install requirements/cuda.txt there, or set it to 0"
            )
        self.device = torch.device("cuda" if settings.gpus else "cpu")
        self.precision: Precision = settings.precision
        self.broken: str | None = None

    def take_threads(self) -> None:
        """Have PyTorch use in this thread as many as it is to.

        OpenMP keeps a number for each thread that calls it, and Ray starts them with its own.
        """
        torch.set_num_threads(1 if self.settings.gpus else self.settings.threads)

    def ready(self, model: RWKVCLIP) -> Encode:
        """This tower of a model, which is this object's own from then on, for `run`.

        Raises:
            ModelError: what the model gives is no embedding, or it cannot be compiled.
        """
        # The other tower is for other replicas, and half of what the model weighs.
        delattr(model, "text_model" if self.tower == "image" else "image_model")
        model.to(self.device)
        round_weights(model, self.precision)
        with products_in(self.precision, self.device):
            check_model(model, self.tower)
        encode: Encode = model.encode_image if self.tower == "image" else model.encode_text
        if self.settings.compile:
            encode = torch.compile(encode)
            sample = sample_input(model.config, self.tower)
            # What is compiled is for a number of threads, and this one may have another.
            with ThreadPoolExecutor(1, "compile", initializer=self.take_threads) as thread:
                thread.submit(self._compile, encode, sample).result()
        return encode

    @torch.inference_mode()
    def run(self, encode: Encode, inputs: Tensor) -> Vectors:
        """Vectors [n, D] in float32 of inputs [n, ...]; raises what PyTorch does."""
        try:
            with products_in(self.precision, self.device):
                vectors: Vectors = encode(inputs.to(self.device)).float().cpu().numpy()
        except torch.AcceleratorError as error:
            # CUDA's own: whatever comes after fails the same way.
            self.broken = str(error).partition("\n")[0]
            raise
        return vectors

    def _compile(self, encode: Encode, sample: Tensor) -> None:
        """Compile for one item, then for any number, with kernels that suit a whole batch."""
        try:
            for items in sorted({1, self.settings.batch}):
                self.run(encode, sample.repeat(items, *[1] * (sample.ndim - 1)))
        except TorchDynamoException as error:
            why = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            raise ModelError(
                f"serve.{self.tower}.compile: PyTorch cannot compile the model on this node "
                f"({why}); install a C and C++ compiler there, or set it to false"
            ) from error
