"""Where vLLM is not installed (.ci/install_vllm does it), tests that start it are not collected."""

import importlib.util

if importlib.util.find_spec("vllm") is None:
    collect_ignore = ["test_vllm_colocated.py", "test_vllm_server.py", "test_vllm_stages.py"]
