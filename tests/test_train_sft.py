"""Tests of train_sft.py: what is trained, what a batch depends on, the run directory. No network, no GPU."""

import io
import json
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train_rl
import train_sft
from model import load_policy, micro_batches, token_logprobs
from rollout import messages, replay, rollout
from train_sft import Config, draw_batch, drawn_ahead, learning_rate, write_atomic

ROOT = Path(train_sft.__file__).parent
TIMES = {"time/step", "time/wait", "time/draw", "memory_gb"}  # the metrics that no seed fixes


def small(out, **changes) -> Config:
    """Two steps of warm-up, then two-message searches."""
    settings = dict(
        out=Path(out),
        steps=4,
        warmup_steps=2,
        warmup_batch=2,
        batch=2,
        kinds=("attribute",),
        difficulties=("easy",),
        impatience=(1.0, 1.0),
        patient_share=0.0,
        max_turns=3,
        save_every=100,
        device="cpu",
    )
    return Config(**{**settings, **changes})


def tiny(seed=0):
    torch.manual_seed(seed)
    return load_policy("tiny", device="cpu")


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def without_times(rows) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights(out) -> dict[str, torch.Tensor]:
    return torch.load(Path(out) / "state.pt", weights_only=True)["weights"]


def run_script(monkeypatch, capsys, script, *args) -> tuple[int, str]:
    """`python script args` in this process: (exit code, stderr)."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    capsys.readouterr()
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ what is trained


def test_the_loss_falls_on_a_memorised_batch(tmp_path, monkeypatch):
    batch = draw_batch(small(tmp_path), tiny(), 3)
    monkeypatch.setattr(train_sft, "draw_batch", lambda *_: batch)
    train_sft.main(small(tmp_path, steps=25, lr=4e-3))
    losses = [row["loss"] for row in lines(tmp_path)]
    assert losses[0] > 3 and losses[-1] < 0.3 * losses[0], losses
    assert all(row["tokens"] == sum(int(e.assistant_mask.sum()) for e in batch) for row in lines(tmp_path))


def test_the_first_loss_is_the_mean_over_all_assistant_tokens_of_the_step(tmp_path):
    cfg = small(tmp_path, steps=1, warmup_steps=0, batch=3, micro_tokens=1)
    train_sft.main(cfg)
    policy, batch = tiny(), draw_batch(cfg, tiny(), 0)
    with torch.no_grad():
        said = torch.cat([token_logprobs(policy, [e])[0][torch.from_numpy(e.assistant_mask)] for e in batch])
    (row,) = lines(tmp_path)
    assert row["loss"] == pytest.approx(-said.mean().item(), rel=1e-4)
    assert row["tokens"] == len(said)


def test_only_predictions_of_assistant_tokens_get_a_gradient(tmp_path, monkeypatch):
    """The gradient at each position of the last layer is nonzero exactly where the next token is the policy's own."""
    policy = tiny()
    seen = []

    def keep(module, args, output):
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    policy.base.model.register_forward_hook(keep)
    monkeypatch.setattr(train_sft, "load_policy", lambda *_, **__: policy)
    monkeypatch.setattr(
        train_sft, "micro_batches", lambda episodes, budget, even: micro_batches(episodes, budget)
    )  # one
    cfg = small(tmp_path, steps=1, warmup_steps=0, micro_tokens=10**6)
    (episodes,) = micro_batches(draw_batch(cfg, policy, 0), 10**6)
    train_sft.main(cfg)
    (hidden,) = seen
    moved = hidden.grad[0].abs().amax(-1) > 0  # (N,) the episodes end to end
    for episode, own in zip(episodes, moved.split([len(e.token_ids) for e in episodes]), strict=True):
        assert own.tolist() == [*episode.assistant_mask[1:], False]
    assert not episodes[0].assistant_mask[0] and 0 < episodes[0].assistant_mask.mean() < 0.9


@pytest.mark.parametrize("step", [0, 2])
def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path, monkeypatch, step):
    """One row per forward or all rows in one, warm-up or search: the same gradient and the same loss."""
    original, found = torch.nn.utils.clip_grad_norm_, []

    def record(parameters, most):
        parameters = list(parameters)
        found.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        return original(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    for tokens in (1, 10**6):
        train_sft.main(
            small(tmp_path / str(tokens), steps=1, warmup_steps=step, batch=3, micro_tokens=tokens)
        )
    one, all_at_once = found
    assert one.norm() > 0.1
    assert (one - all_at_once).norm() < 1e-4 * one.norm()
    assert lines(tmp_path / "1")[0]["loss"] == pytest.approx(lines(tmp_path / "1000000")[0]["loss"], rel=1e-5)


def test_the_gradient_is_clipped_before_the_step(tmp_path, monkeypatch):
    """With a largest norm of 0 nothing is learned; the norm that is logged is the one before clipping."""
    train_sft.main(small(tmp_path, steps=1, grad_clip=0.0, weight_decay=0.0))
    before = dict(tiny().model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path).items())
    assert lines(tmp_path)[0]["grad_norm"] > 0.1


# ------------------------------------------------------------------------------------------------ written trajectories

LOOK = '<think>look</think><grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}</grounding>'
ANSWER = "<think>read</think><answer>4</answer>"
SEARCHES = [[LOOK, ANSWER], [LOOK] * 4 + [ANSWER], [LOOK, LOOK], ["no action", ANSWER], [ANSWER]]


def searches_on_disk(folder: Path) -> Path:
    """Searches as data.py --collect leaves them: short, long, without an answer, broken off in between, at once."""
    folder.mkdir()
    rows = []
    for i, texts in enumerate(SEARCHES):
        Image.new("RGB", (60 + i, 60), (40 * i, 9, 9)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": f"Number {i}?", "answer": "4", "texts": texts})
    rows[2]["answer"] = ""
    (folder / "trajectories.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_written_trajectories_are_told_of_and_cut_with_nothing_trained_beyond(tmp_path, capsys):
    cfg = small(tmp_path / "run", data=searches_on_disk(tmp_path / "set"), max_turns=3, batch=5)
    policy, written = tiny(), train_sft.load_written(cfg)
    said = capsys.readouterr().out
    assert "5 trajectories, 2.4 turns; 1 are cut at 3 turns; 1 end at an earlier message" in said
    assert "1 have no answer in their last turn" in said
    batch = {e.probe.question: e for e in draw_batch(cfg, policy, 0, written)}
    for i, texts in enumerate([*SEARCHES[:1], SEARCHES[1][:3], SEARCHES[2], SEARCHES[3][:1], SEARCHES[4]]):
        episode = batch[f"Number {i}?"]
        assert messages(policy, episode) == texts  # nothing that comes later is even there
        own = [token for text in texts for token in [*policy.encode(text), policy.im_end]]
        assert episode.token_ids[episode.assistant_mask].tolist() == own
    assert train_sft.load_written(small(tmp_path)) == []


def test_each_epoch_has_every_trajectory_once_in_an_order_of_its_own(tmp_path):
    cfg = small(tmp_path / "run", data=searches_on_disk(tmp_path / "set"), batch=2)
    policy, written = tiny(), train_sft.load_written(cfg)
    asked = [e.probe.question for step in range(5) for e in draw_batch(cfg, policy, step, written)]
    assert len(set(asked[:5])) == len(set(asked[5:])) == 5 and asked[:5] != asked[5:]
    assert [e.probe.question for e in draw_batch(cfg, tiny(7), 3, written)] == asked[6:8]
    other = replace(cfg, seed=1)
    assert asked != [e.probe.question for step in range(5) for e in draw_batch(other, policy, step, written)]


def test_the_released_schema_gives_the_same_tokens_as_ours(tmp_path):
    folder = searches_on_disk(tmp_path / "set")
    ours = data.load_trajectories(folder)[0]
    buffer = io.BytesIO()
    ours.probe.open().save(buffer, "PNG")
    said = [
        {"from": "human", "value": "<image>\nNumber 0?"},
        {"from": "gpt", "value": LOOK},
        {"from": "human", "value": "After the above Action 0, (Observation 1):\n<image>.\n"},
        {"from": "gpt", "value": ANSWER},
    ]
    row = {
        "images": [buffer.getvalue()] * 2,
        "image_names": ["a", "b"],
        "conversations": repr(said),
        "data_source": "x",
        "sample_index": 0,
        "rollout_index": 0,
    }
    arrow = data.pyarrow()
    arrow.parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (theirs,) = data.load_trajectories(tmp_path / "a.parquet")
    one, other = (draw_batch(small(tmp_path, batch=1), tiny(), 0, [t]) for t in (ours, theirs))
    assert tokens(one) == tokens(other)
    (ahead,) = drawn_ahead(
        small(tmp_path, batch=1, steps=1), tiny(), 0, [theirs]
    )  # a place in a table stays where it is
    assert tokens(ahead) == tokens(other)


def test_a_run_on_written_trajectories_has_no_warm_up_learns_and_resumes(tmp_path):
    cfg = small(tmp_path / "run", data=searches_on_disk(tmp_path / "set"), steps=4, warmup_steps=240, lr=4e-3)
    train_sft.main(cfg)
    rows = lines(tmp_path / "run")
    assert {row["phase"] for row in rows} == {"search"} and rows[-1]["loss"] < rows[0]["loss"]
    train_sft.main(replace(cfg, out=tmp_path / "two", steps=2))
    with pytest.raises(data.UserError, match="data"):
        train_sft.main(replace(cfg, out=tmp_path / "two", data=None, resume=True))


def test_a_set_of_questions_is_no_set_of_trajectories(tmp_path, monkeypatch, capsys):
    data.save_probes([data.make_probe("sign", "easy", 0)], tmp_path / "set")
    code, err = run_script(
        monkeypatch, capsys, "train_sft.py", "--data", tmp_path / "set", "--out", tmp_path / "x"
    )
    assert code == 2 and "row 1 holds a question and no search" in err and not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------ batches


def tokens(batch) -> list:
    return [
        (e.token_ids.tolist(), e.assistant_mask.tolist(), [v.tobytes() for v in e.views()]) for e in batch
    ]


@pytest.mark.parametrize("step", [0, 3])
def test_a_batch_depends_on_the_seed_and_the_step_alone(tmp_path, step):
    cfg = small(tmp_path)
    first = tokens(draw_batch(cfg, tiny(), step))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    list(map(len, [draw_batch(cfg, tiny(7), 1)]))  # an earlier step, another policy
    assert tokens(draw_batch(replace(cfg, out=Path("elsewhere"), lr=1.0), tiny(7), step)) == first
    assert tokens(draw_batch(replace(cfg, seed=1), tiny(), step)) != first
    assert tokens(draw_batch(cfg, tiny(), step + 1 if step else 1)) != first


def test_batches_drawn_ahead_are_those_of_their_steps(tmp_path):
    cfg, policy = small(tmp_path, steps=4), tiny()
    ahead = [tokens(batch) for batch in drawn_ahead(cfg, policy, 1)]
    assert ahead == [tokens(draw_batch(cfg, policy, step)) for step in (1, 2, 3)]


def test_a_mistake_in_a_batch_drawn_ahead_arrives_in_its_turn_and_in_its_words(tmp_path, monkeypatch):
    def draw(_cfg, _policy, step, _written):
        if step == 2:
            raise data.UserError("row 7: what it is")
        return [batch[step]]

    batch = draw_batch(small(tmp_path, batch=2), tiny(), 3)
    monkeypatch.setattr(train_sft, "draw_batch", draw)
    ahead = drawn_ahead(small(tmp_path, steps=4), tiny(), 0)
    assert [tokens(next(ahead)), tokens(next(ahead))] == [tokens([episode]) for episode in batch]
    with pytest.raises(data.UserError, match="^row 7: what it is$"):
        next(ahead)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no such process")
def test_the_process_that_draws_ends_with_the_one_that_trains(tmp_path):
    """At once, also when that is killed: DataLoader's own watch takes five seconds, and waits for a full pipe for ever."""
    training = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train_sft.py"),
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            "--warmup_batch",
            "2",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children = Path(f"/proc/{training.pid}/task/{training.pid}/children")
    try:
        while training.poll() is None and not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.1)
        (drawing,) = children.read_text().split()
    finally:
        training.kill()
        training.wait()
    for _ in range(20):
        if (
            not Path(f"/proc/{drawing}").exists()
            or "\nState:\tZ" in Path(f"/proc/{drawing}/status").read_text()
        ):
            return
        time.sleep(0.1)
    pytest.fail(f"process {drawing} is still there")


def test_the_cold_start_shows_only_searches_that_end_right(tmp_path):
    batch = draw_batch(small(tmp_path, batch=6), tiny(), 3)
    assert len(batch) == 6 and all(e.stop == "answer" and e.reward == 1.0 and e.turns <= 3 for e in batch)


def test_learning_rate_by_hand():
    cfg = Config(steps=130, warmup_steps=30, lr=1.0)
    assert learning_rate(cfg, 0) == pytest.approx(1 / 20)  # (0 + 1) / 20 of the peak
    assert learning_rate(cfg, 19) == learning_rate(cfg, 30) == 1.0  # held until the warm-up ends
    assert learning_rate(cfg, 49) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 0.82708), abs=1e-4)  # cos(0.19 pi)
    assert learning_rate(cfg, 80) == pytest.approx(0.55)  # half way: 0.1 + 0.9 / 2
    assert learning_rate(cfg, 130) == pytest.approx(0.1)


def test_each_step_uses_and_logs_its_own_learning_rate(tmp_path):
    cfg = small(tmp_path, steps=3)
    train_sft.main(cfg)
    assert [row["lr"] for row in lines(tmp_path)] == [learning_rate(cfg, step) for step in range(3)]


# ------------------------------------------------------------------------------------------------ the run directory


def test_a_run_leaves_metrics_a_description_and_a_hugging_face_directory(tmp_path, capsys):
    train_sft.main(small(tmp_path, steps=3))
    assert "python train_rl.py" in capsys.readouterr().out
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["phase"] for row in rows] == ["warm-up", "warm-up", "search"]
    assert all(
        {"loss", "grad_norm", "lr", "tokens", "turns", "time/step", "memory_gb"} <= row.keys() for row in rows
    )
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["config"]["steps"] == 3 and about["config"]["kinds"] == ["attribute"]
    assert (
        about["torch"] == torch.__version__ and {"commit", "python", "transformers", "policy"} <= about.keys()
    )
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "protocol.json",
    ):
        assert (tmp_path / name).exists(), name
    saved = dict(load_policy(str(tmp_path), device="cpu").model.named_parameters())
    assert weights(tmp_path).keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in weights(tmp_path).items())


def test_a_crashed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch):
    """Killed in step 4, after the checkpoint of step 2: steps 3 and 4 are done again, metrics and weights are equal."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train_sft.main(small(straight, save_every=2))

    original, calls = train_sft.learning_rate, []

    def die(cfg, step):
        calls.append(step)
        if step == 3:
            raise MemoryError
        return original(cfg, step)

    monkeypatch.setattr(train_sft, "learning_rate", die)
    with pytest.raises(MemoryError):
        train_sft.main(small(broken, save_every=2))
    assert calls == [0, 1, 2, 3] and len(lines(broken)) == 3  # one line more than the checkpoint knows
    monkeypatch.setattr(train_sft, "learning_rate", original)
    train_sft.main(small(broken, save_every=2, resume=True))

    assert without_times(lines(broken)) == without_times(lines(straight))
    one, other = weights(straight), weights(broken)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_leaves_a_checkpoint_and_a_command_that_finishes_the_run(tmp_path, monkeypatch):
    out, steps = tmp_path / "a run", 30
    flags = [
        "--out",
        out,
        "--steps",
        steps,
        "--warmup-steps",
        1,
        "--warmup-batch",
        2,
        "--batch",
        1,
        "--max-turns",
        2,
        "--kinds",
        "attribute",
        "--difficulties",
        "easy",
        "--impatience",
        1,
        1,
        "--patient-share",
        0,
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_sft.py"), *map(str, flags)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.time() + 300
        while not ((out / "metrics.jsonl").exists() and lines(out)) and process.poll() is None:
            assert time.time() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    (told,) = [line for line in said.replace("\r", "\n").splitlines() if "go on with:" in line]
    done = len(lines(out))
    assert f"stopped after step {done};" in told and 0 < done < steps
    assert torch.load(out / "state.pt", weights_only=True)["step"] == done
    load_policy(str(out), device="cpu")  # usable as it is

    command = shlex.split(told.split("go on with: ")[1])
    assert command[0] == "python" and Path(command[1]).name == "train_sft.py"
    monkeypatch.setattr(sys, "argv", command[1:])
    runpy.run_path(command[1], run_name="__main__")
    assert [row["step"] for row in lines(out)] == list(range(1, steps + 1))
    assert torch.load(out / "state.pt", weights_only=True)["step"] == steps


def test_a_first_signal_asks_for_a_stop_and_a_second_one_stops():
    asked = train_sft.stop_on_signal()
    assert not asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_taken_directory_is_refused_and_left_alone(tmp_path):
    train_sft.main(small(tmp_path, steps=1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(data.UserError, match="--resume.*another --out"):
        train_sft.main(small(tmp_path, steps=1))
    with pytest.raises(data.UserError, match=r"another seed \(0, now 1\)"):
        train_sft.main(small(tmp_path, steps=1, seed=1, resume=True))
    with pytest.raises(data.UserError, match=r"kinds \(\['attribute'\], now \['sign'\]\).*lr|lr.*kinds"):
        train_sft.main(small(tmp_path, steps=1, kinds=("sign",), lr=0.5, resume=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_steps_may_grow_on_resume_and_the_description_follows(tmp_path):
    train_sft.main(small(tmp_path, steps=1))
    train_sft.main(small(tmp_path, steps=2, resume=True))
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert json.loads((tmp_path / "run.json").read_text())["config"]["steps"] == 2


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(data.UserError, match="no checkpoint in .*without --resume"):
        train_sft.main(small(tmp_path / "new", resume=True))
    early = tmp_path / "early"  # killed before its first checkpoint
    early.mkdir()
    (early / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(data.UserError, match="delete it"):
        train_sft.main(small(early, resume=True))


def test_a_machine_without_git_can_train(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    train_sft.open_run(small(tmp_path), False, "tiny")
    assert json.loads((tmp_path / "run.json").read_text())["commit"] is None


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "run.json"
    write_atomic(path, b"old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, broken, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new, but")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_an_interrupted_checkpoint_leaves_the_old_one(tmp_path, monkeypatch):
    train_sft.main(small(tmp_path, steps=1))
    before = (tmp_path / "state.pt").read_bytes()

    def cut(state, path):
        Path(path).write_bytes(b"half of a")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(small(tmp_path, steps=2, resume=True))
    assert (tmp_path / "state.pt").read_bytes() == before


def test_user_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    code, err = run_script(
        monkeypatch, capsys, "train_sft.py", "--base", tmp_path / "nowhere", "--out", tmp_path / "x"
    )
    assert code == 2 and str(tmp_path / "nowhere") in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "x").exists()
    code, err = run_script(monkeypatch, capsys, "train_sft.py", "--resume", "--out", tmp_path / "x")
    assert code == 2 and err.startswith("error: --resume") and len(err.splitlines()) == 1, err
    code, err = run_script(monkeypatch, capsys, "train_sft.py", "--step", "3")
    assert code == 2 and "--steps" in err  # tyro suggests the right flag


# ------------------------------------------------------------------------------------------------ real bases

FAMILIES = pytest.mark.parametrize("family", ["qwen25_dir", "qwen3_dir"])


def trainable(family, request, out, **flags):
    """(policy, optimizer, one search in two turns) for a small random checkpoint with these flags."""
    base = request.getfixturevalue(family)  # draws random numbers where it is made
    torch.manual_seed(0)
    cfg = small(out, base=base, min_pixels=32 * 32, max_pixels=96 * 96, **flags)
    policy, optimizer = train_sft.load_trainable(cfg.base, cfg, lr=1e-3)
    policy.model.train()
    script = [
        data.search_script(
            probe := data.make_probe("sign", "easy", 1), random.Random(0), pattern="depth_first"
        )[0]
    ]
    return policy, optimizer, replay(policy, probe, [*script, "<answer>4</answer>"])


@FAMILIES
@pytest.mark.filterwarnings("ignore")
def test_in_four_bits_with_every_saving_only_adapters_are_trained(family, request, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    policy, optimizer, episode = trainable(
        family,
        request,
        tmp_path,
        quantize="nf4",
        lora_rank=4,
        adam_8bit=True,
        activation_checkpointing=True,
        train_vision=True,
    )
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    token_logprobs(policy, [episode]).sum().backward()
    adapters = {name for name, weight in policy.model.named_parameters() if weight.grad is not None}
    assert len(adapters) == 2 * 2 * 7 and all("lora_" in name and "visual" not in name for name in adapters)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(adapters)
    for name, module in policy.base.named_modules():
        if "visual" in name or "lm_head" in name:
            assert not isinstance(module, bitsandbytes.nn.Linear4bit), name
    train_sft.update(optimizer, 1.0)
    changed = {
        name for name, weight in policy.model.named_parameters() if not torch.equal(weight, before[name])
    }
    assert changed and changed <= adapters and any("lora_B" in name for name in changed)


@FAMILIES
@pytest.mark.parametrize("flags", [{"lora_rank": 4}, {}], ids=["lora", "full"])
@pytest.mark.filterwarnings("ignore")
def test_activation_checkpointing_changes_neither_gradients_nor_rollouts(family, flags, request, tmp_path):
    gradients, said, calls = [], [], []
    for checkpointing in (False, True):
        policy, _, episode = trainable(
            family, request, tmp_path, activation_checkpointing=checkpointing, **flags
        )
        layer = policy.base.model.language_model.layers[0].mlp
        layer.register_forward_hook(lambda *_: calls.append(checkpointing))
        token_logprobs(policy, [episode]).sum().backward()
        gradients.append({name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})
        said.append(rollout(policy, [episode.probe], max_turns=2, max_turn_tokens=8, seed=1)[0])
    assert (
        calls.index(True) == 1 + len(said[0].token_ids[said[0].assistant_mask])
        and calls[calls.index(True) + 1]
    )
    assert gradients[0].keys() == gradients[1].keys() and (
        len(gradients[0]) == 28 or "lora_rank" not in flags
    )
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)
    assert said[0].token_ids.tolist() == said[1].token_ids.tolist()
    np.testing.assert_allclose(said[0].logprobs, said[1].logprobs, atol=1e-5)


def test_full_fine_tuning_keeps_float32_weights_and_computes_in_bfloat16_on_request(request, tmp_path):
    load_policy(request.getfixturevalue("qwen25_dir"), device="cpu", dtype=torch.bfloat16).save(
        tmp_path / "base"
    )
    request.getfixturevalue = lambda _: str(tmp_path / "base")
    sums = []
    for autocast in (False, True):
        policy, optimizer, episode = trainable(
            "", request, tmp_path, autocast=autocast, train_vision=autocast
        )
        sums.append(token_logprobs(policy, [episode]).sum())
        sums[-1].backward()
        assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
        assert {
            p.grad.dtype for p in policy.base.model.language_model.parameters() if p.grad is not None
        } == {torch.float32}
        assert all((p.grad is not None) == autocast for p in policy.base.model.visual.parameters())
        rollout(policy, [episode.probe], max_turns=2, max_turn_tokens=4)
    assert 1e-4 < abs(sums[0] - sums[1]).item() < 0.02 * abs(sums[0]).item()  # coarser, and not another model


def test_four_bits_without_adapters_are_refused(qwen25_dir, tmp_path):
    with pytest.raises(data.UserError, match="4 bits cannot be trained; add adapters, say --lora_rank"):
        train_sft.main(small(tmp_path / "out", base=qwen25_dir, quantize="nf4"))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_with_adapters_in_four_bits_and_moments_in_eight_equals_one_in_one_go(
    qwen3_dir, tmp_path, monkeypatch
):
    pytest.importorskip("bitsandbytes")
    flags = dict(
        base=qwen3_dir,
        warmup_steps=0,
        quantize="nf4",
        lora_rank=64,
        adam_8bit=True,
        save_every=2,
        activation_checkpointing=True,
        min_pixels=32 * 32,
        max_pixels=48 * 48,
        batch=1,
    )
    train_sft.main(small(tmp_path / "whole", **flags))
    saved = str(torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["optimizer"]["state"])
    assert "dtype=torch.uint8" in saved
    original = train_sft.learning_rate
    monkeypatch.setattr(
        train_sft, "learning_rate", lambda cfg, step: original(cfg, step) if step < 3 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        train_sft.main(small(tmp_path / "parts", **flags))
    monkeypatch.setattr(train_sft, "learning_rate", original)
    train_sft.main(small(tmp_path / "parts", **flags, resume=True))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert len(one) == 28 and all(torch.equal(one[name], two[name]) for name in one)
    assert without_times(lines(tmp_path / "parts")) == without_times(lines(tmp_path / "whole"))


def test_the_rise_and_the_floor_of_the_learning_rate_by_hand():
    cfg = Config(steps=100, warmup_steps=0, lr=1.0, lr_rise=10, lr_floor=0.0)
    assert learning_rate(cfg, 0) == pytest.approx(0.1, rel=1e-3) and learning_rate(cfg, 50) == pytest.approx(
        0.5
    )
    assert learning_rate(cfg, 99) < 1e-3


# ------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("script", [train_sft, train_rl])
def test_the_first_word_picks_a_preset_and_flags_change_it(script, monkeypatch, capsys):
    seen = []
    for args in ([], ["--steps", "7"], ["tiny"], ["qwen3b"], ["qwen7b", "--steps", "7", "--lora_rank", "4"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *args])
        data.command(seen.append, script.Config, script.PRESETS)
    assert seen[0] == seen[2] == script.Config() and seen[1] == replace(script.Config(), steps=7)
    assert seen[3] == script.PRESETS["qwen3b"]
    assert seen[4] == replace(script.PRESETS["qwen7b"], steps=7, lora_rank=4)
    monkeypatch.setattr(sys, "argv", ["script.py", "qwen1b"])
    with pytest.raises(SystemExit) as stop:
        data.command(seen.append, script.Config, script.PRESETS)
    assert stop.value.code == 2
    assert "qwen1b: no such preset; there are tiny, qwen3b, qwen7b, paper" in capsys.readouterr().err


def test_presets_for_24_gb_train_adapters_and_the_paper_trains_every_weight_as_published():
    for presets in (train_sft.PRESETS, train_rl.PRESETS):
        assert list(presets) == ["tiny", "qwen3b", "qwen7b", "paper"]
        for name in ("qwen3b", "qwen7b"):
            cfg = presets[name]
            assert (
                cfg.lora_rank
                and cfg.activation_checkpointing
                and not cfg.train_vision
                and cfg.max_pixels == 1_000_000
            )
            assert (cfg.quantize, cfg.adam_8bit) == (("nf4", True) if name == "qwen7b" else (None, False))
    sft, rl = train_sft.PRESETS["paper"], train_rl.PRESETS["paper"]  # notes: b.3, c.1
    assert sft.base == "Qwen/Qwen2.5-VL-7B-Instruct" and not sft.train_vision and rl.train_vision
    assert (sft.lr, sft.lr_floor, sft.lr_rise / sft.steps) == (1e-5, 0.0, pytest.approx(0.1, abs=1e-3))
    assert sft.steps * sft.batch == pytest.approx(3 * 7267, rel=1e-3)  # three epochs
    assert (rl.questions, rl.group_size, rl.updates, rl.lr, rl.grad_clip) == (256, 16, 8, 1e-6, 1.0)
    assert (rl.clip_low, rl.clip_high, rl.temperature, rl.over_turn) == (0.2, 0.3, 1.0, "mask")
    assert (rl.max_turns, rl.max_images, rl.max_turn_tokens, rl.max_context) == (6, 12, 8192, 32_768 - 2000)
    assert all(
        cfg.lora_rank == 0 and cfg.quantize is None and cfg.max_pixels == 2_000_000 for cfg in (sft, rl)
    )
