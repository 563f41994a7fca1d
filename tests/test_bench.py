"""bench/: gpu.py at toy size through all of its parts, and that the benchmarks compare like with like."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import common

import pytest

from bench import bench_probes, bench_rollout, gpu, random_bases, study
from data import make_probe
from env import OVER_TURN

PATCHED = [(gpu.common, "log_metrics"), (gpu.train_rl, "rollout"), (gpu.eval_script, "rollout")]
PATCHED += [(script, "load_policy") for script in (gpu.train_sft, gpu.train_rl, gpu.eval_script)]
PATCHED += [(script, "token_logprobs") for script in (gpu.train_sft, gpu.train_rl)]


def test_gpu_runs_all_its_parts_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """All parts in this process, which is quicker; then one of them again, as a user does."""
    cfg = gpu.Config(out=tmp_path / "gpu.json", bases=tmp_path, device="cpu", toy=True)

    def run(command, timeout, env):
        with (
            pytest.MonkeyPatch.context() as patches
        ):  # what a part puts into the scripts goes with its process
            for module, name in PATCHED:
                patches.setattr(module, name, getattr(module, name))
            gpu.main(replace(cfg, part=command[-1]))
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(gpu, "subprocess", SimpleNamespace(run=run, TimeoutExpired=TimeoutError))
        patches.setenv("TORCHDYNAMO_DISABLE", "1")
        gpu.main(cfg)
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert list(dict.fromkeys(row[0] for row in rows)) == list(gpu.PARTS)
    assert "Error" not in printed and "failed" not in printed
    measured = {(row[0], row[1]) for row in rows}
    for preset in ("qwen3b", "qwen7b"):
        for what in ("sft, step", "rl, rollout", "rl, update", "eval, rollout"):
            assert (preset, what) in measured
    (note,) = (row[-1] for row in rows if row[1] == "log-probs, rollout and training")
    assert float(note.split()[2]) < 1e-4

    results = json.loads(cfg.out.read_text())
    results["rollout"]["done"] = False
    common.write_atomic(cfg.out, json.dumps(results).encode())
    command = [
        sys.executable,
        gpu.__file__,
        "--device",
        "cpu",
        "--toy",
        "--out",
        cfg.out,
        "--bases",
        tmp_path,
    ]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == len(gpu.PARTS) - 1
    assert "| rollout | tiny, 2 turns, 2 episodes" in again.stdout and "stopped" not in again.stdout


@pytest.mark.parametrize("base, published", [("qwen3b", 3_754_622_976), ("qwen7b", 8_292_166_656)])
def test_random_bases_have_as_many_parameters_as_the_published_ones(base, published):
    model = random_bases.make_model(random_bases.make_config(base), "meta")
    assert sum(weight.numel() for weight in model.parameters()) == published


def test_both_sides_of_the_rollout_benchmark_say_the_same(policy):
    probes = [make_probe("sign", "easy", seed) for seed in range(2)]
    scripts = [bench_rollout.write_script(policy, number, turns=2) for number in range(2)]
    sides = bench_rollout.SIDES.values()
    (plain, read), (ours, read_by_us) = (play(policy, probes, scripts, 2) for play in sides)
    for a, b, script in zip(plain, ours, scripts):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert b.token_ids[b.assistant_mask].tolist() == [token for message in script for token in message]
    prompts = sum(int(e.assistant_mask.argmax()) for e in ours)
    # ours reads the first message token by token, but for the last token; the last message is said, not read
    whole = sum(len(e.token_ids) - len(script[1]) for e, script in zip(ours, scripts))
    assert read == {"prefill": prompts + whole, "images": 2 + 4}
    assert read_by_us == {"prefill": whole - sum(len(script[0]) - 1 for script in scripts), "images": 4}


@pytest.mark.parametrize("kind", bench_probes.data.PROBE_KINDS)
def test_the_crop_reader_of_the_gate_reads_crops(kind):
    reader = bench_probes.CropReader(kind, "hard")
    probe = make_probe(kind, "hard", 0)
    assert reader.answer(probe, probe.boxes) == probe.answer


EPISODES = [{"turns": t, "reward": r} for t, r in ((2, 1.0), (3, 1.0), (3, 0.0), (1, 0.0))] * 100
NUMBERS = dict.fromkeys(("mean_turns", "repeated_crops", "mean_tokens", "seconds", "peak_gb"), 1.0)
NUMBERS["stops"] = {"answer": 1.0, **dict.fromkeys(OVER_TURN, 0.0)}
PLAN = ("1 | cold start | 1 | --steps 9 | - |", "1 | masked | 1 | --steps 9 | |")
PLAN += tuple(f"4 | {n} steps | 1 | --steps 9 | --lr 1 --steps {n} |" for n in (100, 200))
PAGE = "\n".join(["<!-- table 1 -->", "<!-- end -->", "## The plan", *(f"| {line} |" for line in PLAN)])


def test_the_study_makes_each_run_once_goes_on_and_fills_its_tables(tmp_path, monkeypatch):
    said, page = [], tmp_path / "study.md"
    page.write_text(PAGE)

    def call(words, **_) -> int:
        folder = Path(words[words.index("--out") + 1])
        said.append(words[1].removesuffix(".py") + ("+" if "--resume" in words else ""))
        if words[1] == "eval.py":
            (folder / "results.json").write_text(json.dumps(NUMBERS))
            common.write_lines(folder / "episodes.jsonl", EPISODES)
        else:
            (folder / "log.txt").write_text("stopped; go on with: x" if len(said) == 5 else "saved")
            (folder / "run.json").touch()
            common.write_lines(folder / "metrics.jsonl", [{"time/step": 1.0, "over_turn": 0.5}])
        return 0

    monkeypatch.setattr(study.subprocess, "call", call)
    monkeypatch.setattr(study, "PAGES", (page, page))
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.json")
    cfg = study.Config(out=tmp_path / "runs", jobs=1)
    with pytest.raises(common.UserError, match="--lr 1 --steps 100 was stopped"):
        study.main(cfg)
    study.main(cfg)
    study.main(cfg)  # all rows are there
    assert " ".join(said) == "train_sft eval train_rl eval train_rl train_rl+ eval train_rl+ eval"
    # At 1, 2, 4 and 6 turns.
    assert "| masked | 1 | 0.0 | 25.0 | 50.0 | 50.0 |" in page.read_text()


def test_the_pages_show_the_tables_that_the_rows_of_the_study_make():
    tables = study.make_tables(json.loads(study.RESULTS.read_text()))
    for page in study.PAGES:
        assert study.fill_page(page.read_text(), tables) == page.read_text()
