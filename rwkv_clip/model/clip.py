"""The two-tower model: an image encoder and a text encoder that meet in one space."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_clip.model.config import CLIPConfig, named_config
from rwkv_clip.model.image import ImageEncoder
from rwkv_clip.model.init import initialise
from rwkv_clip.model.text import TextEncoder
from rwkv_clip.ops.operator import is_transformed


class RWKVCLIP(nn.Module):
    """RWKV-CLIP (arXiv 2406.06973). Make one by `create_model`, which also fills its weights.

    Attributes:
        config: what it is made of.
        logit_scale: the logarithm of the similarities' scale, a scalar.
        text_model: the text encoder.
        image_model: the image encoder.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.text_model = TextEncoder(config.text)
        self.image_model = ImageEncoder(config.image)

    def encode_image(
        self, pixels: Tensor, normalize: bool = True, seeds: Tensor | None = None
    ) -> Tensor:
        """Embed images.

        Args:
            pixels: [B, 3, height, width], floating, as `image_transform` makes them. Any size: it
                is filled with zeros to whole patches, and the position embedding is interpolated.
            normalize: give each embedding length 1.
            seeds: int64 [B]; in training, each image's stochastic depth is drawn by its own seed,
                whatever else is in the batch, and by PyTorch's generator if absent.

        Returns:
            [B, D].

        Raises:
            ValueError: for another shape, of seeds too.
            TypeError: for integers, for seeds of another type, or for what is no tensor.
        """
        _check_pixels(pixels)
        if seeds is not None:
            _check_seeds(seeds, pixels)
        embedding: Tensor = self.image_model(pixels, seeds)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Embed texts.

        Args:
            tokens: [B, T], int64, as `tokenize` makes them; any length, but weights are trained
                for config.context_length and count the padding.
            normalize: give each embedding length 1.

        Returns:
            [B, D].

        Raises:
            ValueError: for another shape, or (on a CPU, neither compiled nor transformed by
                torch.func) a token outside of the vocabulary.
            TypeError: for another type, or for what is no tensor.
        """
        _check_tokens(tokens, self.config.vocab_size)
        embedding: Tensor = self.text_model(tokens)
        return F.normalize(embedding, dim=-1) if normalize else embedding

    def forward(
        self, image: Tensor, text: Tensor, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both embeddings, not normalised, [B, D] each, and the scale exp(logit_scale).

        Args:
            image, text, seeds: as `encode_image` and `encode_text` take them.
        """
        image_embedding = self.encode_image(image, normalize=False, seeds=seeds)
        text_embedding = self.encode_text(text, normalize=False)
        return image_embedding, text_embedding, self.logit_scale.exp()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """In training, keep only each block's input and compute the rest again on the way back.

        It saves most of the memory of activations, for about a third more time.
        """
        self.image_model.recompute = enabled
        self.text_model.recompute = enabled


def create_model(
    model: str | CLIPConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RWKVCLIP:
    """A model with fresh weights, in training mode.

    Weights are drawn on the CPU from PyTorch's generator, so that a seed means the same model on
    every device.

    Args:
        model: "RWKV-CLIP-B-32", "RWKV-CLIP-B-16", "RWKV-CLIP-Tiny", or a configuration.
        device: where it goes; the CPU by default. On "meta" it has shapes and no weights.
        dtype: of the weights; float32 by default.

    Raises:
        ValueError: for a name that no model has.
    """
    config = named_config(model) if isinstance(model, str) else model
    with torch.device("meta"):  # spares PyTorch's own initialisation
        clip = RWKVCLIP(config).float()  # whatever PyTorch's default type
    if device is None or torch.device(device).type != "meta":
        clip.to_empty(device="cpu")
        initialise(clip)
    return clip.to(device=device, dtype=dtype)


def _check_pixels(pixels: object) -> None:
    if not isinstance(pixels, Tensor):
        raise TypeError(
            f"images are a {type(pixels).__name__}; takes a tensor [B, 3, height, width], as "
            "image_transform makes them"
        )
    if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape[2:]:
        raise ValueError(f"images have shape {list(pixels.shape)}; takes [B, 3, height, width]")
    if not pixels.is_floating_point():
        raise TypeError(
            f"images are {pixels.dtype}; takes floating pixels, as image_transform makes them"
        )


def _check_seeds(seeds: object, pixels: Tensor) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        found = seeds.dtype if isinstance(seeds, Tensor) else f"a {type(seeds).__name__}"
        raise TypeError(f"seeds are {found}; takes an int64 tensor")
    if seeds.shape != pixels.shape[:1]:
        raise ValueError(
            f"seeds have shape {list(seeds.shape)}; takes [B], one for each image, and there are "
            f"{pixels.shape[0]}"
        )


def _check_tokens(tokens: object, vocab_size: int) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"texts are a {type(tokens).__name__}; takes int64 tokens [B, T], as tokenize makes "
            "them"
        )
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"texts have shape {list(tokens.shape)}; takes [B, T], T at least 1")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"texts are {tokens.dtype}; takes int64 tokens, as tokenize makes them")
    # Elsewhere it would wait for the device, break the graph, or ask vmap for one of many values.
    readable = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not is_transformed() and tokens.numel():
        least, most = (int(bound) for bound in torch.aminmax(tokens))
        if least < 0 or most >= vocab_size:
            raise ValueError(
                f"texts have tokens from {least} to {most}; takes 0 to {vocab_size - 1}"
            )
