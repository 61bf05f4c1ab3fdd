"""Sampling responses from the model in training."""
