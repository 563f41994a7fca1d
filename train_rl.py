"""GRPO with the over-turn mask: a policy trained with few turns learns to go on for many (paper, section 3.3).

GRPO, but: (1) no KL term, no reference policy, no entropy bonus; (2) the clip is wider above than below (DAPO's
clip-higher); (3) a group of equal rewards teaches nothing, is dropped, and another question takes its place;
(4) a rollout that ran into a limit still searching is neither rewarded nor punished: its outcome is unknown, and a
punishment would teach to guess before the limit. (4) is the idea of the paper; look for `over_turn` below.

    Q questions, G rollouts per question, B = Q * G rollouts, T tokens, V vocabulary

    $ python train_rl.py                                   # runs/sft -> runs/rl
    $ python train_rl.py --over_turn zero_reward --out runs/rl_zero      # the ablation: running out of turns is failure
    $ python train_rl.py qwen7b --steps 100                # a preset for a real base; see PRESETS
    $ python train_rl.py --data VisualProbe_train --judge base           # a published set; the base judges open answers

Read next: eval.py.
"""
import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import data
from env import ERROR_CODES, MAX_ANSWER_CHARS, MAX_IMAGE_PIXELS, STOPS, judge_prompt
from model import Policy, add_gradients, memory_advice, micro_batches, sampled_logprobs, token_logprobs
from rollout import Episode, describe, rollout
from train_sft import (TrainFlags, go_on, load_run, load_trainable, log, open_run, peak_gb, report_skipped, save_run,
                       stop_on_signal, update)


@dataclass(frozen=True)
class Config(TrainFlags):
    init: Path = Path("runs/sft")      # the policy to start from: a run of train_sft.py, or what its --base takes
    out: Path = Path("runs/rl")        # run directory
    seed: int = 0                      # questions and sampling
    steps: int = 45                    # rollout phases
    questions: int = 24                # Q, groups with spread per step
    group_size: int = 8                # G, rollouts per question
    updates: int = 2                   # optimizer steps per rollout phase, each on its share of the questions
    max_rounds: int = 3                # rollout rounds per step to find Q groups with spread
    lr: float = 1e-4                   # constant (AdamW)
    grad_clip: float = 1.0             # largest gradient norm
    clip_low: float = 0.2              # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.3
    over_turn: Literal["mask", "zero_reward"] = "mask"   # what a rollout teaches that ran into a limit
    baseline: Literal["all", "completed"] = "all"        # rollouts in the mean and std of their group
    denominator: Literal["completed", "all"] = "completed"  # rollouts that the loss is divided by
    kinds: tuple[str, ...] = data.PROBE_KINDS
    difficulties: tuple[str, ...] = ("hard",)  # drawn evenly
    data: tuple[Path, ...] = ()        # sets of questions, such as VisualProbe_train; default: fresh probes
    max_image_pixels: int = MAX_IMAGE_PIXELS  # width * height: a larger image file of `data` is refused
    judge: str = "exact"               # of open answers: exact, base (the model below the adapters), or a server's URL
    judge_model: str = ""              # the name of the judge at that server
    max_turns: int = 6                 # assistant messages per rollout: 5 crops and an answer
    max_images: int = 12               # images per rollout, the original included
    max_context: int = 8192            # tokens per rollout before its last turn
    max_turn_tokens: int = 48          # tokens per turn; a longer one is cut, and void
    temperature: float = 1.0
    micro_tokens: int = 4096           # tokens per training forward
    slots: int = 192                   # rollouts at once
    show_every: int = 10               # steps between two printed rollouts
    save_every: int = 20               # steps
    resume: bool = False               # go on from the last checkpoint in `out`

    def __post_init__(self):
        if self.questions % self.updates:
            raise ValueError(f"--questions {self.questions} is not a multiple of --updates {self.updates}")


# ------------------------------------------------------------------------------------------------ the maths

def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """Rewards (Q, G) -> advantages (Q, G): (r - mean) / (unbiased std + eps) within each group.

    A group of equal rewards gives exact zeros. Source: GRPO; eps and the unbiased std as in the reference code
    (verl/trainer/ppo/core_algos.py:145).

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])).round(decimals=3).tolist()
    [[1.5, -0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]
    """
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)          # (Q, 1) each
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)                         # (Q, 1)
    return torch.where(equal, torch.zeros_like(rewards), (rewards - mean) / (std + eps))


def completed_advantages(rewards: Tensor, over_turn: Tensor, eps: float = 1e-6) -> Tensor:
    """The ablation of decision (a): mean and std over the completed rollouts of each group only; 0 for the others."""
    advantages = torch.zeros_like(rewards)                                           # (Q, G)
    for row, reward, over in zip(advantages, rewards, over_turn):
        if int((~over).sum()) > 1:
            row[~over] = group_advantages(reward[~over][None], eps)[0]
    return advantages


def grpo_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, assistant_mask: Tensor, over_turn: Tensor, *,
              clip_low: float = 0.2, clip_high: float = 0.3, denominator: int | None = None) -> Tensor:
    """The clipped objective of GRPO, with the over-turn mask: a scalar to minimise.

    logp, old_logp: (B, T) log-probs of the tokens now and when they were sampled. advantages: (B,).
    assistant_mask: (B, T), True where the policy sampled. over_turn: (B,), True for rollouts that a limit ended.
    denominator: rows that count in the whole optimizer step; default: those of this call that are not over-turn.
    Changes none of its inputs. Each row is the mean over its sampled tokens (reference: dp_actor.py:394).
    """
    assert logp.shape == old_logp.shape == assistant_mask.shape, (logp.shape, old_logp.shape, assistant_mask.shape)
    sampled = assistant_mask.bool()                                                  # (B, T)
    trained = sampled & ~over_turn.bool()[:, None]                                   # (B, T) the over-turn mask
    if denominator is None:
        denominator = max(1, int((~over_turn.bool()).sum()))
    log_ratio = torch.where(trained, logp - old_logp, 0.0)                           # (B, T) 0 where nothing is trained
    ratio = torch.exp(log_ratio)                                                     # (B, T) policy now / when sampled
    gain = ratio * advantages[:, None]                                               # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages[:, None]         # (B, T)
    objective = torch.where(trained, torch.minimum(gain, clipped), 0.0)              # (B, T)
    per_row = objective.sum(1) / sampled.sum(1).clamp(min=1)                         # (B,)
    return -per_row.sum() / denominator


# ------------------------------------------------------------------------------------------------ the judge

Judge = Callable[[list[str]], list[bool | None]]           # prompts -> is it right? None: the judge failed


def base_judge(policy: Policy) -> Judge:
    """The frozen base below the adapters, text only: is yes or no the likelier next token?"""
    if policy.model is policy.base:
        raise data.UserError("--judge base: asks the model below the adapters, and this policy has none; choose exact "
                             "or a server's URL")
    words = [[policy.encode(word)[0] for word in spelt] for spelt in (("yes", "Yes"), ("no", "No"))]

    @torch.no_grad()
    def ask(prompt: str) -> bool | None:
        ids, _ = policy.render([{"role": "user", "content": [{"type": "text", "text": prompt}]}])
        row = torch.tensor([ids], device=policy.device)                              # (1, T)
        positions = torch.arange(len(ids), device=policy.device).expand(3, 1, -1)    # (3, 1, T)
        with policy.model.disable_adapter():
            hidden = policy.base.model(input_ids=row, position_ids=positions, use_cache=False).last_hidden_state
            logp = sampled_logprobs(policy, hidden[0, -1])                           # (V,)
        yes, no = (logp[spelt].logsumexp(0) for spelt in words)
        return bool(yes > no) if torch.isfinite(yes - no) else None
    return lambda prompts: [ask(prompt) for prompt in prompts]


def open_judge(name: str, model: str, policy: Policy | None) -> Judge | None:
    """--judge as a function, None for exact. UserError for a judge that cannot be asked."""
    if name == "exact":
        return None
    if name == "base":
        if policy is None:
            raise data.UserError("--judge base: needs the policy here, not behind a server")
        return base_judge(policy)
    judge = data.endpoint_judge(data.Endpoint(name, model, key="JUDGE_API_KEY"))
    if judge([judge_prompt("What color?", "red", "red")]) == [None]:
        raise data.UserError(f"--judge {name}: --judge_model {model or '(not given)'} does not say yes or no")
    return judge


def judge_all(episodes: list[Episode], judge: Judge | None) -> None:
    """Scores open answers that are not literally right by the judge; where it fails, an episode is not `judged`.

    Options are left to exact match, and an answer beyond MAX_ANSWER_CHARS is wrong. A group repeats itself: equal
    answers to a question are judged once.
    """
    asked: dict[tuple, list[Episode]] = {}
    for e in episodes:
        if judge and e.stop == "answer" and not (e.reward or e.probe.options or len(e.answer) > MAX_ANSWER_CHARS):
            asked.setdefault((id(e.probe), e.answer), []).append(e)
    prompts = [judge_prompt(e.probe.question, e.probe.answer, e.answer) for e, *_ in asked.values()]
    for verdict, same in zip(judge(prompts) if prompts else [], asked.values()):
        for e in same:
            e.reward, e.judged = float(bool(verdict)), verdict is not None


# ------------------------------------------------------------------------------------------------ one step's rollouts

def gather_groups(cfg: Config, policy, step: int, published: Sequence[data.Probe] = (),
                  judge: Judge | None = None) -> tuple[list[list[Episode]], list[list[Episode]]]:
    """(groups with spread, at most Q; every group that was rolled out). Groups of equal rewards are replaced, and those
    of which the judge left an answer open."""
    rng = random.Random(f"rl/{cfg.seed}/{step}")
    probes = data.probe_stream(cfg.kinds, cfg.difficulties, rng.getrandbits(48))
    if published:
        probes = itertools.cycle(rng.sample(published, len(published)))
    kept, rolled = [], []
    for _ in range(cfg.max_rounds):
        asked = [next(probes) for _ in range(cfg.questions - len(kept))]
        episodes = rollout(policy, asked, group_size=cfg.group_size, max_turns=cfg.max_turns, max_images=cfg.max_images,
                           max_context=cfg.max_context, max_turn_tokens=cfg.max_turn_tokens,
                           temperature=cfg.temperature, seed=rng.getrandbits(48), slots=cfg.slots,
                           keep_features=not cfg.train_vision)
        judge_all(episodes, judge)
        groups = [episodes[i:i + cfg.group_size] for i in range(0, len(episodes), cfg.group_size)]
        rolled += groups
        for group in groups:
            if len({e.reward for e in group}) > 1 and all(e.judged for e in group):
                kept.append(group)
            else:
                forget(group)
        if len(kept) == cfg.questions:
            break
    return kept, rolled


def forget(episodes: list[Episode]) -> None:
    """Frees the visual tokens of episodes that are not trained on (again): 9 MB for a view of 1 megapixel, at 7B."""
    for episode in episodes:
        episode.features = None


def padded(episodes: list[Episode], values: str, device) -> Tensor:
    """One field of the episodes, `logprobs` or `assistant_mask`, as (B, T), padded on the right with 0."""
    rows = [torch.from_numpy(getattr(episode, values)) for episode in episodes]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


@memory_advice("--micro_tokens", "--slots", "--max_context")
def main(cfg: Config) -> None:
    published = [probe for path in cfg.data for probe in data.load_probes(path, None, cfg.max_image_pixels)]
    torch.manual_seed(cfg.seed)
    try:
        policy, optimizer = load_trainable(str(cfg.init), cfg, lr=cfg.lr, betas=(0.9, 0.999), weight_decay=0.01)
    except data.UserError as error:
        if cfg.init.exists() or ":" in str(cfg.init):
            raise
        raise data.UserError(f"--init: {error}; or train one first: python train_sft.py --out {cfg.init}") from None
    judge = open_judge(cfg.judge, cfg.judge_model, policy)
    open_run(cfg, cfg.resume, policy.name)
    start = load_run(cfg.out, policy, optimizer) if cfg.resume else 0
    stop = stop_on_signal()
    for step in tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="GRPO"):
        began = time.time()
        groups, rolled = gather_groups(cfg, policy, step, published, judge)          # roll out
        everything = [episode for group in rolled for episode in group]
        rolled_at = time.time()

        policy.model.train()
        torch.manual_seed(cfg.seed * 1_000_003 + step)             # for dropout: a resumed run draws the same
        rewards = torch.tensor([[e.reward for e in group] for group in groups]).view(-1, cfg.group_size)      # (Q, G)
        over_turn = torch.tensor([[e.over_turn for e in group] for group in groups], dtype=torch.bool)
        over_turn = over_turn.view(-1, cfg.group_size)                                                        # (Q, G)
        # Three decisions. Paper: section 3.3. Reference code: core_algos.py:145, dp_actor.py:322 and :394.
        # (a) Do over-turn rollouts enter the mean and std of their group? Paper and code: yes, with reward 0. So do we.
        advantages = (group_advantages(rewards) if cfg.baseline == "all"                                      # (Q, G)
                      else completed_advantages(rewards, over_turn))
        # (b) Which tokens are trained? Paper and code: the sampled ones of rollouts that are not over-turn. So do we.
        masked = over_turn if cfg.over_turn == "mask" else torch.zeros_like(over_turn)                        # (Q, G)
        # (c) What is the loss divided by? Paper: the rollouts that count. Code: all of them. We follow the paper.
        counted = ~masked if cfg.denominator == "completed" else torch.ones_like(masked)                      # (Q, G)

        norms, skipped, clipped_tokens, trained_tokens = [], 0, 0, 0
        share = -(-len(groups) // cfg.updates) or 1
        for first in range(0, len(groups), share):
            chosen = range(first, min(first + share, len(groups)))
            rows = {id(e): (q, g) for q in chosen for g, e in enumerate(groups[q])}
            denominator = max(1, int(counted[first:first + share].sum()))            # of the whole optimizer step
            used = [e for q in chosen for g, e in enumerate(groups[q]) if not masked[q, g] and advantages[q, g] != 0]

            def loss_of(batch: list[Episode]) -> tuple[Tensor, tuple[int, int]]:
                at = tuple(torch.tensor([rows[id(e)] for e in batch]).T)
                logp = token_logprobs(policy, batch, cfg.temperature)                # (B, T)
                old_logp = padded(batch, "logprobs", policy.device)                  # (B, T)
                sampled = padded(batch, "assistant_mask", policy.device)             # (B, T)
                loss = grpo_loss(logp, old_logp, advantages[at].to(policy.device), sampled,
                                 masked[at].to(policy.device), clip_low=cfg.clip_low, clip_high=cfg.clip_high,
                                 denominator=denominator)
                ratio = torch.exp(logp.detach() - old_logp)[sampled]
                clipped = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
                return loss, (int(clipped.sum()), int(sampled.sum()))

            batches = micro_batches(used, cfg.micro_tokens, even=policy.device.type == "cpu")
            for _, counts in add_gradients(policy, loss_of, batches):
                clipped_tokens, trained_tokens = clipped_tokens + counts[0], trained_tokens + counts[1]
            norm, bad = update(optimizer, cfg.grad_clip)
            norms += [] if bad else [norm]
            skipped += bad

        forget(everything)
        if step % 10 == 9:
            gc.collect()                     # some of it refers to itself, and Python alone would come for it too late
        mean = lambda values: sum(values) / max(1, len(values))
        nll = -sum(float(e.logprobs.sum()) for e in everything)
        sampled_tokens = sum(int(e.assistant_mask.sum()) for e in everything)
        judged = [e for e in everything if e.judged]
        metrics = {
            "step": step + 1, "reward": mean([e.reward for e in judged]),
            "accuracy": mean([e.reward for e in judged if e.stop == "answer"]),
            "unjudged": len(everything) - len(judged),
            **{f"stop/{name}": mean([e.stop == name for e in everything]) for name in STOPS},
            "wrong": mean([e.stop == "answer" and e.reward == 0 for e in judged]),
            "turns": mean([e.turns for e in everything]), "crops": mean([len(e.crops) for e in everything]),
            "errors": mean([len(e.errors) for e in everything]),
            **{f"error/{code}": mean([e.errors.count(code) for e in everything]) for code in ERROR_CODES[1:]},
            "groups/rolled": len(rolled), "groups/trained": len(groups),
            "groups/zero_spread": mean([len({e.reward for e in group if e.judged}) < 2 for group in rolled]),
            "clip_fraction": clipped_tokens / max(1, trained_tokens), "entropy": nll / max(1, sampled_tokens),
            "grad_norm": mean(norms), "skipped": skipped, "trained_tokens": trained_tokens,
            "time/rollout": rolled_at - began, "time/step": time.time() - began,
            "tokens_per_second": sampled_tokens / (rolled_at - began), "memory_gb": peak_gb()}
        metrics["time/eta"] = (cfg.steps - step - 1) * metrics["time/step"]
        log(cfg.out, metrics)
        if skipped:
            report_skipped(cfg.out, [episode for group in groups for episode in group])
        tqdm.write(f"step {step + 1:3d}  reward {metrics['reward']:.2f}  wrong {metrics['wrong']:.2f}  "
                   f"over-turn {metrics['stop/over_turn']:.2f}  void {metrics['stop/void']:.2f}  "
                   f"turns {metrics['turns']:.1f}  entropy {metrics['entropy']:.3f}  "
                   f"clip {metrics['clip_fraction']:.3f}  grad {metrics['grad_norm']:.2f}  "
                   f"{metrics['time/rollout']:.1f} + {metrics['time/step'] - metrics['time/rollout']:.1f} s  "
                   f"{metrics['memory_gb']:.1f} GB  {metrics['time/eta'] / 60:.0f} min left")
        if step % cfg.show_every == 0 and groups:
            tqdm.write(describe(policy, groups[0][0]) + f"  advantage {advantages[0, 0]:+.2f}")
        if stop or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_run(cfg.out, policy, optimizer, step + 1)
        if stop:
            tqdm.write(f"stopped after step {step + 1}; go on with: {go_on()}")
            return
    print(f"saved in {cfg.out}; next: python eval.py --init {cfg.out}")


# For one GPU of 24 GB. `paper`: full fine-tuning as published (256 groups of 16, eight updates, 30,768 tokens before
# the last turn), which needs far more memory and time.
QWEN3B = Config(lora_rank=16, lr=1e-5, steps=200, questions=8, activation_checkpointing=True, max_pixels=1_000_000,
                max_context=16_384, max_turn_tokens=1024, micro_tokens=8192, slots=16)
PRESETS = {
    "tiny": Config(), "qwen3b": QWEN3B, "qwen7b": replace(QWEN3B, quantize="nf4", adam_8bit=True),
    "paper": replace(QWEN3B, lora_rank=0, autocast=True, train_vision=True, lr=1e-6, questions=256, group_size=16,
                     updates=8, max_rounds=10, max_pixels=2_000_000, max_context=30_768, max_turn_tokens=8192,
                     micro_tokens=32_768)}


if __name__ == "__main__":
    data.command(main, Config, PRESETS)
