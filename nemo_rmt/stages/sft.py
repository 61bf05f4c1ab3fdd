"""Supervised fine-tuning: next-token prediction on the assistant's tokens of conversations."""

from __future__ import annotations

from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.sft import SFTExamples
from nemo_rmt.data.tree import TokenTree
from nemo_rmt.megatron.runtime import sum_over_data_parallel
from nemo_rmt.profiling import part
from nemo_rmt.stages.pretrain import next_token
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training


def run(session: Session) -> None:
    """Fine-tune the given checkpoint with a fresh optimizer."""
    settings = session.settings
    examples = SFTExamples(session.recipe.data, session.seed("sft", session.job.iteration))
    training = Training(session, session.require_input("checkpoint"))
    for step in training.steps():
        with part("data"):
            first = step * settings.global_batch_size
            mine = [first + index for index in session.shard(settings.global_batch_size)]
            conversations = [session.tokenizer.chat_example(examples[index]) for index in mine]
            batch, size = pack(session, conversations)
            tokens = sum_over_data_parallel({"tokens": sum(len(tokens) for tokens, _ in conversations)})["tokens"]
        metrics = training.model.train_step(batch.micro_batches(size), next_token)
        training.record(metrics, tokens=int(tokens), samples=lambda: [(i, f"sft:{i}") for i in mine])


def pack(session: Session, conversations: list[tuple[list[int], list[int]]]) -> tuple[TokenBatch, int]:
    """Rows of this rank's conversations, ``(tokens, mask)`` each, and how many of them make a micro-batch: several in a
    row and balanced over the ranks, or, without sft.pack, one in each."""
    settings = session.settings
    if settings.pack:
        return session.packed_batch([TokenTree(tokens, [], mask) for tokens, mask in conversations])
    return session.padded_batch(conversations, settings.sequence_length), settings.micro_batch_size
