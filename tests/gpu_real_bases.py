"""Peak memory and speed of SFT, RL and evaluation on bases of the true shapes with random weights, on a CUDA GPU.

    $ python tests/gpu_real_bases.py                                   # random:qwen3b in bf16, random:qwen7b in nf4
    $ python tests/gpu_real_bases.py --base DIR --device cpu --pixels 12544 --turn_tokens 5      # any base, anywhere

The real scripts with their presets, two steps each, in a temporary folder; prints a Markdown table. Random weights say
nothing that is an action, so three things are put in their mouth: the end of a turn is made likely (in training, too,
so that log-probs agree), every message but the last is taken for a crop, and every second episode is rewarded.
Without a GPU it says so and exits 0.
"""

import dataclasses
import gc
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval as eval_script  # noqa: E402  (after the path)
import train_rl  # noqa: E402
import train_sft  # noqa: E402
from env import Answer, Crop, CropEnv, format_action  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    presets: tuple[str, ...] = ("qwen3b", "qwen7b")
    base: str | None = None  # in place of random:PRESET
    device: str = "cuda"
    pixels: int = 1_000_000  # of each view
    turns: int = 6  # in RL
    group_size: int = 8  # in RL
    eval_turns: int = 32
    turn_tokens: int = 100  # sampled per turn, on average


class Talkative(CropEnv):
    """Takes every complete message for a crop, and the last one that is allowed for an answer."""

    def step(self, text: str):
        number = sum(map(ord, text)) + self.turn
        x, y, source = number % 5 / 10, number % 7 / 10, number % len(self.observations)
        last = self.turn + 1 == self.max_turns
        return super().step(format_action(Answer("4") if last else Crop((x, y, x + 0.5, y + 0.3), source)))


class Phases:
    """Seconds, tokens of the conversations, those of them that were sampled, and peak memory, by phase."""

    def __init__(self):
        self.rows: dict[str, list[float]] = {}
        self.name, self.began = "", 0.0

    def enter(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        row = self.rows.setdefault(self.name, [0.0, 0, 0, 0.0])
        row[0], row[3] = row[0] + time.time() - self.began, max(row[3], train_sft.peak_gb())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.name, self.began = name, time.time()
        self.rows.setdefault(name, [0.0, 0, 0, 0.0])

    def count(self, episodes: list) -> None:
        self.rows[self.name][1] += sum(len(e.token_ids) for e in episodes)
        self.rows[self.name][2] += sum(int(e.assistant_mask.sum()) for e in episodes if self.name != "SFT")


def instrument(cfg: Config, phases: Phases) -> None:
    """Puts the talkative world and the clock between the scripts and what they call."""
    load, play, logprobs = train_sft.load_policy, train_rl.rollout, train_sft.token_logprobs

    def loaded(*args, **kwargs):
        policy = load(*args, **kwargs)
        head = policy.base.get_output_embeddings().weight
        spread = float(head.float().norm(dim=1).mean())  # standard deviation of a logit
        policy.banned[policy.im_end] = math.log(len(head) / cfg.turn_tokens) + spread**2 / 2
        return policy

    def played(*args, **kwargs):
        after = phases.name.replace("RL load", "RL update")
        phases.enter("RL rollout" if "RL" in phases.name else "evaluation")
        episodes = play(*args, **{**kwargs, "make_env": Talkative})
        for i, episode in enumerate(episodes):
            episode.reward = float(i % 2)
        phases.count(episodes)
        phases.enter(after)
        return episodes

    def scored(policy, episodes, *args, **kwargs):
        if phases.name == "SFT load":
            phases.enter("SFT")
        phases.count(episodes)
        return logprobs(policy, episodes, *args, **kwargs)

    train_sft.load_policy = eval_script.load_policy = loaded
    train_rl.rollout = eval_script.rollout = played
    train_sft.token_logprobs = train_rl.token_logprobs = scored


def measure(cfg: Config, preset: str, folder: Path, phases: Phases) -> None:
    views = dict(device=cfg.device, min_pixels=cfg.pixels, max_pixels=cfg.pixels)
    length = 10 * cfg.turn_tokens
    phases.enter("SFT load")
    sft = dataclasses.replace(
        train_sft.PRESETS[preset],
        base=cfg.base or f"random:{preset}",
        out=folder / "sft",
        steps=2,
        batch=4,
        max_turns=cfg.turns,
        **views,
    )
    train_sft.main(sft)
    phases.enter("RL load")
    train_rl.main(
        dataclasses.replace(
            train_rl.PRESETS[preset],
            init=sft.out,
            out=folder / "rl",
            steps=2,
            questions=2,
            updates=1,
            max_turns=cfg.turns,
            group_size=cfg.group_size,
            max_turn_tokens=length,
            **views,
        )
    )
    phases.enter("evaluation load")
    slots = eval_script.PRESETS[preset].slots
    eval_script.main(
        eval_script.Config(
            init=folder / "rl",
            out=folder / "eval",
            count=1,
            samples=slots,
            slots=slots,
            turn_limits=(cfg.eval_turns,),
            quantize=sft.quantize,
            max_context=1 << 17,
            max_turn_tokens=length,
            shown=1,
            device=cfg.device,
            max_pixels=(cfg.pixels,),
        )
    )
    phases.enter("end")


def main(cfg: Config) -> None:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing measured")
        return
    phases, table = Phases(), []
    instrument(cfg, phases)
    for preset in cfg.presets:
        phases.rows.clear()
        with tempfile.TemporaryDirectory() as folder:
            measure(cfg, preset, Path(folder), phases)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for name, (seconds, tokens, sampled, peak) in phases.rows.items():
            if tokens:
                name = f"{cfg.base or f'random:{preset}'}, {train_sft.PRESETS[preset].quantize or 'bf16'}, {name}"
                table.append(
                    f"| {name} | {peak:.1f} | {tokens / seconds:,.0f} | {sampled / seconds:,.0f} | {seconds:.1f} |"
                )
    machine = torch.cuda.get_device_name() if cfg.device == "cuda" else f"{platform.machine()} CPU"
    print(
        f"\n{machine}, torch {torch.__version__}; views of {cfg.pixels:,} pixels, {cfg.turns} turns in training, "
        f"{cfg.eval_turns} in evaluation, groups of {cfg.group_size}\n"
    )
    print("| base, type, phase | peak GB | tokens/s | sampled tokens/s | s |\n|---|--:|--:|--:|--:|")
    print("\n".join(table))


if __name__ == "__main__":
    main(tyro.cli(Config))
