"""qwen3_14b: RMT (arXiv 2509.24375) on Qwen3-14B and Omni-MATH, on 16 H100 80 GB.

From the paper: the base model and data (4,051 problems to train on, 200 held out), budgets from 800 tokens by 0.2 down
to at least 1, the transition from 30 % to 70 % of the stage, λ 0.1, 8 responses a group, learning rate 1e-6, batches of
128, 10 epochs, 16 H100. Ours, because the paper does not give them: everything else, which includes the entropy edges
of the tiers, their probabilities, the length reward's share, the seed of the split, the layout, and that four positions
of one document are asked in one step, so that they share its computation.

Where they come from: the weights, Qwen/Qwen3-14B, through nemo-rmt import; the problems, KbsdJames/Omni-MATH, through
nemo-rmt data build. Both where there is internet: a run does not download.
"""

from __future__ import annotations

from nemo_rmt.config import (
    GRPO,
    RL,
    RMT,
    SFT,
    Anneal,
    Budget,
    Cluster,
    Corpus,
    Curriculum,
    Data,
    Evaluate,
    Flywheel,
    Model,
    Optim,
    Parallel,
    Pretrain,
    Recipe,
    Rollout,
    Tokenizer,
)

TRAINED_ON, HELD_OUT = 4051, 200  # problems
BATCH, EPOCHS = 128, 10


def qwen3_14b() -> Recipe:
    """RMT on Qwen3-14B with Omni-MATH's problems and solutions; 16 H100."""
    return Recipe(
        name="qwen3_14b",
        run_dir="runs/qwen3_14b",
        iterations=1,
        flywheel=Flywheel(keep_checkpoints=2, restarts=3),
        model=Model(  # as published
            num_layers=40,
            hidden_size=5120,
            num_attention_heads=40,
            num_query_groups=8,
            head_dim=128,
            ffn_hidden_size=17408,
            vocab_size=151_936,
            qk_norm=True,
            tie_embeddings=False,
            rope_base=1e6,
            norm_epsilon=1e-6,
            max_position=40_960,
            precision="bf16",
        ),
        parallel=Parallel(tensor=2, sequence=True, distributed_optimizer=True, overlap=True, recompute="full"),
        cluster=Cluster(nodes=2, gpus_per_node=8),
        tokenizer=Tokenizer(path="checkpoints/qwen3_14b/tokenizer", vocab_size=151_669, chat_template=None),
        data=Data(
            corpora=[
                Corpus(
                    name="omni_math",
                    kind="hub",
                    path="KbsdJames/Omni-MATH",
                    num_documents=TRAINED_ON + HELD_OUT,
                    held_out=HELD_OUT,
                    options={"split": "test", "template": "{problem}\n\n{solution}"},  # it has no other split
                )
            ]
        ),
        pretrain=Pretrain(checkpoint="checkpoints/qwen3_14b"),
        anneal=Anneal(enabled=False),
        rmt=RMT(
            steps=TRAINED_ON * EPOCHS // BATCH,
            micro_batch_size=1,
            global_batch_size=BATCH,
            sequence_length=8192,
            optim=Optim(lr=1e-6, schedule="constant", weight_decay=0.0),
            checkpoint_interval=20,
            ntp_coefficient=0.1,
            budget=Budget(initial=800, minimum=1, decay=0.2),
            curriculum=Curriculum(transition=(0.3, 0.7), positions_per_document=4),
            grpo=GRPO(samples_per_group=8),
        ),
        sft=SFT(enabled=False),
        rl=RL(enabled=False),
        rollout=Rollout(temperature=1.0, batch_size=64),
        evaluate=Evaluate(sequence_length=4096, micro_batch_size=1),
    )
