"""Predictions: what a plan will take, on this machine or on others, before a weight is read."""

from mergekit_lite.prediction.cluster import Cluster, this_cluster
from mergekit_lite.prediction.costs import measured_costs
from mergekit_lite.prediction.prediction import Prediction, predict

__all__ = ["Cluster", "Prediction", "measured_costs", "predict", "this_cluster"]
