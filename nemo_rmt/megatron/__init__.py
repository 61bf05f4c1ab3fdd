"""The only door to Megatron-Core: start-up, model, log-probability head, optimizer, train step, checkpoints."""

from nemo_rmt.megatron.cpu import without_compiler

with without_compiler():
    import megatron.core  # noqa: F401
