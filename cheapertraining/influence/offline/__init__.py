"""Influence away from training: shards and checkpoints in, scores out."""

from cheapertraining.influence.offline.job import ESTIMATORS, LoadedModel, LoadModel, ScoringJob
from cheapertraining.influence.offline.run import ScoringReport, score_shards

__all__ = ["ESTIMATORS", "LoadModel", "LoadedModel", "ScoringJob", "ScoringReport", "score_shards"]
