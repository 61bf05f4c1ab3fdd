"""The only door to Megatron-Core: start-up, model, log-probability head, optimizer, train step, checkpoints."""
