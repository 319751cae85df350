"""Evaluation without training: retrieval, cross-modal gain, and the trivial predictors to compare with."""

from mvlm.evaluation.evaluate import Evaluation, evaluate, evaluate_briefly, unseen_images
from mvlm.evaluation.retrieval import Ranks, rank_all

__all__ = ["Evaluation", "Ranks", "evaluate", "evaluate_briefly", "rank_all", "unseen_images"]
