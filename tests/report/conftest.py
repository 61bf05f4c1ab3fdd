"""A synthetic run folder with the shapes of a real one."""

from __future__ import annotations

import json
import math
import random

import pytest
import yaml

from nemo_rmt.config import Recipe

UNIGRAM = {"stdlib": 4.21, "solutions": 2.35, "all": 3.55}
LATER = ("anneal", "rmt", "sft", "rl", "evaluate")
TIERS = ("easy", "medium", "hard")
RMT_SETTINGS = {"steps": 100, "document_length": 128, "budget": {"initial": 24, "decay": 0.7}}
POSITIONS = {"easy": 300, "medium": 300, "hard": 400}
# tier -> (directly, after a sampled thought, after a greedy one), of the annealed model and of the later ones
BEFORE_RMT = {"easy": (0.96, 0.55, 0.62), "medium": (0.60, 0.33, 0.37), "hard": (0.15, 0.12, 0.13)}
AFTER_RMT = {"easy": (0.96, 0.95, 0.96), "medium": (0.61, 0.72, 0.75), "hard": (0.16, 0.46, 0.50)}
# stage of an iteration -> (pass@1, greedy, pass@4) on trained lengths, the same on longer problems
SKILLS = {
    (0, "pretrain"): ((0.31, 0.94, 0.72), (0.05, 0.06, 0.20)),
    (0, "anneal"): ((0.471, 0.995, 0.86), (0.08, 0.09, 0.29)),
    (0, "rmt"): ((0.48, 0.995, 0.87), (0.08, 0.09, 0.29)),
    (0, "sft"): ((0.49, 0.995, 0.88), (0.09, 0.10, 0.31)),
    (0, "rl"): ((0.968, 0.995, 0.99), (0.10, 0.10, 0.18)),
    (1, "anneal"): ((0.565, 0.995, 0.91), (0.09, 0.09, 0.30)),
    (1, "rmt"): ((0.56, 0.995, 0.91), (0.09, 0.09, 0.30)),
    (1, "sft"): ((0.55, 0.995, 0.90), (0.09, 0.11, 0.30)),
    (1, "rl"): ((0.972, 0.995, 0.99), (0.11, 0.10, 0.19)),
}


def share(value, half=0.03):
    return {"": value, "_low": max(0.0, value - half), "_high": min(1.0, value + half)}


def reasoning(prefix, shares, closed):
    """evaluate's metrics of held-out positions, for one model; a tier without shares has no positions."""
    metrics = {}
    for tier in TIERS:
        base = f"{prefix}tokens/{tier}/"
        if tier not in shares:
            metrics[f"{base}positions"] = 0
            continue
        direct, sampled, greedy = shares[tier]
        metrics[f"{base}positions"] = POSITIONS[tier]
        metrics |= {f"{base}ntp{end}": value for end, value in share(direct).items()}
        metrics |= {f"{base}ntr{end}": value for end, value in share(sampled).items()}
        metrics |= {f"{base}ntr_greedy{end}": value for end, value in share(greedy).items()}
        metrics |= {f"{base}think_length": 16.0, f"{base}format_rate": closed}
    return metrics


def evaluation(iteration, skills, before, after, models):
    """evaluate's flat metrics of these models."""
    metrics = {}
    for (number, model), sets in skills.items():
        if number != iteration or model not in models:
            continue
        prefix = "" if model == [name for name in models if name != "evaluate"][-1] else f"{model}/"
        if "rmt" in models:
            is_before = model in ("pretrain", "anneal")
            metrics |= reasoning(prefix, before if is_before else after, 0.6 if is_before else 0.98)
        for name, (sampled, greedy, several) in zip(("chains", "chains_longer"), sets):
            base = f"{prefix}tasks/{name}/"
            metrics.update({f"{base}pass@1{end}": value for end, value in share(sampled).items()})
            metrics.update({f"{base}greedy{end}": value for end, value in share(greedy, 0.01).items()})
            metrics.update({f"{base}pass@4{end}": value for end, value in share(several).items()})
            metrics[f"{base}response_length"] = 21.0
        for number_of_domain, (domain, unigram) in enumerate(UNIGRAM.items()):
            metrics[f"{prefix}lm/{domain}/unigram_nll"] = unigram
            nll = unigram * 0.4 + 0.001 * iteration + 0.02 * number_of_domain
            metrics[f"{prefix}lm/{domain}/nll"] = nll + (0.003 if model == "rmt" else 0.0)
        for tier, accuracy, portion in (("easy", 0.97, 0.58), ("medium", 0.71, 0.25), ("hard", 0.22, 0.17)):
            metrics[f"{prefix}tokens/{tier}/accuracy"], metrics[f"{prefix}tokens/{tier}/share"] = accuracy, portion
    return metrics


def training_steps(name, settings, iteration):
    """metrics.jsonl of a training stage."""
    steps = settings["steps"]
    noise, remit, records = random.Random(f"{name}{iteration}"), name == "anneal" and iteration > 0, []
    peak = {"pretrain": 3e-3, "anneal": 3e-3, "rmt": 3e-4, "sft": 3e-4, "rl": 3e-4}[name]
    for step in range(1, steps + 1):
        done = step / steps
        loss = {
            "pretrain": 1.5 + 2.8 * math.exp(-6 * done),
            "anneal": 1.5 - 0.15 * done,
            "rmt": 0.14,
            "sft": 0.9 - 0.3 * done,
            "rl": 0.0,
        }[name]
        record = {
            "step": step,
            "time": 1.76e9 + step,
            "train/loss": loss + noise.gauss(0, 0.06 if name != "rl" else 0.01),
            "train/lr": peak * (1 - done if name == "anneal" else 1.0),
            "train/grad_norm": 1.0,
            "train/tokens": 1024 * step,
            "train/tokens_per_s": 18_000 + noise.gauss(0, 500),
        }
        if name == "rl":
            record |= {
                "rl/reward_mean": 0.97 - (0.5 - 0.08 * iteration) * math.exp(-8 * done) + noise.gauss(0, 0.02),
                "rl/response_length": 24 - 3 * done + noise.gauss(0, 0.4),
                "rl/zero_variance_groups": 0.7 * done,
                "rollout/token_mult_prob_error": 1 + 1e-6 * done,
                "rollout/logprob_error_max": 1e-5 * done,
            }
        if name == "rmt":
            record |= mid_training(done, noise, settings)
        if remit:
            weights = [math.exp(-(((i - 9.5) / (2 + 3 * done)) ** 2)) + (0.4 if i in (0, 19) else 0) for i in range(20)]
            record |= {f"remit/weight_hist_{i:02}": weight / sum(weights) for i, weight in enumerate(weights)}
            record |= {
                "remit/weight_mean": 0.998 + noise.gauss(0, 0.003),
                "remit/weight_std": 0.07 + 0.02 * done,
                "remit/share_low": 0.05 + 0.02 * done,
                "remit/share_high": 0.04 + 0.03 * done,
                "remit/gap_mean": -0.2,
            }
        records.append(record)
    return records


def mid_training(done, noise, settings):
    """What RMT logs in a step; done: the share of the stage that is over."""
    record = {"ntp/loss": 1.36 - 0.02 * done + noise.gauss(0, 0.04)}
    if settings["objective"] == "ntp":
        return record
    if settings["budget"]["schedule"] != "none":
        record["rmt/budget"] = math.floor(24 * 0.7**done)
    moved = min(1, max(0, (done - 0.3) / 0.4))
    for tier, early, late in zip(TIERS, (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)):
        target = early + (late - early) * moved
        record |= {f"rmt/target_{tier}": target, f"rmt/share_{tier}": min(1, max(0, target + noise.gauss(0, 0.05)))}
        record[f"rmt/match_{tier}"] = BEFORE_RMT[tier][1] + (AFTER_RMT[tier][1] - BEFORE_RMT[tier][1]) * done
        if noise.random() > 0.1:
            record[f"rmt/rewarded_{tier}"] = min(1, max(0, record[f"rmt/match_{tier}"] * 1.3 + noise.gauss(0, 0.06)))
    match = sum(record[f"rmt/share_{tier}"] * record[f"rmt/match_{tier}"] for tier in TIERS)
    return record | {
        "rl/loss": noise.gauss(0, 0.01),
        "rmt/think_length": 20 * 0.75**done + noise.gauss(0, 1),
        "rmt/match_rate": match,
        "rmt/format_rate": 1 - 0.4 * math.exp(-6 * done),
        "rmt/reward_mean": 0.9 * match + 0.08,
    }


def make_run(folder, *, skills=SKILLS, before=BEFORE_RMT, after=AFTER_RMT, changes=None):
    """Write a finished two-iteration run; returns its folder. before, after: shares of the models around RMT."""
    recipe = {
        "name": "tiny",
        "run_dir": str(folder),
        "iterations": 2,
        "data": {"tasks": [{"name": "chains", "longer": {"min_steps": 7}}]},
        "pretrain": {"steps": 300},
        "anneal": {"steps": 120},
        "rmt": RMT_SETTINGS,
        "sft": {"steps": 40},
        "rl": {"steps": 60},
    } | (changes or {})
    recipe = Recipe.model_validate(recipe).model_dump(mode="json")
    later = [name for name in LATER if recipe[name].get("enabled", True)]
    folder.mkdir(parents=True)
    (folder / "flywheel.yaml").write_text(yaml.safe_dump(recipe))
    state = {"recipe": "0" * 64, "iterations": []}
    for iteration, names in enumerate((("data", "pretrain", *later), later)):
        state["iterations"].append({})
        for name in names:
            stage = folder / f"iteration_{iteration:03d}" / name
            stage.mkdir(parents=True)
            metrics = {}
            if name == "data":
                metrics = {f"lm/{domain}/unigram_nll": value for domain, value in UNIGRAM.items()}
            elif name == "evaluate":
                metrics = evaluation(iteration, skills, before, after, models=state["iterations"][-1])
            else:
                records = training_steps(name, recipe[name], iteration)
                (stage / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            result = {"status": "done", "metrics": metrics, "checkpoint": None, "wall_s": 61.5, "tokens": 1_250_000}
            (stage / "result.json").write_text(json.dumps(result))
            state["iterations"][-1][name] = {"status": "done", "attempts": 1, "id": f"{iteration}{name}"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def finished_run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def make_a_run(tmp_path):
    return lambda **options: make_run(tmp_path / "run", **options)
