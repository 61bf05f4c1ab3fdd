"""tiny: a 0.85 M parameter model through two turns of the flywheel in minutes on two CPU cores."""

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
    Difficulty,
    Evaluate,
    Model,
    Optim,
    Pretrain,
    Prompt,
    Recipe,
    Rollout,
    Task,
    Tokenizer,
)

INSTRUCTION = "[{budget}]"  # short, because every response repeats it; the corpus of thoughts teaches what it means
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
                Corpus(name="stdlib", kind="stdlib", weight=0.25, options={"max_document_characters": 2000}),
                Corpus(
                    name="chains",
                    kind="chains",
                    weight=0.3,
                    num_documents=40_000,
                    options={"styles": {"worked": 0.8, "direct": 0.2}},
                ),
                # RMT's raw text: a program's printed digit is right, and hard to say without working it out
                Corpus(
                    name="programs",
                    kind="chains",
                    weight=0.1,
                    num_documents=10_000,
                    held_out=0.05,
                    options={"styles": {"program": 1.0}, "error_rate": 0.0},
                ),
                # what a thought looks like, so that RMT has something to reinforce: many are wrong or stop early
                Corpus(
                    name="thoughts",
                    kind="chains",
                    weight=0.35,
                    num_documents=30_000,
                    options={
                        "styles": {"think": 1.0},
                        "lazy": 0.4,
                        "anywhere": 0.3,
                        "instruction": INSTRUCTION,
                        "heading": "?\n",
                    },
                ),
            ],
            tasks=[Task(name="chains", family="chains", longer={"lengths": [6, 7]})],
            sft_options={"error_rate": 0.15, "direct": 0.3},  # as noisy as the corpus: RL has something to remove
        ),
        # small batches: on this mix they learn the arithmetic with the fewest tokens
        pretrain=Pretrain(
            steps=1800,
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
        rmt=RMT(
            steps=60,
            micro_batch_size=4,
            global_batch_size=32,
            sequence_length=512,
            document_length=128,
            long_documents="split",
            optim=Optim(lr=3e-4, schedule="constant", warmup_steps=5, beta2=0.98),
            checkpoint_interval=10,
            corpora=["programs"],
            prompt=Prompt(instruction=INSTRUCTION),
            budget=Budget(initial=24, decay=0.65),  # ends at 15; working out a digit takes 13 to 21
            difficulty=Difficulty(edges=(0.5, 1.5), first_position=4, max_tokens=200_000),
            curriculum=Curriculum(positions_per_document=4),
            # divided by its standard deviation, a group that differs in length alone would weigh as much as one that
            # differs in matches: thoughts would become long before they become right
            grpo=GRPO(samples_per_group=8, normalize_std=False),
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
            micro_batch_size=32,
            global_batch_size=256,
            sequence_length=2 * ROW,  # a prompt with all of its responses
            optim=Optim(lr=3e-4, schedule="constant", warmup_steps=5, beta2=0.98),
            checkpoint_interval=10,
            grpo=GRPO(samples_per_group=8),
        ),
        rollout=Rollout(max_new_tokens=64, batch_size=1024),
        evaluate=Evaluate(problems=200, samples=4, sequence_length=ROW),
    )
