"""The study of what each piece of Franca is worth.

    python -m benchmarks.study run --budget 60          # repeat until it says that all is done
    python -m benchmarks.study run --only masks --seeds 0 1 2 3 4
    python -m benchmarks.study figures
    python -m benchmarks.study page

``run`` trains and scores what benchmarks/study/results/<scale>.jsonl has no row of; ``figures`` and
``page`` draw docs/study/<scale>/*.png and write docs/study.md from these files alone.
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.study import runs, training
from benchmarks.study.settings import GROUPS, SCALES, SEEDS, groups_of

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
    do.add_argument("--scale", choices=SCALES, default="laptop")
    do.add_argument("--budget", type=float, default=60, metavar="MINUTES")
    do.add_argument("--only", nargs="+", choices=GROUPS, default=DEFAULT, metavar="GROUP")
    do.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    do.add_argument("--data", help="labelled images; by default ../shared/data/cifar10")
    do.add_argument("--dense", default=str(DATA / "cutouts"), help="images with masks")
    do.add_argument("--work", type=Path, default=ROOT / "runs" / "study")
    do.add_argument("--results", type=Path, default=runs.RESULTS)
    for name, what in (("figures", "draw docs/study/<scale>"), ("page", "write docs/study.md")):
        show = commands.add_parser(name, help=what)
        show.add_argument("--results", type=Path, default=runs.RESULTS)
        show.add_argument("--docs", type=Path, default=ROOT / "docs")
    return whole


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "run":
        return run(options)
    from benchmarks.study import figures, page

    results = runs.read_all(options.results)
    if options.command == "page":
        print(page.write(results, options.docs / "study.md"))
        return 0
    for scale, rows in results.items():
        for path in figures.write(rows, options.docs / "study" / scale):
            print(path)
    return 0


def run(options: argparse.Namespace) -> int:
    """Train and score until all is done or the budget is spent."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and the recipe with it
    if options.data is None and options.scale == "gpu":
        sys.exit("--scale gpu: --data names a folder of labelled images, train/CLASS/x.jpg, ...")
    if wrong := [name for name in options.only if name not in groups_of(options.scale)]:
        sys.exit(f"--only {' '.join(wrong)}: not for --scale {options.scale}")
    data = training.prepare(options.data or str(DATA / "cifar10"), options.dense, options.work)
    file = options.results / f"{options.scale}.jsonl"
    done = runs.run(
        list(runs.planned(options.only, options.seeds)),
        SCALES[options.scale],
        data,
        options.work,
        file,
        budget=60 * options.budget,
    )
    print("all is done" if done else f"run the same command again; rows are in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
