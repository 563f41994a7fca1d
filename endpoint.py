"""A policy or a judge behind an OpenAI-compatible server, such as vLLM. Imported only where one is asked for.

The key is read from OPENAI_API_KEY (policy) or JUDGE_API_KEY (judge). It is never kept, logged or shown.
Start vLLM with `--generation-config vllm`: else it samples with the checkpoint's own generation_config, and
Qwen2.5 ships a repetition penalty of 1.05 there.
"""

import base64
import io
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from common import UserError

import httpx2  # comes with huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import hf_raise_for_status, http_backoff
from tqdm import tqdm

from data import Probe
from model import Protocol
from rollout import CLOSING_TAGS, Episode


class RefusedRequest(UserError):
    """The server does not take this one conversation: mostly, it is too long or holds too many images."""


@dataclass
class Endpoint:
    """`endpoint(messages)` is the server's reply, a text.

    url: up to and including /v1. key: the environment variable that holds the key, if the server needs one.
    retries: repeated attempts after 429 and 5xx, with growing pauses. RefusedRequest for a conversation
    that the server does not take (400, 413, 422); UserError when it cannot be reached, refuses the key, or
    keeps failing.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    timeout: float = 120.0  # seconds
    retries: int = 4

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")) or "@" in self.url:
            raise UserError(f"a server is given as http://HOST:PORT/v1, with its key in {self.key}")

    def __call__(self, messages: list[dict], **options) -> str:
        key, where = os.environ.get(self.key, "").strip(), f"{self.url}, model {self.model}"
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.key}: a key is one line of ASCII text")
        body = {"model": self.model, "messages": [encode_message(m) for m in messages], "top_p": 1.0}
        options = {
            "json": body | options,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "follow_redirects": False,  # a redirect might carry the key elsewhere
        }
        url = f"{self.url.rstrip('/')}/chat/completions"
        try:
            reply = http_backoff("POST", url, timeout=self.timeout, max_retries=self.retries, **options)
            hf_raise_for_status(reply)
            choice = reply.json()["choices"][0]
            cut, content = choice["finish_reason"] == "length", choice["message"]["content"] or ""
        except HfHubHTTPError as error:
            status, text = error.response.status_code, error.response.text[:200]
            kind = RefusedRequest if status in (400, 413, 422) else UserError
            told = text.replace(key, "***") if key else text
            raise kind(f"{where}: HTTP {status}, {told!r}") from None
        except OfflineModeIsEnabled:
            raise UserError(f"{where}: HF_HUB_OFFLINE forbids requests to any server; unset it") from None
        except httpx2.HTTPError as error:
            raise UserError(f"{where}: {type(error).__name__}, {error}") from None
        except (ValueError, LookupError):
            raise UserError(f"{where}: the reply is no chat completion") from None
        # A message that is cut is void, as in a rollout. Half surrogate pairs are replaced.
        return "" if cut else content.encode(errors="replace").decode()


def encode_message(message: dict) -> dict:
    """A chat message as the API takes it: images as PNG data URLs, so the server sees the same pixels."""

    def encode(part: dict) -> dict:
        if part["type"] == "text":
            return part
        buffer = io.BytesIO()
        part["image"].save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    return {"role": message["role"], "content": [encode(part) for part in message["content"]]}


def close_action(text: str) -> str:
    """Servers leave the stop string out: puts back the closing tag of the action that is open."""
    opened = {text.rfind(tag.replace("/", "")): tag for tag in CLOSING_TAGS}
    place, tag = max(opened.items())
    return text + tag if place >= 0 and tag not in text[place:] else text


def play_episode(
    endpoint: Endpoint, probe: Probe, protocol: Protocol, max_turns: int, system_suffix: str = "", **options
) -> Episode:
    """One search of the policy behind the server, turn by turn. Of its messages only texts are known.

    options: temperature, max_tokens and the like, for the server. A refused request ends it as context_limit;
    a first request that is refused raises, since then the set-up is wrong, not one conversation.
    """
    env, episode = protocol.make_env(probe, max_turns), Episode(probe)
    messages = env.reset()
    messages[0]["content"][0]["text"] += system_suffix
    while env.stop is None:
        try:
            text = close_action(endpoint(messages, stop=list(CLOSING_TAGS), **options))
        except RefusedRequest as error:
            if not episode.texts:
                raise
            tqdm.write(f"refused: {error}", file=sys.stderr)
            env.take_back_reply()
            break
        episode.texts.append(text)
        reply, _ = env.step(text)
        if reply:
            messages += [{"role": "assistant", "content": [{"type": "text", "text": text}]}, reply]
    episode.finish(env)
    return episode


def play_episodes(
    endpoint: Endpoint, probes: list[Probe], protocol: Protocol, *, threads: int, samples: int = 1, **options
) -> list[Episode]:
    """`samples` adjacent episodes per probe, as `rollout` gives them; plays `threads` of them at once."""
    wanted = [probe for probe in probes for _ in range(samples)]
    with ThreadPoolExecutor(threads) as pool:
        played = pool.map(lambda probe: play_episode(endpoint, probe, protocol, **options), wanted)
        return list(tqdm(played, total=len(wanted), desc="episodes", leave=False))


def make_endpoint_judge(url: str, model: str, example: str) -> Callable[[list[str]], list[bool | None]]:
    """A judge behind a server: prompts in, yes or no out. None where it fails or says neither.

    example: a prompt whose answer is yes. UserError if the judge does not say yes or no to it.
    """
    endpoint = Endpoint(url, model, key="JUDGE_API_KEY")

    def ask(prompt: str) -> bool | None:
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        try:
            text = endpoint([message], temperature=0, max_tokens=8)
        except UserError as error:
            tqdm.write(f"unjudged: {error}", file=sys.stderr)
            return None
        return {"yes": True, "no": False}.get(text.strip().rstrip(".").casefold())

    def judge(prompts: list[str]) -> list[bool | None]:
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(ask, prompts))

    if ask(example) is None:
        raise UserError(f"--judge {url}: --judge_model {model or '(not given)'} does not say yes or no")
    return judge
