#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under 8 minutes: the tests marked gpu, then the benchmarks. Needs the
# package installed with a CUDA build of PyTorch: benchmarks/gpu_check.sh [PYTHON]
# Each part has a limit in seconds. What failed, ran out of time or was left out is named at the end; exit status 1 when
# anything failed. With QUICK=1 the benchmarks' smallest shapes run, on a CPU too: do the lines work?
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${1:-python3}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} PYTHONWARNINGS=ignore
quick=()
failed=()
left_out=()

part() { # SECONDS NAME COMMAND...
    local limit=$1 name=$2 began=$SECONDS status
    shift 2
    echo "gpu_check: $name"
    timeout --kill-after=5 "$limit" "$@"
    status=$?
    echo "gpu_check: $name took $((SECONDS - began)) s"
    case $status in
        0) ;;
        124 | 137) failed+=("$name ran out of its $limit s") ;;
        *) failed+=("$name exited $status") ;;
    esac
}

has() { # MODULE
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

if [[ -n ${QUICK:-} ]]; then
    quick=(--quick)
else
    "$python" - <<'PY' || exit 1
import sys
import torch
if not torch.cuda.is_available():
    sys.exit("gpu_check: no CUDA GPU is visible to PyTorch")
print(f"gpu_check: {torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
PY
    part 110 "tests of one GPU" "$python" -m pytest -q -m gpu -rs
    if has vllm; then
        part 70 "vLLM's rollouts" "$python" -m pytest -q -rs tests/with_vllm/test_vllm_stages.py
    else
        left_out+=("vLLM's rollouts: vllm is not installed")
    fi
fi
part 50 "BF16, 1B parameters" "$python" benchmarks/train_step.py olmo2_1b "${quick[@]}"
if has transformer_engine; then
    part 55 "FP8 against BF16" "$python" benchmarks/train_step.py olmo2_1b --yaml recipes/variants/fp8.yaml "${quick[@]}"
else
    left_out+=("FP8: transformer_engine is not installed")
fi
# Attention by flex_attention on both sides, in a quarter of the 1B model's layers.
part 60 "token tree of 4,096" "$python" benchmarks/rmt_step.py --recipe olmo2_1b --change model.num_layers=4 \
    --shapes 4096,4,8,64 "${quick[@]}"
part 30 "log-probability head" "$python" benchmarks/logprob_head.py --vocab 151936 --hidden-size 2048 "${quick[@]}"
part 30 "ReMiT, cached and online" "$python" benchmarks/remit_step.py "${quick[@]}"
part 30 "packing" "$python" benchmarks/packing.py "${quick[@]}"
part 40 "rollout" "$python" benchmarks/rollout.py "${quick[@]}"

for reason in "${left_out[@]}"; do echo "gpu_check: left out: $reason"; done
for reason in "${failed[@]}"; do echo "gpu_check: failed: $reason"; done
((${#failed[@]} == 0))
