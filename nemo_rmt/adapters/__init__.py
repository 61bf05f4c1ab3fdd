"""ReMiT inside other trainers: NeMo 2.7, Megatron-Bridge, and nemo_run's command line."""
