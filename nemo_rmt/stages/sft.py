"""Supervised fine-tuning: next-token prediction on the assistant's tokens of conversations."""

from __future__ import annotations

from nemo_rmt.data.sft import SFTExamples
from nemo_rmt.megatron.runtime import sum_over_data_parallel
from nemo_rmt.stages.pretrain import next_token
from nemo_rmt.stages.session import Session
from nemo_rmt.stages.training import Training


def run(session: Session) -> None:
    """Fine-tune the given checkpoint with a fresh optimizer."""
    settings = session.settings
    examples = SFTExamples(session.recipe.data, session.seed("sft", session.job.iteration))
    training = Training(session, session.require_input("checkpoint"))
    for step in training.steps():
        first = step * settings.global_batch_size
        mine = [first + index for index in session.shard(settings.global_batch_size)]
        rows = [session.tokenizer.chat_example(examples[index]) for index in mine]
        batch = session.padded_batch(rows, settings.sequence_length)
        metrics = training.model.train_step(batch.micro_batches(settings.micro_batch_size), next_token)
        tokens = sum_over_data_parallel({"tokens": sum(len(tokens) for tokens, _ in rows)})["tokens"]
        training.record(metrics, tokens=int(tokens), samples=lambda: [(i, f"sft:{i}") for i in mine])
