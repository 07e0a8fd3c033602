"""Checks on a machine with a GPU that everything works, and measures how fast it is.

Stages: the machine, correctness, speed, and quality, which gets the time that is left. Every check and every measurement is a
process of its own with a time limit, and `results.json` and `RESULTS.md` are rewritten after each, so a run that is cut short
leaves its results. `--rehearse` runs everything in tiny sizes on a CPU. Exit status: 0, 1 if anything failed, 2 without a GPU.
"""

import argparse
import ast
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import quality
from processes import Entry, Runner, Settings, Task
from report import Results

HERE = Path(__file__).resolve().parent
MARGIN = 4.0  # seconds at the end for writing and cleaning up
ENVIRONMENT_SECONDS, CORRECTNESS_SECONDS = 60.0, 120.0
CORRECTNESS_FRACTION, SPEED_FRACTION = 0.22, 0.40  # of all time, at most
CHECK_SECONDS, MEASUREMENT_SECONDS, GROUP_SECONDS = 110.0, 150.0, 200.0
LEAST = 20.0  # seconds in which a measurement has a chance to end


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    command.add_argument("--minutes", type=float, default=9.0, metavar="M", help="time for everything (default: 9)")
    command.add_argument("--shards", type=Path, metavar="DIR", help="images for the last stage, of 32 to 96 pixels a side")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    command.add_argument("--rehearse", action="store_true", help="the same in a small way on a CPU; needs no --shards")
    return command


def tasks(program: str, table: str, settings: Settings, seconds: float, least: float = 0.0) -> list[Task]:
    """One task for each key of the dictionary `table` of a program; in a rehearsal two for all, to save the time of imports.

    The program is not imported: this process waits neither for torch nor for what cannot be imported.
    """
    assignments = [node for node in ast.parse((HERE / program).read_text()).body if isinstance(node, ast.AnnAssign)]
    values = next(node.value for node in assignments if ast.unparse(node.target) == table)
    assert isinstance(values, ast.Dict)
    names = [ast.literal_eval(key) for key in values.keys if key]
    command = [sys.executable, str(HERE / program)]
    if settings.rehearse:
        groups = (names[start::2] for start in range(2))
        return [Task(group, [*command, *group], GROUP_SECONDS) for group in groups]
    return [Task([name], [*command, name], seconds, least) for name in names]


def run_stages(args: argparse.Namespace, settings: Settings, results: Results, begin: float) -> None:
    """All stages, one after the other. One that fails as a whole is recorded, too."""
    cores, total, rehearse = os.cpu_count() or 1, 60 * args.minutes, settings.rehearse
    runner = Runner(settings, args.out / "log.txt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what is running, as Ctrl-C does
    end = begin + total - MARGIN

    def run_tasks(program: str, table: str, seconds: float, each: float, most: int, least: float = 0.0) -> None:
        lanes = 2 if rehearse else max(1, most)
        deadline = end if rehearse else min(end, time.monotonic() + seconds)
        record = partial(results.add, program.removesuffix(".py"))
        runner.run_all(tasks(program, table, settings, each, least), lanes, deadline, record)

    limit, speed_limit = min(CORRECTNESS_SECONDS, CORRECTNESS_FRACTION * total), SPEED_FRACTION * total
    stages: dict[str, Callable[[], None]] = {
        "environment": lambda: run_tasks("environment.py", "FACTS", ENVIRONMENT_SECONDS, ENVIRONMENT_SECONDS, 3),
        "correctness": lambda: run_tasks("correctness.py", "CHECKS", limit, CHECK_SECONDS, min(6, cores // 2)),
        "speed": lambda: run_tasks("speed.py", "MEASUREMENTS", speed_limit, MEASUREMENT_SECONDS, min(3, cores // 4), LEAST),
        "quality": lambda: quality.run(runner, args.out, end, partial(results.add, "quality")),
    }
    for name, stage in stages.items():
        try:
            stage()
        except Exception as error:
            traceback.print_exc()
            results.add(name, Entry("the stage itself", "failed", f"{type(error).__name__}: {error}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs everything and returns the exit status."""
    begin = time.monotonic()
    args = parser().parse_args(argv)
    if not args.rehearse:
        import torch

        if not torch.cuda.is_available():
            print("error: torch finds no GPU here; --rehearse does the same in a small way on a CPU", file=sys.stderr)
            return 2
        if args.shards is None or not (args.shards / "index.json").exists():
            print("error: --shards DIR: give a folder of shards (python -m vae_scale.pack) for the last stage", file=sys.stderr)
            return 2
    args.out.mkdir(parents=True, exist_ok=True)
    args.out, args.shards = args.out.resolve(), args.shards and args.shards.resolve()
    (args.out / "log.txt").write_text("")
    command = shlex.join(["python", "tests/gpu/run.py", *(sys.argv[1:] if argv is None else argv)])
    results = Results(args.out, command, {"minutes": args.minutes, "rehearsal": args.rehearse})
    scratch = Path(tempfile.mkdtemp(prefix="vae_scale_gpu_"))
    try:
        shards = scratch / "shards"
        run_stages(args, Settings(shards, args.shards or shards, scratch, args.rehearse), results, begin)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1
    finally:
        results.write()
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{args.out / 'RESULTS.md'}: {'something failed' if results.has_failures else 'nothing failed'}")
    return int(results.has_failures)


if __name__ == "__main__":
    sys.exit(main())
