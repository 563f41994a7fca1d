"""Tests of train_sft.py: what is trained, what a batch depends on, runs that are stopped, killed and resumed.

MUTATIONS
"""

import inspect
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import common

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import load_weights_of, noise, read_lines, run_main, same_weights, without_times

import data
import train_sft
from data import Probe, WarmUpEnv
from env import Crop, fit_pixels, format_action
from model import load_policy, mrope_positions
from train_sft import Config, draw_batch, learning_rate, load_batches, load_searches

ROOT = Path(train_sft.__file__).parent
LOOK, ANSWER = format_action(Crop((0.0, 0.0, 0.5, 0.5), 0)), "<think>read</think><answer>4</answer>"
SEARCHES = [[LOOK, ANSWER], [LOOK] * 4 + [ANSWER], [LOOK, LOOK], ["no action", ANSWER], [ANSWER]]


def small(out, **changes) -> Config:
    """Two steps of warm-up, then two-message searches."""
    settings = dict(steps=4, warmup_steps=2, warmup_looks=2, warmup_plans=1, batch=2, kinds=("attribute",))
    settings |= dict(difficulties=("easy",), impatience=(1.0, 1.0), patient_share=0.0, max_turns=3)
    return Config(**settings | dict(out=Path(out), save_every=2, device="cpu") | changes)


def tokens_of(batch) -> list:
    return [
        (e.token_ids.tolist(), e.assistant_mask.tolist(), [v.tobytes() for v in e.views()]) for e in batch
    ]


def tiny():
    """The policy that a run with seed 0 starts from."""
    torch.manual_seed(0)
    return load_policy("tiny", device="cpu")


@pytest.fixture
def written(tmp_path) -> Path:
    """Searches on disk: short, long, without an answer, broken off in between, answered at once."""
    probes = [
        Probe(noise(60 + i, 60, seed=i), f"Number {i}?", "4", meta={"texts": texts})
        for i, texts in enumerate(SEARCHES)
    ]
    data.save_probes(probes, tmp_path / "set")
    return tmp_path / "set"


# ---------------------------------------------------------------------------------------- what is trained


def naive_loss(policy, batch) -> torch.Tensor:
    """Cross-entropy of the full logits of each episode alone, token by token, where the assistant wrote."""
    losses = []
    for e in batch:
        seen, ids = policy.process_views(e.views()), torch.from_numpy(e.token_ids)
        grids = seen["image_grid_thw"].tolist()
        positions, _ = mrope_positions(e.token_ids, grids, policy.image_pad, policy.merge)
        positions = torch.from_numpy(positions)[:, None]
        logits = policy.model(input_ids=ids[None], position_ids=positions, **seen).logits[0]
        for i in np.flatnonzero(e.assistant_mask):
            losses.append(F.cross_entropy(logits[i - 1] + policy.banned, ids[i]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("micro_tokens", [1, 10**6])
@pytest.mark.parametrize("phase", ["warm-up", "search"])
def test_the_loss_is_the_mean_cross_entropy_of_assistant_tokens_alone(
    tmp_path, monkeypatch, phase, micro_tokens
):
    """Value and gradient, with a forward for each episode and with one for all of them."""
    looks = int(phase == "warm-up")
    cfg = small(tmp_path, steps=1, warmup_steps=looks, batch=3, micro_tokens=micro_tokens)
    policy, clip, found = tiny(), common.clip_gradients, []
    batch = draw_batch(cfg, policy, 0, [])
    loss, weights = naive_loss(policy, batch), list(policy.model.parameters())
    expected = torch.autograd.grad(loss, weights)

    def keep(optimizer, limit):
        found.extend(weight.grad.clone() for weight in weights)
        return clip(optimizer, limit)

    monkeypatch.setattr(train_sft, "load_policy", lambda *_, **__: policy)
    monkeypatch.setattr(common, "clip_gradients", keep)
    train_sft.main(cfg)
    (row,) = read_lines(tmp_path)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4) and row["phase"] == phase
    assert row["tokens"] == sum(int(e.assistant_mask.sum()) for e in batch)
    assert row["grad_norm"] == pytest.approx(
        torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-3
    )
    for gradient, by_hand in zip(found, expected):
        assert (gradient - by_hand).norm() < 1e-3 * by_hand.norm() + 1e-6


def test_the_loss_falls_on_a_memorised_batch(tmp_path, monkeypatch):
    batch = draw_batch(small(tmp_path), tiny(), 3, [])
    monkeypatch.setattr(train_sft, "draw_batch", lambda *_: batch)
    train_sft.main(small(tmp_path, steps=25, lr=4e-3))
    losses = [row["loss"] for row in read_lines(tmp_path)]
    assert losses[0] > 3 and losses[-1] < 0.3 * losses[0], losses


def test_each_step_takes_its_own_learning_rate_and_logs_it(tmp_path, monkeypatch):
    """With 0.1 in step 1 and 0 afterwards, nothing moves after step 1."""
    monkeypatch.setattr(train_sft, "learning_rate", lambda cfg, step: 0.0 if step else 0.1)
    left = []
    for steps in (1, 3):
        train_sft.main(small(tmp_path / str(steps), steps=steps))
        left.append(load_weights_of(tmp_path / str(steps)))
    assert [row["lr"] for row in read_lines(tmp_path / "3")] == [0.1, 0, 0]
    assert same_weights(*left) and not same_weights(left[0], dict(tiny().model.named_parameters()))


def test_learning_rate_by_hand():
    cfg = Config(steps=130, warmup_steps=30, lr=1.0)
    expected = {0: 1 / 20, 9: 10 / 20, 19: 1, 30: 1}  # the rise, (step + 1) / 20; held until the warm-up ends
    expected |= {
        49: 0.1 + 0.9 * 0.5 * (1 + 0.82708),
        80: 0.1 + 0.9 * 0.5,
        130: 0.1,
    }  # cos(0.19 pi); the floor
    assert {step: learning_rate(cfg, step) for step in expected} == pytest.approx(expected, abs=1e-5)
    cfg = Config(steps=100, lr=1.0, lr_rise=10, lr_floor=0.0, data=Path("set"))  # no warm-up there
    expected = {0: 0.1 * 0.99975, 50: 0.5, 100: 0.0}
    assert {step: learning_rate(cfg, step) for step in expected} == pytest.approx(expected, abs=1e-4)


def test_the_loop_takes_its_gradients_in_sight():
    assert "batch_loss.backward()" in inspect.getsource(train_sft.main)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("step", [0, 3])
def test_a_batch_depends_on_the_seed_and_the_step_alone(policy, tmp_path, step):
    cfg, other = small(tmp_path), load_policy("tiny", device="cpu")  # other weights

    def draw(changed=cfg, policy=other, step=step):
        return tokens_of(draw_batch(changed, policy, step, []))

    first = draw(cfg, policy)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert draw(step=1) != first  # an earlier step, or a later one
    assert draw(replace(cfg, out=Path("elsewhere"), lr=1.0)) == first != draw(replace(cfg, seed=1))


def test_the_warm_up_has_looks_at_one_plate_and_beginnings_of_planned_searches(policy, tmp_path):
    """A look shows no first view, only a crop of the whole picture, whose pixels are in the episode."""
    batch = draw_batch(small(tmp_path, warmup_looks=12, warmup_plans=4), policy, 1, [])
    looks, plans, size = batch[:12], batch[12:], policy.protocol.max_pixels
    for e in looks:
        (view,) = e.views()
        assert e.env_class is WarmUpEnv and len(e.crops) == 1 and len(e.texts) == 2
        assert view.tobytes() == fit_pixels(e.probe.image, size, size).tobytes()
        assert (e.token_ids == policy.image_pad).sum() == policy.count_visual_tokens(view)
    ends = {(e.stop, e.reward) for e in looks}
    assert ends == {("answer", 1.0), ("turn_limit", 0.0)}  # it is the one, and it is not
    assert len(plans) == 4 and all(e.texts[0].startswith("<think>plates") for e in plans)
    assert all(len(e.texts) <= 3 and len(e.views()) == 1 + len(e.crops) > 1 for e in plans)


def test_the_search_phase_shows_only_searches_that_end_right_in_time(policy, tmp_path):
    batch = draw_batch(small(tmp_path, batch=12, max_turns=4), policy, 3, [])
    assert len(batch) == 12 and all(e.stop == "answer" and e.reward == 1.0 for e in batch)
    assert {e.turns for e in batch} == {2, 3, 4}


def test_batches_drawn_in_a_worker_are_those_drawn_here(policy, tmp_path, written):
    for cfg in (small(tmp_path), small(tmp_path, data=written)):
        searches = load_searches(cfg)
        ahead = list(load_batches(cfg, policy, 1, searches))
        here = [draw_batch(cfg, policy, step, searches) for step in (1, 2, 3)]
        assert [tokens_of(batch) for batch in ahead] == [tokens_of(batch) for batch in here]
        assert all(e.probe.image is None for batch in ahead for e in batch)  # views are enough


def test_written_searches_are_cut_at_max_turns_with_nothing_trained_beyond(policy, tmp_path, written, capsys):
    cfg = small(tmp_path / "run", data=written, max_turns=3, batch=5)
    searches = load_searches(cfg)
    assert capsys.readouterr().out == "5 searches, 2.4 turns; 1 are cut at 3\n"
    batch = {e.probe.question: e for e in draw_batch(cfg, policy, 0, searches)}
    shown = [SEARCHES[0], SEARCHES[1][:3], SEARCHES[2], SEARCHES[3][:1], SEARCHES[4]]  # void ends one
    for i, texts in enumerate(shown):
        e = batch[f"Number {i}?"]
        said = policy.decode(e.token_ids[e.assistant_mask])
        assert e.texts == texts and said.replace("<|im_end|>", "") == "".join(texts)


def test_each_epoch_has_every_written_search_once_in_an_order_of_its_own(policy, tmp_path, written):
    cfg = small(tmp_path, data=written)
    searches = load_searches(cfg)

    def ask(cfg, steps):
        return [e.probe.question for step in steps for e in draw_batch(cfg, policy, step, searches)]

    asked = ask(cfg, range(5))
    assert len(set(asked[:5])) == len(set(asked[5:])) == 5 and asked[:5] != asked[5:]
    assert ask(cfg, [3]) == asked[6:8] and ask(replace(cfg, seed=1), range(5)) != asked


def test_questions_without_searches_are_refused_and_written_searches_have_no_warm_up(tmp_path, written):
    data.save_probes([data.make_probe("sign", "easy", 0)], tmp_path / "questions")
    with pytest.raises(common.UserError, match="holds questions without searches; see prepare/cold_start.py"):
        train_sft.main(small(tmp_path / "run", data=tmp_path / "questions"))
    assert not (tmp_path / "run").exists()
    train_sft.main(small(tmp_path / "run", data=written, steps=1, warmup_steps=240))
    assert read_lines(tmp_path / "run")[0]["phase"] == "search"


# ---------------------------------------------------------------------------------------------- runs

FLAGS = "--warmup_looks 20 --warmup_plans 1 --batch 2 --max_turns 3 --kinds attribute --difficulties easy "
FLAGS = (FLAGS + "--impatience 1 1 --patient_share 0 --save_every 2 --device cpu").split()


@pytest.fixture(scope="module")
def start_process():
    """start_process(*args) runs train_sft.py in a process of its own, up to step 3; it dies with the tests."""
    processes = []

    def start(*args, out: Path) -> subprocess.Popen:
        command = [sys.executable, "train_sft.py", *FLAGS, *args, "--out", str(out)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }  # sums as in this process
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        processes.append(subprocess.Popen(command, cwd=ROOT, **options))
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_lines(out)) >= 3, 300)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(condition, seconds: float) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def test_ctrl_c_saves_and_tells_how_to_go_on_and_nobody_else_may_write_there(
    tmp_path, monkeypatch, start_process
):
    out = tmp_path / "a run"
    process = start_process("--warmup_steps", "2", "--steps", "60", out=out)
    with pytest.raises(common.UserError, match="another process is writing to .*a run"):
        train_sft.main(small(out, resume=True))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in said, said
    (told,) = (line for line in said.replace("\r", "\n").splitlines() if "go on with:" in line)
    done = len(read_lines(out))
    assert f"stopped after step {done};" in told and 0 < done < 60
    assert torch.load(out / "state.pt", weights_only=True)["step"] == done
    _, script, *flags = shlex.split(told.split("go on with: ")[1])
    assert flags[-1] == "--resume"
    code, said, _ = run_main(monkeypatch, script, *flags)
    assert code == 0 and said[-1] == f"saved in {out}; next: python train_rl.py --init {out}"
    assert [row["step"] for row in read_lines(out)] == list(range(1, 61))


KILLED = ["--warmup_steps", "8", "--steps", "12"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory, start_process) -> tuple[Path, list[str]]:
    """A run that was ended by kill -9 between two checkpoints, and the ids of its workers (on Linux)."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process = start_process(*KILLED, out=out)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    process.kill()
    process.wait()
    return out, workers


def test_a_run_that_was_killed_and_resumed_equals_a_straight_one_bit_for_bit(killed, tmp_path, monkeypatch):
    out, _ = killed
    assert 3 <= len(read_lines(out)) < 12
    for flags in (["--out", tmp_path], ["--out", out, "--resume"]):
        assert run_main(monkeypatch, "train_sft.py", *FLAGS, *KILLED, *flags)[0] == 0
    assert without_times(read_lines(tmp_path)) == without_times(read_lines(out))
    assert same_weights(load_weights_of(tmp_path), load_weights_of(out))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in out.iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no worker")
def test_the_worker_of_a_run_that_was_killed_ends_too(killed):
    """Its last batch does not fit into the pipe that nobody reads any more."""
    (worker,) = killed[1]
    status = Path(f"/proc/{worker}/status")
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text(), 15)


def test_a_taken_directory_and_a_changed_configuration_are_refused_and_nothing_is_touched(tmp_path):
    train_sft.main(small(tmp_path, steps=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refused = {"holds a run already: pass --resume to go on, or another --out": {}}
    refused[r"another seed \(0, now 1\), steps \(1, now 2\)"] = dict(seed=1, steps=2, resume=True)
    refused[r"another kinds \(\['attribute'\], now \['sign'\]\)"] = dict(kinds=("sign",), resume=True)
    for complaint, changes in refused.items():
        with pytest.raises(common.UserError, match=complaint):
            train_sft.main(small(tmp_path, **{"steps": 1} | changes))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_leaves_metrics_and_a_directory_that_transformers_opens(tmp_path):
    train_sft.main(small(tmp_path, steps=3))
    rows = read_lines(tmp_path)
    assert [(row["step"], row["phase"]) for row in rows] == [(1, "warm-up"), (2, "warm-up"), (3, "search")]
    logged = {"step", "phase", "loss", "grad_norm", "lr", "tokens", "turns"}
    assert without_times(rows)[0].keys() == logged and rows[2]["turns"] >= 2
    assert json.loads((tmp_path / "run.json").read_text())["config"]["batch"] == 2
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert same_weights(load_weights_of(tmp_path), dict(model.named_parameters()))
    opened, policy = transformers.AutoTokenizer.from_pretrained(tmp_path), tiny()
    assert opened("a b")["input_ids"] == policy.tokenizer("a b")["input_ids"]
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    assert processor.to_dict() == policy.image_processor.to_dict()


def test_a_search_of_the_scripted_searcher_fits_the_vocabulary_of_the_tiny_policy(policy):
    """Phrases are single tokens, so a message takes about twenty."""
    probe = data.make_probe("conjunction", "hard", 3)
    texts = data.write_search(probe, random.Random(0), pattern="trial_and_error")
    assert all(len(policy.encode(text)) <= 30 for text in texts)
