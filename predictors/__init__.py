"""Guess the next layers' experts before their routers speak; installed as ``moe_offload.predictors``."""

from moe_offload.planning.prediction import Forecast, Predictor

__all__ = ["Forecast", "Predictor"]
