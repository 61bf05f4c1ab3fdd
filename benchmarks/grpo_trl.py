"""A whole GRPO step, sampling, rewards and update, against trl's GRPOTrainer on a Qwen3 of the same shape.

``python benchmarks/grpo_trl.py`` prints one JSON line per case. Both sides answer the same prompts with as many
responses of as many tokens (there is no end token), on as many parameters in float32, reward them by the same rule, and
take one AdamW step with the gradient clipped. Ours samples in process and trains on token trees, a prompt computed once
for its responses; in the case ``rmt`` it samples from four positions of one document and trains on the document too.
There trl has one prompt for each position: what precedes it, and the instruction. trl samples everything in one batch,
for one step, which it takes in as many micro-batches as are fastest, without a reference model. Its time is that of its
``training_step``, which samples and scores, with the optimizer's step: nothing of its data loading, logging or saving.
It needs trl, which the extra ``test`` installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import tempfile
from dataclasses import dataclass, replace

import torch
from measuring import alternately, emit, ratio

from nemo_rmt.config import GRPO, Model, Optim, Parallel
from nemo_rmt.config import Rollout as RolloutSettings
from nemo_rmt.data.batch import TokenBatch
from nemo_rmt.data.tree import BRANCH_MASK, Branch, TokenTree, pack_trees
from nemo_rmt.megatron.head import TokenScores
from nemo_rmt.megatron.model import build_model
from nemo_rmt.megatron.runtime import distributed
from nemo_rmt.megatron.train_step import TrainedModel
from nemo_rmt.objectives import LossOutput, group_advantages, ntp_loss
from nemo_rmt.rollout.engine import BranchPrompt, Rollout, Sampling
from nemo_rmt.rollout.in_process import InProcessEngine
from nemo_rmt.stages.policy import policy_loss

MODEL, VOCAB = Model(num_layers=4, hidden_size=128, ffn_hidden_size=384, qk_norm=True), 128
LEARNING_RATE = 1e-6
NTP_WEIGHT = 0.1
INSTRUCTION = 16
"""Tokens of the instruction before each response in the case ``rmt``."""


@dataclass(frozen=True)
class Case:
    """What a step samples."""

    prompts: int
    """Of the case ``rmt``: positions of the document."""
    prompt: int
    """Tokens of each; of the document."""
    samples: int
    """Responses to each prompt."""
    response: int
    """Tokens of each response."""
    row: int
    """Most tokens of a row of our update."""
    accumulate: int = 1
    """Micro-batches of trl's update: as many as are fastest."""


CASES = {
    "short": Case(prompts=32, prompt=12, samples=8, response=21, row=748, accumulate=2),
    "long": Case(prompts=4, prompt=256, samples=8, response=32, row=1024, accumulate=2),
    "rmt": Case(prompts=4, prompt=512, samples=8, response=32, row=2048, accumulate=2),
}
QUICK = {
    "short": Case(prompts=2, prompt=4, samples=2, response=3, row=32),
    "long": Case(prompts=2, prompt=16, samples=2, response=3, row=32),
    "rmt": Case(prompts=2, prompt=16, samples=2, response=3, row=128),
}


def drawn(seed: int, count: int) -> list[int]:
    """Random tokens."""
    return random.Random(seed).choices(range(VOCAB), k=count)


def positions(case: Case) -> list[int]:
    """Spread over the later half of the document."""
    return [int(case.prompt * (0.5 + 0.5 * (index + 0.5) / case.prompts)) for index in range(case.prompts)]


def prompts_of(name: str, case: Case) -> list[list[int]]:
    """Token ids of each whole prompt."""
    if name == "rmt":
        document = drawn(0, case.prompt)
        return [document[:position] + drawn(1, INSTRUCTION) for position in positions(case)]
    return [drawn(index, case.prompt) for index in range(case.prompts)]


def reward(response: list[int]) -> float:
    """The share of even tokens."""
    return sum(token % 2 == 0 for token in response) / len(response)


class Ours:
    """Our model and engine in a world of one; calling it is one step."""

    def __init__(self, name: str, case: Case):
        chunks = build_model(MODEL, Parallel(), VOCAB)
        self.name, self.case, self.steps = name, case, 0
        self.model = TrainedModel(chunks, MODEL, Parallel(), Optim(lr=LEARNING_RATE), steps=1000)
        self.engine = InProcessEngine(chunks, case.prompts * case.samples)
        self.parameters = sum(parameter.numel() for parameter in chunks[0].parameters())

    def __call__(self) -> None:
        rollouts = self.sample()
        rewards = torch.tensor([reward(rollout.response) for rollout in rollouts]).view(-1, self.case.samples)
        advantages = group_advantages(rewards).view(-1).tolist()
        batch = pack_trees(self.trees(rollouts, advantages), self.case.row, pad=0).narrowed(1)
        batch = batch.to(torch.cuda.current_device())
        self.model.train_step(batch.micro_batches(len(batch.tokens)), objective, with_entropy=True)
        self.steps += 1

    def sample(self) -> list[Rollout]:
        """All responses, group after group."""
        case = self.case
        sampling = Sampling(case.response, frozenset(), seed=0)
        count = case.prompts * case.samples
        ids = list(range(self.steps * count, (self.steps + 1) * count))
        if self.name == "rmt":
            prompts = [BranchPrompt(0, position, drawn(1, INSTRUCTION)) for position in positions(case)]
            repeated = [prompt for prompt in prompts for _ in range(case.samples)]
            return self.engine.generate_branches([drawn(0, case.prompt)], repeated, ids, sampling)
        repeated = [prompt for prompt in prompts_of(self.name, case) for _ in range(case.samples)]
        return self.engine.generate(repeated, ids, sampling)

    def trees(self, rollouts: list[Rollout], advantages: list[float]) -> list[TokenTree]:
        """One for each document, or for each prompt without its last token, with which its responses begin."""
        if self.name == "rmt":
            forks = [position for position in positions(self.case) for _ in range(self.case.samples)]
            branches = [branch(*each) for each in zip(forks, rollouts, advantages, strict=True)]
            return [TokenTree(drawn(0, self.case.prompt), branches)]
        trees = []
        for start in range(0, len(rollouts), self.case.samples):
            trunk, last = rollouts[start].prompt[:-1], rollouts[start].prompt[-1:]
            group = range(start, start + self.case.samples)
            responses = [(replace(rollouts[index], prompt=last), advantages[index]) for index in group]
            trees.append(TokenTree(trunk, [branch(len(trunk), *each) for each in responses], [0.0] * len(trunk)))
        return trees


def branch(position: int, rollout: Rollout, advantage: float) -> Branch:
    """A response and the prompt of its own before it."""
    before = [0.0] * len(rollout.prompt)
    extras = {"advantages": advantage, "rollout_logprobs": before + rollout.logprobs}
    return Branch(position, rollout.prompt + rollout.response, before + [1.0] * len(rollout.response), extras)


def objective(scores: TokenScores, batch: TokenBatch) -> LossOutput:
    """GRPO on the responses, and where documents count, next-token prediction on them."""
    rl = policy_loss(scores, batch, batch.extras[BRANCH_MASK], GRPO(), RolloutSettings())
    if not batch.num_tokens():
        return rl
    ntp = ntp_loss(scores.logprobs, batch.loss_mask)
    return LossOutput(rl.loss_sum + NTP_WEIGHT * ntp.loss_sum, rl.num_tokens + ntp.num_tokens, rl.metrics)


class Theirs:
    """trl's trainer; calling it is one step, as its training loop takes it."""

    def __init__(self, name: str, case: Case, folder: str):
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        texts = [" ".join(map(str, prompt)) for prompt in prompts_of(name, case)]
        count = case.prompts * case.samples
        self.trainer = GRPOTrainer(
            qwen3(),
            reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
            args=GRPOConfig(
                folder,
                per_device_train_batch_size=count // case.accumulate,
                steps_per_generation=case.accumulate,
                gradient_accumulation_steps=case.accumulate,
                num_generations=case.samples,
                max_completion_length=case.response,
                max_steps=1000,
                learning_rate=LEARNING_RATE,
                adam_beta2=0.95,
                lr_scheduler_type="constant",
                beta=0.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(),
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer(),
        )
        self.inputs = [{"prompt": text} for text in texts for _ in range(case.samples)]
        trainer = self.trainer
        trainer.create_optimizer_and_scheduler(1000)
        trainer.model.train()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = case.accumulate
        self.accumulate = case.accumulate
        self.parameters = sum(parameter.numel() for parameter in trainer.model.parameters())

    def __call__(self) -> None:
        trainer = self.trainer
        for _ in range(self.accumulate):  # the first samples, and scores, for all
            trainer.training_step(trainer.model_wrapped, self.inputs, None)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1


def qwen3():
    """transformers' model of MODEL's shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.ffn_hidden_size,
            num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_attention_heads,
            num_key_value_heads=MODEL.num_query_groups,
            head_dim=MODEL.hidden_size // MODEL.num_attention_heads,
            tie_word_embeddings=True,
            attention_bias=False,
        )
    )


def tokenizer():
    """A word for every token of the model; the end token is one the model does not have, so that nothing ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCAB + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(VOCAB), pad_token="0")


def compare(name: str, case: Case, pairs: int) -> None:
    """One case's line."""
    with distributed(Parallel(), seed=0), tempfile.TemporaryDirectory() as folder:
        ours, theirs = Ours(name, case), Theirs(name, case, folder)
        if ours.parameters != theirs.parameters:
            raise ValueError(f"the models differ: {ours.parameters} parameters of ours, {theirs.parameters} of trl's")
        seconds = alternately({"ours": ours, "trl": theirs}, pairs)
    emit("grpo_trl", case=name, **vars(case), parameters=ours.parameters, **ratio(seconds, over="trl", under="ours"))


def main() -> None:
    """Compare every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the same cases at their smallest, 2 pairs")
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        parser.exit(1, "trl is not installed: pip install 'nemo-rmt[test]' on Python 3.11 or later\n")
    for name in options.cases:
        compare(name, (QUICK if options.quick else CASES)[name], 2 if options.quick else options.pairs)


if __name__ == "__main__":
    main()
