"""bench/: gpu.py at toy size through all of its parts, and that the benchmarks compare like with like."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import common

import pytest

from bench import bench_probes, bench_rollout, gpu, random_bases, study
from data import make_probe
from env import OVER_TURN

SCRIPTS = (gpu.train_sft, gpu.train_rl, gpu.eval_script)


def test_gpu_runs_all_its_parts_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """The command of each part runs in this process, which is quicker."""
    file, started = tmp_path / "gpu.json", []
    flags = ["--device", "cpu", "--toy", "--out", str(file), "--bases", str(tmp_path)]

    def run(command, timeout, env):
        started.append(command[-1])
        # What a part puts into the scripts would end with its process.
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(common, "log_metrics", common.log_metrics)
            for script, name in itertools.product(SCRIPTS, ("load_policy", "rollout", "token_logprobs")):
                patches.setattr(script, name, getattr(script, name, None), raising=False)
            patches.setenv("TORCHDYNAMO_DISABLE", env["TORCHDYNAMO_DISABLE"])
            patches.setattr(sys, "argv", command[1:])
            common.cli(gpu.main, gpu.Config)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=run, TimeoutExpired=TimeoutError))
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    common.cli(gpu.main, gpu.Config)
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert list(dict.fromkeys(row[0] for row in rows)) == list(gpu.PARTS) == started
    assert "Error" not in printed and "failed" not in printed
    steps = ("sft, step", "rl, rollout", "rl, update", "eval, rollout")
    assert set(itertools.product(("qwen3b", "qwen7b"), steps)) <= {(row[0], row[1]) for row in rows}
    assert float({row[1]: row[-1] for row in rows}["log-probs, rollout and training"].split()[2]) < 1e-4

    file.write_text(file.read_text().replace('"done": true', '"done": false', 1))
    gpu.print_table(json.loads(file.read_text()))
    assert "| smoke | stopped here | " in capsys.readouterr().out
    common.cli(gpu.main, gpu.Config)
    assert started[len(gpu.PARTS) :] == ["smoke"] and "stopped here" not in capsys.readouterr().out


def test_gpu_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    gpu.main(gpu.Config())
    assert capsys.readouterr().out == "no CUDA GPU here: nothing measured\n"


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
