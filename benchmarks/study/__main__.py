"""The study of what each piece of Franca is worth.

    python -m benchmarks.study run --budget 60          # repeat until it says that all is done
    python -m benchmarks.study run --only masks --seeds 0 1 2 3 4
    python -m benchmarks.study figures
    python -m benchmarks.study page

``run`` trains and scores what benchmarks/study/results/<scale>.jsonl has no row of; ``figures`` and
``page`` draw docs/study/*.png and write docs/study.md from that file alone.
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.study import runs, training
from benchmarks.study.settings import GROUPS, SCALES, groups_of

DATA = ROOT.parent / "shared" / "data"
DEFAULT = [name for name, group in GROUPS.items() if group.split == "test"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)
    do = commands.add_parser("run", help="train and score what is missing")
    do.add_argument("--budget", type=float, default=60, metavar="MINUTES")
    do.add_argument("--only", nargs="+", choices=GROUPS, default=DEFAULT, metavar="GROUP")
    do.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    do.add_argument("--data", help="labelled images; by default ../shared/data/cifar10")
    do.add_argument("--dense", default=str(DATA / "cutouts"), help="images with masks")
    do.add_argument("--work", type=Path, default=ROOT / "runs" / "study")
    for one in (
        do,
        commands.add_parser("figures", help="draw"),
        commands.add_parser("page", help="write docs/study.md"),
    ):
        one.add_argument("--scale", choices=SCALES, default="laptop")
        one.add_argument("--results", type=Path, default=runs.RESULTS)
        if one is not do:
            one.add_argument("--docs", type=Path, default=ROOT / "docs")
    return whole


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    file = options.results / f"{options.scale}.jsonl"
    if options.command == "run":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and the recipe with it
        if options.data is None and options.scale == "gpu":
            sys.exit(
                "--scale gpu: --data names a folder of labelled images, train/CLASS/x.jpg, ..."
            )
        images = options.data or str(DATA / "cifar10")
        data = training.prepare(images, options.dense, options.work)
        if wrong := [name for name in options.only if name not in groups_of(options.scale)]:
            sys.exit(f"--only {' '.join(wrong)}: not for --scale {options.scale}")
        planned = list(runs.planned(options.only, options.seeds))
        done = runs.run(
            planned, SCALES[options.scale], data, options.work, file, budget=60 * options.budget
        )
        print("all is done" if done else f"run the same command again; rows are in {file}")
        return 0
    from benchmarks.study import figures, page

    if options.command == "figures":
        for path in figures.write(runs.read(file), options.docs / "study"):
            print(path)
    else:
        print(page.write(runs.read(file), options.docs / "study.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
