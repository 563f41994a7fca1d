"""Tests of endpoint.py against a chat server on this machine.

Lines worth flipping, each with the test that then fails:
    Endpoint       the key is not masked in what the server says  -> a_request_that_fails_is_one_message_...
    Endpoint       400 is asked again                             -> a_request_that_fails_is_one_message_...
    Endpoint       finish_reason is not looked at                 -> a_message_that_was_cut_is_void
    encode_message JPEG                                           -> a_request_holds_the_conversation_...
    close_action   the tags in the other order                    -> the_tag_of_the_open_action_is_put_back
    play_episode   no take_back_reply                             -> a_refused_conversation_ends_there_...
    play_episodes  samples are not adjacent                       -> samples_of_a_probe_are_adjacent
    judge          neither counts as no                           -> a_judge_says_yes_or_no_or_fails
"""

import base64
import io
import json
import re

from common import UserError

import huggingface_hub.constants
import pytest
from conftest import noise
from PIL import Image

from data import Probe
from endpoint import Endpoint, RefusedRequest, close_action, make_endpoint_judge, play_episode, play_episodes
from model import Protocol

TALK = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
WORDING = Protocol("Search.", "Observation {label}:", "Failed: {error}", 32 * 32, 64 * 64)
LOOK = '<grounding>{"bbox_2d": [0, 0, 0.5, 0.5], "source": "original_image"}'


def decode(part: dict) -> Image.Image:
    kind, _, content = part["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_a_request_holds_the_conversation_its_pixels_the_options_and_the_key(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " secret\n")
    server, picture = serve(lambda body: "hello"), noise(40, 30)
    talk = [*TALK, {"role": "user", "content": [{"type": "image", "image": picture}]}]
    assert Endpoint(f"{server.url}/", "m")(talk, temperature=0.5, stop=["x"]) == "hello"
    ((path, headers),), (body,) = server.headers, server.bodies
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert decode(body["messages"][1]["content"].pop()).tobytes() == picture.tobytes()
    assert body.pop("messages") == [TALK[0], {"role": "user", "content": []}]
    assert body == {"model": "m", "top_p": 1.0, "temperature": 0.5, "stop": ["x"]}
    monkeypatch.delenv("OPENAI_API_KEY")
    Endpoint(server.url, "m")(TALK)
    assert "Authorization" not in server.headers[1][1]


def test_a_server_that_is_busy_for_a_while_is_asked_again(serve):
    said = [(429, {}), (503, {}), "at last"]
    assert Endpoint(serve(lambda body: said.pop(0)).url, "m")(TALK) == "at last"


def test_a_message_that_was_cut_is_void(serve):
    cut = {"choices": [{"message": {"content": "<answer>red"}, "finish_reason": "length"}]}
    assert Endpoint(serve(lambda body: (200, cut)).url, "m")(TALK) == ""
    assert Endpoint(serve(lambda body: "a\ud83db").url, "m")(TALK) == "a?b"  # half a surrogate pair


SECRET, SILENT = {"error": "no secret"}, {"choices": [{"message": {"content": None}}]}
FAILURES = [(400, SECRET, RefusedRequest, 1), (401, SECRET, UserError, 1), (500, SECRET, UserError, 3)]
# A redirect might carry the key elsewhere.
FAILURES += [(307, b"secret", UserError, 1), (200, b"<html>", UserError, 1), (200, SILENT, UserError, 1)]


@pytest.mark.parametrize("status, content, kind, attempts", FAILURES)
def test_a_request_that_fails_is_one_message(serve, monkeypatch, status, content, kind, attempts):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda body: (status, content))
    with pytest.raises(UserError) as error:
        Endpoint(server.url, "m", retries=2)(TALK)
    assert type(error.value) is kind and server.url in str(error.value) and "model m" in str(error.value)
    assert "secret" not in str(error.value) and len(server.bodies) == attempts


def test_what_cannot_be_asked_is_one_message_without_the_key(serve, monkeypatch):
    for url in ("nowhere", "http://me:secret@host/v1"):
        with pytest.raises(UserError, match="a server is given as http"):
            Endpoint(url, "m")
    with pytest.raises(UserError, match="Connect"):
        Endpoint(serve(str).url.replace("127.0.0.1", "127.0.0.1:9/"), "m", retries=1)(TALK)
    for key in ("sec\nret", "sécret"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
            Endpoint(serve(lambda body: "hello").url, "m")(TALK)
        assert "ret" not in str(error.value).replace("OPENAI_API_KEY", "")


def test_the_offline_mode_of_the_hub_forbids_every_server_and_says_so(serve, monkeypatch):
    server = serve(lambda body: "hello")  # allows the hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids requests"):
        Endpoint(server.url, "m")(TALK)


def test_the_tag_of_the_open_action_is_put_back():
    table = {"<answer>red": "</answer>", "<think>x</think><grounding>{}": "</grounding>", "red": ""}
    table |= {"<answer>red</answer>": "", "<grounding>{}</grounding><answer>red": "</answer>"}
    assert {text: close_action(text) for text in table} == {text: text + end for text, end in table.items()}


def test_an_episode_is_played_turn_by_turn(serve):
    script = iter([LOOK, LOOK.replace("original_image", "observation_7"), "<think>Red.</think><answer>red"])
    server, probe = serve(lambda body: next(script)), Probe(noise(128, 64), "What color?", "red")
    e = play_episode(Endpoint(server.url, "m"), probe, WORDING, 4, " More.", max_tokens=9)
    assert (e.stop, e.answer, e.reward, e.turns) == ("answer", "red", 1.0, 3)
    assert e.errors == ["bad_source"] and len(e.crops) == 1 and e.texts[0] == LOOK + "</grounding>"
    assert all(b["stop"] == ["</grounding>", "</answer>"] and b["max_tokens"] == 9 for b in server.bodies)
    *_, first, said, crop, _, told = server.bodies[-1]["messages"]
    assert server.bodies[-1]["messages"][0]["content"][0]["text"] == "Search. More."
    assert first["content"][1]["text"] == "\nWhat color?" and said["content"][0]["text"] == e.texts[0]
    seen = [decode(part).tobytes() for part in (first["content"][0], crop["content"][1])]
    assert seen == [view.tobytes() for view in e.views()]
    assert told["content"][0]["text"].startswith("Failed: observation_7 does not exist")


def test_a_refused_conversation_ends_there_and_a_refused_beginning_is_an_error(serve):
    server = serve(lambda body: LOOK if len(body["messages"]) < 5 else (400, {"error": "too long"}))
    probe = Probe(noise(128, 64), "What color?", "red")
    e = play_episode(Endpoint(server.url, "m"), probe, WORDING, 9)
    assert (e.stop, e.turns, len(e.texts), len(e.crops)) == ("context_limit", 2, 2, 1) and e.over_turn
    assert len(e.views()) == 2  # the view that was refused left the bank
    with pytest.raises(RefusedRequest, match="too long"):
        play_episode(Endpoint(serve(lambda body: (400, b"too long")).url, "m"), probe, WORDING, 9)


def test_samples_of_a_probe_are_adjacent(serve):
    server = serve(lambda body: f"<answer>{re.search('Number ([0-9])', json.dumps(body))[1]}")
    probes = [Probe(noise(64, 64), f"Number {i}?", "1") for i in range(3)]
    episodes = play_episodes(Endpoint(server.url, "m"), probes, WORDING, threads=4, samples=2, max_turns=1)
    assert [e.answer for e in episodes] == ["0", "0", "1", "1", "2", "2"]
    assert [e.reward for e in episodes] == [0, 0, 1, 1, 0, 0] and len({id(e) for e in episodes}) == 6


def test_a_judge_says_yes_or_no_or_fails(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "key")
    says = {"a": "Yes.", "b": " no", "c": "maybe", "d": (500, {})}
    server = serve(lambda body: says[body["messages"][0]["content"][0]["text"]])
    judge = make_endpoint_judge(server.url, "m", example="a")
    assert judge(["a", "b", "c", "d"]) == [True, False, None, None]
    assert (server.bodies[0]["temperature"], server.bodies[0]["max_tokens"]) == (0, 8)
    assert server.headers[0][1]["Authorization"] == "Bearer key"
    with pytest.raises(UserError, match="--judge_model m does not say yes or no"):
        make_endpoint_judge(server.url, "m", example="c")
