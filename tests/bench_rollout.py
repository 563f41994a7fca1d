"""How much faster rollouts are than what one would write first: `generate` on the whole conversation, turn after turn.

Baseline: transformers' `generate` with its own KV cache and its own layers, batched, left-padded, once per turn; every
turn encodes all images again and reads all tokens again. Both sides say the same tokens, drawn searches of exactly so
many turns, with the same weights, alternating in one process: medians after a warm-up. "of the roofline": what the
one-token steps must read (the weights of the language model once, the keys and values of each row), at the rate of a
copy measured in the same run, over the time that they take.

    $ python tests/bench_rollout.py                                   # tiny; with CUDA also random:qwen3b and :qwen7b
    $ python tests/bench_rollout.py --bases tiny --turns 6 --batch 16 --repeats 3
"""

import itertools
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

import data
import rollout as rollout_module
from env import Crop, CropEnv, format_action
from model import OUR_ATTENTION, PatchProduct, Policy, PolicyFlags, load_policy, policy_flags
from rollout import Row, Transcript, rollout


@dataclass(frozen=True)
class Config(PolicyFlags):
    bases: tuple[str, ...] = (
        "tiny",
        "random:qwen3b",
        "random:qwen7b",
    )  # without CUDA: only those that are not random:
    turns: tuple[int, ...] = (6, 32)  # assistant messages per episode
    batch: tuple[int, ...] = (16, 64)  # episodes at once, in groups of 8
    pixels: tuple[int, ...] = (
        1_000_000,
        500_000,
    )  # of each view of a base that is not tiny, for each of `turns`
    repeats: int = 5  # runs of each side; the first, a warm-up, comes on top
    group_size: int = 8  # G


def scripts(policy: Policy, count: int, turns: int) -> list[list[int]]:
    """Per episode the ids of all its messages: looks at one cell after the other, an answer at last; no two alike."""
    said = []
    for episode in range(count):
        cells = [((i + 7 * episode) % 36 % 6, (i + 7 * episode) % 36 // 6) for i in range(turns - 1)]
        texts = [
            f"<think>next {data.cell_name(cell)}</think>{format_action(Crop(data.cell_box(cell, 6), 0))}"
            for cell in cells
        ] + ["<think>read 4</think><answer>4</answer>"]
        said.append([token for text in texts for token in [*policy.encode(text), policy.im_end]])
    return said


class Forced(LogitsProcessor):
    """`generate` says what it is told to."""

    def __init__(self, tokens: list[list[int]], prompt: int, end: int):
        self.tokens, self.prompt, self.end = tokens, prompt, end

    def __call__(self, input_ids, scores):
        at = input_ids.shape[1] - self.prompt
        forced = torch.full_like(scores, float("-inf"))
        for row, tokens in enumerate(self.tokens):
            forced[row, tokens[at] if at < len(tokens) else self.end] = 0.0
        return forced


@contextmanager
def plain(policy: Policy):
    """The model as transformers makes it, without the layers that we replaced."""
    layer = policy.base.model.visual.patch_embed.proj
    policy.base.set_attn_implementation("sdpa")
    layer.__class__ = torch.nn.Conv3d
    try:
        yield
    finally:
        policy.base.set_attn_implementation(OUR_ATTENTION)
        layer.__class__ = PatchProduct


@torch.no_grad()
def baseline(
    policy: Policy, probes: list[data.Probe], said: list[list[int]], group_size: int, turns: int
) -> dict:
    """One `generate` per turn over everything so far; finished episodes leave the batch."""
    probes = [probe for probe in probes for _ in range(group_size)]
    live = [
        (Transcript(policy, probe, turns, None, CropEnv), iter(tokens)) for probe, tokens in zip(probes, said)
    ]
    views = [list(transcript.new_views) for transcript, _ in live]
    count = {"prefill tokens": 0, "images encoded": 0, "tokens": 0}
    model, pad = policy.base, policy.tokenizer.pad_token_id
    while live:
        length = max(len(t.ids) for t, _ in live)
        ids = torch.tensor([[pad] * (length - len(t.ids)) + t.ids for t, _ in live], device=policy.device)
        turn = [
            list(itertools.takewhile(lambda token: token != policy.im_end, tokens)) + [policy.im_end]
            for _, tokens in live
        ]
        pixels = policy.pixels([view for shown in views for view in shown])
        with plain(policy):
            model.generate(
                input_ids=ids,
                attention_mask=(ids != pad).long(),
                **pixels,
                mm_token_type_ids=(ids == policy.image_pad).int(),
                logits_processor=LogitsProcessorList([Forced(turn, length, policy.im_end)]),
                do_sample=False,
                max_new_tokens=max(map(len, turn)),
                eos_token_id=policy.im_end,
                pad_token_id=pad,
            )
        count["prefill tokens"] += sum(len(t.ids) for t, _ in live)
        count["images encoded"] += sum(map(len, views))
        count["tokens"] += sum(map(len, turn))
        going = []
        for (transcript, tokens), new, shown in zip(live, turn, views):
            for token in new:
                transcript.sample(token, 0.0)
            if transcript.end_turn(True, 1 << 30):
                going.append(((transcript, tokens), shown + transcript.new_views))
        live, views = [pair for pair, _ in going], [shown for _, shown in going]
    return count


def ours(
    policy: Policy, probes: list[data.Probe], said: list[list[int]], group_size: int, turns: int
) -> dict:
    """The rollout as it is; only what is sampled is given."""
    count = {"prefill tokens": 0, "images encoded": 0, "tokens": sum(map(len, said)), "decode": []}
    weights = model_bytes(policy)

    class Told(Row):
        def __init__(self, index, *rest):
            super().__init__(index, *rest)
            tokens = iter(said[index])
            self.random.random = lambda: next(tokens)

    def take(logprobs, tokens, temperature):
        return tokens, logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[
            :, 0
        ].tolist()

    class Timed(rollout_module.Decoder):
        def __call__(self, ids, positions, starts):
            row = sum(
                layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in self.cache.layers
            )
            began = now(policy)
            hidden = super().__call__(ids, positions, starts)
            count["decode"].append((weights + sum(start + 1 for start in starts) * row, began, now(policy)))
            return hidden

    features, positions = policy.image_features, rollout_module.mrope_positions
    replaced = {"Row": Told, "Decoder": Timed, "_sample": take}
    kept = {name: getattr(rollout_module, name) for name in [*replaced, "mrope_positions"]}

    def seen(views):
        count["images encoded"] += len(views)
        return features(views)

    def placed(ids, *rest):
        count["prefill tokens"] += len(ids) * (len(ids) > 1)
        return positions(ids, *rest)

    vars(rollout_module).update(replaced, mrope_positions=placed)
    policy.image_features = seen
    try:
        rollout(policy, probes, group_size=group_size, max_turns=turns, slots=len(said))
    finally:
        vars(rollout_module).update(kept)
        del policy.image_features
    return count


def model_bytes(policy: Policy) -> int:
    """Bytes of the weights that a one-token step reads: those of the language model, without its head."""
    return sum(p.nbytes for p in policy.base.model.language_model.layers.parameters())


def now(policy: Policy):
    """A point in time, on the GPU an event: nothing waits for it."""
    if policy.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(began, ended) -> float:
    """Seconds."""
    return ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1000


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes, the best of five."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, best = torch.zeros_like(source), 0.0
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def reset_peak(policy: Policy) -> None:
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts again from now


def peak_gb(policy: Policy) -> str:
    """Most memory since reset_peak: of the GPU, or of this process (weights and libraries included)."""
    if policy.device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
    status = Path("/proc/self/status")
    found = (
        [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line]
        if status.exists()
        else []
    )
    return f"{int(found[0]) * 1024 / 1e9:.2f}" if found else "not measured"


def timed(side, policy: Policy, *args) -> tuple[float, str, dict]:
    """(seconds, peak GB, counts)."""
    reset_peak(policy)
    began = time.perf_counter()
    count = side(policy, *args)
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, peak_gb(policy), count


def rows(cfg: Config, base: str, turns: int, pixels: int, batch: int) -> None:
    """The two lines of the table for one setting."""
    torch.manual_seed(0)
    tiny = base == "tiny"
    size = {} if tiny else {"min_pixels": pixels, "max_pixels": pixels}
    policy = load_policy(
        base, **policy_flags(cfg) | size | {"quantize": "nf4" if "7b" in base else cfg.quantize}
    )
    probes = [
        data.make_probe("attribute", "hard", seed, cell=48 if tiny else 170)
        for seed in range(batch // cfg.group_size)
    ]
    said = scripts(policy, batch, turns)
    runs: dict = {baseline: [], ours: []}
    for repeat in tqdm(range(cfg.repeats + 1), desc=f"{base}, {turns} turns, batch {batch}", leave=False):
        for side in runs:  # alternating
            try:
                run = timed(side, policy, probes, said, cfg.group_size, turns)
            except torch.OutOfMemoryError:
                run = (float("nan"), "out of memory", None)
            runs[side] += [run] if repeat else []  # the first is a warm-up
    median = {side: statistics.median(seconds for seconds, _, _ in runs[side]) for side in runs}
    for side in runs:
        seconds, (_, peak, count) = median[side], runs[side][0]
        cells = ["", "", "", ""]
        if count:
            cells = [
                f"{count['prefill tokens']:,}",
                f"{count['images encoded']:,}",
                f"{count['tokens'] / seconds:,.0f}",
                "",
            ]
            if side is ours:
                spent = sum(between(began, ended) for _, began, ended in count["decode"])
                cells[3] = (
                    f"{sum(read for read, *_ in count['decode']) / spent / copy_rate(policy.device):.0%}"
                )
        print(
            f"| {base} | {turns} | {batch} | {side.__name__} | {' | '.join(cells)} | {batch / seconds:.2f} | {seconds:.2f} | "
            f"{median[baseline] / seconds:.1f} | {peak} |",
            flush=True,
        )


def main(cfg: Config) -> None:
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    print(
        f"{torch.cuda.get_device_name() if cuda else 'CPU'}, {torch.get_num_threads()} threads, medians of {cfg.repeats} "
        f"runs{'' if cuda else '; random bases, and CUDA: not measured'}\n"
    )
    print(
        "| base | turns | batch | side | prefill tokens | images encoded | decode tokens/s | of the roofline | episodes/s | "
        "seconds | ratio | peak GB |"
    )
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for base in cfg.bases:
        for (turns, pixels), batch in itertools.product(
            zip(cfg.turns, itertools.cycle(cfg.pixels)), cfg.batch
        ):
            if cuda or not base.startswith("random:"):
                rows(cfg, base, turns, pixels, batch)


if __name__ == "__main__":
    data.command(main, Config)
