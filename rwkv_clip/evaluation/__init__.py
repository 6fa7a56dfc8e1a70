"""Evaluation: zero-shot classification, retrieval and linear probe, as pure functions.

They take embeddings (tensors on any device, or NumPy arrays) and need no cluster. Scores are
fractions, 0 to 1; logits are ranked as real numbers; what is not finite is refused.
"""

from rwkv_clip.evaluation.classification import (
    ClassificationResult,
    class_embeddings,
    classify,
    prompts,
    zero_shot_classifier,
)
from rwkv_clip.evaluation.clip_benchmark import (
    BenchmarkResult,
    benchmark_result,
    read_result,
    write_result,
)
from rwkv_clip.evaluation.datasets import DatasetSpec, dataset_names, dataset_spec
from rwkv_clip.evaluation.linear_probe import (
    STRENGTHS,
    LinearClassifier,
    LinearProbeResult,
    fit_logistic_regression,
    linear_probe,
)
from rwkv_clip.evaluation.retrieval import (
    DirectionResult,
    RetrievalRanks,
    RetrievalResult,
    TopK,
    nearest,
    retrieval,
    retrieval_ranks,
    top_k,
)

__all__ = [
    "STRENGTHS",
    "BenchmarkResult",
    "ClassificationResult",
    "DatasetSpec",
    "DirectionResult",
    "LinearClassifier",
    "LinearProbeResult",
    "RetrievalRanks",
    "RetrievalResult",
    "TopK",
    "benchmark_result",
    "class_embeddings",
    "classify",
    "dataset_names",
    "dataset_spec",
    "fit_logistic_regression",
    "linear_probe",
    "nearest",
    "prompts",
    "read_result",
    "retrieval",
    "retrieval_ranks",
    "top_k",
    "write_result",
    "zero_shot_classifier",
]
