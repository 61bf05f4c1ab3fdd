"""Reinforcement-guided mid-training (ReMiT, RMT, the flywheel) on Megatron-Core and NeMo."""

__version__ = "0.1.0"
