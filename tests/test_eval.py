"""Tests of eval.py: the numbers by hand, the controls, the files it writes. No network, no GPU."""
import base64
import html.parser
import io
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as eval_script
import model as model_module
import rollout as rollout_module
from env import Crop, fit_pixels, format_action
from eval import (BlackCrops, BlackEpisode, Config, choose, controlled, correct_within, mean_and_error, page, record,
                  summarise)
from model import load_policy
from rollout import Episode, messages, replay

ROOT = Path(eval_script.__file__).parent
KEYS = {"label", "init", "probes", "samples", "seed", "control", "seconds", "curve", "correct_by_turns", "stops",
        "errors", "mean_turns", "repeated_crops", "by_source", "by_k", "judge", "unjudged", "by_category", "by_cycle",
        "by_pixels"}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return load_policy("tiny", device="cpu")


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("policy")
    tiny.save(out)
    return out


def episode(turns: int, reward: float, source="sign", k=4, crops=(), stop=None) -> Episode:
    probe = data.Probe(Image.new("RGB", (8, 8)), "?", "4", source=source, meta={} if k is None else {"k": k})
    nothing = np.zeros(0)
    stop = stop or ("answer" if reward else "over_turn")
    return Episode(probe, nothing, nothing, nothing, list(crops), turns, stop, None, reward)


# ------------------------------------------------------------------------------------------------ numbers

def test_mean_and_error_by_hand():
    """Question means 1/2, 1, 0: mean 1/2, unbiased std 1/2, error 0.5 / sqrt(3) = 0.288675."""
    assert mean_and_error([[1, 0], [1, 1], [0, 0]]) == pytest.approx((0.5, 0.288675), abs=1e-6)
    assert mean_and_error([[1, 0, 0, 0]]) == (0.25, 0.0)                          # one question: no error to be had
    assert mean_and_error([[1], [1], [1], [0]]) == pytest.approx((0.75, 0.25))    # std 0.5, by sqrt(4)
    assert mean_and_error([[1, 1, 1, 0], [0]])[0] == 0.375                        # a mean over questions, not samples


def test_an_answer_in_the_last_allowed_turn_counts():
    assert [correct_within(episode(6, 1.0), limit) for limit in (5, 6, 7)] == [0.0, 1.0, 1.0]
    assert correct_within(episode(3, 0.0), 6) == 0.0


EPISODES = [episode(1, 1.0), episode(2, 0.0, stop="answer"),                      # question 1, two samples
            episode(3, 1.0), episode(4, 1.0),                                     # question 2
            episode(6, 1.0, "relation", 16), episode(6, 0.0, "relation", 16),     # question 3
            episode(2, 0.0, "relation", None, stop="void"), episode(5, 1.0, "relation", None)]


def test_the_curve_of_one_pass_equals_filtering():
    """Question means at limit 2: 1/2 0 0 0; at 4: 1/2 1 0 0; at 6: 1/2 1 1/2 1/2."""
    curve = summarise(EPISODES, 2, (2, 4, 6))["curve"]
    assert {limit: row["accuracy"] for limit, row in curve.items()} == {"2": 0.125, "4": 0.375, "6": 0.625}
    assert curve["4"]["error"] == pytest.approx(np.std([0.5, 1, 0, 0], ddof=1) / 2) and curve["4"]["questions"] == 4
    for limit in range(1, 9):
        one_pass = summarise(EPISODES, 2, (limit, 8))["curve"][str(limit)]["accuracy"]
        assert one_pass == sum(e.reward for e in EPISODES if e.turns <= limit) / len(EPISODES)


def test_correct_by_turns_sums_to_the_final_accuracy():
    results = summarise(EPISODES, 2, (2, 4, 6))
    assert results["correct_by_turns"] == {"1-2": 1 / 8, "3-4": 2 / 8, "5-6": 2 / 8}
    assert sum(results["correct_by_turns"].values()) == results["curve"]["6"]["accuracy"]


def test_shares_and_groups_by_hand():
    results = summarise(EPISODES, 2, (2, 4, 6))
    assert results["stops"] == {"answer": 6 / 8, "over_turn": 1 / 8, "void": 1 / 8, "over_images": 0, "over_context": 0}
    assert results["mean_turns"] == (1 + 2 + 3 + 4 + 6 + 6 + 2 + 5) / 8
    assert {name: (row["accuracy"], row["questions"]) for name, row in results["by_source"].items()} == {
        "sign": (0.75, 2), "relation": (0.5, 2)}
    assert [(name, row["accuracy"], row["questions"]) for name, row in results["by_k"].items()] == [
        ("4", 0.75, 2), ("16", 0.5, 1), ("unknown", 0.5, 1)]                      # in the order of the numbers


def test_repeated_crops_by_hand():
    """Crops a a b, a: of four crops one repeats an earlier one of its own episode."""
    a, b = Crop((0.0, 0.0, 0.5, 0.5), 0), Crop((0.0, 0.0, 0.5, 0.5), 1)
    assert summarise([episode(3, 1.0, crops=(a, a, b)), episode(1, 0.0, crops=(a,))], 1, (6,))["repeated_crops"] == 0.25
    assert summarise([episode(1, 1.0)], 1, (6,))["repeated_crops"] == 0


def cycled(question: str, cycle: int, reward: float, judged=True) -> Episode:
    played = episode(2, reward, source="hr_bench", stop="answer")
    played.probe.meta = {"cycle_of": question, "cycle_category": str(cycle), "category": "single" if question == "a" else "cross"}
    played.judged = judged
    return played


def test_hr_bench_is_the_mean_over_its_four_cycles_and_its_error_that_of_questions():
    """Cycles: 1, 1/2, 1/2, 0 over the questions a and b: mean 1/2. Questions: a 3/4, b 1/4: std sqrt(1/8), error 1/4."""
    right = {("a", 0), ("a", 1), ("a", 2), ("b", 0)}
    results = summarise([cycled(q, c, float((q, c) in right)) for c in range(4) for q in "ab"], 1, (4,))
    assert {name: row["accuracy"] for name, row in results["by_cycle"].items()} == {"0": 1.0, "1": 0.5, "2": 0.5, "3": 0.0}
    assert results["curve"]["4"] == {"accuracy": 0.5, "error": pytest.approx(0.25), "questions": 2}
    assert results["curve"]["4"]["accuracy"] == np.mean([row["accuracy"] for row in results["by_cycle"].values()])
    assert {name: (row["accuracy"], row["questions"]) for name, row in results["by_category"].items()} == {
        "cross": (0.25, 1), "single": (0.75, 1)}


def test_unjudged_episodes_count_nowhere_but_as_unjudged():
    """Question 1: right and unjudged; question 2: unjudged twice; question 3: wrong and right. Mean of 1 and 1/2."""
    rows = [episode(1, 1.0), episode(2, 0.0, stop="answer"), episode(1, 0.0, stop="answer"), episode(1, 0.0, stop="answer"),
            episode(1, 0.0), episode(1, 1.0)]
    for i in (1, 2, 3):
        rows[i].judged = False
    results = summarise(rows, 2, (2,))
    assert results["curve"]["2"]["accuracy"] == 0.75 and results["curve"]["2"]["questions"] == 2 and results["unjudged"] == 3
    assert results["correct_by_turns"] == {"1-2": 2 / 3} and results["stops"]["answer"] == 5 / 6
    for row in rows:
        row.judged = False
    with pytest.raises(data.UserError, match="the judge failed on every episode"):
        summarise(rows, 2, (2,))


# ------------------------------------------------------------------------------------------------ controls

def checkers(side: int = 96) -> Image.Image:
    """A board of single black and white pixels: grey from afar, any detail is fine detail."""
    return Image.fromarray(np.uint8(255 * (np.indices((side, side)).sum(0) % 2))).convert("RGB")


def test_blind_sees_grey(tiny):
    probe = data.Probe(checkers(), "?", "4")
    shown = controlled(probe, "blind", tiny).open()
    assert shown.size == (96, 96) and shown.getcolors() == [(96 * 96, (128, 128, 128))]
    assert probe.open().getcolors() != shown.getcolors()                          # the probe itself is left alone


def test_overview_has_no_more_detail_than_the_first_view(tiny):
    probe = data.Probe(checkers(), "?", "4")
    shown = controlled(probe, "overview", tiny).open()
    assert shown.size == (96, 96)
    crop = np.asarray(shown.crop((16, 16, 80, 80)), int)
    assert np.asarray(probe.open()).std() > 120 and crop.std() < 5                # the board is gone, from any crop
    picture = data.make_probe("sign", "easy", 0)
    limits = tiny.protocol.min_pixels, tiny.protocol.max_pixels
    first, again = (np.asarray(fit_pixels(image, *limits), int)
                    for image in (picture.open(), controlled(picture, "overview", tiny).open()))
    assert np.abs(first - again).mean() < 3                                       # what could be seen still is


def test_no_control_shows_the_picture_as_it_is(tiny):
    probe = data.Probe(checkers(), "?", "4")
    assert controlled(probe, "none", tiny).open().tobytes() == probe.open().tobytes()


def test_black_crops_are_black_and_the_first_view_is_not():
    env = BlackCrops(checkers(), "?", max_turns=4, min_pixels=48 * 48, max_pixels=48 * 48)
    first = env.reset()[1]["content"][0]["image"]
    assert first.tobytes() == fit_pixels(checkers(), 48 * 48, 48 * 48).tobytes()
    for source in (0, 1):                                                         # a crop, and a crop of it
        message, _ = env.step(format_action(Crop((0.0, 0.0, 0.5, 0.5), source)))
        view = message["content"][1]["image"]
        assert view.size == (48, 48) and view.getextrema() == ((0, 0),) * 3
    assert env.observations[1].getextrema() != ((0, 0),) * 3                      # the bank is true


def scripted(monkeypatch, policy, *texts: str):
    """The policy says these messages, in order, instead of what it thinks of."""
    ids = [token for text in texts for token in [*policy.encode(text), policy.im_end]]
    monkeypatch.setattr(rollout_module, "_sample", lambda logprobs, *_: ([ids.pop(0)], [0.0]))


def test_force_answer_opens_the_last_message_as_an_answer(tiny, monkeypatch):
    probe = data.Probe(checkers(), "?", "red")
    look = format_action(Crop((0.0, 0.0, 0.5, 0.5), 0))
    scripted(monkeypatch, tiny, look, "red</answer>")
    forced, = rollout_module.rollout(tiny, [probe], max_turns=2, force_answer="<think>guess</think><answer>")
    assert (forced.stop, forced.answer, forced.reward, forced.turns) == ("answer", "red", 1.0, 2)
    opening = tiny.encode("<think>guess</think><answer>")
    last = np.flatnonzero(forced.assistant_mask[1:] & ~forced.assistant_mask[:-1])[-1]
    start = last + 1                                                              # where the last message begins
    assert forced.token_ids[start - len(opening):start].tolist() == opening       # written for it, not sampled by it
    assert not forced.assistant_mask[start - len(opening):start].any()
    assert messages(tiny, forced)[0] == look                                      # the first message is its own
    scripted(monkeypatch, tiny, look, look)
    free, = rollout_module.rollout(tiny, [probe], max_turns=2)
    assert free.stop == "over_turn"


def test_a_control_takes_the_likeliest_of_the_possible_answers(tiny, monkeypatch):
    """Whatever was sampled after the opening, the four answers of the kind are compared, and one of them is given."""
    probe = data.make_probe("sign", "easy", 1)
    look = format_action(Crop((0.0, 0.0, 0.5, 0.5), 0))
    scripted(monkeypatch, tiny, look, "nonsense")
    forced, = rollout_module.rollout(tiny, [probe], max_turns=2, force_answer=eval_script.ANSWER_NOW)
    assert forced.answer is None
    told = choose(tiny, forced, 2)
    assert (told.stop, told.turns) == ("answer", 2) and told.reward == float(told.answer == probe.answer)
    assert messages(tiny, told) == [look, f"{told.answer}</answer>"] and len(told.views()) == 2
    talk = tiny.decode(told.token_ids)
    assert talk.endswith(f"{eval_script.ANSWER_NOW}{told.answer}</answer><|im_end|>")
    said = {}
    for digit in data.DIGITS:                                         # by hand: each of the four, written out
        text = [look, f"{eval_script.ANSWER_NOW}{digit}</answer>"]
        row = replay(tiny, probe, text)
        said[digit] = model_module.token_logprobs(tiny, [row])[0, -3:].sum().item()   # digit, </answer>, end of turn
    assert told.answer == max(said, key=said.get)


def test_a_choice_is_made_only_where_the_answers_are_known_and_the_last_message_was_reached(tiny, monkeypatch):
    look = format_action(Crop((0.0, 0.0, 0.5, 0.5), 0))
    for probe, chosen in ((data.Probe(checkers(), "?", "red"), None),
                          (data.Probe(checkers(), "?", ["2", "two"], source="elsewhere"), None),
                          (data.Probe(checkers(), "?", "B", options={"A": "red", "B": "blue"}), {"A", "B"})):
        scripted(monkeypatch, tiny, look, "nonsense")
        forced, = rollout_module.rollout(tiny, [probe], max_turns=2, force_answer=eval_script.ANSWER_NOW)
        told = choose(tiny, forced, 2)
        assert told is forced if chosen is None else told.answer in chosen
        assert choose(tiny, forced, 3) is forced


@pytest.mark.parametrize("control, make_env, force", [
    ("none", rollout_module.CropEnv, False), ("blind", rollout_module.CropEnv, True),
    ("overview", rollout_module.CropEnv, True), ("black_crop", BlackCrops, True)])
def test_each_control_reaches_the_rollout(saved, tmp_path, monkeypatch, control, make_env, force):
    seen = {}

    def play(policy, probes, **options):
        seen.update(options, colors=len(probes[0].open().getcolors(1 << 20)))
        return [replay(policy, probes[0], ["<answer>4</answer>"])]

    monkeypatch.setattr(eval_script, "rollout", play)
    eval_script.main(small(saved, tmp_path, count=1, samples=1, control=control))
    assert (seen["make_env"], seen["force_answer"]) == (make_env, eval_script.ANSWER_NOW if force else "")
    assert (seen["colors"] == 1) == (control == "blind")
    assert json.loads((tmp_path / "results.json").read_text())["control"] == control


# ------------------------------------------------------------------------------------------------ the command

def small(init, out, **changes) -> Config:
    settings = dict(init=init, out=Path(out), count=2, samples=2, kinds=("attribute", "sign"), difficulties=("easy",),
                    turn_limits=(2, 1), max_turn_tokens=6, shown=3, device="cpu")
    return Config(**{**settings, **changes})


class Tags(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.images = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            source = dict(attrs)["src"].removeprefix("data:image/png;base64,")
            self.images.append(Image.open(io.BytesIO(base64.b64decode(source))))


def test_all_files_are_written_and_parse(saved, tmp_path, capsys):
    eval_script.main(small(saved, tmp_path / "new/eval"))
    out = tmp_path / "new/eval"
    results = json.loads((out / "results.json").read_text())
    assert results.keys() == KEYS
    assert list(results["curve"]) == ["1", "2"] and results["curve"]["2"]["questions"] == 2    # sorted
    assert (results["label"], results["probes"], results["samples"]) == (saved.name, 2, 2)
    rows = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and rows[0]["question"] == rows[1]["question"] != rows[2]["question"]
    assert all({"answer", "prediction", "reward", "stop", "turns", "crops", "messages", "source", "k"} <= row.keys()
               for row in rows)
    assert Image.open(out / "curve.png").width > 300
    tags = Tags((out / "trajectories.html").read_text())
    assert tags.tags.count("section") == 3 and len(tags.images) >= 3
    assert sorted(path.name for path in out.iterdir()) == [".lock", "curve.png", "episodes.jsonl", "results.json",
                                                           "trajectories.html"]
    said = capsys.readouterr().out
    assert "turn limit" in said and "4 episodes" in said and str(out) in said


def test_the_same_seed_gives_the_same_numbers(saved, tmp_path):
    for name, changes in (("one", {}), ("two", {"slots": 1}), ("other", {"seed": 1})):
        eval_script.main(small(saved, tmp_path / name, **changes))
    one, two, other = ((tmp_path / name / "episodes.jsonl").read_text() for name in ("one", "two", "other"))
    assert one == two != other


def curve(*accuracies) -> dict:
    return {str(2 * i): {"accuracy": a, "error": 0.01, "questions": 9} for i, a in enumerate(accuracies, 1)}


def earlier(out: Path, label: str, *accuracies) -> Path:
    out.mkdir()
    (out / "results.json").write_text(json.dumps({"label": label, "curve": curve(*accuracies)}))
    return out


def test_against_draws_every_curve_with_its_label(saved, tmp_path, monkeypatch):
    drawn = []
    original = eval_script.draw_curves
    monkeypatch.setattr(eval_script, "draw_curves", lambda *args: drawn.append(args[0]) or original(*args))
    others = earlier(tmp_path / "a", "mask", 0.5, 0.75, 0.875), earlier(tmp_path / "b", "mine", 0.25, 0.25)
    eval_script.main(small(saved, tmp_path / "c", label="mine", against=others))
    curves, = drawn
    own = json.loads((tmp_path / "c/results.json").read_text())["curve"]
    assert len(curves) == 3 and curves["mine"] == own and curves["mask"] == curve(0.5, 0.75, 0.875)
    assert curve(0.25, 0.25) in curves.values()                                   # the same label hides nothing
    assert (tmp_path / "c/curve.png").exists()


def test_the_figure_shows_every_limit_and_marks_the_limit_in_training(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(eval_script.pyplot, "close", figures.append)
    eval_script.draw_curves({"a": curve(0.1, 0.2, 0.3), "b": curve(0.5)}, 6, tmp_path / "curve.png")
    axes, = figures[0].axes
    assert [round(tick) for tick in axes.get_xticks()] == [2, 4, 6]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert any(set(line.get_xdata()) == {6} for line in axes.get_lines())
    monkeypatch.undo()
    eval_script.pyplot.close(figures[0])


def questions(folder: Path) -> Path:
    """Three questions of two categories; the answer to number i is i."""
    folder.mkdir()
    for i in range(3):
        checkers(96 + i).save(folder / f"{i}.png")
    (folder / "probes.jsonl").write_text("\n".join(json.dumps(
        {"image": f"{i}.png", "question": f"Number {i}?", "answer": str(i), "category": "ab"[i // 2]}) for i in range(3)))
    return folder


def test_a_published_set_is_played_once_per_pixel_budget(saved, tmp_path, monkeypatch, capsys):
    seen = []

    def play(policy, probes, group_size, **_):
        seen.append((policy.protocol.min_pixels, policy.protocol.max_pixels, len(probes), group_size))
        return [replay(policy, p, [f"<answer>{i if len(seen) == 1 else 7}</answer>"]) for i, p in enumerate(probes)
                for _ in range(group_size)]

    monkeypatch.setattr(eval_script, "rollout", play)
    eval_script.main(small(saved, tmp_path / "eval", count=None, data=questions(tmp_path / "set"), samples=3, max_pixels=(4096, 1024)))
    assert seen == [(2304, 4096, 3, 3), (1024, 1024, 3, 3)]                       # all rows; a floor below its ceiling
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert {name: (row["accuracy"], row["mean_turns"]) for name, row in results["by_pixels"].items()} == {
        "4096": (1.0, 1.0), "1024": (0.0, 1.0)}
    assert results["curve"]["2"]["accuracy"] == 1.0 and (results["probes"], results["samples"]) == (3, 3)
    assert {name: row["questions"] for name, row in results["by_category"].items()} == {"a": 2, "b": 1}
    assert "by_pixels    4096 100.0 +- 0.0  1024 0.0 +- 0.0" in capsys.readouterr().out


def test_photographs_of_a_set_stay_on_disk_until_their_turn(tiny, tmp_path):
    probe = data.load_probes(questions(tmp_path / "set"))[0]
    assert controlled(probe, "none", tiny) is probe and controlled(probe, "black_crop", tiny) is probe


def say_number(body: dict) -> str:
    """Number 0: right at once. 1: a broken and a good look, then right. 2: answers 3."""
    number, turn = re.search(r"Number (\d)", json.dumps(body))[1], len(body["messages"]) // 2
    if number == "1" and turn < 3:
        source = "original_image" if turn == 2 else "observation_9"
        return f'<grounding>{{"bbox_2d": [0, 0, 0.5, 0.5], "source": "{source}"}}'
    return f"<think><b>x</b></think><answer>{number.replace('2', '3')}</answer>"


def test_a_policy_behind_a_server_fills_the_same_table(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eval_script, "load_policy", None)                         # nothing is loaded here
    server = serve(say_number)
    cfg = small("runs/rl", tmp_path / "eval", count=None, data=questions(tmp_path / "set"), endpoint=server.url, model="served",
                turn_limits=(1, 2, 4), temperature=0.7)
    eval_script.main(cfg)
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert results.keys() == KEYS and (results["label"], results["init"]) == ("served", server.url)
    assert {limit: row["accuracy"] for limit, row in results["curve"].items()} == {
        "1": pytest.approx(1 / 3), "2": pytest.approx(1 / 3), "4": pytest.approx(2 / 3)}
    assert results["mean_turns"] == pytest.approx(5 / 3) and results["errors"]["unknown_source"] == pytest.approx(1 / 3)
    assert list(results["by_pixels"]) == ["2000000"]
    rows = [json.loads(line) for line in (tmp_path / "eval/episodes.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == ["0", "0", "1", "1", "3", "3"] and len(rows[2]["messages"]) == 3
    assert {body["temperature"] for body in server.bodies} == {0.7} and {body["max_tokens"] for body in server.bodies} == {6}
    text = (tmp_path / "eval/trajectories.html").read_text()
    for section in text.split("<section>")[1:]:
        items = [("<img" in item) for item in re.findall(r"<li>(.*?)</li>", section)]
        assert items == ([False, True, False] if "Number 1" in section else [False])
    assert "<b>x</b>" not in text and "by_category  a 100.0 +- 0.0  b 0.0 +- 0.0" in capsys.readouterr().out


def test_a_judge_that_fails_is_reported_and_its_answers_are_not_wrong(serve, tmp_path, capsys):
    def reply(body):
        text = json.dumps(body)
        return "yes" if "Candidate" in text and "red" in text else (500, {}) if "Candidate" in text else say_number(body)

    server = serve(reply)
    eval_script.main(small("x", tmp_path / "eval", count=None, data=questions(tmp_path / "set"), endpoint=server.url, model="m",
                           judge=server.url, judge_model="j", turn_limits=(4,)))
    results = json.loads((tmp_path / "eval/results.json").read_text())
    assert results["unjudged"] == 2 and results["curve"]["4"] == {"accuracy": 1.0, "error": 0.0, "questions": 2}
    rows = [json.loads(line) for line in (tmp_path / "eval/episodes.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [1.0, 1.0, 1.0, 1.0, None, None]
    assert "unjudged 2" in capsys.readouterr().out and "unjudged (stop: answer" in (tmp_path / "eval/trajectories.html").read_text()


@pytest.mark.parametrize("flags, message", [
    (["--endpoint", "http://127.0.0.1:9/v1"], "--model NAME"), (["--endpoint", "nowhere", "--model", "m"], "a server is given as http"),
    (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--control", "blind"], "plays no --control"),
    (["--endpoint", "http://127.0.0.1:9/v1", "--model", "m", "--judge", "base"], "needs the policy here")])
def test_flags_of_a_served_policy_that_do_not_go_together(tmp_path, monkeypatch, capsys, flags, message):
    code, said = run_script(monkeypatch, capsys, *flags, "--count", "1", "--out", tmp_path / "eval")
    assert code == 2 and message in said[-1]


# ------------------------------------------------------------------------------------------------ pages and records

def test_model_text_cannot_become_markup(tiny):
    probe = data.Probe(checkers(), 'Is <b>this</b> "bold" & red?', "<i>red</i>")
    said = "<think></code><script>alert(1)</script><img src=x onerror=y></think><answer>red</answer>"
    text = page(tiny, [replay(tiny, probe, [said])])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<script" not in text
    tags = Tags(text)
    assert not {"script", "i"} & set(tags.tags) and tags.tags.count("b") == 1     # the page's own <b>
    assert len(tags.images) == 1 and tags.tags.count("li") == 1


def test_each_message_stands_beside_the_view_that_it_got(tiny):
    """A crop that failed got no view; the view belongs to the crop that worked."""
    bad = format_action(Crop((0.0, 0.0, 0.5, 0.5), 7))
    good = format_action(Crop((0.0, 0.0, 0.25, 0.25), 0))
    probe = data.Probe(checkers(), "?", "red")
    text = page(tiny, [replay(tiny, probe, [bad, good, bad, "<answer>red</answer>"])])
    items = re.findall(r"<li>(.*?)</li>", text)
    assert [("<img" in item) for item in items] == [False, True, False, False]
    assert "correct" in text and "stop: answer, 4 turns" in text


def test_the_page_of_the_black_crop_control_shows_black_crops(tiny):
    look = format_action(Crop((0.0, 0.0, 0.5, 0.5), 0))
    played = replay(tiny, data.Probe(checkers(), "?", "red"), [look, "<answer>red</answer>"])
    _, seen = Tags(page(tiny, [BlackEpisode(**vars(played))])).images
    assert seen.convert("RGB").getextrema() == ((0, 0),) * 3
    _, seen = Tags(page(tiny, [played])).images
    assert seen.convert("RGB").getextrema() != ((0, 0),) * 3


def test_a_record_is_plain_json_and_complete(tiny):
    texts = [format_action(Crop((0.0, 0.0, 0.25, 0.25), 0)), "<think>\N{SNOWMAN}</think><answer>4</answer>"]
    played = replay(tiny, data.make_probe("sign", "easy", 3, grid=2, cell=24), texts)
    row = json.loads(json.dumps(record(tiny, played)))
    assert row["messages"] == texts and row["crops"] == [{"box": [0.0, 0.0, 0.25, 0.25], "source": 0}]
    assert (row["source"], row["k"], row["seed"], row["stop"], row["turns"]) == ("sign", 4, 3, "answer", 2)
    assert row["prediction"] == "4" and row["reward"] == float(row["answer"] == "4")


# ------------------------------------------------------------------------------------------------ mistakes of users

def run_script(monkeypatch, capsys, *args) -> tuple[int, list[str]]:
    """`python eval.py args` in this process: (exit code, lines on stderr)."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    capsys.readouterr()
    try:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err.splitlines()


def test_a_missing_policy_is_one_line(tmp_path, monkeypatch, capsys):
    code, said = run_script(monkeypatch, capsys, "--init", tmp_path / "nowhere", "--out", tmp_path / "eval")
    assert code == 2 and len(said) == 1 and str(tmp_path / "nowhere") in said[0]
    assert not (tmp_path / "eval").exists()


def test_missing_results_to_compare_with_are_noticed_before_the_work(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_module, "load_policy", None)                        # what the script imports
    code, said = run_script(monkeypatch, capsys, "--init", saved, "--against", tmp_path / "gone")
    assert code == 2 and len(said) == 1 and "--against" in said[0] and str(tmp_path / "gone") in said[0]


def test_missing_data_is_noticed_before_the_work(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_module, "load_policy", None)
    code, said = run_script(monkeypatch, capsys, "--init", saved, "--data", tmp_path / "gone.jsonl")
    assert code == 2 and len(said) == 1 and str(tmp_path / "gone.jsonl") in said[0]


def test_a_control_that_does_not_exist_is_refused_with_the_choices(monkeypatch, capsys):
    code, said = run_script(monkeypatch, capsys, "--control", "deaf")
    assert code == 2 and "black_crop" in "\n".join(said)
