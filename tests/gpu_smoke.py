"""Runs the whole default chain on a CUDA GPU, in a temporary folder, and prints the time of each part.

    $ python tests/gpu_smoke.py            # the full default run; --steps 5 for a quick look

Also compares log-probs of rollout and training on the GPU. Without a GPU it says so and exits 0.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Config:
    steps: int | None = None  # of SFT and of RL; default: the full default run
    count: int = 400  # probes in the evaluation


def timed(name: str, *command: str) -> None:
    began = time.time()
    subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:], "--device", "cuda"], check=True, cwd=ROOT
    )
    print(f"{name:10s} {time.time() - began:7.1f} s", flush=True)


def agreement(directory: Path) -> float:
    """Largest |log-prob in rollout - log-prob in training| over 64 episodes of 6 turns."""
    import data
    from model import load_policy, token_logprobs
    from rollout import rollout

    policy = load_policy(str(directory), device="cuda")
    stream = data.probe_stream(data.PROBE_KINDS, ("hard",), 7)
    episodes = rollout(
        policy, [next(stream) for _ in range(16)], group_size=4, max_turns=6, max_turn_tokens=64
    )
    with torch.no_grad():
        now = token_logprobs(policy, episodes).cpu()
    return max(
        float((now[i, : len(e.logprobs)] - torch.from_numpy(e.logprobs)).abs().max())
        for i, e in enumerate(episodes)
    )


def main(cfg: Config) -> None:
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing measured")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    steps = ["--steps", str(cfg.steps)] if cfg.steps else []
    warmup = ["--warmup_steps", "1"] if cfg.steps else []
    with tempfile.TemporaryDirectory() as folder:
        sft, rl, result = (str(Path(folder) / name) for name in ("sft", "rl", "eval"))
        began = time.time()
        timed("cold start", "train_sft.py", "--out", sft, *steps, *warmup)
        timed("GRPO", "train_rl.py", "--init", sft, "--out", rl, *steps)
        timed("evaluation", "eval.py", "--init", rl, "--out", result, "--count", str(cfg.count))
        print(f"{'in all':10s} {time.time() - began:7.1f} s")
        print(f"largest |log-prob in rollout - log-prob in training|: {agreement(Path(rl)):.1e}")


if __name__ == "__main__":
    main(tyro.cli(Config))
