"""What the training phase of a GRPO step costs, against plain code; and whether memory grows over many steps.

Baseline: transformers' own layers, padded rows in the order in which they came, as many per forward as the
budget takes, all images encoded again, logits of every position at once. All sides compute the gradient of
the same loss over the same rollouts, and it has to be the same, or the exit code is 1. They alternate in one
process; medians after a warm-up.

    $ python bench/bench_train.py                      # needs runs/sft
    $ python bench/bench_train.py --memory_steps 200   # also: resident memory over small steps of train_rl.py
"""

import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import train_rl
from bench.bench_rollout import time_call, use_plain_layers
from data import PROBE_KINDS, probe_stream
from model import Policy, load_policy, micro_batches, mrope_positions, policy_flags, token_logprobs
from rollout import Episode, rollout, rollout_flags


@dataclass(frozen=True)
class Config:
    base: str = "runs/sft"  # what load_policy takes
    questions: int = 12  # Q, of one optimizer step
    group_size: int = 8  # G
    micro_tokens: int = 4096  # tokens per forward
    repeats: int = 5  # runs of each side; a warm-up comes on top
    memory_steps: int = 0  # steps of GRPO whose resident memory is plotted
    lora_rank: int = 0  # adapters of this rank on the language model, all else frozen
    quantize: str | None = None  # "nf4": the language model in 4 bits
    device: str | None = None  # default: cuda if there is one


SIDES = ("plain", "images encoded again", "as in train_rl.py")


# ------------------------------------------------------------------------------------------ the sides


def plain_logprobs(policy: Policy, episodes: list[Episode]) -> Tensor:
    """(B, T) as token_logprobs, with (B, T, V) logits on the way."""
    pixels = policy.process_views([view for episode in episodes for view in episode.views()])
    grids = iter(pixels["image_grid_thw"].tolist())
    places = [mrope_positions(e.token_ids, grids, policy.image_pad, policy.merge)[0].T for e in episodes]
    positions = pad_sequence([torch.from_numpy(place) for place in places], batch_first=True)  # (B, T, 3)
    positions = positions.permute(2, 0, 1).to(policy.device)  # (3, B, T)
    ids, mask = (train_rl.pad(episodes, name, policy.device) for name in ("token_ids", "assistant_mask"))
    logits = policy.base(input_ids=ids, position_ids=positions, use_cache=False, **pixels).logits.float()
    logprobs = F.log_softmax(logits[:, :-1] + policy.banned, -1)  # (B, T - 1, V)
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    return F.pad(torch.where(mask[:, 1:], chosen, 0.0), (1, 0))


def split_in_order(episodes: list[Episode], budget: int) -> list[list[Episode]]:
    """Batches of neighbours whose padded rows fit the budget."""
    batches: list[list[Episode]] = [[]]
    for episode in episodes:
        longest = max(len(e.token_ids) for e in [*batches[-1], episode])
        if batches[-1] and (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
        batches[-1].append(episode)
    return batches


def train(policy: Policy, episodes: list[Episode], budget: int, side: str) -> None:
    """Adds the gradient of the mean log-probability of the rollouts."""
    plain = side == "plain"
    if side == "images encoded again":
        episodes = [replace(episode, features=[]) for episode in episodes]
    with use_plain_layers(policy) if plain else nullcontext():
        for batch in (split_in_order if plain else micro_batches)(episodes, budget):
            logprobs = (plain_logprobs if plain else token_logprobs)(policy, batch)
            (-logprobs.sum() / len(episodes)).backward()


# ------------------------------------------------------------------------------------------ measuring


def compare_speed(cfg: Config) -> bool:
    """Prints the table. Do the gradients agree?"""
    torch.manual_seed(0)
    policy = load_policy(cfg.base, **policy_flags(cfg))
    policy.base.model.visual.requires_grad_(False)
    weights = common.trainable_weights(policy.model).values()
    probes = list(islice(probe_stream(PROBE_KINDS, ("hard",), 0), cfg.questions))
    episodes = rollout(policy, probes, **rollout_flags(cfg), keep_features=True)
    runs, gradients = {side: [] for side in SIDES}, {}
    for repeat in tqdm(range(cfg.repeats + 1), leave=False):
        for side in SIDES:  # alternating
            policy.model.zero_grad()
            run = time_call(train, policy, episodes, cfg.micro_tokens, side)
            runs[side] += [run] if repeat else []  # the first is a warm-up
            gradients[side] = torch.cat([weight.grad.flatten() for weight in weights])
    tokens = sum(len(episode.token_ids) for episode in episodes)
    padded = split_in_order(episodes, cfg.micro_tokens)
    padded = sum(len(batch) * max(len(e.token_ids) for e in batch) for batch in padded)
    print(f"{cfg.base} on {policy.device}, {torch.get_num_threads()} threads: {len(episodes)} rollouts")
    print(f"{tokens:,} tokens; padding adds {padded / tokens - 1:.0%} to the baseline\n")
    print("| side | tokens/s | seconds | ratio | gradient off by | peak GB |\n|---|--:|--:|--:|--:|--:|")
    plain, worst = gradients["plain"], 0.0
    median = {side: statistics.median(run[0] for run in runs[side]) for side in SIDES}
    for side, seconds in median.items():
        off = float((gradients[side] - plain).norm() / plain.norm())
        peak, ratio, worst = max(run[1] for run in runs[side]), median["plain"] / seconds, max(worst, off)
        print(f"| {side} | {tokens / seconds:,.0f} | {seconds:.2f} | {ratio:.2f} | {off:.0e} | {peak:.2f} |")
    return worst < (1e-3 if policy.base.dtype == torch.float32 else 0.1)  # bf16 has 8 bits


def read_resident_gb() -> float:
    """Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e9


def plot_memory(cfg: Config) -> None:
    """Small steps of the real train_rl.py; resident memory after each, as a plot in text."""
    seen, log = [], common.log_metrics

    def look_and_log(out: Path, metrics: dict) -> None:
        seen.append(read_resident_gb())
        log(out, metrics)

    common.log_metrics = look_and_log
    with tempfile.TemporaryDirectory() as folder:
        small = {"questions": 4, "group_size": 4, "max_rounds": 1, "show_every": 10**6, "save_every": 50}
        places = {"init": Path(cfg.base), "out": Path(folder) / "rl", "device": cfg.device}
        train_rl.main(train_rl.Config(**places, steps=cfg.memory_steps, **small))
    common.log_metrics = log
    part = max(1, len(seen) // 20)
    means = [statistics.fmean(seen[i : i + part]) for i in range(0, len(seen), part)]
    print("\nresident memory, GB, by steps")
    for i, mean in enumerate(means):
        bar = "#" * round(50 * mean / max(means))
        print(f"{i * part + 1:4d} - {min(len(seen), (i + 1) * part):4d}  {mean:.3f}  {bar}")
    third = max(1, len(seen) // 3)
    early, late = statistics.fmean(seen[part : part + third]), statistics.fmean(seen[-third:])
    print(f"a third of the steps after the start {early:.3f}, the last third {late:.3f}")


def main(cfg: Config) -> None:
    agree = compare_speed(cfg)
    if cfg.memory_steps:
        plot_memory(cfg)
    if not agree:
        sys.exit("the gradients differ")


if __name__ == "__main__":
    common.cli(main, Config)
