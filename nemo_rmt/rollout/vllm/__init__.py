"""vLLM behind the engine protocol: in the training processes, or as a server. Importing this imports nothing."""
