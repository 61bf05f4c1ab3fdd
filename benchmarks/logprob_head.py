"""Peak memory and time of the chunked log-probability head against full logits, forward and backward.

``python benchmarks/logprob_head.py`` measures both in turn, each in a process of its own, and prints one JSON line:
peak memory beyond what the inputs take, time, and the ratios of chunked to full, as medians over ``--pairs``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

WIDTH = 64


def measure(variant: str, vocab: int, tokens: int) -> dict[str, float]:
    """Peak memory (MiB, beyond the inputs and their gradients) and seconds of one forward and backward."""
    import torch

    from nemo_rmt.config import Parallel
    from nemo_rmt.megatron.head import token_scores
    from nemo_rmt.megatron.runtime import distributed

    with distributed(Parallel(), seed=0):
        gpu = torch.cuda.is_available()
        device = torch.device("cuda" if gpu else "cpu")
        hidden = torch.randn(tokens, 1, WIDTH, device=device, requires_grad=True)
        weight = torch.randn(vocab, WIDTH, device=device, requires_grad=True)
        labels = torch.randint(0, vocab, (1, tokens), device=device)
        for tensor in (hidden, weight):
            tensor.grad = torch.zeros_like(tensor)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        began = time.perf_counter()
        if variant == "chunked":
            logprobs = token_scores(hidden, weight, labels, vocab_size=vocab).logprobs
        else:
            logits = torch.einsum("sbh,vh->bsv", hidden, weight).float()
            logprobs = torch.log_softmax(logits, dim=-1).gather(2, labels[:, :, None])[:, :, 0]
        logprobs.sum().backward()
        if gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"peak_mib": (peak - before) / 2**20, "seconds": time.perf_counter() - began}


def main() -> None:
    """Compare the two and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--variant", choices=("chunked", "full"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options.variant, options.vocab, options.tokens)))
        return
    results: dict[str, list[dict[str, float]]] = {"chunked": [], "full": []}
    for _ in range(options.pairs):
        for variant, runs in results.items():
            command = [sys.executable, __file__, "--variant", variant]
            command += ["--vocab", str(options.vocab), "--tokens", str(options.tokens)]
            quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet)
            runs.append(json.loads(output.stdout.splitlines()[-1]))
    line: dict[str, object] = {"benchmark": "logprob_head", "vocab": options.vocab, "tokens": options.tokens}
    for key in ("peak_mib", "seconds"):
        for variant, runs in results.items():
            line[f"{variant}_{key}"] = round(sorted(run[key] for run in runs)[len(runs) // 2], 3)
        line[f"{key}_ratio"] = round(float(line[f"chunked_{key}"]) / float(line[f"full_{key}"]), 4)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
