"""bench/: gpu.py at toy size through all of its parts, and that the benchmarks compare like with like."""

import json
import subprocess
import sys
from pathlib import Path

import common

import pytest
import torch
from conftest import noise_probes

from bench import bench_probes, bench_rollout, bench_train, gpu, random_bases
from data import make_probe
from model import token_logprobs
from rollout import rollout

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory) -> tuple[gpu.Config, str]:
    """gpu.py at toy size: its configuration, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, BENCH / "gpu.py", "--device", "cpu", "--toy"]
    command += ["--out", folder / "gpu.json", "--bases", folder]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return gpu.Config(out=folder / "gpu.json", bases=folder, device="cpu", toy=True), run.stdout


def test_gpu_runs_all_its_parts(toy_run):
    cfg, printed = toy_run
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert list(dict.fromkeys(row[0] for row in rows)) == list(gpu.PARTS)
    assert "Error" not in printed and "failed" not in printed
    measured = {(row[0], row[1]) for row in rows}
    for preset in ("qwen3b", "qwen7b"):
        for what in ("sft, step", "rl, rollout", "rl, update", "eval, rollout"):
            assert (preset, what) in measured
    (note,) = (row[-1] for row in rows if row[1] == "log-probs, rollout and training")
    assert float(note.split()[2]) < 1e-4


def test_gpu_goes_on_part_by_part(toy_run, monkeypatch, capsys):
    cfg, _ = toy_run
    results = json.loads(cfg.out.read_text())
    results["rollout"]["done"] = False
    common.write_atomic(cfg.out, json.dumps(results).encode())
    started = []

    def run(command, timeout, env):
        started.append(command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    gpu.main(cfg)
    assert started == ["rollout"]
    assert "| rollout | stopped here | " in capsys.readouterr().out


def test_gpu_without_a_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(gpu.Config())
    assert capsys.readouterr().out == "no CUDA GPU here: nothing measured\n"


PUBLISHED = {"qwen3b": 3_754_622_976, "qwen7b": 8_292_166_656, "qwen3vl4b": 4_437_815_808}


@pytest.mark.parametrize("base", PUBLISHED)
def test_random_bases_have_as_many_parameters_as_the_published_ones(base):
    model = random_bases.make_model(random_bases.make_config(base), "meta")
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[base]


def test_both_sides_of_the_rollout_benchmark_say_the_same(policy):
    probes = [make_probe("sign", "easy", seed) for seed in range(2)]
    scripts = [bench_rollout.write_script(policy, number, turns=2) for number in range(2)]
    (plain, read), (ours, read_by_us) = (
        play(policy, probes, scripts, 2) for play in bench_rollout.SIDES.values()
    )
    for a, b, script in zip(plain, ours, scripts):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert b.token_ids[b.assistant_mask].tolist() == [token for message in script for token in message]
    prompts = sum(int(e.assistant_mask.argmax()) for e in ours)
    # ours reads the first message token by token, but for the last token; the last message is said, not read
    whole = sum(len(e.token_ids) - len(script[1]) for e, script in zip(ours, scripts))
    assert read == {"prefill": prompts + whole, "images": 2 + 4}
    assert read_by_us == {"prefill": whole - sum(len(script[0]) - 1 for script in scripts), "images": 4}


def test_the_baseline_of_the_training_benchmark_computes_the_same(policy):
    episodes = rollout(policy, noise_probes((200, 100), (96, 96)), max_turns=3, max_turn_tokens=20)
    same = [score(policy, episodes) for score in (token_logprobs, bench_train.plain_logprobs)]
    torch.testing.assert_close(*same, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", bench_probes.data.PROBE_KINDS)
def test_the_crop_reader_of_the_gate_reads_crops(kind):
    reader = bench_probes.CropReader(kind, "hard")
    probe = make_probe(kind, "hard", 0)
    assert reader.answer(probe, probe.boxes) == probe.answer
