"""Race everything, record it, render docs/benchmarks.md and say which goals are met.

    python -m benchmarks --device cuda -k attention

Exits with an error if a contestant failed; a missed goal or an absent peer is printed and is none.
"""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks import reach, render
from benchmarks.machine import RESULTS, ROOT

QUICK = ROOT / "runs" / "quick_benchmarks"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"toy sizes, results in {QUICK}")
    parser.add_argument("--seconds", type=float, help="of the timed rounds of a race")
    parser.add_argument("--results", type=Path, help="folder that the .jsonl files are in")
    parser.add_argument("--docs", type=Path, help="the page to render")
    parser.add_argument("-k", dest="expression", help="pytest's -k: which races or contestants")
    options = parser.parse_args()
    results = options.results or (QUICK if options.quick else RESULTS)
    docs = options.docs or (QUICK / "benchmarks.md" if options.quick else render.PAGE)

    arguments = [str(ROOT / "benchmarks"), "-rsfE", "--strict-markers", "-p", "no:cacheprovider"]
    arguments += ["-o", "addopts=", "-o", "python_files=bench_*.py", "--rootdir", str(ROOT)]
    arguments += ["--benchmark-columns=median,iqr,rounds", "--durations=8"]
    arguments += ["--device", options.device, "--results", str(results)]
    arguments += ["--quick"] * options.quick
    arguments += [] if options.seconds is None else ["--seconds", str(options.seconds)]
    arguments += [] if options.expression is None else ["-k", options.expression]
    status = pytest.main(arguments)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(status)

    files = sorted(results.glob("*.jsonl"))
    render.write(files, docs, sorted((results / "steps").glob("*.jsonl")))
    if not options.quick:  # goals are about full sizes
        for file in files:
            reach.report(file)
    print(f"recorded in {results}, rendered to {docs}")
    if status != pytest.ExitCode.OK:
        print("some contestants FAILED: see above", file=sys.stderr)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
