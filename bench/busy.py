"""How much slower a command is beside one busy process: the ratio of its wall times, beside it and alone.

The busy process is a plain Python loop, pinned nowhere. Runs alternate; medians of `repeats`. TMP in the
command is a new empty folder for each run.

    $ python bench/busy.py --repeats 3 -- python train_sft.py --steps 20 --out TMP/sft
"""

import statistics
import subprocess
import sys
import tempfile
import time


def time_command(command: list[str], busy: bool) -> float:
    """Seconds of one run. A command that fails ends the measurement."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            words = [word.replace("TMP", folder) for word in command]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return time.time() - began
    finally:
        if other:
            other.kill()
            other.wait()


def main(repeats: int, command: list[str]) -> None:
    times = {"alone": [], "beside a busy process": []}
    for _ in range(repeats):
        for name, seconds in times.items():  # alternating
            seconds.append(time_command(command, busy=name != "alone"))
            print(f"{name:24s}{seconds[-1]:8.1f} s", flush=True)
    alone, busy = (statistics.median(seconds) for seconds in times.values())
    print(f"medians: alone {alone:.1f} s, beside a busy process {busy:.1f} s, ratio {busy / alone:.2f}")


if __name__ == "__main__":
    if "--" not in sys.argv:
        sys.exit("usage: python bench/busy.py [--repeats N] -- COMMAND")
    split = sys.argv.index("--")
    options, command = sys.argv[1:split], sys.argv[split + 1 :]
    main(int(options[1]) if options[:1] == ["--repeats"] else 3, command)
