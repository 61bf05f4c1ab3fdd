"""olmo2_1b: two turns of the flywheel with ReMiT (arXiv 2602.03075) on OLMo 2 1B, on 16 H100 80 GB.

From the paper: the family of models it measures ReMiT on, and ε 0.2. From OLMo 2's report (arXiv 2501.00656): the
architecture, rows of 4,096 tokens in batches of 512, an anneal of about 50 billion tokens that decays linearly to 0 on
a mix made for it. Ours, because neither gives them for this purpose: which checkpoint, the shares of the mix, the SFT
and RL settings, the tasks, the layout. The mix is Dolmino's without its web part, which is too big to fetch whole:
FineWeb-Edu's sample of ten billion tokens stands there.

The checkpoint has to be one whose learning rate has not been annealed yet: the last of OLMo 2's first stage (a revision
of allenai/OLMo-2-0425-1B), through nemo-rmt import. Two files are made once, where there is internet:

    from datasets import load_dataset
    load_dataset("openai/gsm8k", "main", split="train").to_json("data/gsm8k.jsonl")
    chats = load_dataset("allenai/tulu-3-sft-olmo-2-mixture-0225", split="train")
    chats.select_columns(["messages"]).to_json("data/sft.jsonl")

and nemo-rmt data build fetches and tokenizes the rest.
"""

from __future__ import annotations

from nemo_rmt.config import (
    GRPO,
    RL,
    RMT,
    SFT,
    Anneal,
    Cluster,
    Corpus,
    Data,
    Evaluate,
    Flywheel,
    Model,
    Optim,
    Parallel,
    Pretrain,
    Recipe,
    ReMiT,
    Rollout,
    Task,
    Tokenizer,
)

ROW, BATCH = 4096, 512
ANNEAL_TOKENS = 50e9
DOLMINO = {"flan": 0.17, "pes2o": 0.06, "wiki": 0.07, "stackexchange": 0.02, "math": 0.21}


def olmo2_1b() -> Recipe:
    """ReMiT's flywheel on OLMo 2 1B, annealed on Dolmino's parts; 16 H100."""
    return Recipe(
        name="olmo2_1b",
        run_dir="runs/olmo2_1b",
        iterations=2,
        flywheel=Flywheel(keep_checkpoints=2, restarts=3),
        model=Model(  # as published
            num_layers=16,
            hidden_size=2048,
            num_attention_heads=16,
            num_query_groups=16,
            ffn_hidden_size=8192,
            vocab_size=100_352,
            norm_position="after",
            qk_norm=True,
            qk_norm_span="all_heads",
            tie_embeddings=False,
            rope_base=500_000.0,
            norm_epsilon=1e-6,
            max_position=4096,
            precision="bf16",
        ),
        parallel=Parallel(tensor=1, distributed_optimizer=True, overlap=True),
        cluster=Cluster(nodes=2, gpus_per_node=8),
        tokenizer=Tokenizer(
            path="checkpoints/olmo2_1b_stage1/tokenizer",
            vocab_size=100_278,
            chat_template="{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
            "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ),
        data=Data(
            corpora=[
                Corpus(
                    name="web",
                    kind="hub",
                    path="HuggingFaceFW/fineweb-edu",
                    weight=0.47,
                    held_out=2000,
                    options={"config": "sample-10BT"},
                ),
                *(
                    Corpus(
                        name=part,
                        kind="hub",
                        path="allenai/dolmino-mix-1124",
                        weight=weight,
                        held_out=2000,
                        options={"config": part},
                    )
                    for part, weight in DOLMINO.items()
                ),
            ],
            tasks=[Task(name="gsm8k", family="questions", options={"path": "data/gsm8k.jsonl", "match": "number"})],
            sft_path="data/sft.jsonl",
        ),
        pretrain=Pretrain(checkpoint="checkpoints/olmo2_1b_stage1"),
        anneal=Anneal(
            steps=round(ANNEAL_TOKENS / (ROW * BATCH)),
            micro_batch_size=2,
            global_batch_size=BATCH,
            sequence_length=ROW,
            optim=Optim(lr=2e-4, schedule="linear", min_lr=0.0, warmup_steps=100, weight_decay=0.1, skip_spikes=6.0),
            checkpoint_interval=500,
            resume_optimizer=False,  # published weights come without
            objective="remit",
            remit=ReMiT(epsilon=0.2, scale=1.0, gap_model="current", reference="previous"),
        ),
        rmt=RMT(enabled=False),  # a base model of this size has not learnt to think
        sft=SFT(
            steps=2000,
            micro_batch_size=2,
            global_batch_size=128,
            sequence_length=ROW,
            optim=Optim(lr=2e-5, schedule="linear", warmup_steps=60),
            checkpoint_interval=500,
        ),
        rl=RL(
            steps=400,
            micro_batch_size=2,
            global_batch_size=1024,
            sequence_length=2048,
            optim=Optim(lr=1e-6, schedule="constant", warmup_steps=10),
            checkpoint_interval=50,
            grpo=GRPO(samples_per_group=8, clip_high=0.28),
        ),
        rollout=Rollout(max_new_tokens=1024, batch_size=64),
        evaluate=Evaluate(problems=500, samples=4, max_tokens=1_048_576, micro_batch_size=2, sequence_length=ROW),
    )
