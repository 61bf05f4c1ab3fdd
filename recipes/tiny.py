"""tiny: a 0.85 M parameter model through two turns of the flywheel in minutes on two CPU cores."""

from __future__ import annotations

from nemo_rmt.config import (
    GRPO,
    RL,
    SFT,
    Anneal,
    Cluster,
    Corpus,
    Data,
    Evaluate,
    Model,
    Optim,
    Pretrain,
    Recipe,
    Rollout,
    Task,
    Tokenizer,
)

ROW = 128  # tokens: several documents of the mix, or one problem with its worked solution


def tiny() -> Recipe:
    """Real text and code from this Python's standard library, and noisy worked solutions of arithmetic chains."""
    return Recipe(
        name="tiny",
        run_dir="runs/tiny",
        iterations=2,
        model=Model(
            num_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=384,
            qk_norm=True,
            rope_base=1000.0,  # rows are 128 tokens
            init_std=0.06,  # 0.02 suits widths in the thousands: it learns half as fast here
            max_position=512,
        ),
        cluster=Cluster(nodes=1, gpus_per_node=1),
        tokenizer=Tokenizer(vocab_size=512),
        data=Data(
            corpora=[
                Corpus(name="stdlib", kind="stdlib", weight=0.3, options={"max_document_characters": 2000}),
                Corpus(name="chains", kind="chains", weight=0.7, num_documents=50_000),
            ],
            tasks=[Task(name="chains", family="chains", longer={"lengths": [6, 7]})],
            sft_options={"error_rate": 0.15, "direct": 0.3},  # as noisy as the corpus: RL has something to remove
        ),
        # small batches: on this mix they learn the arithmetic with the fewest tokens
        pretrain=Pretrain(
            steps=1400,
            micro_batch_size=8,
            global_batch_size=8,
            sequence_length=ROW,
            optim=Optim(lr=2e-3, schedule="constant", warmup_steps=50, beta2=0.98),
            checkpoint_interval=300,
        ),
        anneal=Anneal(
            steps=300,
            micro_batch_size=8,
            global_batch_size=8,
            sequence_length=ROW,
            optim=Optim(lr=2e-3, schedule="linear", min_lr=0.0, beta2=0.98),
            checkpoint_interval=100,
        ),
        # light, and still: on this noisy data it takes back what ReMiT brought
        sft=SFT(
            steps=16,
            micro_batch_size=32,
            global_batch_size=32,
            sequence_length=ROW,
            optim=Optim(lr=3e-4, schedule="constant"),
            checkpoint_interval=16,
        ),
        rl=RL(
            steps=40,
            micro_batch_size=64,
            global_batch_size=256,
            sequence_length=ROW,
            optim=Optim(lr=3e-4, schedule="constant", warmup_steps=5, beta2=0.98),
            checkpoint_interval=10,
            grpo=GRPO(samples_per_group=8),
        ),
        rollout=Rollout(max_new_tokens=64, batch_size=256),
        evaluate=Evaluate(problems=200, samples=4, sequence_length=ROW),
    )
