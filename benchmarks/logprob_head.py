"""Time and peak memory of the chunked log-probability head against full logits, forward and backward.

``python benchmarks/logprob_head.py`` prints one JSON line per vocabulary: ``ratio`` is the time of the chunked head to
that of full logits, ``memory_ratio`` its peak to theirs, each in a process of its own and beyond the inputs and their
gradients. Full logits of 4,096 tokens and 151,936 entries need 10 GiB. The chunked head computes its logits twice, four
matrix products against three: the wider the hidden states, the nearer its time comes to 4/3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import psutil
import torch
from measuring import alternately, emit, peak_beyond, peak_mib, ratio

from nemo_rmt.config import Model, Parallel
from nemo_rmt.megatron.head import token_scores
from nemo_rmt.megatron.runtime import distributed

VARIANTS = ("chunked", "full")
FULL_COPIES = 4
"""Of the logits, that log-softmax and its backward hold at once, in float32."""


def variants(vocab: int, tokens: int, hidden_size: int) -> dict[str, Callable[[], None]]:
    """Both heads on the same inputs, in bf16 on a GPU and in fp32 on a CPU; gradients are there from the beginning.

    Logits spread as an untrained model's. Spread over tens of nats, most probabilities would be denormal, with which
    CPUs take ten times as long.
    """
    gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    hidden = torch.randn(tokens, 1, hidden_size, device=device, dtype=dtype)
    weight = torch.randn(vocab, hidden_size, device=device, dtype=dtype).mul_(Model().init_std)
    labels = torch.randint(0, vocab, (1, tokens), device=device)
    for tensor in (hidden, weight):
        tensor.requires_grad_().grad = torch.zeros_like(tensor)

    def chunked() -> None:
        token_scores(hidden, weight, labels, vocab_size=vocab).logprobs.sum().backward()

    def full() -> None:
        logits = torch.einsum("sbh,vh->bsv", hidden, weight).float()
        logprobs = torch.log_softmax(logits, dim=-1).gather(2, labels[:, :, None])[:, :, 0]
        logprobs.sum().backward()

    return {"chunked": chunked, "full": full}


def require_room(vocab: int, tokens: int) -> None:
    """Leave with a message where full logits would not fit."""
    needed = FULL_COPIES * 4 * vocab * tokens
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available
    if free < 1.2 * needed:
        raise SystemExit(
            f"full logits of {tokens} tokens at a vocabulary of {vocab} need {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} are free: give --tokens a smaller number"
        )


def compare(vocab: int, tokens: int, hidden_size: int, pairs: int) -> None:
    """One vocabulary's line."""
    require_room(vocab, tokens)
    with distributed(Parallel(), seed=0):
        seconds = alternately(variants(vocab, tokens, hidden_size), pairs)
    shape = ["--vocab", str(vocab), "--tokens", str(tokens), "--hidden-size", str(hidden_size)]
    peaks = {name: peak_mib(__file__, ["--peak", name, *shape]) for name in VARIANTS}
    emit(
        "logprob_head",
        vocab=vocab,
        tokens=tokens,
        hidden_size=hidden_size,
        **ratio(seconds, over="chunked", under="full"),
        memory_ratio=round(peaks["chunked"] / peaks["full"], 4),
        **{f"{name}_peak_mib": peak for name, peak in peaks.items()},
    )


def main() -> None:
    """Compare at every vocabulary; or, in a process of its own, print the peak of one head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small shape, 2 pairs")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.vocab, options.tokens, options.hidden_size, options.pairs = [8_192], 512, 32, 2
    for vocab in options.vocab:
        if options.peak:
            with distributed(Parallel(), seed=0):
                print(peak_beyond(variants(vocab, options.tokens, options.hidden_size)[options.peak]))
        else:
            compare(vocab, options.tokens, options.hidden_size, options.pairs)


if __name__ == "__main__":
    main()
