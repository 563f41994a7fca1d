"""All that is to be measured on a CUDA GPU, part by part, and one Markdown table of it for docs/.

    smoke     the default run (cold start, GRPO, evaluation); do log-probs of rollout and training agree?
    qwen3b    a base of true size with random weights, bf16, through SFT, GRPO and evaluation, by its preset
    qwen7b    the same in 4 bits
    rollout   rollout.py against `generate`, as in bench_rollout.py
    compile   rollouts with and without --compile

Each part runs in a process of its own, about 8 minutes at most, and writes its rows to --out as it goes. The
same command goes on where it stopped: finished parts are skipped. Memory that runs out costs one cell.

Random weights say nothing that is an action, so three things are arranged: the end of a turn is made likely
(in training, too, so that log-probs agree), every message but the last is taken for a crop, and every second
rollout is rewarded. Of two steps the second is measured. Tokens: all of the conversations, read or sampled.

    $ python bench/gpu.py                                 # 24 GB of random bases go to runs/bases
    $ python bench/gpu.py --only smoke rollout
    $ python bench/gpu.py --device cpu --toy              # toy sizes, nothing compiled: to see that it runs
"""

import functools
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

import torch

import eval as eval_script
import train_rl
import train_sft
from bench.bench_rollout import SIDES, compare, play_with_rollout, reset_peak, time_call
from bench.random_bases import save_base
from data import PROBE_KINDS, probe_stream
from env import Answer, Crop, CropEnv, format_action
from model import Policy, load_policy, token_logprobs
from rollout import rollout

# default, preset: what is changed in the default run, and in the presets. turn_tokens: sampled per turn, on
# average. pixels: of a view, with the presets and in the last two parts. rollouts: base, turns, episodes.
FULL = SimpleNamespace(probes=16, pixels=(1_000_000, 500_000), turn_tokens=50)
FULL.rollouts = (("tiny", 6, 64), ("tiny", 32, 64), ("qwen3b", 6, 16), ("qwen3b", 32, 4))
FULL.default = {"sft": {}, "rl": {}, "eval": {}}
FULL.preset = {"sft": {"steps": 2, "batch": 8}, "rl": {"steps": 2, "questions": 2}}
FULL.preset["eval"] = {"count": 1, "samples": 4, "shown": 1, "turn_limits": (32,)}
EASY = {"kinds": ("sign",), "difficulties": ("easy",)}
TOY = SimpleNamespace(probes=2, pixels=(3136, 3136), turn_tokens=3)
TOY.rollouts = (("tiny", 2, 2), ("qwen3b", 2, 2))
TOY.preset = {"sft": {"steps": 2, "warmup_steps": 0, "batch": 1, "max_turns": 4, **EASY}}
TOY.preset["rl"] = {"steps": 2, "questions": 2, "group_size": 2, "max_turns": 2, **EASY}
TOY.preset["eval"] = {"count": 1, "turn_limits": (2,)}
TOY.default = TOY.preset
COLUMNS = {"seconds": ".1f", "tokens_per_second": ",.0f", "ratio": ".2f", "peak_gb": ".1f", "note": ""}


@dataclass(frozen=True)
class Config:
    out: Path = Path("runs/gpu.json")  # results, by part
    bases: Path = Path("runs/bases")  # random bases; made where they are missing
    only: tuple[str, ...] = ()  # parts to run; default: all
    part: str | None = None  # runs this part in this process: the script calls itself so
    device: str = "cuda"
    toy: bool = False  # toy sizes
    limit_s: int = 900  # a part that takes longer is stopped


class Report:
    """The rows of one part, in the file as soon as they are known. A row of the same name is replaced."""

    def __init__(self, cfg: Config):
        self.cfg, self.rows = cfg, {}
        self.machine = torch.cuda.get_device_name() if cfg.device == "cuda" else "CPU"

    def add(self, what: str, **cells) -> None:
        self.rows[what] = cells
        self.write()

    def write(self, done: bool = False) -> None:
        part = {"machine": f"{self.machine}, torch {torch.__version__}", "done": done, "rows": self.rows}
        results = read_results(self.cfg.out) | {self.cfg.part: part}
        self.cfg.out.parent.mkdir(parents=True, exist_ok=True)
        common.write_atomic(self.cfg.out, json.dumps(results, indent=1).encode())

    def attempt(self, what: str, call: Callable, *args) -> bool:
        """Calls. False when memory runs out, which becomes the note of a row."""
        try:
            call(*args)
            return True
        except torch.OutOfMemoryError:
            self.add(what, note="out of memory")
            return False
        finally:
            gc.collect()


def read_results(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def find_base(cfg: Config, name: str) -> str:
    """The directory of a random base, made where it is missing. "tiny" is its own name."""
    if name == "tiny":
        return name
    name = "toy" if cfg.toy else name
    if not (cfg.bases / name).exists():
        save_base(name, cfg.bases / f".{name}", cfg.device)
        (cfg.bases / f".{name}").rename(cfg.bases / name)
        gc.collect()
    return str(cfg.bases / name)


# ------------------------------------------------------------------------------------------ the three scripts


def run_scripts(cfg: Config, report: Report, base: str, changes: dict, views: dict, folder: Path) -> Path:
    """Cold start, GRPO and evaluation; each starts from the last that succeeded. The trained policy."""
    preset, last = cfg.part if cfg.part in train_sft.PRESETS else "tiny", Path(base)
    for name, script in {"sft": train_sft, "rl": train_rl, "eval": eval_script}.items():
        start = {"base": base} if name == "sft" else {"init": last}
        options = {"out": folder / name, "device": cfg.device, **start, **changes[name], **views}
        what, config = f"{name}, whole script", replace(script.PRESETS[preset], **options)
        began = time.time()
        if report.attempt(what, script.main, config):
            peak = common.peak_gb() if preset == "tiny" else None
            report.add(what, seconds=time.time() - began, peak_gb=peak)
            last = last if name == "eval" else config.out
    return last


def measure_default_run(cfg: Config, sizes: SimpleNamespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trained = run_scripts(cfg, report, "tiny", sizes.default, {}, Path(folder))
        policy = load_policy(str(trained), device=cfg.device)
    probes = list(itertools.islice(probe_stream(PROBE_KINDS, ("hard",), 7), sizes.probes))
    episodes = rollout(policy, probes, group_size=4, max_turns=6, max_turn_tokens=48)
    with torch.no_grad():
        now = token_logprobs(policy, episodes)
    off = (now - train_rl.pad(episodes, "logprobs", policy.device)).abs().max()
    report.add("log-probs, rollout and training", note=f"differ by {off.item():.0e} at most")


def measure_base(cfg: Config, sizes: SimpleNamespace, report: Report) -> None:
    instrument(report, sizes.turn_tokens)
    views = {"min_pixels": sizes.pixels[0], "max_pixels": sizes.pixels[0]}
    with tempfile.TemporaryDirectory() as folder:
        run_scripts(cfg, report, find_base(cfg, cfg.part), sizes.preset, views, Path(folder))


class Talkative(CropEnv):
    """Takes every complete message for a crop, and the last one that is allowed for an answer."""

    def step(self, text: str) -> tuple[dict | None, str | None]:
        x = self.turn % 5 / 10
        last = self.turn + 1 == self.max_turns
        return super().step(format_action(Answer("4") if last else Crop((x, 0.2, x + 0.5, 0.7), 0)))


def instrument(report: Report, turn_tokens: int) -> None:
    """Puts the talkative world and the clock between the scripts and what they call."""
    log, tokens = common.log_metrics, 0

    def load_talkative(*args, **kwargs) -> Policy:
        policy = load_policy(*args, **kwargs)
        head = policy.base.get_output_embeddings().weight
        spread = head.norm(dim=1, dtype=torch.float32).mean().item()  # standard deviation of a logit
        policy.banned[policy.im_end] = math.log(len(head) / turn_tokens) + spread**2 / 2
        return policy

    def play(what: str, *args, **kwargs) -> list:
        seconds, peak, episodes = time_call(rollout, *args, **kwargs | {"env_class": Talkative})
        speed = sum(len(e.token_ids) for e in episodes) / seconds
        sampled = sum(int(e.assistant_mask.sum()) for e in episodes)
        note = f"{sampled / seconds:,.0f} sampled/s"
        report.add(what, seconds=seconds, tokens_per_second=speed, peak_gb=peak, note=note)
        for i, episode in enumerate(episodes):
            episode.reward = float(i % 2)
        reset_peak()
        return episodes

    def score(policy: Policy, episodes: list, *args) -> torch.Tensor:
        nonlocal tokens
        tokens += sum(len(e.token_ids) for e in episodes)
        return token_logprobs(policy, episodes, *args)

    def log_and_add(out: Path, metrics: dict) -> None:
        nonlocal tokens
        what, seconds = "sft, step", metrics["time/step"]
        if "time/rollout" in metrics:
            what, seconds = "rl, update", seconds - metrics["time/rollout"]
        report.add(what, seconds=seconds, tokens_per_second=tokens / seconds, peak_gb=common.peak_gb())
        tokens = 0
        reset_peak()
        log(out, metrics)

    train_sft.load_policy = train_rl.load_policy = eval_script.load_policy = load_talkative
    train_rl.rollout = functools.partial(play, "rl, rollout")
    eval_script.rollout = functools.partial(play, "eval, rollout")
    train_sft.token_logprobs = train_rl.token_logprobs = score
    common.log_metrics = log_and_add


# ------------------------------------------------------------------------------------------ rollouts


def measure_sides(cfg: Config, sizes: SimpleNamespace, report: Report, sides: dict[str, Callable]) -> None:
    def measure(what: str, base: str, turns: int, batch: int) -> None:
        views = {} if base == "tiny" else dict.fromkeys(("min_pixels", "max_pixels"), sizes.pixels[1])
        policy = load_policy(find_base(cfg, base), device=cfg.device, **views)
        for row in compare(policy, turns, batch, min(8, batch), 1, sides):
            note = "out of memory"
            if row["seconds"]:
                note = f"{row['prefill']:,} prefill tokens; first run {row['first']:.1f} s"
            cells = {key: row[key] for key in ("seconds", "ratio", "peak_gb")}
            report.add(f"{what}: {row['side']}", **cells, note=note)

    for base, turns, batch in sizes.rollouts:
        what = f"{base}, {turns} turns, {batch} episodes"
        report.attempt(what, measure, what, base, turns, batch)


# ------------------------------------------------------------------------------------------ the command


COMPILED = {"plain": play_with_rollout, "--compile": functools.partial(play_with_rollout, compile=True)}
PARTS = {"smoke": measure_default_run, "qwen3b": measure_base, "qwen7b": measure_base}
PARTS["rollout"] = functools.partial(measure_sides, sides=SIDES)
PARTS["compile"] = functools.partial(measure_sides, sides=COMPILED)


def print_table(results: dict) -> None:
    machines = sorted({part["machine"] for part in results.values()})
    print(f"{'; '.join(machines)}\n\n| part | what | s | tokens/s | ratio | peak GB | note |")
    print("|---|---|--:|--:|--:|--:|---|")
    for name in filter(results.get, PARTS):
        part = results[name]
        unfinished = {} if part["done"] else {"stopped here": {"note": "run the command again"}}
        for what, row in (part["rows"] | unfinished).items():
            cells = ["" if row.get(key) is None else format(row[key], COLUMNS[key]) for key in COLUMNS]
            print(f"| {name} | {what} | {' | '.join(cells)} |")


def main(cfg: Config) -> None:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing measured")
        return
    if cfg.part:
        report = Report(cfg)
        PARTS[cfg.part](cfg, TOY if cfg.toy else FULL, report)
        report.write(done=True)
        return
    environment = os.environ | ({"TORCHDYNAMO_DISABLE": "1"} if cfg.toy else {})  # a compiler takes its time
    for name in cfg.only or PARTS:
        if read_results(cfg.out).get(name, {}).get("done"):
            print(f"{name}: done before")
            continue
        began = time.time()
        try:
            command = [sys.executable, *sys.argv, "--part", name]
            code = subprocess.run(command, timeout=cfg.limit_s, env=environment).returncode
        except subprocess.TimeoutExpired:
            code = f"longer than {cfg.limit_s} s"
        print(f"{name}: {time.time() - began:.0f} s" + (f", failed ({code})" if code else ""), flush=True)
    print_table(read_results(cfg.out))


if __name__ == "__main__":
    common.cli(main, Config)
