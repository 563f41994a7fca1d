"""Faults: kill -9, signals, full disks, full GPUs, numbers that are not finite, two runs at once, broken checkpoints.

Processes that are killed are real ones. They come from one server process that has torch loaded, so each starts quickly.

Lines that were flipped, each with the test that then failed:
"""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

import data
import eval as eval_script
import model as model_module
import test_eval
import test_train_rl
import test_train_sft
import train_rl
import train_sft
from model import load_policy
from rollout import replay

ROOT = Path(train_sft.__file__).parent
lines, same, weights = test_train_rl.lines, test_train_rl.same, test_train_rl.weights
TIMES = test_train_sft.TIMES | test_train_rl.TIMES


def without_times(out) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in lines(out)]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A saved policy with random weights."""
    out = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    load_policy("tiny", device="cpu").save(out)
    return out


# ------------------------------------------------------------------------------------------------ mistakes of the policy


def test_every_kind_of_mistake_is_counted(start, tmp_path, monkeypatch):
    """Four rollouts of three turns: right; not JSON; an image that is not there, then an open tag; no action."""

    def play(policy, probes, **_):
        answer = f"<answer>{probes[0].answer}</answer>"
        absent = test_train_rl.CROP.replace("original_image", "observation_5")
        texts = [
            [answer],
            ["<grounding>x</grounding>", "<answer>no</answer>"],
            [absent, "<grounding>", "<answer>no</answer>"],
            ["hm"],
        ]
        return [replay(policy, probes[0], said) for said in texts]

    monkeypatch.setattr(train_rl, "rollout", play)
    train_rl.main(test_train_rl.small(start, tmp_path))
    (row,) = lines(tmp_path)
    counted = {key.removeprefix("error/"): value for key, value in row.items() if key.startswith("error/")}
    assert {code for code, value in counted.items() if value == 0.25} == {
        "bad_json",
        "unknown_source",
        "unclosed_tag",
    }
    assert row["errors"] == 0.75 and row["stop/void"] == 0.25
    episodes = play(load_policy(str(start), device="cpu"), [data.make_probe("sign", "easy", 0)])
    assert eval_script.summarise(episodes, 4, (6,))["errors"] == counted


# ------------------------------------------------------------------------------------------------ runs to be killed


def small_pictures() -> None:
    original = data.probe_stream
    data.probe_stream = lambda *args, **size: original(
        *args, **{"grid": 2, "cell": 24, "candidates": 4, **size}
    )


def run_sft(start, out, **changes) -> None:
    train_sft.main(test_train_sft.small(out, **{"steps": 6, "save_every": 2, **changes}))


def run_rl(start, out, **changes) -> None:
    """Rollouts are invented, so that random weights have something to learn from; all else is real."""
    small_pictures()
    train_rl.rollout = test_train_rl.inventor()
    train_rl.main(test_train_rl.small(start, out, **{"steps": 6, "save_every": 2, **changes}))


def run_eval(start, out, **changes) -> None:
    small_pictures()
    eval_script.main(test_eval.small(start, out, **changes))


def hold(start, out) -> None:
    """Another run in this directory, for a minute."""
    data.lock(Path(out))
    (Path(out) / "held").touch()
    time.sleep(60)


def full_disk(start, out, **changes) -> None:
    """Files may not grow beyond a few kB: as on a full disk, writes fail in the middle, whoever makes them."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    run_sft(start, out, **changes)


def command_line(work, said: Path, *args, **more) -> None:
    """Runs `work` as a script would: what it says goes to a file, mistakes of users are one line."""
    with open(said, "w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        sys.argv = ["script.py"]
        data.command(lambda _: work(*args, **more), test_train_sft.Config)


@pytest.fixture(scope="module")
def process():
    """process(work, *args): runs a function of this file in a process of its own, on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_faults"])
        numbers = iter(range(1000))

        def begin(work, start, out, **more):
            said = Path(out).with_name(f"said-{next(numbers)}.txt")
            child = context.Process(target=command_line, args=(work, said, start, out), kwargs=more)
            child.said = said
            child.start()
            return child

        yield begin


def finished(child) -> str:
    child.join(600)
    said = child.said.read_text()
    assert child.exitcode is not None, said
    return said


def check_whole(out: Path) -> None:
    """Whatever is there can be used: the checkpoint, the policy, every line that the checkpoint knows of."""
    if (out / "state.pt").exists():
        assert len(lines_that_are_whole(out)) >= torch.load(out / "state.pt", weights_only=True)["step"]
    if (out / "model.safetensors").exists():
        load_policy(str(out), device="cpu")


def lines_that_are_whole(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


@pytest.mark.survives(
    "faults",
    "`kill -9` at any moment of training",
    "`--resume` ends with the same weights and metrics, bit for bit",
)
@pytest.mark.parametrize("work", [run_sft, run_rl])
def test_a_run_killed_at_random_moments_and_resumed_equals_an_uninterrupted_one(
    start, tmp_path, process, work
):
    began = time.time()
    said = finished(process(work, start, tmp_path / "straight"))
    seconds, out, kills, chance = time.time() - began, tmp_path / "broken", [], random.Random(work.__name__)
    assert len(lines(tmp_path / "straight")) == 6, said
    while len(kills) < 3:
        child = process(work, start, out, resume=(out / "run.json").exists())
        child.join(chance.uniform(0.2, 1.0) * seconds)
        if child.exitcode is not None:  # done: it was resumed often enough
            assert child.exitcode == 0, child.said.read_text()
            if kills:
                break
            shutil.rmtree(out)  # done before any kill: sooner, then
            seconds /= 2
            continue
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills.append(len(lines_that_are_whole(out)) if (out / "metrics.jsonl").exists() else 0)
        check_whole(out)
    if (
        len(lines(out)) < 6
        or not (out / "state.pt").exists()
        or torch.load(out / "state.pt", weights_only=True)["step"] < 6
    ):
        child = process(work, start, out, resume=(out / "run.json").exists())
        said = finished(child)
        assert child.exitcode == 0, said
    assert [row["step"] for row in lines(out)] == [1, 2, 3, 4, 5, 6], kills  # none repeated, none lost
    assert without_times(out) == without_times(tmp_path / "straight"), kills
    assert same(weights(out), weights(tmp_path / "straight")), kills
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (tmp_path / "straight").iterdir()}  # nothing half-written is left


@pytest.mark.survives(
    "faults",
    "`kill -9` at any moment of an evaluation",
    "the same command starts again and gives the same; `results.json` comes last",
)
def test_an_evaluation_killed_at_random_moments_starts_again_and_gives_the_same(start, tmp_path, process):
    began = time.time()
    finished(process(run_eval, start, tmp_path / "straight"))
    seconds, out, chance, killed = time.time() - began, tmp_path / "broken", random.Random(3), 0
    expected = (tmp_path / "straight/episodes.jsonl").read_text()
    for _ in range(4):
        child = process(run_eval, start, out)
        child.join(chance.uniform(0.3, 1.0) * seconds)
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        child.join()
        if (out / "results.json").exists():  # then all of it is there
            assert (out / "episodes.jsonl").read_text() == expected
    finished(process(run_eval, start, out))
    one, other = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("straight", "broken")
    )
    assert killed and (out / "episodes.jsonl").read_text() == expected
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_results_are_written_last_and_those_before_are_gone_first(start, tmp_path, monkeypatch):
    run = lambda: eval_script.main(test_eval.small(start, tmp_path, count=1, samples=1))
    run()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_script, "draw_curves", die)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("run", [run_sft, run_rl])
def test_a_run_killed_before_its_first_checkpoint_is_resumed_from_the_start(
    start, tmp_path, run, monkeypatch
):
    monkeypatch.setattr(data, "probe_stream", data.probe_stream)  # run_rl replaces both
    monkeypatch.setattr(train_rl, "rollout", train_rl.rollout)
    run(start, tmp_path / "straight", steps=2)
    shutil.copytree(tmp_path / "straight", tmp_path / "early")
    (tmp_path / "early/state.pt").unlink()
    with open(tmp_path / "early/metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')  # killed in the middle of a line
    run(start, tmp_path / "early", steps=2, resume=True)
    assert without_times(tmp_path / "early") == without_times(tmp_path / "straight")
    assert same(weights(tmp_path / "early"), weights(tmp_path / "straight"))


# ------------------------------------------------------------------------------------------------ checkpoints


class Killed(BaseException):
    """Stands for kill -9 where the moment matters."""


@pytest.mark.survives(
    "faults", "a crash in the middle of saving", "the last checkpoint and the last policy are whole"
)
@pytest.mark.parametrize("moment", [*range(8), "in the weights"])
def test_the_last_policy_is_whole_until_the_next_one_is(start, tmp_path, monkeypatch, moment):
    """The process dies when so many of the eight files have taken their place, or while the weights are written."""
    shutil.copytree(start, tmp_path, dirs_exist_ok=True)
    before = dict(load_policy(str(tmp_path), device="cpu").model.named_parameters())
    torch.manual_seed(1)
    other, replaced, original = load_policy("tiny", device="cpu"), [], os.replace

    def replace(source, target):
        if len(replaced) == moment:
            raise Killed
        replaced.append(Path(target).name)
        original(source, target)

    def save_half(place):
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"half of it")
        raise Killed

    monkeypatch.setattr(os, "replace", replace)
    if moment == "in the weights":
        monkeypatch.setattr(other.model, "save_pretrained", save_half)
    with pytest.raises(Killed):
        other.save(tmp_path)
    assert "model.safetensors" not in replaced  # it comes last
    now = dict(load_policy(str(tmp_path), device="cpu").model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in before.items())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def drop_a_weight(folder: Path) -> None:
    tensors = safetensors_of(folder / "model.safetensors")
    del tensors[min(name for name in tensors if name.endswith("q_proj.weight"))]
    save_safetensors(tensors, folder / "model.safetensors")


def safetensors_of(file: Path) -> dict:
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def save_safetensors(tensors: dict, file: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def narrower(folder: Path) -> None:
    model_module.tiny_model(model_module.tiny_tokenizer(), width=64).save_pretrained(folder / "64")
    shutil.move(folder / "64/model.safetensors", folder / "model.safetensors")


JSON_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "protocol.json",
)
DAMAGE = {
    **{
        f"cut {name}": (lambda folder, name=name: cut(folder / name), f"{name}: not JSON.*cut short")
        for name in JSON_FILES
    },
    **{
        f"empty {name}": (lambda folder, name=name: (folder / name).write_text(""), f"{name}: not JSON")
        for name in JSON_FILES
    },
    **{
        f"list {name}": (
            lambda folder, name=name: (folder / name).write_text("[]"),
            f"{name}: should be an object",
        )
        for name in JSON_FILES
    },
    "binary config": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0"),
        "config.json: cannot be read as UTF-8",
    ),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors: .*cut short"),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "model.safetensors: .*cut short",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load .*model.safetensors"),
    "a weight too few": (
        drop_a_weight,
        "cannot load .*lacks model.language_model.layers.0.self_attn.q_proj.weight",
    ),
    "another shape": (narrower, "cannot load .*mismatch"),
    "another kind": (lambda folder: change(folder / "config.json", model_type="bert"), "cannot load"),
    "an unknown kind": (
        lambda folder: change(folder / "config.json", model_type="none"),
        "cannot load .*none",
    ),
    "no kind": (lambda folder: (folder / "config.json").write_text("{}"), "cannot load"),
    "no tokens": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot load"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load"),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "cannot load"),
    "protocol key": (lambda folder: change(folder / "protocol.json", colour="red"), "cannot load .*colour"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "cannot load None"),
    "cut adapter": (
        lambda folder: (folder / "adapter_config.json").write_text('{"r'),
        "adapter_config.json: not JSON",
    ),
}


@pytest.mark.survives(
    "files",
    "a policy with a file that is cut, empty, missing, or of another model",
    "one line that names it; never random weights instead",
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_policy_is_one_line_that_names_it(start, tmp_path, damage):
    shutil.copytree(start, tmp_path / "policy")
    harm, message = DAMAGE[damage]
    harm(tmp_path / "policy")
    with pytest.raises(data.UserError, match=message) as caught:
        load_policy(str(tmp_path / "policy"), device="cpu")
    said = str(caught.value)
    assert (
        "\n" not in said
        and len(said) < 300 + 2 * len(str(tmp_path))
        and (str(tmp_path) in said or damage == "adapter")
    )


@pytest.fixture(scope="module")
def adapter(qwen25_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    load_policy(qwen25_dir, lora_rank=4, device="cpu").save(out)
    return out


def reshape(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_safetensors(
        {name: tensor[..., :-1].contiguous() for name, tensor in safetensors_of(file).items()}, file
    )


def rename(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_safetensors(
        {name.replace("layers.1.", "layers.7."): tensor for name, tensor in safetensors_of(file).items()},
        file,
    )


@pytest.mark.survives(
    "files",
    "an adapter of another shape, or for other layers",
    "refused; peft would warn and go on without it",
)
@pytest.mark.parametrize(
    "harm, message",
    [
        (reshape, "cannot put the adapter .* on "),
        (rename, "cannot put the adapter .*missing adapter keys"),
        (lambda folder: cut(folder / "adapter_model.safetensors"), "adapter_model.safetensors: .*cut short"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot put the adapter"),
        (lambda folder: change(folder / "adapter_config.json", r="many"), "cannot put the adapter"),
    ],
)
def test_a_damaged_adapter_is_one_line_that_names_it(adapter, tmp_path, harm, message):
    shutil.copytree(adapter, tmp_path / "adapter")
    harm(tmp_path / "adapter")
    with pytest.raises(data.UserError, match=message) as caught:
        load_policy(str(tmp_path / "adapter"), device="cpu")
    assert str(tmp_path / "adapter") in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory) -> Path:
    """A run of RL after one step. Its vision tower is frozen."""
    out = tmp_path_factory.mktemp("run") / "rl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "probe_stream", data.probe_stream)
        patch.setattr(train_rl, "rollout", None)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        run_rl(start, out, steps=1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return out


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def rewrite(file: Path, edit) -> None:
    state = torch.load(file, weights_only=True)
    torch.save(edit(state), file)


def without_a_weight(state: dict) -> dict:
    state["weights"].popitem()
    return state


def transposed(state: dict) -> dict:
    name = next(
        name
        for name, weight in state["weights"].items()
        if weight.dim() == 2 and weight.shape[0] != weight.shape[1]
    )
    state["weights"][name] = state["weights"][name].T.contiguous()
    return state


BROKEN_STATES = {
    "cut": (cut, "state.pt: "),
    "a flipped byte": (flip_a_byte, "is damaged"),
    "text": (lambda file: file.write_text("hello"), "state.pt: File is not a zip file"),
    "empty": (lambda file: file.write_bytes(b""), "state.pt: File is not a zip file"),
    "a list": (lambda file: torch.save([1], file), "state.pt: "),
    "no weights": (lambda file: rewrite(file, lambda state: {"step": 1}), "state.pt: 'weights'"),
    "no step": (lambda file: rewrite(file, lambda state: {**state, "step": None}), "state.pt: int"),
    "no optimizer": (
        lambda file: rewrite(file, lambda state: {**state, "optimizer": {}}),
        "state.pt: 'param_groups'",
    ),
    "another policy": (lambda file: rewrite(file, without_a_weight), "of another policy, .* differ"),
    "another shape": (lambda file: rewrite(file, transposed), "of another policy, .* differ"),
    "another base": (
        lambda file: rewrite(file, lambda state: {**state, "frozen": 1}),
        "of another policy, the frozen weights differ",
    ),
    "fewer metrics": (
        lambda file: (file.parent / "metrics.jsonl").write_text(""),
        "metrics.jsonl has 0 lines only, .* step 1",
    ),
    "no metrics": (lambda file: (file.parent / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "binary metrics": (
        lambda file: (file.parent / "metrics.jsonl").write_bytes(b"\xff\xfe"),
        "cannot go on from",
    ),
    "cut run.json": (lambda file: cut(file.parent / "run.json"), "run.json: not JSON"),
    "list run.json": (
        lambda file: (file.parent / "run.json").write_text("[]"),
        "run.json: should be an object",
    ),
    "no configuration": (lambda file: (file.parent / "run.json").write_text("{}"), "holds no configuration"),
    "odd configuration": (
        lambda file: (file.parent / "run.json").write_text('{"config": 3}'),
        "holds no configuration",
    ),
    "no run.json": (lambda file: (file.parent / "run.json").unlink(), "delete it and run again"),
}


@pytest.mark.survives(
    "files",
    "a run directory with a damaged or foreign `state.pt`, `metrics.jsonl` or `run.json`",
    "`--resume` refuses in one line and changes nothing",
)
@pytest.mark.parametrize("damage", BROKEN_STATES)
def test_a_damaged_run_directory_is_one_line_and_is_left_as_it_was(
    start, stopped, tmp_path, damage, monkeypatch
):
    monkeypatch.setattr(data, "probe_stream", data.probe_stream)
    monkeypatch.setattr(train_rl, "rollout", None)
    out = tmp_path / "rl"
    shutil.copytree(stopped, out)
    harm, message = BROKEN_STATES[damage]
    harm(out / "state.pt")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.json"}
    with pytest.raises(data.UserError, match=message) as caught:
        train_rl.main(test_train_rl.small(start, out, steps=2, save_every=2, resume=True))
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.json"} == before


def test_frozen_weights_are_known_again_by_the_sum_of_their_bytes(start):
    policy = load_policy(str(start), device="cpu")
    assert train_sft.frozen_sum(policy) == 0
    policy.base.model.visual.requires_grad_(False)
    before = train_sft.frozen_sum(policy)
    with torch.no_grad():
        next(policy.base.model.visual.parameters()).view(-1)[0] += 0.5
    assert before != train_sft.frozen_sum(policy) != 0


def test_a_checkpoint_never_runs_code(tmp_path, stopped, start):
    """torch.load takes plain data only: an object of a class that it does not know is refused, whatever it would do."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    shutil.copytree(stopped, tmp_path / "rl")
    torch.save({"weights": Evil()}, tmp_path / "rl/state.pt")
    policy = load_policy(str(start), device="cpu")
    with pytest.raises(Exception, match="Weights only load failed"):
        train_sft.load_run(tmp_path / "rl", policy, torch.optim.AdamW(policy.model.parameters()))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.survives(
    "files", "`--against` a folder whose `results.json` is cut or something else", "one line, before the work"
)
@pytest.mark.parametrize("content", ["{", "[]", '{"label": "x"}'])
def test_broken_results_to_compare_with_are_named(start, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(data.UserError, match="results.json"):
        eval_script.main(test_eval.small(start, tmp_path / "eval", against=(tmp_path,)))
    assert not (tmp_path / "eval").exists()


# ------------------------------------------------------------------------------------------------ full disks


@pytest.mark.survives(
    "faults", "a full disk", "one line that says so; the last checkpoint is whole, `--resume` goes on from it"
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_can_be_resumed(start, tmp_path, process):
    """The limit on file sizes makes the real writers fail: json, safetensors, torch."""
    out = tmp_path / "run"
    finished(process(run_sft, start, out, steps=2))
    shutil.copytree(out, tmp_path / "undisturbed")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".jsonl"}
    child = process(full_disk, start, out, steps=4, resume=True)
    said = [line for line in finished(child).replace("\r", "\n").splitlines() if "error" in line]
    assert child.exitcode == 2 and len(said) == 1, said
    assert (
        f"step 4 could not be saved in {out}" in said[0]
        and "is the disk full?" in said[0]
        and "--resume" in said[0]
    )
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".jsonl"}
    assert {**after, "run.json": b""} == {**before, "run.json": b""}  # and nothing half-written takes up room
    for run in (out, tmp_path / "undisturbed"):
        finished(process(run_sft, start, run, steps=4, resume=True))
    assert len(lines(out)) == 4 and without_times(out) == without_times(tmp_path / "undisturbed")
    assert same(weights(out), weights(tmp_path / "undisturbed"))


@pytest.mark.parametrize("failing", ["safetensors", "torch", "os"])
def test_each_name_of_a_full_disk_is_understood(start, tmp_path, monkeypatch, failing):
    from safetensors import SafetensorError

    full = {
        "safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
        "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        "os": OSError(errno.ENOSPC, "No space left on device"),
    }[failing]

    def fail(*arguments, **__):
        if failing == "torch":
            Path(arguments[1]).write_bytes(b"half of it")
        raise full

    run_sft(start, tmp_path, steps=1)
    before = (tmp_path / "state.pt").read_bytes(), (tmp_path / "model.safetensors").read_bytes()
    if failing == "safetensors":
        monkeypatch.setattr(transformers.Qwen2_5_VLForConditionalGeneration, "save_pretrained", fail)
    elif failing == "torch":
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
        monkeypatch.setattr(train_sft, "write_atomic", lambda *_: None)
    with pytest.raises(data.UserError, match="step 2 could not be saved.*is the disk full"):
        run_sft(start, tmp_path, steps=2, resume=True)
    assert (tmp_path / "state.pt").read_bytes() == before[0]
    assert not [
        path for path in tmp_path.iterdir() if path.name in (".partial", ".tmp.state.pt")
    ]  # takes up no room
    if failing != "torch":
        assert (tmp_path / "model.safetensors").read_bytes() == before[1]


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 2), (errno.EDQUOT, 2), (errno.EFBIG, 2)])
def test_a_full_disk_anywhere_else_is_one_line_too(monkeypatch, capsys, number, code):
    def main(_):
        raise OSError(number, os.strerror(number), "runs/eval/episodes.jsonl")

    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as stop:
        data.command(main, train_sft.Config)
    said = capsys.readouterr().err
    assert stop.value.code == code and len(said.splitlines()) == 1
    assert "runs/eval/episodes.jsonl" in said and "is the disk full?" in said


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def main(_):
        raise FileNotFoundError(errno.ENOENT, "No such file")

    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(FileNotFoundError):
        data.command(main, train_sft.Config)


# ------------------------------------------------------------------------------------------------ full GPUs


@pytest.mark.survives(
    "faults", "CUDA out of memory", "one line: what was in memory, and three flags that need less"
)
@pytest.mark.parametrize(
    "script, config, broken",
    [
        (train_sft, lambda start, out: test_train_sft.small(out), "token_logprobs"),
        (train_rl, lambda start, out: test_train_rl.small(start, out), "rollout"),
        (eval_script, lambda start, out: test_eval.small(start, out), "rollout"),
    ],
)
def test_out_of_gpu_memory_is_one_line_with_three_flags_that_exist(
    start, tmp_path, monkeypatch, script, config, broken
):
    def full(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1 GiB.\nMore."
        )

    monkeypatch.setattr(script, broken, full)
    with pytest.raises(data.UserError) as caught:
        script.main(config(start, tmp_path / "out"))
    said = str(caught.value)
    flags = said.split("smaller ")[1].split(", ")
    assert len(flags) == 3 and all(
        flag.removeprefix("--") in script.Config.__dataclass_fields__ for flag in flags
    )
    assert "Tried to allocate 20.00 MiB" in said and "\n" not in said
    for part in ("weights", "gradients", "optimizer", "KV cache"):
        assert part in said


class FakeCuda(torch.nn.Parameter):
    """A parameter that says it lies on the GPU."""

    is_cuda = True


def test_what_was_in_memory_adds_up(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10_000_000)
    weight = FakeCuda(torch.zeros(1_000_000))  # 4 MB
    with pytest.raises(
        data.UserError, match=r"In memory: 0.01 GB, of which weights 0.00, .* the rest 0.01\. Less"
    ):
        with model_module.memory_advice("--slots"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3_000_000_000)
    many = FakeCuda(torch.zeros(1).expand(500_000_000))  # 2 GB, if it were
    with pytest.raises(
        data.UserError, match=r"In memory: 3.00 GB, of which weights 2.00, .* the rest 1.00\. Less"
    ):
        with model_module.memory_advice("--slots"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    assert weight.is_cuda and many.is_cuda


# ------------------------------------------------------------------------------------------------ numbers that are not finite


def poisoned(monkeypatch, *steps: int, value: float = float("nan")) -> None:
    """From now on, the log-probs of these steps of SFT (from 0) are not finite."""
    calls, original, draw = iter(range(10**6)), train_sft.token_logprobs, train_sft.draw_batch
    batch = draw(
        test_train_sft.small("unused"), test_train_sft.tiny(), 3
    )  # one for all steps: spares the drawing
    monkeypatch.setattr(train_sft, "draw_batch", lambda *_: batch)
    monkeypatch.setattr(
        train_sft, "micro_batches", lambda episodes, *_, **__: [episodes]
    )  # one call is one step
    monkeypatch.setattr(
        train_sft, "token_logprobs", lambda *args: original(*args) * (value if next(calls) in steps else 1.0)
    )


def one_batch(out, **changes):
    return test_train_sft.small(out, **{"save_every": 100, **changes})


@pytest.mark.survives(
    "faults", "a loss or a gradient that is not finite", "the step is skipped, counted (`skipped`) and shown"
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_without_a_finite_loss_is_skipped_counted_and_shown(tmp_path, monkeypatch, capsys, value):
    poisoned(monkeypatch, 0, value=value)
    train_sft.main(one_batch(tmp_path, steps=1))
    (row,) = lines(tmp_path)
    assert (row["skipped"], row["loss"], row["grad_norm"]) == (1, None, None)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()  # no JSON
    said = capsys.readouterr()
    assert "step 1: loss or gradient is not finite, update skipped" in said.out + said.err
    before = dict(test_train_sft.tiny().model.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tmp_path).items())


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for gradient, loss, skipped in (
        ([1.0, float("nan")], 1.0, True),
        ([1.0, float("inf")], 1.0, True),
        ([1.0, 1.0], float("nan"), True),
        ([1.0, 1.0], float("inf"), True),
        ([1.0, 1.0], 1.0, False),
    ):
        weight.grad = torch.tensor(gradient)
        before = weight.detach().clone()
        assert train_sft.update(optimizer, 1.0, loss)[1] == skipped
        assert torch.equal(before, weight) == skipped and weight.grad is None


def test_a_skipped_step_leaves_the_others_as_they_would_be(tmp_path, monkeypatch):
    poisoned(monkeypatch, 1)
    train_sft.main(one_batch(tmp_path, steps=3))
    assert [row["skipped"] for row in lines(tmp_path)] == [0, 1, 0]
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path).values())
    assert lines(tmp_path)[2]["loss"] < lines(tmp_path)[0]["loss"]


@pytest.mark.survives(
    "faults", "ten such steps in a row", "the run stops, the batch is saved in `broken_batch.pt`"
)
def test_ten_skipped_steps_in_a_row_stop_the_run_with_the_batch_saved(tmp_path, monkeypatch):
    poisoned(monkeypatch, *range(9), *range(10, 99))  # 9 in a row, one good, then 10 in a row
    with pytest.raises(data.UserError, match="ten steps in a row.*broken_batch.pt.*--lr"):
        train_sft.main(one_batch(tmp_path, steps=60))
    assert [row["skipped"] for row in lines(tmp_path)] == [1] * 9 + [0] + [1] * 10
    saved = torch.load(tmp_path / "broken_batch.pt", weights_only=True)
    monkeypatch.undo()
    cfg = one_batch(tmp_path)
    expected = train_sft.draw_batch(cfg, test_train_sft.tiny(), 3)
    assert [row["token_ids"].tolist() for row in saved] == [
        episode.token_ids.tolist() for episode in expected
    ]
    assert [row["seed"] for row in saved] == [episode.probe.meta["seed"] for episode in expected]


def test_rl_skips_a_bad_update_and_makes_the_good_one(start, tmp_path, monkeypatch):
    """Two updates in a step: the first is bad, the second is made."""
    monkeypatch.setattr(data, "probe_stream", data.probe_stream)
    monkeypatch.setattr(train_rl, "rollout", None)
    original, calls = train_rl.token_logprobs, iter(range(99))
    monkeypatch.setattr(
        train_rl,
        "token_logprobs",
        lambda *args: original(*args) * (float("nan") if next(calls) == 0 else 1.0),
    )
    run_rl(start, tmp_path, steps=1, questions=2, updates=2, micro_tokens=10**6)
    (row,) = lines(tmp_path)
    assert row["skipped"] == 1 and 0 < row["grad_norm"] < 1e6
    before = dict(load_policy(str(start), device="cpu").model.named_parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(tmp_path).items())
    assert all(torch.isfinite(weight).all() for weight in weights(tmp_path).values())


def test_ten_bad_steps_stop_rl_too_and_a_resumed_run_counts_on(start, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "probe_stream", data.probe_stream)
    monkeypatch.setattr(train_rl, "rollout", None)
    original = train_rl.token_logprobs
    monkeypatch.setattr(train_rl, "token_logprobs", lambda *args: original(*args) * float("inf"))
    run_rl(start, tmp_path, steps=7, save_every=7)
    with pytest.raises(data.UserError, match="ten steps in a row"):
        run_rl(start, tmp_path, steps=20, save_every=7, resume=True)
    assert len(lines(tmp_path)) == 10 and (tmp_path / "broken_batch.pt").exists()


# ------------------------------------------------------------------------------------------------ two runs, signals, changed runs


@pytest.mark.survives(
    "faults",
    "a second run, or evaluation, into one directory",
    "refused while the first lives; a killed one leaves no stale lock",
)
def test_a_second_run_into_one_directory_is_refused_until_the_first_is_dead(start, tmp_path, process):
    out = tmp_path / "run"
    other = process(hold, start, out)
    while not (out / "held").exists():
        assert other.exitcode is None, other.said.read_text()
        time.sleep(0.02)
    for again in (
        lambda: run_sft(start, out),
        lambda: train_rl.main(test_train_rl.small(start, out)),
        lambda: eval_script.main(test_eval.small(start, out, count=1)),
    ):
        with pytest.raises(data.UserError, match=f"another process is writing to {out}"):
            again()
    assert {path.name for path in out.iterdir()} == {".lock", "held"}
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    run_sft(start, out, steps=1)
    assert len(lines(out)) == 1


def test_two_sets_of_probes_cannot_be_drawn_into_one_directory(tmp_path, monkeypatch):
    """The second process looked before the first began: it fails where it makes the folder of images."""
    monkeypatch.setattr(data, "any", lambda _: False, raising=False)
    data.save_probes([data.make_probe("sign", "easy", 0, grid=2, cell=24)], tmp_path / "set")
    with pytest.raises(data.UserError, match="cannot write"):
        data.save_probes([data.make_probe("sign", "easy", 1, grid=2, cell=24)], tmp_path / "set")


@pytest.mark.survives(
    "faults", "Ctrl-C, SIGTERM", "stops after the current step, saved, and says how to go on"
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script, run", [(train_sft, run_sft), (train_rl, run_rl)])
def test_a_signal_ends_the_run_after_its_step_and_the_rest_is_as_it_would_have_been(
    start, tmp_path, monkeypatch, capsys, number, script, run
):
    monkeypatch.setattr(data, "probe_stream", data.probe_stream)
    monkeypatch.setattr(train_rl, "rollout", None)
    run(start, tmp_path / "straight", steps=3, save_every=100)
    original, asked = script.update, []

    def interrupted(*args):
        if not asked:
            asked.append(os.kill(os.getpid(), number))
        return original(*args)

    monkeypatch.setattr(script, "update", interrupted)
    run(start, tmp_path / "broken", steps=3, save_every=100)
    said = capsys.readouterr()
    assert "stopped after step 1; go on with: " in said.out + said.err and "--resume" in said.out + said.err
    assert (
        len(lines(tmp_path / "broken"))
        == torch.load(tmp_path / "broken/state.pt", weights_only=True)["step"]
        == 1
    )
    run(start, tmp_path / "broken", steps=3, save_every=100, resume=True)
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "straight")
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "straight"))


def test_a_signal_to_the_whole_group_of_processes_stops_the_run_as_well(tmp_path):
    """As a batch system sends it: to the process that draws, too."""
    run = subprocess.Popen(
        [sys.executable, "train_sft.py", "--out", str(tmp_path), "--device", "cpu", "--warmup_batch", "2"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while run.poll() is None and not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and "go on with: " in said and "Traceback" not in said
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == len(lines(tmp_path)) > 0


def test_ctrl_c_where_there_is_no_step_is_one_line(monkeypatch, capsys):
    def main(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit) as stop:
        data.command(main, train_sft.Config)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"


@pytest.mark.survives(
    "faults",
    "`--resume` with another configuration",
    "refused; the fields that changed are named with both values",
)
@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"lr": 0.5}, {"group_size": 5, "clip_low": 0.3}, {"over_turn": "zero_reward"}]
)
def test_a_changed_configuration_is_refused_by_naming_its_fields(start, stopped, tmp_path, changes):
    shutil.copytree(stopped, tmp_path / "rl")
    with pytest.raises(data.UserError) as caught:
        train_rl.main(
            test_train_rl.small(start, tmp_path / "rl", steps=1, save_every=2, resume=True, **changes)
        )
    assert all(
        f"{name} (" in str(caught.value) and f"now {value})" in str(caught.value)
        for name, value in changes.items()
    )
