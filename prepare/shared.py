"""What the scripts in this folder share: fetching a set, and writing its rows as probes.

Each script turns one published set into our own format, once; data.load_probes reads the result. To add a
set, write one function that makes a Probe of a row, and pass it to `convert`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import UserError, cli, write_atomic  # noqa: F401  (the scripts take them from here)

import huggingface_hub
import tyro
from tqdm import tqdm

from data import Probe, load_probes, save_probes
from env import grade


@dataclass(frozen=True)
class BaseConfig:
    src: tyro.conf.Positional[str]  # the set: a folder or file on this disk, or `hub` to download it
    out: Path  # new folder for the probes


# ---------------------------------------------------------------------------------------------- finding


def fetch(src: str, repo: str, pattern: str | None = None) -> Path:
    """The absolute path of a set. `hub` downloads it (of its files, those that fit the pattern).

    The download stays in the cache of the Hugging Face hub, and the probes name the images there.
    """
    if src == "hub":
        try:
            return Path(huggingface_hub.snapshot_download(repo, repo_type="dataset", allow_patterns=pattern))
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot download {repo} from the Hugging Face hub: {reason}") from None
    path = Path(src).absolute()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return path


def find_file(src: str, repo: str, *patterns: str, download: str | None = None) -> Path:
    """The one file of a set that fits one of the patterns. src may also be that file, whatever its name."""
    path = fetch(src, repo, download)
    if path.is_file():
        return path
    found = [file for pattern in patterns for file in sorted(path.glob(pattern))]
    if len(found) != 1:
        names, wanted = ", ".join(file.name for file in found), " or ".join(patterns)
        raise UserError(f"{path}: give the path of the file; wanted {wanted}, found {names or 'none'}")
    return found[0]


def find_image(folder: Path, name: str) -> Path:
    """The image that a row names. A set must not make us read files elsewhere."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"the image {name!r:.80} is not inside {folder}")
    if not (folder / name).is_file():
        raise UserError(f"the image {folder / name} is missing; is the set complete?")
    return folder / name


# ---------------------------------------------------------------------------------------------- converting


def take(row: dict, key: str, *kinds: type):
    """row[key]. UserError if it is missing or of another type, or if the row is no object at all."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kinds):
        raise UserError(f'"{key}" is missing or of the wrong type: {value!r:.80}')
    return value


def convert(rows: Iterable[tuple[str, object]], read_row: Callable[[object], Probe], out: Path) -> None:
    """Writes a set in our format. No row is left out: UserError names the first that is broken.

    rows: (where it is, for messages; the row). read_row: makes a Probe of a row; its ValueError says what is
    wrong.
    """
    save_probes(_read_rows(rows, read_row), out)
    print(f"{len(load_probes(out))} probes in {out}")


def _read_rows(rows: Iterable[tuple[str, object]], read_row: Callable[[object], Probe]) -> Iterator[Probe]:
    where = None
    for where, row in tqdm(rows, desc="rows"):
        try:
            probe = read_row(row)
            probe.question = probe.question.replace("<image>", "").strip()  # env.CropEnv puts the image first
            if not probe.question:
                raise UserError("the question is empty")
            if probe.answer != [] and not grade(probe.answer, probe.answer, probe.options):
                raise UserError(f"no prediction can match the answer {probe.answer!r:.80}")
        except (ValueError, OSError) as error:  # OSError: a name that is too long, a full disk
            raise UserError(f"{where}: {error}") from None
        yield probe
    if where is None:
        raise UserError("the set holds no rows")
