"""Cold start: a policy learns to search by imitating trajectories that ended well (paper, section 3.2).

Next-token cross-entropy, but only on assistant tokens: what the environment wrote is never trained on. Two phases,
one loss. The tiny policy, which has never seen a picture, first takes single looks (warm-up: what is on this plate,
is it the one?); then it learns whole searches. Real bases skip the warm-up. Batches are drawn afresh at every step.

    Q questions, G rollouts per question, B = Q * G rollouts, T tokens, V vocabulary

    $ python train_sft.py                      # tiny, from random weights -> runs/sft
    $ python train_sft.py --seed 1 --out runs/sft1
    $ python train_sft.py --resume             # goes on where runs/sft stopped
    $ python train_sft.py qwen7b               # LoRA on Qwen2.5-VL-7B in 4 bits; see PRESETS
    $ python train_sft.py --base DIR --data cold_start        # imitates searches that were written elsewhere

Read next: train_rl.py.
"""
import ctypes
import itertools
import json
import math
import platform
import random
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

import data
from data import write_atomic
from env import MAX_IMAGE_PIXELS, ImageError
from model import (FILE_ERRORS, LoraFlags, Policy, add_gradients, load_policy, memory_advice, micro_batches,
                   policy_flags, reason, token_logprobs)
from rollout import Episode, replay


@dataclass(frozen=True, kw_only=True)
class TrainFlags(LoraFlags):
    """Flags of both training scripts."""
    activation_checkpointing: bool = False  # keep few activations, compute them again: less memory, more time
    adam_8bit: bool = False            # moments of AdamW in 8 bits (bitsandbytes)
    train_vision: bool = False         # train the vision tower too; never with adapters
    autocast: bool = False             # compute in bfloat16 with float32 weights; for a real base without adapters


@dataclass(frozen=True)
class Config(TrainFlags):
    base: str = "tiny"                 # "tiny", "random:qwen3b" and the like, a Hugging Face id, or a directory
    out: Path = Path("runs/sft")       # run directory
    seed: int = 0                      # weights and data
    steps: int = 740                   # optimizer steps, warm-up included
    warmup_steps: int = 400            # of them on single looks: perception first
    warmup_batch: int = 40             # single looks per step, and half as many beginnings of a planned search
    batch: int = 32                    # trajectories per step
    lr: float = 2e-3                   # peak learning rate (AdamW); after the warm-up a cosine
    lr_rise: int = 20                  # steps to the peak
    lr_floor: float = 0.1              # share of the peak at the end
    weight_decay: float = 0.01
    grad_clip: float = 1.0             # largest gradient norm
    kinds: tuple[str, ...] = data.PROBE_KINDS
    difficulties: tuple[str, ...] = ("medium", "hard", "hard", "hard")  # drawn evenly
    data: Path | None = None           # trajectories to imitate: of data.py --collect, or the released set; no warm-up
    max_image_pixels: int = MAX_IMAGE_PIXELS  # width * height: a larger image file of `data` is refused
    trial_share: float = 0.06          # trial-and-error searches; the rest are depth-first
    impatience: tuple[float, float] = (0.05, 0.15)  # one draw per search: chance of a guess after the n-th miss, over n
    patient_share: float = 0.10        # searches that never guess, however long
    slip: float = 0.02                 # chance, per plate, of taking an empty cell for one more
    max_turns: int = 32                # longest trajectory; a longer one of `data` is trained on up to here
    train_vision: bool = True          # the tiny policy has never seen a picture
    micro_tokens: int = 4096           # tokens per forward
    save_every: int = 100              # steps
    resume: bool = False               # go on from the last checkpoint in `out`


def load_written(cfg: Config) -> list[data.Trajectory]:
    """The trajectories of `--data`, [] without it; tells what there is to know about them."""
    written = data.load_trajectories(cfg.data, None, cfg.max_image_pixels) if cfg.data else []
    if written:
        turns = [len(t.texts) for t in written]
        early = sum(any(data.ends(text) for text in t.texts[:-1]) for t in written)
        print(f"{cfg.data}: {len(written)} trajectories, {sum(turns) / len(turns):.1f} turns; "
              f"{sum(n > cfg.max_turns for n in turns)} are cut at {cfg.max_turns} turns; {early} end at an earlier "
              f"message in our environment; {sum(t.answer is None for t in written)} have no answer in their last "
              "turn, and are trained on as searches that go on")
    return written


def draw_written(cfg: Config, policy: Policy, step: int, written: list[data.Trajectory]) -> list[Episode]:
    """The next `batch` written trajectories: every epoch has all of them, in an order of its own."""
    places = [divmod(at, len(written)) for at in range(step * cfg.batch, (step + 1) * cfg.batch)]
    orders = {epoch: random.Random(f"sft/{cfg.seed}/epoch {epoch}").sample(written, len(written))
              for epoch in {epoch for epoch, _ in places}}
    return [replay(policy, trajectory.probe, trajectory.texts[:cfg.max_turns])
            for trajectory in (orders[epoch][place] for epoch, place in places)]


def draw_batch(cfg: Config, policy: Policy, step: int, written: list[data.Trajectory] = ()) -> list[Episode]:
    """The episodes of one step; depends on the seed and the step alone, so that a resumed run sees the same."""
    if written:
        return draw_written(cfg, policy, step, written)
    rng = random.Random(f"sft/{cfg.seed}/{step}")
    if step < cfg.warmup_steps:
        probes = data.probe_stream(cfg.kinds, cfg.difficulties, rng.getrandbits(48), grid=1, candidates=1)
        looks = [replay(policy, probe, data.look_script(probe), data.Unseen)
                 for probe, _ in zip(probes, range(cfg.warmup_batch))]
        probes = data.probe_stream(cfg.kinds, cfg.difficulties, rng.getrandbits(48))
        plans = [replay(policy, probe, data.search_script(probe, rng, pattern="depth_first")[:3])
                 for probe, _ in zip(probes, range(cfg.warmup_batch // 2))]
        return looks + plans
    probes = data.probe_stream(cfg.kinds, cfg.difficulties, rng.getrandbits(48))
    searches = data.cold_start(probes, rng.getrandbits(48), trial_share=cfg.trial_share, impatience=cfg.impatience,
                               patient_share=cfg.patient_share, slip=cfg.slip, max_turns=cfg.max_turns, unplayed=True)
    played = (replay(policy, search.probe, search.texts) for search in searches)
    return list(itertools.islice((episode for episode in played if episode.reward == 1.0), cfg.batch))


class Steps(torch.utils.data.Dataset):
    """The batches of a run, by step, to be sent to another process: with their views, but without their pictures.

    A person's mistake is returned, not raised: a worker would wrap its message.
    """

    def __init__(self, cfg: Config, policy: Policy, written: list[data.Trajectory]):
        self.drawn_from = cfg, policy, written

    def __getitem__(self, step: int) -> list[Episode] | Exception:
        cfg, policy, written = self.drawn_from
        try:
            episodes = draw_batch(cfg, policy, step, written)
            return [replace(episode, probe=replace(episode.probe, image="")) for episode in episodes]
        except (data.UserError, ImageError) as error:
            return error


def begin_drawing(_worker: int) -> None:
    """In the process that draws: to stop is for the one that trains, and if that dies, so does this one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)                # PR_SET_PDEATHSIG, see prctl(2)


def drawn_ahead(cfg: Config, policy: Policy, start: int,
                written: list[data.Trajectory] = ()) -> Iterator[list[Episode]]:
    """The batches of all steps from `start` on, drawn in a process of its own while the ones before are trained on.

    A thread would draw as well, but hold up the threads that train: all wait for one interpreter lock. Off Linux, where
    such a process would need a copy of the policy, each batch is drawn when its step begins.
    """
    worker = dict(num_workers=1, prefetch_factor=1, multiprocessing_context="fork", worker_init_fn=begin_drawing)
    loader = torch.utils.data.DataLoader(
        Steps(cfg, policy, written), batch_size=None, sampler=range(start, cfg.steps), collate_fn=lambda batch: batch,
        **(worker if sys.platform == "linux" else {}))
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def learning_rate(cfg: Config, step: int) -> float:
    """Linear rise to the peak; after the warm-up a cosine, down to a share of the peak at the last step."""
    fallen = max(0, step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * fallen)).item())
    return cfg.lr * min(1.0, (step + 1) / cfg.lr_rise) * (cfg.lr_floor + (1 - cfg.lr_floor) * cosine)


# ------------------------------------------------------------------------------------------------ run directories

def open_run(cfg, resume: bool, policy_name: str) -> None:
    """Makes the run directory, locks it and writes run.json: configuration, commit and versions. UserError if taken."""
    taken = (cfg.out / "state.pt").exists() or (cfg.out / "metrics.jsonl").exists()
    if resume and not (cfg.out / "run.json").exists():
        raise data.UserError(f"--resume: no checkpoint in {cfg.out}; "
                             + ("delete it and run again" if taken else "run without --resume first"))
    data.lock(cfg.out)
    if taken and not resume:
        raise data.UserError(f"{cfg.out} holds a run already: pass --resume to go on, or another --out")
    settings = {k: v for k, v in asdict(cfg).items() if k not in ("out", "resume", "device")}
    settings = json.loads(json.dumps(settings, default=str))
    if resume:
        about = data.read_json(cfg.out / "run.json")
        before = about.get("config")
        if not isinstance(before, dict):
            raise data.UserError(f"--resume: {cfg.out / 'run.json'} holds no configuration; is the file damaged?")
        changed = [k for k in settings if settings[k] != before.get(k)]
        if [k for k in changed if k != "steps"]:
            raise data.UserError(f"--resume: {cfg.out} was started with another " + ", ".join(
                f"{k} ({before.get(k)}, now {settings[k]})" for k in changed))
        about["config"] = settings
    else:
        about = {"config": settings, "commit": commit(), "python": platform.python_version(),
                 "torch": torch.__version__, "transformers": transformers.__version__, "policy": policy_name}
    write_atomic(cfg.out / "run.json", json.dumps(about, indent=1).encode())


def commit() -> str | None:
    """The commit of this code, marked -dirty if files were changed since; None outside a checkout."""
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True,
                             text=True)
    except OSError:                                                    # a machine without git
        return None
    return git.stdout.strip() or None


def go_on() -> str:
    """The command that goes on with this run: all flags count, since --resume refuses a changed configuration."""
    return shlex.join(["python", *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def save_run(out: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Saves the policy in the Hugging Face layout, and what an exact resume needs beside it (state.pt).

    state.pt comes last, so that it is never of a later step than the policy. UserError when it cannot be written.
    """
    trained = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
    state = {"step": step, "weights": trained, "optimizer": optimizer.state_dict(), "frozen": frozen_sum(policy)}
    try:
        policy.save(out)
        with data.replacing(out / "state.pt") as temporary:
            torch.save(state, temporary)
    except FILE_ERRORS as error:                # a full disk has three names: torch's, that of safetensors, and OSError
        raise data.UserError(f"step {step} could not be saved in {out} ({reason(error)}); is the disk full? The last "
                             f"checkpoint is whole; go on from it with: {go_on()}") from error


def frozen_sum(policy: Policy) -> int:
    """The sum of all bytes of the weights that are not trained, which state.pt does not hold: are they the same?"""
    return sum(int(part.sum(dtype=torch.int64)) for p in policy.model.parameters() if not p.requires_grad
               for part in p.detach().flatten().view(torch.uint8).split(1 << 24))      # a sum copies what it sums


def load_run(out: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Loads weights and optimizer of the last checkpoint, forgets later metrics; returns the number of steps done.

    0 for a run that was killed before its first checkpoint. UserError for a checkpoint that is broken, or of another
    policy.
    """
    file, step, frozen = out / "state.pt", 0, frozen_sum(policy)
    try:
        if file.exists():
            damaged = zipfile.ZipFile(file).testzip()                 # compares checksums: torch does not
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")
            state = torch.load(file, map_location=policy.device, weights_only=True)
            theirs = {name: tuple(weight.shape) for name, weight in state["weights"].items()}
            ours = {name: tuple(p.shape) for name, p in policy.model.named_parameters() if p.requires_grad}
            other = min((name for name in theirs | ours if theirs.get(name) != ours.get(name)), default="")
            if other or state.get("frozen", frozen) != frozen:
                raise ValueError(f"it is a checkpoint of another policy, {other or 'the frozen weights'} differ")
            policy.model.load_state_dict(state["weights"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            step = int(state["step"])
        lines = (out / "metrics.jsonl").read_text().splitlines()[:step] if step else []
        if len(lines) < step:
            raise ValueError(f"metrics.jsonl has {len(lines)} lines only, the checkpoint is of step {step}")
    except (*FILE_ERRORS, EOFError, struct.error, zipfile.BadZipFile) as error:
        raise data.UserError(f"--resume: cannot go on from {file}: {reason(error)}") from error
    write_atomic(out / "metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())
    return step


def stop_on_signal() -> list:
    """Ctrl-C and SIGTERM ask for a stop after the current step: the returned list is then not empty."""
    asked: list = []

    def ask(number, _frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return asked


def peak_gb() -> float:
    """Peak memory in GB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def log(out: Path, metrics: dict) -> None:
    """Appends a line to metrics.jsonl. JSON knows no NaN and no infinity: null stands for both."""
    metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    with open(out / "metrics.jsonl", "a") as f:
        f.write(json.dumps(metrics) + "\n")


def update(optimizer: torch.optim.Optimizer, grad_clip: float, loss: float = 0.0) -> tuple[float, bool]:
    """An optimizer step, unless loss or gradient is not finite: (gradient norm before clipping, was it skipped?)."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, grad_clip).item()
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, not finite


def report_skipped(out: Path, episodes: list[Episode]) -> None:
    """Tells of the skipped update that was just logged. The tenth step in a row with one ends the run: UserError."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[-10:]]
    tqdm.write(f"step {rows[-1]['step']}: loss or gradient is not finite, update skipped")
    if len(rows) == 10 and all(row.get("skipped") for row in rows):
        batch = [{"token_ids": torch.from_numpy(e.token_ids), "assistant_mask": torch.from_numpy(e.assistant_mask),
                  "logprobs": torch.from_numpy(e.logprobs), "crops": [(crop.box, crop.source) for crop in e.crops],
                  "reward": e.reward, "stop": e.stop, "question": e.probe.question, "kind": e.probe.source,
                  "difficulty": e.probe.difficulty, "seed": e.probe.meta.get("seed")} for e in episodes]
        with data.replacing(out / "broken_batch.pt") as temporary:
            torch.save(batch, temporary)
        raise data.UserError(f"ten steps in a row without a finite loss and gradient; the batch of the last one is in "
                             f"{out / 'broken_batch.pt'}. Start again with a smaller --lr and another --out")


# ------------------------------------------------------------------------------------------------ training

def load_trainable(name: str, cfg: TrainFlags, **adam) -> tuple[Policy, torch.optim.Optimizer]:
    """The policy `name` as the flags ask for it, and AdamW with the settings `adam` on the weights that are trained.

    Without adapters the weights are float32: in bfloat16, steps as small as these learning rates are rounded away.
    UserError for 4 bits without adapters, which cannot be trained.
    """
    adapters = cfg.lora_rank or (Path(name) / "adapter_config.json").exists()
    if cfg.quantize and not adapters:
        raise data.UserError("--quantize: weights in 4 bits cannot be trained; add adapters, say --lora_rank 16")
    policy = load_policy(name, dtype=None if adapters else torch.float32, **policy_flags(cfg))
    if not cfg.train_vision:
        policy.base.model.visual.requires_grad_(False)
    if cfg.activation_checkpointing:
        policy.base.activation_checkpointing_enable({"use_reentrant": False})
    for part in ("forward", "get_image_features") if cfg.autocast else ():
        halved = torch.autocast(policy.device.type, torch.bfloat16)(getattr(policy.base.model, part))
        setattr(policy.base.model, part, halved)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    if cfg.adam_8bit:
        import bitsandbytes
    kind = bitsandbytes.optim.AdamW8bit if cfg.adam_8bit else torch.optim.AdamW
    return policy, kind(weights, **adam)


@memory_advice("--micro_tokens", "--max_turns", "--base")
def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    written = load_written(cfg)
    policy, optimizer = load_trainable(cfg.base, cfg, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=cfg.weight_decay)
    open_run(cfg, cfg.resume, policy.name)
    policy.model.train()
    start = load_run(cfg.out, policy, optimizer) if cfg.resume else 0
    stop = stop_on_signal()
    ended = time.time()
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="cold start")
    for step, episodes in zip(bar, drawn_ahead(cfg, policy, start, written)):
        began = time.time()
        torch.manual_seed(cfg.seed * 1_000_003 + step)             # for dropout: a resumed run draws the same

        denominator = sum(int(episode.assistant_mask.sum()) for episode in episodes)   # of the whole step, counted once
        loss = 0.0
        loss_of = lambda batch: (-token_logprobs(policy, batch).sum() / denominator, None)    # 0 off the assistant mask
        batches = micro_batches(episodes, cfg.micro_tokens, even=policy.device.type == "cpu")
        for part, _ in add_gradients(policy, loss_of, batches):
            loss += part

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        norm, skipped = update(optimizer, cfg.grad_clip, loss)

        warm_up = step < cfg.warmup_steps and not written
        metrics = {"step": step + 1, "phase": "warm-up" if warm_up else "search", "loss": loss, "grad_norm": norm,
                   "skipped": int(skipped), "lr": optimizer.param_groups[0]["lr"],
                   "tokens": denominator, "turns": sum(e.turns for e in episodes) / len(episodes),
                   "time/step": time.time() - began, "time/wait": began - ended, "memory_gb": peak_gb()}
        ended = time.time()
        log(cfg.out, metrics)
        if skipped:
            report_skipped(cfg.out, episodes)
        if step % 10 == 9:
            tqdm.write(f"step {step + 1:4d}  {metrics['phase']:7s}  loss {loss:.3f}  grad {norm:.2f}  "
                       f"turns {metrics['turns']:.1f}  {metrics['time/step']:.2f} s + {metrics['time/wait']:.2f} s "
                       "waiting for data")
        if stop or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_run(cfg.out, policy, optimizer, step + 1)
        if stop:
            tqdm.write(f"stopped after step {step + 1}; go on with: {go_on()}")
            return
    print(f"saved in {cfg.out}; next: python train_rl.py --init {cfg.out}")


# For one GPU of 24 GB; `paper`: full fine-tuning as published (3 epochs of 7,267 rows; batch 32 is ours, theirs was
# not stated), which needs far more memory.
QWEN3B = Config(base="Qwen/Qwen2.5-VL-3B-Instruct", lora_rank=16, lr=1e-4, steps=450, warmup_steps=0, batch=16,
                activation_checkpointing=True, train_vision=False, max_pixels=1_000_000, micro_tokens=8192)
PRESETS = {
    "tiny": Config(), "qwen3b": QWEN3B,
    "qwen7b": replace(QWEN3B, base="Qwen/Qwen2.5-VL-7B-Instruct", quantize="nf4", adam_8bit=True),
    "paper": replace(QWEN3B, base="Qwen/Qwen2.5-VL-7B-Instruct", lora_rank=0, autocast=True, lr=1e-5, steps=681,
                     lr_rise=68, lr_floor=0.0, batch=32, max_pixels=2_000_000, micro_tokens=32_768)}


if __name__ == "__main__":
    data.command(main, Config, PRESETS)
