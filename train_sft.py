"""Cold start: a policy learns to search by imitating searches that ended well (paper, section 3.2).

Next-token cross-entropy, but only on assistant tokens: what the environment wrote is never trained on. Two
phases, one loss. The tiny policy, which has never seen a picture, first takes single looks (warm-up: what
is on this plate, is it the one?); then it learns whole searches, of 32 turns at most. Real bases skip the
warm-up. Batches are drawn afresh at every step.

    Q questions, G rollouts per question, B = Q * G rollouts, T tokens, V vocabulary

    $ python train_sft.py                      # tiny, from random weights -> runs/sft
    $ python train_sft.py --seed 1 --out runs/sft1
    $ python train_sft.py --resume             # goes on where runs/sft stopped
    $ python train_sft.py qwen7b               # LoRA on Qwen2.5-VL-7B in 4 bits; see PRESETS
    $ python train_sft.py qwen7b --data cold_start          # imitates written searches; see prepare/

Read next: train_rl.py.
"""

import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import common

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from data import Probe, ProbeFlags, WarmUpEnv
from model import Policy, PolicyFlags, load_policy, micro_batches, policy_flags, token_logprobs
from rollout import Episode, replay


@dataclass(frozen=True)
class Config(PolicyFlags, ProbeFlags):
    base: str = "tiny"  # "tiny", a Hugging Face id, or a directory
    out: Path = Path("runs/sft")  # run directory
    seed: int = 0  # weights and data
    steps: int = 640  # optimizer steps, warm-up included
    warmup_steps: int = 360  # of which so many on looks and beginnings of searches: perception first
    warmup_looks: int = 40  # single looks per warm-up step
    warmup_plans: int = 6  # beginnings of planned searches per warm-up step, and as many in one region
    batch: int = 32  # searches per step
    lr: float = 2e-3  # peak learning rate (AdamW); after the warm-up a cosine
    lr_rise: int = 20  # steps to the peak
    lr_floor: float = 0.1  # share of the peak at the end
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # largest gradient norm
    difficulties: tuple[str, ...] = ("medium", "hard", "hard", "hard")  # drawn evenly
    data: Path | None = None  # written searches to imitate, as prepare/ makes them; no warm-up
    trial_share: float = 0.06  # trial-and-error searches; the rest are depth-first
    # Each search draws an impatience from this range; after n misses it guesses with n times that chance.
    impatience: tuple[float, float] = (0.05, 0.15)
    patient_share: float = 0.10  # searches that never guess, however long
    slip: float = 0.02  # chance, per plate, of taking an empty cell for one more
    max_turns: int = 32  # longest search; a longer one of `data` is trained on up to here
    micro_tokens: int = 4096  # tokens per forward
    save_every: int = 100  # steps
    resume: bool = False  # go on from the last checkpoint in `out`
    train_vision: bool = True  # train the vision tower too: the tiny policy has never seen a picture
    activation_checkpointing: bool = False  # keep few activations, compute them again: less memory, more time
    adam_8bit: bool = False  # moments of AdamW in 8 bits (bitsandbytes)
    lora_rank: int = 0  # adapters of this rank on the language model, all else frozen; 0 trains every weight


def draw_batch(cfg: Config, policy: Policy, step: int, written: list[Probe]) -> list[Episode]:
    """The episodes of one step. They depend on seed and step alone, so a resumed run sees the same."""
    batch: list[Episode] = []
    if written:  # every epoch has all of them, in an order of its own
        for at in range(step * cfg.batch, (step + 1) * cfg.batch):
            epoch, place = divmod(at, len(written))
            order = random.Random(f"sft/{cfg.seed}/epoch {epoch}").sample(range(len(written)), len(written))
            probe = written[order[place]]
            batch.append(replay(policy, probe, probe.meta["texts"][: cfg.max_turns]))
        return batch
    rng = random.Random(f"sft/{cfg.seed}/{step}")
    seed = rng.getrandbits(48)
    if step < cfg.warmup_steps:
        plates = cfg.draw_probes(seed, regions=1, grid=1, candidates=1)
        plates = itertools.islice(plates, cfg.warmup_looks)
        batch += [replay(policy, plate, data.write_look(plate), WarmUpEnv) for plate in plates]
        # The list of one region, with many plates on it, and beginnings of whole searches.
        for size, turns in (({"regions": 1, "candidates": None}, 1), ({}, 4)):
            probes = cfg.draw_probes(rng.getrandbits(48), **size)
            for probe in itertools.islice(probes, cfg.warmup_plans):
                texts = data.write_search(probe, rng, pattern="depth_first")
                batch.append(replay(policy, probe, texts[:turns]))
        return batch
    shares = {"trial_share": cfg.trial_share, "patient_share": cfg.patient_share, "slip": cfg.slip}
    options = {"impatience": cfg.impatience, "max_turns": cfg.max_turns, **shares}
    searches = data.cold_start(cfg.draw_probes(seed), rng.getrandbits(48), **options)
    for probe, texts in itertools.islice(searches, cfg.batch):
        batch.append(replay(policy, probe, texts))
        batch[-1].probe = replace(probe, image=None)  # its views are kept
    return batch


class Batches(Dataset):
    """The batches of a run, by step, as another process draws them."""

    def __init__(self, cfg: Config, policy: Policy, written: list[Probe]):
        self.arguments = cfg, policy, written

    def __getitem__(self, step: int) -> list[Episode]:
        cfg, policy, written = self.arguments
        return draw_batch(cfg, policy, step, written)


def start_worker(_worker: int) -> None:
    """Data worker: ignores Ctrl-C, since the trainer decides when to stop. Ends with the trainer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_trainer, args=(os.getppid(),), daemon=True).start()


def end_with_trainer(trainer: int) -> None:
    """A worker whose trainer was killed would wait for ever to hand over its last batch."""
    while os.getppid() == trainer:
        time.sleep(1)
    os._exit(1)


def load_batches(cfg: Config, policy: Policy, start: int, written: list[Probe]) -> DataLoader:
    """The batches of all steps from `start` on. On Linux the next one is drawn in a process of its own.

    A process, not a thread: drawing would compete with training for the interpreter lock.
    """
    fork = {"num_workers": 1, "prefetch_factor": 1, "multiprocessing_context": "fork"}
    return DataLoader(
        Batches(cfg, policy, written),
        batch_size=None,
        sampler=range(start, cfg.steps),
        collate_fn=lambda batch: batch,
        worker_init_fn=start_worker,
        **(fork if sys.platform == "linux" else {}),
    )


def learning_rate(cfg: Config, step: int) -> float:
    """Linear rise to the peak, held through the warm-up; then a cosine, down to a share of the peak."""
    warmup_steps = 0 if cfg.data else cfg.warmup_steps
    share = max(0, step - warmup_steps) / max(1, cfg.steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * share))
    return cfg.lr * min(1.0, (step + 1) / cfg.lr_rise) * (cfg.lr_floor + (1 - cfg.lr_floor) * cosine)


def load_searches(cfg: Config) -> list[Probe]:
    """The searches of --data, [] without it. UserError for a set of questions without searches."""
    written = data.load_probes(cfg.data) if cfg.data else []
    if any("texts" not in probe.meta for probe in written):
        raise common.UserError(
            f"--data {cfg.data}: holds questions without searches; see prepare/cold_start.py"
        )
    turns = [len(probe.meta["texts"]) for probe in written]
    if written:
        cut = sum(n > cfg.max_turns for n in turns)
        print(f"{len(turns)} searches, {sum(turns) / len(turns):.1f} turns; {cut} are cut at {cfg.max_turns}")
    return written


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    written = load_searches(cfg)
    policy = load_policy(cfg.base, **policy_flags(cfg))
    optimizer = common.make_optimizer(policy, cfg, betas=(0.9, 0.98))
    common.open_run(cfg)
    start = common.load_run(cfg.out, policy, optimizer) if cfg.resume else 0
    policy.model.train()
    stop = common.StopSignal()
    ended = time.time()
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="cold start")
    for step, episodes in zip(bar, load_batches(cfg, policy, start, written)):
        began = time.time()
        # The denominator: assistant tokens of the whole step, counted once.
        tokens = sum(int(episode.assistant_mask.sum()) for episode in episodes)
        loss = 0.0
        for batch in micro_batches(episodes, cfg.micro_tokens):
            batch_loss = -token_logprobs(policy, batch).sum() / tokens  # 0 off the assistant mask
            batch_loss.backward()
            loss += batch_loss.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        norm = common.clip_gradients(optimizer, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

        metrics = {
            "step": step + 1,
            "phase": "warm-up" if step < cfg.warmup_steps and not written else "search",
            "loss": loss,
            "grad_norm": norm,
            "lr": learning_rate(cfg, step),
            "tokens": tokens,
            "turns": sum(e.turns for e in episodes) / len(episodes),
            "time/step": time.time() - began,
            "time/wait": began - ended,
            "memory_gb": common.peak_gb(),
        }
        ended = time.time()
        common.log_metrics(cfg.out, metrics)
        if step % 10 == 9:
            tqdm.write(
                "step {step:4d}  {phase:7s}  loss {loss:.3f}  grad {grad_norm:.2f}  turns {turns:.1f}  "
                "{time/step:.2f} s + {time/wait:.2f} s waiting for data".format(**metrics)
            )
        if stop.requested or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            common.save_run(cfg.out, policy, optimizer, step + 1)
        if stop.requested:
            tqdm.write(f"stopped after step {step + 1}; go on with: {common.resume_command()}")
            return
    print(f"saved in {cfg.out}; next: python train_rl.py --init {cfg.out}")


QWEN3B = Config(
    base="Qwen/Qwen2.5-VL-3B-Instruct",
    lora_rank=16,
    lr=1e-4,
    steps=450,
    warmup_steps=0,
    batch=16,
    activation_checkpointing=True,
    train_vision=False,
    max_pixels=1_000_000,
    micro_tokens=8192,
)
QWEN7B = replace(QWEN3B, base="Qwen/Qwen2.5-VL-7B-Instruct", quantize="nf4", adam_8bit=True)
PRESETS = {"tiny": Config(), "qwen3b": QWEN3B, "qwen7b": QWEN7B}


if __name__ == "__main__":
    common.cli(main, Config, PRESETS)
