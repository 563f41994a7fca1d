"""Tests of common.py: the command line, atomic writes, locks, run directories, signals, gradients."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import common
from common import UserError

import pytest
import torch
from conftest import read_lines

from env import ImageError

ROOT = Path(common.__file__).parent


@dataclass(frozen=True)
class Config:
    out: Path = Path("run")
    steps: int = 4
    lr: float = 0.1
    resume: bool = False
    device: str | None = None


def call(monkeypatch, *words, main=lambda cfg: cfg, presets=None):
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    return common.cli(main, Config, presets)


def test_a_first_word_picks_a_preset_and_flags_change_it(monkeypatch):
    presets = {"small": Config(steps=1), "large": Config(steps=100, lr=0.5)}
    assert call(monkeypatch, presets=presets) == Config()
    assert call(monkeypatch, "large", "--lr", "0.2", presets=presets) == Config(steps=100, lr=0.2)


@pytest.mark.parametrize("error", [UserError("no such thing"), ImageError("a.png: broken")])
def test_a_mistake_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys, error):
    def fail(cfg):
        raise error

    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, main=fail)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, "huge", presets={"small": Config()})
    assert stop.value.code == 2 and "huge: no such preset; there are small" in capsys.readouterr().err


def test_an_error_of_ours_is_not_dressed_up(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, main=lambda cfg: 1 / 0)


def test_an_interrupt_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupt(cfg):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, main=interrupt)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"


# ---------------------------------------------------------------------------------------------- files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.txt"
    common.write_atomic(file, b"one")
    before = file.stat().st_ino
    common.write_atomic(file, b"one")
    assert file.stat().st_ino != before  # a new file took its place, the old one was never open for writing
    with pytest.raises(ZeroDivisionError), common.replacing(file) as temporary:
        temporary.write_bytes(b"tw")
        assert file.read_bytes() == b"one"
        raise ZeroDivisionError
    assert file.read_bytes() == b"one" and list(tmp_path.iterdir()) == [file]
    common.write_lines(file, [{"a": 1}, {"b": "\u00e9"}])
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"b": "\u00e9"}]


def python(code: str, **more) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)


def test_a_second_process_is_refused_until_the_first_ends_even_by_kill_9(tmp_path):
    lock = f"common.lock(pathlib.Path({str(tmp_path)!r}))"
    first = python(f"import common, pathlib, time; {lock}; print(1, flush=True); time.sleep(600)")
    assert first.stdout.readline() == "1\n"
    with pytest.raises(UserError, match="another process is writing to"):
        common.lock(tmp_path)
    first.kill()
    first.wait()
    common.lock(tmp_path)
    common.lock(tmp_path)  # the same process may ask again


def test_openmp_spins_briefly_unless_the_user_says_otherwise():
    before, _, after = (ROOT / "common.py").read_text().partition("GOMP_SPINCOUNT")
    assert "import torch" in after and "import torch" not in before  # torch reads it when it is imported
    code = "import common, os; print(os.environ['GOMP_SPINCOUNT'])"
    assert python(f"import os; os.environ.clear(); {code}").communicate()[0] == "2000\n"
    assert python(code, GOMP_SPINCOUNT="7").communicate()[0] == "7\n"  # the user's own stays


# -------------------------------------------------------------------------------------------- run directories


class Stand:
    """What save_run and load_run need of a policy: a model, a device, and a way to save."""

    def __init__(self, seed=0, width=3):
        torch.manual_seed(seed)
        self.model, self.device = torch.nn.Linear(width, 1), torch.device("cpu")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def save(self, directory):
        (directory / "model.txt").write_text("saved")

    def step(self, x: float) -> None:
        self.model(torch.full((1, self.model.in_features), float(x))).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_a_run_directory_is_opened_once_and_resumed_only_as_it_was(tmp_path):
    cfg = Config(out=tmp_path / "run")
    with pytest.raises(UserError, match="--resume: no run in"):
        common.open_run(Config(out=cfg.out, resume=True))
    common.open_run(cfg)
    about = json.loads((cfg.out / "run.json").read_text())
    assert about["config"]["lr"] == 0.1 and about["torch"] == torch.__version__
    with pytest.raises(UserError, match="holds a run already: pass --resume"):
        common.open_run(cfg)
    common.open_run(Config(out=cfg.out, resume=True, device="cpu"))
    with pytest.raises(UserError, match=r"another steps \(4, now 9\), lr \(0.1, now 0.3\)"):
        common.open_run(Config(out=cfg.out, resume=True, lr=0.3, steps=9))
    common.open_run(Config(out=cfg.out, resume=True, steps=9), may_change=("steps",))


def test_a_resumed_run_is_where_it_stopped_and_later_metrics_are_dropped(tmp_path):
    one = Stand()
    for step in (1, 2, 3):
        one.step(step)
        common.log_metrics(tmp_path, {"step": step})
        if step == 2:
            common.save_run(tmp_path, one, one.optimizer, step)
            weights = one.model.weight.detach().clone()
    two = Stand(seed=1)
    assert common.load_run(tmp_path, two, two.optimizer) == 2 and torch.equal(two.model.weight, weights)
    assert (tmp_path / "model.txt").read_text() == "saved"  # by the policy, in its own layout
    assert read_lines(tmp_path) == [{"step": 1}, {"step": 2}]
    two.step(3)
    assert torch.equal(one.model.weight, two.model.weight)  # the moments of AdamW came back too


def test_a_run_without_a_checkpoint_starts_again_from_step_0(tmp_path):
    common.log_metrics(tmp_path, {"step": 1})
    stand = Stand()
    assert common.load_run(tmp_path, stand, stand.optimizer) == 0 and read_lines(tmp_path) == []


def test_a_checkpoint_of_another_policy_is_refused(tmp_path):
    one, renamed, wider = Stand(), Stand(), Stand(width=4)
    common.save_run(tmp_path, one, one.optimizer, 1)
    renamed.model = torch.nn.Sequential(renamed.model)
    for other in (renamed, wider):
        with pytest.raises(UserError, match="a checkpoint of another policy"):
            common.load_run(tmp_path, other, other.optimizer)


def test_frozen_weights_are_not_in_the_checkpoint(tmp_path):
    stand = Stand()
    stand.model.bias.requires_grad_(False)
    common.save_run(tmp_path, stand, stand.optimizer, 1)
    assert list(torch.load(tmp_path / "state.pt")["weights"]) == ["weight"]


def test_a_crash_in_the_middle_of_saving_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    stand = Stand()
    common.save_run(tmp_path, stand, stand.optimizer, 1)
    before = (tmp_path / "state.pt").read_bytes()

    def crash(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="no space left"):
        common.save_run(tmp_path, stand, stand.optimizer, 2)
    assert (tmp_path / "state.pt").read_bytes() == before and not list(tmp_path.glob(".tmp*"))


def test_the_command_that_resumes_repeats_all_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "qwen3b", "--out", "my runs/a"])
    assert common.resume_command() == "python train_rl.py qwen3b --out 'my runs/a' --resume"
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "--resume"])
    assert common.resume_command() == "python train_rl.py --resume"


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_stop_and_the_second_stops(number, capsys):
    stop = common.StopSignal()
    assert signal.getsignal(number) == stop.handle and not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested and "stopping after this step" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        stop.handle(number, None)


def test_the_norm_over_all_groups_of_weights_is_scaled_down_to_the_limit():
    """The gradient (3, 4) has norm 5; a limit of 1 makes it (0.6, 0.8), a limit of 9 leaves it."""
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two]}], lr=1.0)
    for limit, scaled in ((9.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        one.grad, two.grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert common.clip_gradients(optimizer, limit) == pytest.approx(5.0)
        assert [one.grad.item(), two.grad.item()] == pytest.approx(scaled, abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error_before_the_step(value):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, value])
    with pytest.raises(UserError, match="not finite"):
        common.clip_gradients(SimpleNamespace(param_groups=[{"params": [weight]}]), 1.0)
    assert weight.tolist() == [1.0, 1.0]
