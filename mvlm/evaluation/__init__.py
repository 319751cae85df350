"""Evaluation without training: retrieval, cross-modal gain, and the trivial predictors to compare with."""

from mvlm.evaluation.evaluate import evaluate, evaluate_briefly, unseen_images
from mvlm.evaluation.retrieval import Ranks, rank

__all__ = ["Ranks", "evaluate", "evaluate_briefly", "rank", "unseen_images"]
