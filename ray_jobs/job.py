"""What makes a stage of the pipeline a job: `rwkv-clip STAGE`, `python -m ray_jobs.STAGE`.

Every job takes the pipeline's whole configuration, so one file serves them all.
"""

import argparse
import sys
from typing import NoReturn

from rwkv_clip.config import add_config_options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add a job's options."""
    add_config_options(parser)


def run_stage(stage: str, args: argparse.Namespace) -> int:
    """Run one stage on what the earlier ones left in the storage, and print its table."""
    from ray_jobs.pipeline import run_job  # which imports the stages

    return run_job(args, stage)


def main(stage: str) -> NoReturn:
    """Be `python -m ray_jobs.STAGE`, with the options of `rwkv-clip STAGE`."""
    from rwkv_clip.cli import main as command

    sys.exit(command([stage, *sys.argv[1:]]))
