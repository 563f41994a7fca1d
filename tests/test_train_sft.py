"""Tests of train_sft.py: the loss by a naive loop, the batches, the schedule, stops and resumed runs.

Lines worth flipping, each with the test that then fails:
    main            divide by the tokens of a micro-batch     -> micro_batches_change_nothing
    token_logprobs  train what the environment wrote          -> the_loss_is_the_cross_entropy_of_...
    draw_batch      seed without the step                     -> a_batch_depends_on_the_seed_and_...
    draw_batch      no cut at max_turns                       -> written_searches_come_once_per_epoch_...
    learning_rate   cosine from step 0                        -> the_rate_rises_is_held_and_falls_...
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import load_weights_of, noise, read_lines, run_main, same_weights, without_times

import train_sft
from data import PROBE_KINDS, Probe, make_probe, make_scene, save_probes, write_search
from env import Crop, format_action
from model import load_policy, mrope_positions, token_logprobs
from train_sft import Config, draw_batch, learning_rate, load_batches

ROOT = Path(train_sft.__file__).parent
LOOK = format_action(Crop((0.0, 0.0, 0.5, 0.5), 0))
SMALL = {"steps": 4, "warmup_steps": 2, "warmup_looks": 3, "warmup_plans": 1, "batch": 2, "save_every": 2}


def small(out, **changes) -> Config:
    return Config(out=Path(out), device="cpu", **SMALL | changes)


def flags(out: Path, **changes) -> list[str]:
    """The same as words of a command."""
    return [f"--{key}={value}" for key, value in (SMALL | {"out": out, "device": "cpu"} | changes).items()]


@pytest.fixture(scope="module")
def batches(policy):
    return [draw_batch(small("x"), policy, step, []) for step in (0, 2)]


# ---------------------------------------------------------------------------------------------- the loss


def naive_loss(policy, episodes) -> torch.Tensor:
    """Cross-entropy over assistant tokens, row by row, with the logits of transformers' own forward."""
    total, count = 0.0, 0
    for episode in episodes:
        pixels = policy.process_views(episode.views())
        grids = pixels["image_grid_thw"].tolist()
        ids = torch.from_numpy(episode.token_ids)
        positions, _ = mrope_positions(episode.token_ids, grids, policy.image_pad, policy.merge)
        where = torch.from_numpy(positions)[:, None]
        logits = policy.base(input_ids=ids[None], position_ids=where, **pixels).logits
        logits = logits[0].float() + policy.banned
        for place in range(1, len(ids)):
            if episode.assistant_mask[place]:
                total = total + F.cross_entropy(logits[place - 1], ids[place])
                count += 1
    return total / count


def gradients(policy, loss) -> list[torch.Tensor]:
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    return torch.autograd.grad(loss, weights, allow_unused=True)


def test_the_loss_is_the_cross_entropy_of_assistant_tokens_and_nothing_else(policy, batches):
    for episodes in batches:
        tokens = sum(int(e.assistant_mask.sum()) for e in episodes)
        ours, theirs = -token_logprobs(policy, episodes).sum() / tokens, naive_loss(policy, episodes)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        for one, other in zip(gradients(policy, ours), gradients(policy, theirs)):
            if other is not None:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_micro_batches_change_nothing(tmp_path):
    """The denominator is of the whole step, whatever the batches; the token budget only changes memory."""
    for budget in (10_000, 100):
        train_sft.main(small(tmp_path / str(budget), steps=2, micro_tokens=budget))
    one, other = (read_lines(tmp_path / name) for name in ("10000", "100"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-3)
    assert one[0]["grad_norm"] == pytest.approx(other[0]["grad_norm"], rel=1e-3)


def test_only_what_the_searcher_said_is_trained(policy, batches):
    for episode in [e for batch in batches for e in batch]:
        said = policy.decode(episode.token_ids[episode.assistant_mask])
        assert said == "".join(episode.texts) and "Observation" not in said


# ---------------------------------------------------------------------------------------------- the batches


def ids(batch) -> list[list[int]]:
    return [e.token_ids.tolist() for e in batch]


def test_a_batch_depends_on_the_seed_and_the_step_alone(policy, batches):
    again = [ids(draw_batch(small("y"), policy, step, [])) for step in (2, 0)][::-1]
    assert again == [ids(batch) for batch in batches]
    others = [draw_batch(small("x", seed=1), policy, 2, []), draw_batch(small("x"), policy, 3, [])]
    assert all(ids(other) != ids(batches[1]) for other in others)


def test_the_warm_up_has_looks_and_plans_and_then_come_searches_that_end_right(policy, batches):
    warm_up, searches = batches
    assert [e.turns for e in warm_up[:3]] == [2, 2, 2] and len(warm_up) == 5
    assert all(e.crops and len(e.views()) == len(e.crops) for e in warm_up[:3])  # one view: that of the crop
    assert all(e.texts[0].startswith("<think>plates") for e in warm_up[3:])
    assert len(warm_up[3].texts) == 1 and len(warm_up[4].texts) <= 4
    draw_batch(small("x", regions=3, candidates=48), policy, 0, [])  # more plates than a region has cells
    assert len(searches) == 2 and all(e.stop == "answer" and e.reward == 1.0 for e in searches)


def test_batches_drawn_in_another_process_are_those_drawn_here(policy):
    drawn = list(load_batches(small("x"), policy, 1, []))
    assert len(drawn) == 3
    for step, batch in enumerate(drawn, 1):
        here = draw_batch(small("x"), policy, step, [])
        assert ids(batch) == ids(here) and all(e.probe.image is None for e in batch)
        for one, other in zip(batch, here):
            assert [v.tobytes() for v in one.views()] == [v.tobytes() for v in other.views()]


def write_set(folder: Path, count: int, turns: int = 3) -> Path:
    texts = [LOOK] * (turns - 1) + ["<answer>4</answer>"]
    pictures = [noise(64, 64, i) for i in range(count)]
    meta = {"texts": texts}
    save_probes([Probe(p, f"Question {i}?", "4", meta=meta) for i, p in enumerate(pictures)], folder)
    return folder


def test_written_searches_come_once_per_epoch_and_are_cut(policy, tmp_path):
    cfg = small("x", data=write_set(tmp_path / "set", 5), max_turns=2)
    written = train_sft.load_searches(cfg)
    episodes = [e for step in range(5) for e in draw_batch(cfg, policy, step, written)]  # two epochs of five
    epochs = [[e.probe.question for e in episodes[i : i + 5]] for i in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"Question {i}?" for i in range(5)]
    assert epochs[0] != epochs[1]
    assert {e.turns for e in episodes} == {2} and {e.stop for e in episodes} == {"turn_limit"}


def test_a_set_of_questions_without_searches_is_refused(tmp_path, monkeypatch):
    save_probes([make_probe("sign", "easy", 0)], tmp_path / "set")
    code, _, err = run_main(monkeypatch, "train_sft", "--data", tmp_path / "set", "--out", tmp_path / "run")
    assert code == 2 and "holds questions without searches" in err[-1] and not (tmp_path / "run").exists()


def test_the_rate_rises_is_held_and_falls_to_its_floor_by_hand():
    """Peak 1, 4 steps of rise, held to step 10, then a cosine over 10 steps down to a tenth."""
    cfg = Config(lr=1.0, lr_rise=4, warmup_steps=10, steps=20, lr_floor=0.1)
    assert [learning_rate(cfg, step) for step in (0, 1, 3, 4, 10)] == pytest.approx([0.25, 0.5, 1, 1, 1])
    assert [learning_rate(cfg, step) for step in (15, 20)] == pytest.approx([0.55, 0.1])
    assert learning_rate(replace(cfg, data=Path("set")), 10) == pytest.approx(0.55)  # no warm-up there


# ---------------------------------------------------------------------------------------------- runs


def test_a_run_is_saved_in_the_hugging_face_layout_and_described(tmp_path, monkeypatch):
    code, out, err = run_main(monkeypatch, "train_sft", *flags(tmp_path))
    assert code == 0 and f"python train_rl.py --init {tmp_path}" in out[-1]
    rows = read_lines(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["phase"] for row in rows] == ["warm-up", "warm-up", "search", "search"]
    assert json.loads((tmp_path / "run.json").read_text())["config"]["batch"] == 2
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(load_policy("tiny", device="cpu").tokenizer)
    saved, trained = dict(model.named_parameters()), load_weights_of(tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in trained.items())


def start(out: Path, *words: str) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, ROOT / "train_sft.py", *flags(out, steps=24), *words]
    return subprocess.Popen(command, **options)


def wait_for_step(out: Path, step: int) -> None:
    for _ in range(1200):
        if (out / "metrics.jsonl").exists() and len(read_lines(out)) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} never came")


def processes_of(out: Path) -> list[str]:
    """What is at work for a run directory, by its command line (Linux)."""
    search = ["grep", "-sal", f"out={out}", "/dev/null", *Path("/proc").glob("[0-9]*/cmdline")]
    return subprocess.run(search, capture_output=True, text=True).stdout.split()


def test_a_run_that_is_killed_or_stopped_ends_as_one_that_was_not(tmp_path, monkeypatch):
    """kill -9 in the middle, then Ctrl-C after the step, then to the end: as a straight run, bit for bit."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    first = start(broken)
    wait_for_step(broken, 5)
    first.kill()
    first.wait()
    second = start(broken, "--resume")
    wait_for_step(broken, 7)
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0 and "--resume" in out + err and len(read_lines(broken)) < 24
    for words in (flags(straight, steps=24), [*flags(broken, steps=24), "--resume"]):
        assert run_main(monkeypatch, "train_sft", *words)[0] == 0
    assert without_times(read_lines(straight)) == without_times(read_lines(broken))
    assert same_weights(load_weights_of(straight), load_weights_of(broken))
    assert not processes_of(broken)  # the data worker of the killed run has ended too


def test_a_search_of_the_scripted_searcher_fits_the_vocabulary_of_the_tiny_policy(policy):
    """Phrases are single tokens, so a message takes about twenty, and a list of plates one for each."""
    for kind, regions in itertools.product(PROBE_KINDS, (1, 3)):
        scene = make_scene(kind, "hard", 3, regions=regions)
        texts = write_search(scene, random.Random(0), pattern="depth_first")
        assert all(len(policy.encode(text)) <= 24 + text.count(" ") - 3 for text in texts)
