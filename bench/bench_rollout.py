"""How much faster a rollout is than the obvious way: `generate` on the whole conversation, turn after turn.

Baseline: transformers' `generate` with its own cache and its own layers, batched, padded on the left, called
once per turn. Each turn reads the whole conversation again and encodes all of its images again. Both sides
say the same tokens, written searches of exactly so many turns. Both sample a token before the written one
takes its place. Same weights, alternating in one process, medians after a warm-up.

    prefill tokens   tokens read in forwards longer than one token, padding not counted
    ratio            seconds of the baseline / seconds of this side
    peak GB          of the GPU if there is one, else of this process, libraries and weights included

    $ python bench/bench_rollout.py                                     # about 10 minutes on two cores
    $ python bench/bench_rollout.py --turns 6 --batch 16 --repeats 2    # --base DIR: another policy than tiny
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, peak_gb

import numpy as np
import torch
from tqdm import tqdm
from transformers import LogitsProcessor

import rollout as rollout_module
from data import Probe, cell_box, cell_name, make_probe
from env import Crop, format_action
from model import OUR_ATTENTION, Policy, PolicyFlags, load_policy, policy_flags
from rollout import Episode, Wave, rollout


@dataclass(frozen=True)
class Config(PolicyFlags):
    base: str = "tiny"  # what load_policy takes; a random base: see random_bases.py
    turns: tuple[int, ...] = (6, 32)  # assistant messages per episode
    batch: tuple[int, ...] = (16, 64)  # episodes at once
    group_size: int = 8  # episodes per question
    repeats: int = 3  # runs of each side; a warm-up comes on top


def write_script(policy: Policy, number: int, turns: int) -> list[tuple[int, ...]]:
    """The messages of an episode as token ids: looks at one cell after the other, then an answer."""
    places = [divmod((look + 7 * number) % 36, 6) for look in range(turns - 1)]
    texts = [f"<think>try {cell_name(p)}</think>{format_action(Crop(cell_box(p, 6), 0))}" for p in places]
    return [policy.encode(text) for text in [*texts, "<think>read 4</think><answer>4</answer>"]]


# ------------------------------------------------------------------------------------------ the two sides


class SayScript(LogitsProcessor):
    """Makes `generate` say these tokens, a row each, and then end-of-turn."""

    def __init__(self, rows: list[tuple[int, ...]], prompt: int, end: int):
        self.rows, self.prompt, self.end = rows, prompt, end

    def __call__(self, input_ids, scores):
        at = input_ids.shape[1] - self.prompt
        allowed = [row[at] if at < len(row) else self.end for row in self.rows]
        allowed = torch.tensor(allowed, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, allowed, 0.0)


def play_with_generate(
    policy: Policy, probes: list[Probe], scripts: list, turns: int
) -> tuple[list[Episode], dict]:
    """One `generate` per turn over the whole of each conversation. Episodes, and what was read for them."""
    policy.model.eval()
    pad, counts = policy.tokenizer.pad_token_id, {"prefill": 0, "images": 0}
    episodes = [Episode(probe) for probe in probes for _ in range(len(scripts) // len(probes))]
    for episode in episodes:
        episode.begin(policy, policy.protocol.make_env(episode.probe, turns))
    views = [list(episode.new_views) for episode in episodes]
    for turn in range(turns):  # all scripts have as many messages
        said = [script[turn] for script in scripts]
        length = max(len(e.token_ids) for e in episodes)
        ids = [[pad] * (length - len(e.token_ids)) + e.token_ids for e in episodes]
        ids = torch.tensor(ids, device=policy.device)  # (B, T)
        shown = [view for row in views for view in row]
        inputs = {"attention_mask": (ids != pad).long(), **policy.process_views(shown)}
        inputs["mm_token_type_ids"] = (ids == policy.image_pad).int()
        say = SayScript(said, length, policy.im_end)
        options = {"logits_processor": [say], "max_new_tokens": max(map(len, said)), "do_sample": True}
        policy.base.set_attn_implementation("sdpa")  # the model as transformers makes it
        try:
            policy.base.generate(ids, **inputs, **options, eos_token_id=policy.im_end, pad_token_id=pad)
        finally:
            policy.base.set_attn_implementation(OUR_ATTENTION)
        counts["prefill"] += sum(len(e.token_ids) for e in episodes)
        counts["images"] += len(shown)
        for episode, message, row in zip(episodes, said, views):
            for token in message:
                episode.sample(policy, token, 0.0)
            episode.end_turn(policy, complete=True, max_context=1 << 30)
            row += episode.new_views
    return episodes, counts


def play_with_rollout(
    policy: Policy, probes: list[Probe], scripts: list, turns: int, compile: bool = False
) -> tuple[list[Episode], dict]:
    """The rollout as it is; only what is said is given: the random stream of a row yields its script."""
    counts = {"prefill": 0, "images": 0}
    sample, forward = rollout_module.sample_tokens, Wave.forward

    def open_stream(seed: str) -> SimpleNamespace:
        tokens = (token for message in scripts[int(seed.split("/")[-1])] for token in message)
        return SimpleNamespace(random=lambda: next(tokens))

    def say_script(logprobs, stream, temperature):
        sample(logprobs, [0.5] * len(stream), temperature)  # what it costs is part of the rollout
        tokens = np.array(stream, np.int64)  # 0 where a row waits
        index = torch.from_numpy(tokens).to(logprobs.device)[:, None]
        return tokens, logprobs.gather(1, index)[:, 0].tolist()

    def count(wave, ids, positions, real, features):
        counts["prefill"] += int(real.sum()) if ids.shape[1] > 1 else 0
        counts["images"] += len(features)
        return forward(wave, ids, positions, real, features)

    options = {"group_size": len(scripts) // len(probes), "wave_size": len(scripts), "max_turns": turns}
    given = {"random": SimpleNamespace(Random=open_stream), "sample_tokens": say_script}
    with mock.patch.multiple(rollout_module, **given), mock.patch.object(Wave, "forward", count):
        return rollout(policy, probes, **options, max_context=1 << 30, compile=compile), counts


COLUMNS = {"prefill": ",", "images": ",", "seconds": ".2f", "ratio": ".2f", "peak_gb": ".2f"}
SIDES = {"generate": play_with_generate, "rollout": play_with_rollout}


# ------------------------------------------------------------------------------------------ measuring


def reset_peak() -> None:
    """Peak memory of the GPU is counted from now. That of a process is counted from its start."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def time_call(call: Callable, *args, **kwargs) -> tuple[float, float, Any]:
    """Calls. (seconds, peak GB, what it returned)."""
    reset_peak()
    began = time.perf_counter()
    result = call(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, peak_gb(), result


def compare(
    policy: Policy, turns: int, batch: int, group_size: int, repeats: int, sides: dict[str, Callable] = SIDES
) -> list[dict]:
    """A row per side, `ratio` against the first of them. Where memory runs out, its numbers are None.

    first: seconds of the warm-up.
    """
    cell = 48 if policy.protocol.max_pixels < 100_000 else 170  # pixels; 170: a photograph of a megapixel
    questions = max(1, batch // group_size)
    probes = [make_probe("attribute", "hard", seed, cell=cell) for seed in range(questions)]
    scripts = [write_script(policy, number, turns) for number in range(batch)]
    runs: dict[str, list] = {side: [] for side in sides}
    for _ in tqdm(range(repeats + 1), desc=f"{turns} turns, {batch} episodes", leave=False):
        for side, play in sides.items():  # alternating
            try:
                seconds, peak, (_, counts) = time_call(play, policy, probes, scripts, turns)
                runs[side].append({"seconds": seconds, "peak_gb": peak, **counts})
            except torch.OutOfMemoryError:
                continue
    rows = []
    for side, (first, *measured) in ((side, runs[side] or [{}]) for side in sides):
        row = {"turns": turns, "episodes": batch, "side": side, **dict.fromkeys(COLUMNS)}
        if len(measured) == repeats:
            row |= first | {"first": first["seconds"]}
            row["seconds"] = statistics.median(run["seconds"] for run in measured)
            row["peak_gb"] = max(run["peak_gb"] for run in measured)
            other = rows[0]["seconds"] if rows else row["seconds"]
            row["ratio"] = other and other / row["seconds"]
        rows.append(row)
    return rows


def main(cfg: Config) -> None:
    torch.manual_seed(0)
    policy = load_policy(cfg.base, **policy_flags(cfg))
    place = torch.cuda.get_device_name() if policy.device.type == "cuda" else "CPU"
    print(f"{cfg.base} on {place}, {torch.get_num_threads()} threads, medians of {cfg.repeats}\n")
    print("| turns | episodes | side | prefill tokens | images encoded | seconds | ratio | peak GB |")
    print("|--:|--:|---|--:|--:|--:|--:|--:|")
    for turns, batch in itertools.product(cfg.turns, cfg.batch):
        for row in compare(policy, turns, batch, min(cfg.group_size, batch), cfg.repeats):
            cells = [str(row[key]) for key in ("turns", "episodes", "side")]
            cells += ["-" if row[key] is None else format(row[key], COLUMNS[key]) for key in COLUMNS]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    cli(main, Config)
