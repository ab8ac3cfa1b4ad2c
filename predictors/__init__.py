"""Guess the next layers' experts before their routers speak; installed as ``moe_offload.predictors``."""

from moe_offload.residency.prefetch import Predictor

__all__ = ["Predictor"]
