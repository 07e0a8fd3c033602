"""Checks correctness and measures speed on a machine with a GPU.

Stages: environment, correctness, speed, and quality, which uses the remaining time. `--stages` selects some of them; the
environment is always measured. Each check and measurement runs in a separate process with a time limit. `results.json` and
`RESULTS.md` are rewritten after each, so an interrupted run keeps its results.
`--rehearse` runs everything with tiny sizes on a CPU. Exit status: 0, 1 if anything failed, 2 without a GPU.
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
from report import STAGES, Results

HERE = Path(__file__).resolve().parent
MARGIN = 4.0  # seconds reserved for cleanup
ENVIRONMENT_SECONDS, CORRECTNESS_SECONDS = 60.0, 120.0
CORRECTNESS_FRACTION, SPEED_FRACTION = 0.25, 0.40  # maximum fraction of the total time, except for the last stage
CHECK_SECONDS, MEASUREMENT_SECONDS, GROUP_SECONDS = 110.0, 150.0, 200.0
LEAST = 20.0  # minimum remaining seconds to start a measurement


def parser() -> argparse.ArgumentParser:
    """Returns the argument parser."""
    command = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    command.add_argument("--minutes", type=float, default=15.0, metavar="M", help="total time (default: 15)")
    command.add_argument("--shards", type=Path, metavar="DIR", help="images for the last stage, of 32 to 96 pixels a side")
    command.add_argument(
        "--stages",
        nargs="+",
        default=STAGES[1:],
        choices=STAGES[1:],
        metavar="STAGE",
        help="correctness, speed, quality (default: all)",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    command.add_argument("--rehearse", action="store_true", help="run everything with tiny sizes on a CPU, without --shards")
    return command


def tasks(program: str, table: str, settings: Settings, seconds: float, least: float = 0.0) -> list[Task]:
    """Returns one task per key of the dictionary `table` of a program, or two tasks in a rehearsal, to save import time.

    The program is parsed but not imported, since importing torch is slow and optional packages may be missing.
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
    """Runs all stages in order and records exceptions of a stage."""
    cores, total, rehearse = os.cpu_count() or 1, 60 * args.minutes, settings.rehearse
    runner = Runner(settings, args.out / "log.txt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops running tasks like Ctrl-C
    end = begin + total - MARGIN

    def run_tasks(program: str, table: str, seconds: float, limit: float, parallel: int, least: float = 0.0) -> None:
        num_workers = 2 if rehearse else max(1, parallel)
        stage = program.removesuffix(".py")
        deadline = end if rehearse or stage == args.stages[-1] else min(end, time.monotonic() + seconds)
        record = partial(results.add, stage)
        runner.run_all(tasks(program, table, settings, limit, least), num_workers, deadline, record)

    correctness_limit, speed_limit = min(CORRECTNESS_SECONDS, CORRECTNESS_FRACTION * total), SPEED_FRACTION * total
    stages: dict[str, Callable[[], None]] = {
        "environment": lambda: run_tasks("environment.py", "FACTS", ENVIRONMENT_SECONDS, ENVIRONMENT_SECONDS, 3),
        "correctness": lambda: run_tasks("correctness.py", "CHECKS", correctness_limit, CHECK_SECONDS, min(6, cores // 2)),
        "speed": lambda: run_tasks("speed.py", "MEASUREMENTS", speed_limit, MEASUREMENT_SECONDS, min(5, cores // 3), LEAST),
        "quality": lambda: quality.run(runner, args.out, end, partial(results.add, "quality")),
    }
    for name in (STAGES[0], *args.stages):
        try:
            stages[name]()
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
            print(
                "error: no GPU is available to torch; use --rehearse to run everything with tiny sizes on a CPU",
                file=sys.stderr,
            )
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
    print(f"{args.out / 'RESULTS.md'}: {'failed' if results.has_failures else 'passed'}")
    return int(results.has_failures)


if __name__ == "__main__":
    sys.exit(main())
