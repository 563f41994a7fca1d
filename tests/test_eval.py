"""Tests of eval.py: the numbers by hand, the controls, the files and figures it writes, mistakes of users.

Lines worth flipping, each with the test that then fails:
    mean_and_error   mean over samples, not questions   -> mean_and_error_by_hand
    correct_within   < in place of <=                   -> an_answer_in_the_last_allowed_turn_counts
    summarise        cycle_of is not looked at          -> rows_with_the_same_cycle_of_are_one_question
    summarise        unjudged episodes are wrong        -> unjudged_episodes_count_nowhere_...
    hide_image       overview is the picture            -> each_control_hides_what_it_should
    BlackCropEnv     the first view is black too        -> a_control_shows_the_first_view_as_it_is
    take_likeliest   argmin                             -> a_control_takes_the_likeliest_of_...
    main             results.json first                 -> results_are_written_last
    main             limits are not sorted              -> all_files_are_written_and_parse
    main             the same label replaces a curve    -> against_draws_every_curve_with_its_label
"""

import base64
import io
import json
import re
from pathlib import Path

from common import UserError

import numpy as np
import pytest
import torch
from conftest import noise, read_cards, run_main
from PIL import Image

import eval as eval_script
import rollout as rollout_module
from data import DIGITS, Probe, save_probes
from env import Crop, fit_pixels, format_action
from eval import ANSWER_NOW, correct_within, mean_and_error, summarise, take_likeliest_answer
from model import token_logprobs
from rollout import Episode, replay, rollout

LOOK = format_action(Crop((0.0, 0.0, 0.5, 0.5), 0))


def episode(turns: int, reward: float, source="sign", stop=None, judged=True, **more) -> Episode:
    probe = Probe(noise(8, 8), "?", "4", source=source, meta=more.pop("meta", {"k": 4}))
    stop = stop or ("answer" if reward else "turn_limit")
    return Episode(probe, turns=turns, reward=reward, stop=stop, judged=judged, **more)


# ---------------------------------------------------------------------------------------------- numbers


def test_mean_and_error_by_hand():
    """Question means 1/2, 1, 0: mean 1/2, unbiased std 1/2, error 0.5 / sqrt(3) = 0.288675."""
    assert mean_and_error([[1, 0], [1, 1], [0, 0]]) == pytest.approx((0.5, 0.288675), abs=1e-6)
    assert mean_and_error([[1, 0, 0, 0]]) == (0.25, 0.0)  # one question: no error to be had
    assert mean_and_error([[1, 1, 1, 0], [0]])[0] == 0.375  # a mean over questions, not samples


def test_an_answer_in_the_last_allowed_turn_counts():
    assert [correct_within(episode(6, 1.0), limit) for limit in (5, 6, 7)] == [0.0, 1.0, 1.0]
    assert correct_within(episode(3, 0.0), 6) == 0.0


def test_the_curve_and_the_shares_by_hand():
    """Question means at limit 2: 1/2 0 0 0; at 4: 1/2 1 0 0; at 6: 1/2 1 1/2 1/2. Crops: a a b, a."""
    a, b = Crop((0.0, 0.0, 0.5, 0.5), 0), Crop((0.0, 0.0, 0.5, 0.5), 1)
    many, other = ({"source": "relation", "meta": meta} for meta in ({"k": 16}, {}))
    rows = [episode(1, 1.0, crops=[a, a, b]), episode(2, 0.0, stop="answer", crops=[a])]
    rows += [episode(3, 1.0), episode(4, 1.0, errors=["bad_box", "bad_box"])]
    rows += [episode(6, 1.0, **many), episode(6, 0.0, **many)]
    rows += [episode(2, 0.0, stop="void", **other), episode(5, 1.0, **other)]
    results = summarise(rows, 2, (2, 4, 6))
    assert [row["accuracy"] for row in results["curve"].values()] == [0.125, 0.375, 0.625]
    assert results["curve"]["4"]["error"] == pytest.approx(np.std([0.5, 1, 0, 0], ddof=1) / 2)
    stops = {"answer": 6 / 8, "turn_limit": 1 / 8, "void": 1 / 8, "image_limit": 0, "context_limit": 0}
    assert results["stops"] == stops and results["errors"]["bad_box"] == 2 / 8
    assert (results["repeated_crops"], results["mean_turns"]) == (1 / 4, (1 + 2 + 3 + 4 + 6 + 6 + 2 + 5) / 8)
    for name in ("by_source", "by_k"):
        results[name] = [(key, row["accuracy"], row["questions"]) for key, row in results[name].items()]
    assert results["by_source"] == [("sign", 0.75, 2), ("relation", 0.5, 2)]
    assert results["by_k"] == [("4", 0.75, 2), ("16", 0.5, 1), ("unknown", 0.5, 1)]  # as numbers are ordered


def test_rows_with_the_same_cycle_of_are_one_question():
    """Question a: 3 of its 4 orders right; b: 1 of 4. Mean 1/2, std sqrt(1/8), error 1/4."""
    right = ("a0", "a1", "a2", "b0")
    rows = [episode(2, f"{q}{i}" in right, meta={"cycle_of": q}) for i in range(4) for q in "ab"]
    row = summarise(rows, 1, (4,))["curve"]["4"]
    assert row == {"accuracy": 0.5, "error": pytest.approx(0.25), "questions": 2}


def test_unjudged_episodes_count_nowhere_but_as_unjudged():
    """Question 1: right and unjudged; question 2: unjudged twice; question 3: wrong and right: 1 and 1/2."""
    told = [(1.0, True), *[(0.0, False)] * 3, (0.0, True), (1.0, True)]
    rows = [episode(1, reward, stop="answer", judged=judged) for reward, judged in told]
    results = summarise(rows, 2, (2,))
    assert (results["curve"]["2"]["accuracy"], results["curve"]["2"]["questions"]) == (0.75, 2)
    assert results["unjudged"] == 3 and results["stops"]["answer"] == 1
    with pytest.raises(UserError, match="the judge failed on every episode"):
        summarise(rows[1:4], 1, (2,))


# ---------------------------------------------------------------------------------------------- controls


def checkers(side: int = 96) -> Image.Image:
    """A board of single black and white pixels: grey from afar, any detail is fine detail."""
    return Image.fromarray(np.uint8(255 * (np.indices((side, side)).sum(0) % 2))).convert("RGB")


def say(monkeypatch, policy, *texts: str) -> None:
    """The one row of a rollout says these messages, in order; a message ends with its closing tag."""
    ids = iter([token for text in texts for token in policy.encode(text)])
    monkeypatch.setattr(rollout_module, "sample_tokens", lambda *_: (np.array([next(ids)]), [0.0]))


def read_pixels(url: str) -> np.ndarray:
    """An image of a page, from its data: URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"), int)


@pytest.mark.parametrize("control", ["none", "blind", "overview", "black_crop"])
def test_each_control_hides_what_it_should(saved, policy, tmp_path, monkeypatch, control):
    """The page shows what the policy saw."""
    save_probes([Probe(checkers(), "Which?", "4", source="sign")], tmp_path / "set")
    say(monkeypatch, policy, LOOK, "<answer>4</answer>" if control == "none" else "4</answer>")
    code, _, error = play(monkeypatch, saved, tmp_path, "--data", tmp_path / "set", "--control", control)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (code, results["control"], results["stops"]["answer"]) == (0, control, 1.0), error
    (card,) = read_cards(tmp_path / "trajectories.html")
    picture, crop = read_pixels(card["picture"]), read_pixels(card["turns"][0]["view"])
    grey = {"blind": [128], "black_crop": [0]}
    assert (picture.std() > 30) == (control in ("none", "black_crop"))
    assert (crop.std() > 30) == (control == "none")
    assert control not in grey or np.unique(crop).tolist() == grey[control]


def test_a_control_shows_the_first_view_as_it_is(policy):
    probe = Probe(noise(288, 288), "?", "4")
    shown = eval_script.hide_image(probe, "overview", policy).open()
    first, again = (np.asarray(fit_pixels(image, 48 * 48, 48 * 48), int) for image in (probe.image, shown))
    assert shown.size == (288, 288) and np.abs(first - again).mean() < 12 < first.std()
    assert eval_script.hide_image(probe, "black_crop", policy) is probe  # read from disk when it is played
    view, crop = replay(policy, probe, [LOOK, LOOK], eval_script.BlackCropEnv).views()
    assert view.getbbox() and not crop.getbbox()  # None where all is black


def test_a_control_takes_the_likeliest_of_the_possible_answers(policy, monkeypatch):
    """Whatever was sampled after the opening, the four answers of the kind are compared and one is given."""
    probe = Probe(checkers(), "What number is on sign A?", "7", source="sign")
    say(monkeypatch, policy, LOOK, "nonsense</answer>")
    (forced,) = rollout(policy, [probe], max_turns=2, force_answer=ANSWER_NOW)
    told = take_likeliest_answer(policy, forced, 2)
    by_hand = [replay(policy, probe, [LOOK, f"{ANSWER_NOW}{digit}</answer>"]) for digit in DIGITS]
    chosen = len(policy.encode("4</answer>"))  # each of the four, written out
    with torch.no_grad():
        likeliest = DIGITS[token_logprobs(policy, by_hand)[:, -chosen:].sum(1).argmax()]
    assert (told.stop, told.turns, told.answer) == ("answer", 2, likeliest)
    assert told.reward == float(told.answer == "7") and len(told.views()) == 2
    assert policy.decode(told.token_ids).endswith(f"{ANSWER_NOW}{told.answer}</answer>")
    assert take_likeliest_answer(policy, forced, 3) is forced  # it ended before its last message
    for options, answers in ((None, {"nonsense"}), ({"A": "red", "B": "blue"}, {"A", "B"})):
        probe = Probe(checkers(), "?", "B", options)
        say(monkeypatch, policy, "nonsense</answer>")
        (forced,) = rollout(policy, [probe], max_turns=1, force_answer=ANSWER_NOW)
        assert take_likeliest_answer(policy, forced, 1).answer in answers


# ---------------------------------------------------------------------------------------------- the page


def test_a_row_holds_all_of_an_episode(policy):
    bad = LOOK.replace("original_image", "observation_7")
    e = replay(policy, Probe(checkers(), "?", "red"), [bad, LOOK, bad, "<answer>red</answer>"])
    row = json.loads(json.dumps(eval_script.make_row(e)))
    assert row["crops"] == [{"box": [0.0, 0.0, 0.5, 0.5], "source": 0}] and row["messages"] == e.texts
    assert (row["prediction"], row["reward"], row["errors"]) == ("red", 1.0, ["bad_source"] * 2)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("policy")
    policy.save(out)
    return out


def play(monkeypatch, init, out, *flags) -> tuple[int, list[str], list[str]]:
    """eval.py on two easy probes; later flags win."""
    few = "--count 2 --kinds sign --difficulties easy --turn_limits 2 1 --max_turn_tokens 6".split()
    return run_main(monkeypatch, "eval.py", "--init", init, "--out", out, *few, "--device", "cpu", *flags)


def read(out: Path) -> tuple[dict, list[dict]]:
    rows = (out / "episodes.jsonl").read_text().splitlines()
    return json.loads((out / "results.json").read_text()), list(map(json.loads, rows))


def test_all_files_are_written_and_parse(saved, tmp_path, monkeypatch):
    out = tmp_path / "new/eval"
    code, said, _ = play(monkeypatch, saved, out, "--samples", 2, "--shown", 3)
    results, rows = read(out)
    assert code == 0 and list(results["curve"]) == ["1", "2"] and results["curve"]["2"]["questions"] == 2
    assert (results["label"], results["probes"], results["samples"]) == (saved.name, 2, 2)
    assert len(rows) == 4 and rows[0]["seed"] == rows[1]["seed"] != rows[2]["seed"]
    assert Image.open(out / "curve.png").width > 300
    assert len(read_cards(out / "trajectories.html")) == 3
    files = [".lock", "curve.png", "episodes.jsonl", "results.json", "trajectories.html"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert said[0].startswith("turn limit") and said[-1].startswith("4 episodes")


def test_the_same_seed_gives_the_same_results(saved, tmp_path, monkeypatch):
    for name, flags in {"one": (), "two": ("--wave_size", 1), "other": ("--seed", 1)}.items():
        assert play(monkeypatch, saved, tmp_path / name, *flags)[0] == 0
    one, two, other = (read(tmp_path / name) for name in ("one", "two", "other"))
    spent = {"seconds": 0, "peak_gb": 0}
    assert one[1] == two[1] != other[1] and one[0] | spent == two[0] | spent


def test_results_are_written_last(saved, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("of an earlier evaluation")
    (tmp_path / "trajectories.html").mkdir()  # so the page cannot be written
    with pytest.raises(OSError):
        play(monkeypatch, saved, tmp_path)
    assert not (tmp_path / "results.json").exists()


def curve(*accuracies: float) -> dict:
    return {str(2 * i): {"accuracy": a, "error": 0.01, "questions": 9} for i, a in enumerate(accuracies, 1)}


def test_against_draws_every_curve_with_its_label(saved, tmp_path, monkeypatch):
    where, figures = [tmp_path / "mask", tmp_path / "mine"], []
    for other, row in zip(where, (curve(0.5, 0.75, 0.875), curve(0.25))):
        other.mkdir()
        (other / "results.json").write_text(json.dumps({"label": other.name, "curve": row}))
    monkeypatch.setattr(eval_script.pyplot, "close", figures.append)
    assert play(monkeypatch, saved, tmp_path / "out", "--label", "mine", "--against", *where)[0] == 0
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["mine", "mask", f"mine ({where[1]})"]  # the same label hides nothing
    assert [round(tick) for tick in axes.get_xticks()] == [1, 2, 4, 6]
    drawn = [line.get_ydata().tolist() for line in axes.get_lines() if line.get_marker() == "o"]
    assert drawn[1:] == [[50.0, 75.0, 87.5], [25.0]]
    assert any(set(line.get_xdata()) == {6} for line in axes.get_lines())  # the limit in GRPO


def say_number(body: dict) -> str:
    """Number 0: right at once. 1: a broken and a good look, then right. 2: answers 3."""
    number, turn = re.search(r"Number (\d)", json.dumps(body))[1], len(body["messages"]) // 2
    if number == "1" and turn < 3:
        return LOOK if turn == 2 else LOOK.replace("original_image", "observation_9")
    return f"<think><b>x</b></think><answer>{number.replace('2', '3')}"


@pytest.fixture
def served(serve, tmp_path, monkeypatch):
    """served(*flags): eval.py on a set of three questions, whose policy is say_number behind a server."""
    probes = [Probe(checkers(), f"Number {i}?", str(i), meta={"category": "aab"[i]}) for i in range(3)]
    save_probes(probes, tmp_path / "set")
    server = serve(say_number)
    where = ["--data", tmp_path / "set", "--count", 3, "--endpoint", server.url, "--model", "served"]

    def run(*flags):
        code, said, error = play(monkeypatch, "nowhere", tmp_path / "out", *where, *flags)
        assert code == 0, error
        return server, said, *read(tmp_path / "out")

    return run


def test_a_policy_behind_a_server_fills_the_same_table(served, tmp_path):
    server, said, results, rows = served("--samples", 2, "--turn_limits", 4, 1, 2, "--temperature", 0.7)
    about = results["label"], results["init"], results["errors"]["bad_source"]
    assert about == ("served", server.url, 1 / 3)
    assert [row["accuracy"] for row in results["curve"].values()] == [1 / 3, 1 / 3, 2 / 3]
    assert [row["prediction"] for row in rows] == ["0", "0", "1", "1", "3", "3"]
    assert {(body["temperature"], body["max_tokens"]) for body in server.bodies} == {(0.7, 6)}
    for card in read_cards(tmp_path / "out/trajectories.html"):
        views = [turn["view"] is not None for turn in card["turns"]]
        assert views == ([False, True, False] if "Number 1" in card["question"] else [False])
    assert "by_category  a 100.0 +- 0.0  b 0.0 +- 0.0" in said


def test_one_pass_gives_what_a_pass_at_each_limit_gives(served):
    _, _, results, _ = served("--turn_limits", 1, 3)
    for limit, row in results["curve"].items():
        assert served("--turn_limits", limit)[2]["curve"] == {limit: row}


def test_a_judge_that_fails_is_reported_and_its_answers_are_not_wrong(serve, served, tmp_path):
    judge = serve(lambda body: "yes" if "red" in json.dumps(body) else (500, {}))
    _, said, results, rows = served("--judge", judge.url, "--judge_model", "j", "--turn_limits", 4)
    assert results["unjudged"] == 1 and any("unjudged 1 " in line for line in said)
    assert results["curve"]["4"] == {"accuracy": 1.0, "error": 0.0, "questions": 2}
    assert [row["reward"] for row in rows] == [1.0, 1.0, None]
    assert "unjudged" in {card["verdict"] for card in read_cards(tmp_path / "out/trajectories.html")}


MISTAKES = {
    "--init gone": "cannot load gone",
    "--against gone": "--against: no results.json of an evaluation in gone",
    "--turn_limits 0": "start at 1",
    "--control deaf": "black_crop",
    "--candidates 1": "give a multiple of 4",
    "--endpoint http://here/v1": "--model NAME",
    "--endpoint http://here/v1 --model m --control blind": "plays no --control",
    "--endpoint http://here/v1 --model m --judge base": "needs the policy here",
    "--judge nowhere": "a server is given as http",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_of_users_are_told(saved, tmp_path, monkeypatch, flags):
    code, _, error = play(monkeypatch, saved, tmp_path / "out", *flags.split())
    assert code == 2 and not (tmp_path / "out").exists()
    assert MISTAKES[flags] in " ".join(" ".join(error).split())
    assert len(error) == 1 or not error[0].startswith("error")  # tyro explains with more lines


def test_the_first_word_chooses_a_preset(monkeypatch):
    code, page, _ = run_main(monkeypatch, "eval.py", "qwen7b", "--help")
    assert code == 0 and "nf4" in "".join(page) and "1024" in "".join(page)
    code, _, error = run_main(monkeypatch, "eval.py", "huge")
    assert code == 2 and error == ["error: huge: no such preset; there are tiny, qwen3b, qwen7b"]
