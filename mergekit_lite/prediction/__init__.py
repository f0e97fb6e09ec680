"""Predictions: what a plan will take, on this machine or on others, before a weight is read."""

from mergekit_lite.prediction.cluster import Cluster, this_cluster
from mergekit_lite.prediction.costs import measured_costs
from mergekit_lite.prediction.in_turn import InTurn, predict_in_turn
from mergekit_lite.prediction.prediction import Prediction, predict

__all__ = ["Cluster", "InTurn", "Prediction", "measured_costs", "predict", "predict_in_turn", "this_cluster"]
