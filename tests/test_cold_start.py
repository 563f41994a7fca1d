"""Tests of prepare/cold_start.py against a chat server on this machine.

Lines worth flipping, each with the test that then fails:
    open_log     the last line is kept as it is          -> a_stopped_cold_start_goes_on_where_it_was
    open_log     a changed run is not noticed            -> a_stopped_cold_start_goes_on_where_it_was
    main         every row is kept                       -> what_ends_right_is_kept_and_the_rest_is_counted
    main         paths as they were given                -> what_ends_right_is_kept_and_the_rest_is_counted
    play_all     a refused row stops everything          -> a_refused_row_is_left_for_next_time
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "prepare"))

import cold_start
from conftest import noise, run_main

from data import Probe, load_probes, save_probes
from env import SYSTEM_PROMPT, CropEnv
from rollout import replay

LOOK = '<think>Not yet.</think><grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}'


def search(body: dict) -> str:
    """Looks twice, then answers: even numbers right, 1 wrong, 3 without an action, 5 looks forever."""
    number, turn = int(re.search(r"Number (\d)", json.dumps(body))[1]), len(body["messages"]) // 2
    if turn < 3 or number == 5:
        return LOOK
    return "I give up" if number == 3 else f"<think>Seen.</think><answer>{number + number % 2}"


def play(monkeypatch, folder: Path, url: str, *flags) -> tuple[int, list[str], list[str]]:
    """Plays the six questions in folder/set, named by a relative path, into folder/out."""
    monkeypatch.chdir(folder)
    if not Path("set").exists():
        save_probes([Probe(noise(64, 64, i), f"Number {i}?", str(i), meta={"n": i}) for i in range(6)], "set")
    where = ["set", "--endpoint", url, "--model", "m", "--out", "out", "--max_turns", 5]
    return run_main(monkeypatch, "cold_start.py", *where, *flags)


def rows_of(log: Path) -> list[int]:
    return [json.loads(line)["row"] for line in log.read_text().splitlines()[1:]]


def test_the_written_searches_are_accepted_by_the_world():
    text = cold_start.EXEMPLARS.read_text(encoding="utf-8")
    for part in text.split("\n## ")[1:]:
        env = CropEnv(noise(1000, 1000), "?", max_turns=9)
        _, stop = [env.step(said) for said in re.findall(r"^Assistant: (.*)", part, re.MULTILINE)][-1]
        assert stop == "answer" and not env.errors and env.crops, part


def test_what_ends_right_is_kept_and_the_rest_is_counted(serve, tmp_path, monkeypatch, ragged):
    server = serve(search)
    code, said, _ = play(monkeypatch, tmp_path, server.url, "--temperature", 0.5)
    assert code == 0 and "3 searches in out" in said[-1]
    report = json.loads(Path("out/report.json").read_text())
    assert (report["played"], report["acceptance"], report["turns"]) == (6, 0.5, {"3": 3})
    assert report["outcomes"] == {"kept": 3, "wrong": 1, "void": 1, "turn_limit": 1}
    system = {body["messages"][0]["content"][0]["text"] for body in server.bodies}
    assert system == {SYSTEM_PROMPT + cold_start.read_exemplars(cold_start.EXEMPLARS)}
    assert system.pop().count("\n## ") == 6 and {body["temperature"] for body in server.bodies} == {0.5}
    kept = load_probes(tmp_path / "out")
    assert [(p.question, p.meta["n"]) for p in kept] == [(f"Number {i}?", i) for i in (0, 2, 4)]
    assert [p.image for p in kept] == [f"{tmp_path}/set/images/0000{i}.png" for i in (0, 2, 4)]
    assert all(replay(ragged, probe, probe.meta["texts"]).reward for probe in kept)  # as in train_sft.py


def test_a_stopped_cold_start_goes_on_where_it_was(serve, tmp_path, monkeypatch):
    failing = serve(lambda body: search(body) if re.search("Number [01]", json.dumps(body)) else (500, {}))
    code, _, error = play(monkeypatch, tmp_path, failing.url, "--threads", 1)
    log = Path("out/played.jsonl")
    assert code == 2 and "HTTP 500" in error[-1] and rows_of(log) == [0, 1]
    log.write_text(log.read_text() + '{"row": 2, "outco')  # a line that a kill cut short
    server = serve(search)
    for _ in range(2):  # the second time nothing is left to play
        assert play(monkeypatch, tmp_path, server.url, "--threads", 1)[0] == 0
        assert rows_of(log) == list(range(6))
        assert len(load_probes("out")) == 3 and len(server.bodies) == 3 + 3 + 3 + 5
    code, _, error = play(monkeypatch, tmp_path, server.url, "--temperature", 0.5)
    assert code == 2 and "another temperature (1.0, now 0.5)" in error[-1] and len(error) == 1


def test_a_refused_row_is_left_for_next_time(serve, tmp_path, monkeypatch):
    refusing = serve(lambda body: (400, {}) if "Number 2" in json.dumps(body) else search(body))
    code, _, error = play(monkeypatch, tmp_path, refusing.url, "--threads", 1, "--count", 3)
    assert code == 0 and any("row 3 was refused" in line for line in error)
    assert play(monkeypatch, tmp_path, serve(search).url, "--count", 3)[0] == 0
    assert [probe.answer for probe in load_probes("out")] == ["0", "2"]


def test_what_cannot_work_is_one_line(serve, tmp_path, monkeypatch):
    url = serve(lambda body: (400, {"error": "no images here"})).url
    twice, no_search = ("--out", "set"), ("--exemplars", "set/probes.jsonl")
    told = {(): "no images here", twice: "holds another set of probes", no_search: "holds no search"}
    for flags, message in told.items():
        code, _, error = play(monkeypatch, tmp_path, url, *flags)
        assert code == 2 and message in error[-1], error
