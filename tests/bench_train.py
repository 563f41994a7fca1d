"""What a GRPO training phase costs, against plain code; and whether memory grows over many steps.

Baseline: transformers' own layers, padded rows in the order in which they came, as many per forward as the budget takes,
all images encoded again, logits of every position at once, one backward after the other on all of torch's threads. Both
sides compute the gradient of the same loss over the same rollouts, and it must be the same; they alternate in one
process: medians after a warm-up.

    $ python tests/bench_train.py                # needs runs/sft; on CUDA --base random:qwen3b --lora_rank 16
    $ python tests/bench_train.py --memory_steps 200      # also: resident memory over 200 small steps of GRPO
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import train_rl
from bench_rollout import peak_gb, plain, reset_peak
from model import (
    LoraFlags,
    Policy,
    add_gradients,
    load_policy,
    micro_batches,
    mrope_positions,
    policy_flags,
    token_logprobs,
)
from rollout import Episode, rollout


@dataclass(frozen=True)
class Config(LoraFlags):
    base: str = "runs/sft"  # any name that load_policy knows
    questions: int = 12  # Q, of one optimizer step
    group_size: int = 8  # G
    max_turns: int = 6
    max_turn_tokens: int = 48
    micro_tokens: int = 4096  # tokens per forward
    repeats: int = 5  # runs of each side; the first, a warm-up, comes on top
    memory_steps: int = 0  # steps of GRPO whose resident memory is plotted


def baseline_logprobs(policy: Policy, episodes: list[Episode]) -> torch.Tensor:
    """(B, T) as token_logprobs, with (B, T, V) logits on the way."""
    ids, positions = [], []
    pixels = policy.pixels([view for episode in episodes for view in episode.views()])
    grids = iter(pixels["image_grid_thw"].tolist())
    for episode in episodes:
        ids.append(torch.from_numpy(episode.token_ids))
        place = mrope_positions(episode.token_ids, grids, policy.image_pad, policy.merge)[0]
        positions.append(torch.from_numpy(place).T)
    pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.device)
    ids, positions = pad(ids), pad(positions).permute(2, 0, 1)  # (B, T), (3, B, T)
    mask = pad([torch.from_numpy(episode.assistant_mask) for episode in episodes])  # (B, T)
    logits = policy.base(input_ids=ids, position_ids=positions, use_cache=False, **pixels).logits.float()
    logprobs = F.log_softmax(logits[:, :-1] + policy.banned, -1)  # (B, T - 1, V)
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    return F.pad(torch.where(mask[:, 1:], chosen, 0.0), (1, 0))


def in_order(episodes: list[Episode], budget: int) -> list[list[Episode]]:
    batches: list[list[Episode]] = [[]]
    for episode in episodes:
        longest = max(len(e.token_ids) for e in [*batches[-1], episode])
        if batches[-1] and (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
        batches[-1].append(episode)
    return batches


def gradient(
    policy: Policy, weights: list, side: str, episodes: list[Episode], budget: int
) -> list[torch.Tensor]:
    for weight in weights:
        weight.grad = None
    if side == "baseline":
        with plain(policy):
            for batch in in_order(episodes, budget):
                (-baseline_logprobs(policy, batch).sum() / len(episodes)).backward()
    else:
        if side == "pictures encoded again":
            episodes = [dataclasses.replace(episode, features=None) for episode in episodes]
        loss_of = lambda batch: (-token_logprobs(policy, batch).sum() / len(episodes), None)
        for _ in add_gradients(policy, loss_of, micro_batches(episodes, budget, policy.device.type == "cpu")):
            pass
    return [weight.grad for weight in weights]


def matrix_rate(policy: Policy, size: int) -> float:
    """FLOP/s of a square matrix product, the best of five."""
    a = torch.randn(size, size, device=policy.device, dtype=policy.base.dtype)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def speed(cfg: Config) -> None:
    torch.manual_seed(0)
    policy = load_policy(cfg.base, **policy_flags(cfg))
    policy.base.model.visual.requires_grad_(False)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    stream = data.probe_stream(data.PROBE_KINDS, ("hard",), 0)
    episodes = rollout(
        policy,
        [next(stream) for _ in range(cfg.questions)],
        group_size=cfg.group_size,
        max_turns=cfg.max_turns,
        max_turn_tokens=cfg.max_turn_tokens,
        keep_features=True,
    )
    sides = ["baseline", "pictures encoded again", "as in train_rl.py"]
    runs, found = {side: [] for side in sides}, {}
    for repeat in tqdm(range(cfg.repeats + 1), leave=False):
        for side in sides:  # alternating
            reset_peak(policy)
            began = time.perf_counter()
            found[side] = [
                None if g is None else g.clone()
                for g in gradient(policy, weights, side, episodes, cfg.micro_tokens)
            ]
            if policy.device.type == "cuda":
                torch.cuda.synchronize()
            runs[side] += [(time.perf_counter() - began, peak_gb(policy))] if repeat else []
    norm = lambda gradients: sum(float(g.double().square().sum()) for g in gradients if g is not None) ** 0.5
    with FlopCounterMode(display=False) as flops:  # of a plain pass, on this thread
        for batch in micro_batches(episodes, cfg.micro_tokens):
            (-token_logprobs(policy, batch).sum()).backward()
    cuda = policy.device.type == "cuda"
    rate = matrix_rate(policy, 8192 if cuda else 1024)
    tokens = sum(len(episode.token_ids) for episode in episodes)
    median = {side: statistics.median(seconds for seconds, _ in runs[side]) for side in sides}
    print(
        f"{cfg.base} on {policy.device}, {torch.get_num_threads()} threads, {len(episodes)} rollouts, {tokens} tokens; "
        f"{flops.get_total_flops() / 1e9:.1f} GFLOP in matrices and attention, matrix products at {rate / 1e9:.0f} GFLOP/s\n"
    )
    print("| side | padding | tokens/s | seconds | ratio | of the matrix rate | gradient off by | peak GB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for side in sides:
        read = tokens
        if side == "baseline":
            read = sum(
                len(batch) * max(len(e.token_ids) for e in batch)
                for batch in in_order(episodes, cfg.micro_tokens)
            )
        off = norm([a - b for a, b in zip(found[side], found["baseline"]) if a is not None]) / norm(
            found["baseline"]
        )
        print(
            f"| {side} | {1 - tokens / read:.1%} | {tokens / median[side]:,.0f} | {median[side]:.2f} | "
            f"{median['baseline'] / median[side]:.2f} | {flops.get_total_flops() / median[side] / rate:.0%} | {off:.1e} | "
            f"{runs[side][0][1]} |"
        )


def resident_gb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e9


def memory(cfg: Config) -> None:
    """Small steps of the real train_rl.py; resident memory after each, as a plot in text."""
    seen, log = [], train_rl.log
    train_rl.log = lambda out, metrics: seen.append(resident_gb()) or log(out, metrics)
    with tempfile.TemporaryDirectory() as out:
        train_rl.main(
            train_rl.Config(
                init=Path(cfg.base),
                out=Path(out) / "rl",
                steps=cfg.memory_steps,
                questions=4,
                group_size=4,
                max_rounds=1,
                show_every=10**6,
                save_every=50,
                device=cfg.device,
            )
        )
    part = max(1, len(seen) // 20)
    means = [statistics.fmean(seen[i : i + part]) for i in range(0, len(seen), part)]
    print("\nresident memory, GB, by steps")
    for i, mean in enumerate(means):
        print(
            f"{i * part + 1:4d} - {min(len(seen), (i + 1) * part):4d}  {mean:.3f}  "
            + "#" * round(50 * mean / max(means))
        )
    third = len(seen) // 3
    print(
        f"first third after the start {statistics.fmean(seen[part:third]):.3f}, last third {statistics.fmean(seen[-third:]):.3f}"
    )


def main(cfg: Config) -> None:
    speed(cfg)
    if cfg.memory_steps:
        memory(cfg)


if __name__ == "__main__":
    data.command(main, Config)
