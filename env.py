"""The world of visual search: one image, one question, one tool that crops. No torch, no model.

An episode is a conversation. The model thinks, then either asks for a crop or answers:

    <think>...</think><grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>
    <think>...</think><answer>blue</answer>

A crop is cut from the native pixels of its source and joins the bank of observations. The model is shown a
resized view of it, so a crop of a crop stays as sharp as the photograph is. `source` is original_image or
observation_i, where i is the index in the bank. A box is relative to its own source, x to the right, y down:

    original_image (0)       [0.50, 0.25, 1.00, 0.75]     observation_1          [0.50, 0.50, 1.00, 1.00]
    (0,0)---------------.     of original_image           (0,0)----------.        of observation_1
      |         .-------|                                   |            |
      |         |   1   |    ------------------------>      |      .-----|    ------------------------>  ...
      |         '-------|                                   |      |  2  |
      '---------------(1,1)                                 '---------(1,1)

What one assistant message leads to (the first row that fits; a turn is one assistant message):

    the message without its thoughts (an open one ends it)     step returns               code in env.errors
    ---------------------------------------------------------  -------------------------  ------------------
    no <grounding>, no <answer>, nor behind an open thought    (None, "void")             no_action (not kept)
    exactly one non-empty answer, even in the last turn        (None, "answer")           -
    any error below, in the last turn                          (None, "void")             its code
    an action only behind a thought that is never closed       (error message, None)      unclosed_tag
    more than one action                                       (error message, None)      two_actions
    an action tag that is never closed                         (error message, None)      unclosed_tag
    an answer of white space                                   (error message, None)      empty_answer
    no JSON object with bbox_2d and source; > 2000 characters  (error message, None)      bad_json
    a box of other than four finite numbers, or without area   (error message, None)      bad_box
    a source that is no image in the bank                      (error message, None)      bad_source
    a crop with a side below 2 pixels, or longer than 190:1    (error message, None)      bad_size
    a good crop in the last turn                               (None, "turn_limit")       -
    a good crop, but the bank already holds max_images         (None, "image_limit")      -
    a good crop; a box that sticks out is clamped to [0, 1]    (observation, None)        -

The rollout counts tokens and adds two stops: "context_limit", and "void" for a message that was cut.
An episode that a limit ended while it still asked for a crop is *over-turn*: see OVER_TURN.

The reference code differs: of several actions it runs the last crop; the box goes through `eval`; labels run
ahead of the bank after a failed call; the clamp excludes the last row and column (docs/differences.md).

    $ python env.py photo.jpg          plays a scripted search on your photo, writes the crops to runs/env

Read next: data.py, which makes the questions.
"""

import copy
import json
import math
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

STOPS = ("answer", "turn_limit", "image_limit", "context_limit", "void")
OVER_TURN = ("turn_limit", "image_limit", "context_limit")  # a limit ended the search: its outcome is unknown
CALL_ERRORS = ("bad_json", "bad_box", "bad_source", "bad_size")
# no_action ends the episode as void; the others are counted in CropEnv.errors.
ERROR_CODES = ("no_action", "two_actions", "unclosed_tag", "empty_answer", *CALL_ERRORS)

SYSTEM_PROMPT = (
    "Answer the question about the image. Small things may need a closer look first. "
    "Reason between <think> and </think>, then end the message with exactly one action.\n"
    'Look closer: <grounding>{"bbox_2d": [x0, y0, x1, y1], "source": "original_image"}</grounding>. '
    "(x0, y0) is the top-left and (x1, y1) the bottom-right corner; the width and the height of the source "
    "count as 1.0. The source is original_image or observation_i, the i-th observation that you were given.\n"
    "Finish: <answer>your answer</answer>."
)
OBSERVATION_PROMPT = "Observation {label}:"  # the view follows; {label} is the index in the bank
ERROR_PROMPT = "This action failed: {error}. Think about what went wrong, then try again."

MAX_PAYLOAD_CHARS = 2_000  # between the grounding tags; bounds the nesting that json has to read
MAX_ECHO_CHARS = 200  # of the model's own text in an error message
MAX_ANSWER_CHARS = 1_000  # a longer prediction is wrong
MIN_CROP_SIDE = 2  # native pixels
MAX_ASPECT = 190  # longer side / shorter side; the image processors of Qwen refuse ratios above 200


# ---------------------------------------------------------------------------------------------- actions

Box = tuple[float, float, float, float]  # x0, y0, x1, y1, relative to a source of width and height 1.0


@dataclass(frozen=True)
class Crop:
    """A look at `box`, clamped to 0..1, of image `source` in the bank (0 = the original image)."""

    box: Box
    source: int


@dataclass(frozen=True)
class Answer:
    """The final answer: not empty, no white space around it."""

    text: str


class ActionError(ValueError):
    """A message that is not exactly one good action. `code` is one of ERROR_CODES; str() is safe to echo."""

    def __init__(self, code: str, reason: str):
        assert code in ERROR_CODES, code
        super().__init__(reason)
        self.code = code


def _quote(text: str) -> str:
    """Model text that is safe to repeat: short, ASCII, and without `<|>`, so that no tag can be formed."""
    text = text[:MAX_ECHO_CHARS].encode("ascii", "backslashreplace").decode()
    return text.translate(str.maketrans("<|>", "(/)"))[:MAX_ECHO_CHARS]


def parse_action(text: str) -> Crop | Answer:
    """Reads one assistant message. Raises ActionError, and nothing else, in time linear in the text.

    Thoughts do not nest: the first </think> closes. Whether the source exists and the crop is large enough
    depends on the bank, so CropEnv.step checks that.

    >>> parse_action('<grounding>{"source": "observation_2", "bbox_2d": [-1, 0, 0.5, 1]}</grounding>')
    Crop(box=(0.0, 0.0, 0.5, 1.0), source=2)
    >>> parse_action("<think>Not <answer>red</answer>.</think> <answer> blue </answer>")
    Answer(text='blue')
    """
    first, *pieces = text.split("<think>")
    spoken = " ".join([first, *(piece.partition("</think>")[2] for piece in pieces)])
    crops, answers = spoken.count("<grounding>"), spoken.count("<answer>")
    if crops + answers == 0:
        # What follows the beginning of a thought that is never closed.
        hidden = text.rpartition("</think>")[2].partition("<think>")[2]
        if "<grounding>" in hidden or "<answer>" in hidden:
            raise ActionError("unclosed_tag", "the thought before the action is not closed")
        raise ActionError("no_action", "the message has neither a grounding nor an answer tag")
    if crops + answers > 1:
        raise ActionError("two_actions", "the message has more than one action")
    tag = "grounding" if crops else "answer"
    payload, closed, _ = spoken.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    if not closed:
        raise ActionError("unclosed_tag", f"the {tag} tag is not closed")
    if crops:
        return _parse_crop(payload)
    if not payload.strip():
        raise ActionError("empty_answer", "the answer is empty")
    return Answer(payload.strip())


def _parse_crop(payload: str) -> Crop:
    """The JSON between the grounding tags: any key order and spacing, other keys are ignored."""
    echo = _quote(payload)
    if len(payload) > MAX_PAYLOAD_CHARS:
        raise ActionError("bad_json", f"the call is longer than {MAX_PAYLOAD_CHARS} characters: {echo}")
    try:  # integers are read as floats: 10**400 becomes inf, which is refused below
        call = json.loads(payload, parse_int=float)
    except (ValueError, RecursionError):  # 2000 brackets are enough for a RecursionError
        call = None
    if not isinstance(call, dict) or not {"bbox_2d", "source"} <= call.keys():
        raise ActionError("bad_json", f"this is not one JSON object with bbox_2d and source: {echo}")

    box, source = call["bbox_2d"], call["source"]
    four = isinstance(box, list) and len(box) == 4
    if not four or not all(type(v) is float and math.isfinite(v) for v in box):
        raise ActionError("bad_box", f"bbox_2d must be a list of four finite numbers: {echo}")
    x0, y0, x1, y1 = (min(max(0.0, value), 1.0) for value in box)
    if x0 >= x1 or y0 >= y1:
        raise ActionError("bad_box", f"bbox_2d needs x0 < x1 and y0 < y1, inside 0 to 1: {echo}")
    name = isinstance(source, str) and re.fullmatch("original_image|observation_([1-9][0-9]{0,5})", source)
    if not name:
        raise ActionError("bad_source", f"source must be original_image or observation_i: {echo}")
    return Crop((x0, y0, x1, y1), int(name[1] or 0))


def source_name(source: int) -> str:
    """0 -> "original_image", i -> "observation_i"."""
    return f"observation_{source}" if source else "original_image"


def format_action(action: Crop | Answer) -> str:
    """The inverse of parse_action, spelled as in the released data (an answer must not contain tags).

    >>> format_action(Crop((0.25, 0.5, 1.0, 1.0), 2))
    '<grounding>{"bbox_2d": [0.25, 0.5, 1.0, 1.0], "source": "observation_2"}</grounding>'
    """
    if isinstance(action, Answer):
        return f"<answer>{action.text}</answer>"
    call = {"bbox_2d": list(action.box), "source": source_name(action.source)}
    return f"<grounding>{json.dumps(call)}</grounding>"


# ---------------------------------------------------------------------------------------------- pixels


def crop_pixels(image_size: tuple[int, int], box: Box) -> tuple[int, int, int, int]:
    """A relative box as (left, top, right, bottom) in pixels of an image of (width, height).

    Half-open: right and bottom are the first column and row that are left out. Clamped to the image, then
    rounded outwards, so (0, 0, 1, 1) is every pixel; at least 1 x 1. ValueError for an empty or outer box.

    >>> crop_pixels((5, 10), (0.2, -1.0, 0.6, 0.55))
    (1, 0, 3, 6)
    """
    edges = []
    for size, low, high in ((image_size[0], box[0], box[2]), (image_size[1], box[1], box[3])):
        low, high = max(low, 0.0), min(high, 1.0)
        if not low < high:  # true for NaN too
            raise ValueError(f"box {tuple(box)} has no pixel inside the image")
        first = min(math.floor(low * size + 1e-9), size - 1)  # 1e-9: 0.07 * 100 is 7, not 7.000..1
        edges.append((first, max(math.ceil(high * size - 1e-9), first + 1)))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def fit_pixels(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """The view of an image that a model is shown: same picture, width * height in [min_pixels, max_pixels].

    Returns the image itself when it fits. The aspect is kept up to rounding, but a strip beyond 190:1 is made
    broader: boxes are relative, so they stay right. Where whole numbers cannot meet both limits, max_pixels
    holds. ValueError for bad limits.
    """
    if not 1 <= min_pixels <= max_pixels:
        raise ValueError(f"need 1 <= min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
    sides = max(image.width, image.height / MAX_ASPECT), max(image.height, image.width / MAX_ASPECT)
    pixels = sides[0] * sides[1]
    scale = math.sqrt(min(max(pixels, min_pixels), max_pixels) / pixels)
    width, height = (max(1, math.floor(side * scale + 1e-9)) for side in sides)
    if width * height < min_pixels and (width + 1) * (height + 1) <= max_pixels:
        width, height = width + 1, height + 1
    size = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)  # rounding may pass it again
    if size == image.size:
        return image
    kind = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return image.resize(size, kind, reducing_gap=4.0)  # a photograph four times as fast, the same to the eye


# ---------------------------------------------------------------------------------------------- the episode


class CropEnv:
    """One episode: `reset` opens the conversation, `step` takes one assistant message and replies to it.

    image           PIL image, upright (load_image makes one); turned into RGB, never changed
    question        the text of the first user message, which follows the image; not interpreted
    max_turns       assistant messages allowed, >= 1: 6 leaves room for 5 crops and an answer
    min_pixels, max_pixels   width * height of each view shown to the model
    max_images      images allowed in the bank, the original included, >= 1; None = no limit
    *_prompt        the wording; {label} and {error} are filled in; the view is at {image}, or at the end;
                    {action} is the number of the message that it answers, from 0

    observations    the bank: native pixels, [0] = the original, [i] = observation_i
    crops           the successful crops in order: crops[i - 1] made observations[i]
    crop_turns      for each of them, the turn (from 1) that asked for it
    errors          the code of each failed action
    turn            assistant messages so far
    stop, answer    None until the episode ends; stop is one of STOPS

    Deterministic; episodes on the same image share nothing that changes. ValueError on bad arguments.
    """

    def __init__(
        self,
        image: Image.Image,
        question: str,
        max_turns: int = 6,
        min_pixels: int = 40_000,
        max_pixels: int = 2_000_000,
        max_images: int | None = None,
        system_prompt: str = SYSTEM_PROMPT,
        observation_prompt: str = OBSERVATION_PROMPT,
        error_prompt: str = ERROR_PROMPT,
    ):
        if not isinstance(image, Image.Image) or 0 in image.size:
            raise ValueError(f"image must be a PIL image with pixels (load_image makes one), not {image!r}")
        if max_turns < 1 or (max_images is not None and max_images < 1):
            raise ValueError(f"max_turns and max_images start at 1, got {max_turns} and {max_images}")
        if not 1 <= min_pixels <= max_pixels:
            raise ValueError(f"need 1 <= min_pixels <= max_pixels, got {min_pixels} and {max_pixels}")
        image.load()  # a broken file fails here, not in the middle of an episode
        self.image, self.question = to_rgb(image), question
        self.max_turns, self.max_images = max_turns, max_images
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.system_prompt, self.observation_prompt = system_prompt, observation_prompt
        self.error_prompt = error_prompt
        self._start()

    def _start(self) -> None:
        self.observations: list[Image.Image] = [self.image]
        self.crops: list[Crop] = []
        self.crop_turns: list[int] = []
        self.errors: list[str] = []
        self.turn = 0
        self.stop: str | None = None
        self.answer: str | None = None

    def reset(self) -> list[dict]:
        """Starts (again). Returns the system message and the first user message (image + question)."""
        self._start()
        return [
            {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]},
            {"role": "user", "content": [self._view(self.image), {"type": "text", "text": self.question}]},
        ]

    def step(self, text: str) -> tuple[dict | None, str | None]:
        """Takes one assistant message. Returns (user message to append, None), or (None, stop) at the end.

        Nothing that the model says raises: see the table at the top. RuntimeError when the episode is over.
        """
        if self.stop is not None:
            raise RuntimeError(f"step after the episode ended with {self.stop!r}: call reset first")
        self.turn += 1
        last = self.turn == self.max_turns
        try:
            action = parse_action(text)
            if isinstance(action, Answer):
                self.answer = action.text
                return self.end("answer")
            pixels = self._locate(action)
        except ActionError as error:
            if error.code == "no_action":
                return self.end("void")
            self.errors.append(error.code)
            if last:
                return self.end("void")
            # replace, not format: the wording or the echo may hold other braces
            message = {"type": "text", "text": self.error_prompt.replace("{error}", str(error))}
            return {"role": "user", "content": [message]}, None
        if last:
            return self.end("turn_limit")
        if len(self.observations) == self.max_images:
            return self.end("image_limit")

        label = str(len(self.observations))
        self.observations.append(self.observations[action.source].crop(pixels))
        self.crops.append(action)
        self.crop_turns.append(self.turn)
        wording = self.observation_prompt.replace("{label}", label).replace("{action}", str(self.turn - 1))
        before, _, after = ({"type": "text", "text": text} for text in wording.partition("{image}"))
        content = [before, self._view(self.observations[-1]), after]
        return {"role": "user", "content": [part for part in content if part.get("text") != ""]}, None

    def end(self, stop: str) -> tuple[None, str]:
        """Ends the episode. The rollout calls it for what only it can see: a cut message, a full context."""
        self.stop = stop
        return None, stop

    def take_back_reply(self) -> None:
        """The last reply does not fit the context: its observation leaves the bank, and the episode ends.

        After a crop that is context_limit; after a failed action it is void, as in the last turn.
        """
        if self.crop_turns[-1:] == [self.turn]:
            self.observations.pop(), self.crops.pop(), self.crop_turns.pop()
            self.end("context_limit")
        else:
            self.end("void")

    def clone(self) -> "CropEnv":
        """Another episode on the same image, from its start."""
        other = copy.copy(self)
        other._start()
        return other

    def _locate(self, crop: Crop) -> tuple[int, int, int, int]:
        """The pixels of a crop in its source; ActionError when the bank or the size forbids it."""
        if crop.source >= len(self.observations):
            wanted, last = source_name(crop.source), source_name(len(self.observations) - 1)
            raise ActionError("bad_source", f"{wanted} does not exist, the last image is {last}")
        left, top, right, bottom = crop_pixels(self.observations[crop.source].size, crop.box)
        short, long = sorted((right - left, bottom - top))
        if short < MIN_CROP_SIDE or long > MAX_ASPECT * short:
            size = f"{right - left} x {bottom - top} pixels"
            rule = f"a side needs {MIN_CROP_SIDE}, and the sides may differ by a factor of {MAX_ASPECT}"
            raise ActionError("bad_size", f"the region has {size}; {rule}")
        return left, top, right, bottom

    def _view(self, image: Image.Image) -> dict:
        return {"type": "image", "image": fit_pixels(image, self.min_pixels, self.max_pixels)}


# ---------------------------------------------------------------------------------------------- images


class ImageError(ValueError):
    """A file that is no usable image; the message names the file and the reason."""


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, without what `convert` alone would lose: alpha is laid on white, 16-bit pixels are scaled to 8."""
    if image.mode in ("I", "F"):
        raise ImageError(f"pixels of mode {image.mode} have no known white: save the image with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """An upright RGB image from a file: EXIF orientation applied, alpha on white, frame 0 of an animation.

    ImageError for a file that is missing, broken, no image, or larger than Pillow's own limit (178 million
    pixels). It names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except (
        OSError,
        ValueError,
        SyntaxError,
        RuntimeError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # SyntaxError: Pillow's readers of PNG and PPM. RuntimeError: AVIF. struct.error: EXIF.
        raise ImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


# ---------------------------------------------------------------------------------------------- grading

_FOLD = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII, nothing else
_WORDS = """zero one two three four five six seven eight nine ten
eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"""
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split())}
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019"}


def _normalise(text: str) -> str:
    text = " ".join(text.translate(_FOLD).casefold().split()).removesuffix(".").rstrip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:  # pairs only: 5' and 5" are not 5
        text = text[1:-1].strip().removesuffix(".").rstrip()
    return " ".join(_NUMBERS.get(word, word) for word in text.split())


def _choose(text: str, options: dict[str, str]) -> str | None:
    """The one letter that a text names, as B, (B), B., B), B:, "B. blue", "(B) blue" or blue. Else None."""
    said = _normalise(text)
    by_letter = {
        letter: {f"{letter}", f"({letter})", f"{letter})", f"{letter}:"}
        | {f"{mark} {option}" for mark in (f"{letter}.", f"{letter})", f"({letter})", f"{letter}:")}
        for letter, option in options.items()
    }
    by_text = {letter: {option} for letter, option in options.items()}
    for forms in (by_letter, by_text):  # a letter is a letter, even if it is another option's text
        named = [letter for letter in options if said in {_normalise(form) for form in forms[letter]}]
        if named:
            return named[0] if len(named) == 1 else None
    return None


def grade(prediction: str | None, answer: str | list[str], options: dict[str, str] | None = None) -> float:
    """1.0 when the whole prediction equals the answer, or one of several answers, else 0.0.

    Equal after normalisation: full-width ASCII made ASCII, case folded, white space collapsed, one pair of
    quotes and a final full stop removed, zero .. twenty as digits. So "2" is not "20", nor is "it is 2".
    With options {letter: text} the answer is a letter, and the prediction must name exactly that option, by
    letter, by letter and text, or by text. ValueError when the answer is none of the options.

    >>> grade("Two.", "2"), grade("2 or 3", "2"), grade("grey", ["gray", "grey"])
    (1.0, 0.0, 1.0)
    >>> [grade(text, "B", {"A": "red", "B": "blue"}) for text in ("(b)", "B. blue", "blue", "A or B")]
    [1.0, 1.0, 1.0, 0.0]
    """
    answers = [answer] if isinstance(answer, str) else answer
    if options:
        letters = {_choose(text, options) for text in answers}
        if None in letters:
            raise ValueError(f"answer {answer!r} is not one of the options {', '.join(options)}")
    if prediction is None or len(prediction) > MAX_ANSWER_CHARS or not _normalise(prediction):
        return 0.0
    if options:
        return float(_choose(prediction, options) in letters)
    return float(_normalise(prediction) in {_normalise(text) for text in answers})


# ---------------------------------------------------------------------------------------------- demo


def main(photo: Path, /, out: Path = Path("runs/env")) -> None:
    """Plays a scripted search on a photo: a crop, a crop of that crop, a mistake, an answer.

    Args:
        photo: any image file
        out: folder for the crops, in native pixels
    """
    actions = [
        Crop((0.25, 0.25, 0.75, 0.75), 0),  # the middle
        Crop((0.5, 0.0, 1.0, 0.5), 1),  # closer, in the frame of that crop
        Crop((0.0, 0.0, 1.0, 1.0), 7),  # an image that does not exist
        Answer("a photo"),
    ]
    try:
        env = CropEnv(load_image(photo), "What is this?")
    except ImageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    out.mkdir(parents=True, exist_ok=True)
    print(f"user       an image of {env.image.width} x {env.image.height}: {env.question}")
    for text in map(format_action, actions):
        reply, stop = env.step(text)
        print(f"assistant  {text}")
        print(f"user       {reply['content'][0]['text']}" if reply else f"stop       {stop}")
    for i, image in enumerate(env.observations[1:], 1):
        image.save(out / f"{source_name(i)}.png")
        print(f"{out / source_name(i)}.png  {image.width} x {image.height}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
