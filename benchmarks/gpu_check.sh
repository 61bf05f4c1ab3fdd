#!/usr/bin/env bash
# Everything that needs a GPU, in one call: the tests marked gpu, then the benchmarks. Needs the package installed with a
# CUDA build of PyTorch: benchmarks/gpu_check.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}

"$python" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("gpu_check: no CUDA GPU is visible to PyTorch")
print(f"gpu_check: {torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
PY
"$python" -m pytest -q -m gpu -rs
if "$python" -c 'import vllm' 2>/dev/null; then
    "$python" -m pytest -q -rs tests/with_vllm/test_vllm_stages.py
else
    echo "gpu_check: vLLM is not installed: its rollouts were not tested"
fi
"$python" benchmarks/logprob_head.py --vocab 151936 --tokens 2048
"$python" benchmarks/rmt_step.py
"$python" benchmarks/rollout.py
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} "$python" benchmarks/train_step.py small olmo2_1b
if "$python" -c 'import transformer_engine' 2>/dev/null; then
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} "$python" benchmarks/train_step.py olmo2_1b --yaml recipes/variants/fp8.yaml
else
    echo "gpu_check: Transformer Engine is not installed: FP8 was not measured"
fi
