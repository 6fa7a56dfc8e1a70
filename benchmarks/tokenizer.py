"""Strings a second of `rwkv_clip.tokenize` on one core against its plain path.

The plain path is the definition: ftfy, html.unescape twice, whitespace, lower case for every
string, then the same byte-pair encoder. Both take all strings in one call. Ids are compared before
anything is timed, which is the run to warm up; the two are timed in turn and the medians reported.
The goal is for texts as the web has them.

    python benchmarks/tokenizer.py [--strings 10000] [--repeats 7]
"""

import argparse
import html
import random
import statistics
from functools import partial

import ftfy
import numpy as np
import torch
from _common import header, machine, row, seconds, verdict
from instant_clip_tokenizer import Tokenizer

from rwkv_clip.tokenizer import tokenize

GOAL, GOAL_TEXTS = 100_000, "web mix"
WORDS = (
    "a the of dog cat photo with red small standing on grass near Blue house woman holding "
    "umbrella street sunny beach, two people playing guitar in front of an old wooden door"
).split()
SUFFIXES = {
    "ASCII": [""],
    "web mix": [""] * 16 + [" it’s", " café", " AT&T &amp; co", " 日本語 😀"],
    "curly quotes": [" it’s"],
    "accents": [" café"],
    "ampersands": [" salt & pepper"],
    "entities": [" salt &amp; pepper"],
}


def captions(count: int, suffixes: list[str]) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=10)) + rng.choice(suffixes) for _ in range(count)]


def plain(encoder: Tokenizer, texts: list[str]) -> torch.Tensor:
    cleaned = [html.unescape(html.unescape(ftfy.fix_text(text))) for text in texts]
    lowered = [" ".join(text.split()).lower() for text in cleaned]
    return torch.from_numpy(encoder.tokenize_batch(lowered, 77).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strings", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    encoder = Tokenizer()
    print(machine())
    print(f"{arguments.strings:,} strings in a call\n")
    header("", "ours", "plain", "times", "target", "")
    for name, suffixes in SUFFIXES.items():
        texts = captions(arguments.strings, suffixes)
        if not torch.equal(tokenize(texts), plain(encoder, texts)):
            raise SystemExit(f"{name}: ids differ from the plain path's; nothing was timed")
        pairs = [
            (seconds(partial(tokenize, texts)), seconds(partial(plain, encoder, texts)))
            for _ in range(arguments.repeats)
        ]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        rate, plain_rate = arguments.strings / ours, arguments.strings / theirs
        target = (f"{GOAL:,}/s", verdict(rate >= GOAL)) if name == GOAL_TEXTS else ("", "")
        row(name, f"{rate:,.0f}", f"{plain_rate:,.0f}", f"{theirs / ours:.1f}", *target)


if __name__ == "__main__":
    main()
