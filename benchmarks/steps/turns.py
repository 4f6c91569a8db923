"""A contestant's side of a race: it gets warm, says so, and waits for its turns.

A contestant is a process of its own. It imports nothing of this project but this file and the
`sslkit` that its ``PYTHONPATH`` names, which may be the one of an old commit.

    parent -> child: the arguments, as JSON on the command line
    child -> parent: {"facts": {...}}            when it is warm
    parent -> child: 5                           work for 5 steps
    child -> parent: {"seconds": 0.61}           and so on, until its standard input ends
"""

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Work = Callable[[int], float]
"""Takes a number of steps and returns the last loss."""
Kinds = Mapping[str, Callable[[dict[str, Any]], tuple[Work, dict[str, Any]]]]
"""What a file can do, by name: a function of the arguments to the work and facts about it."""


def serve(kinds: Kinds) -> None:
    """Build and warm up what the arguments ask for, then work when told to.

    The last loss of the warm-up is one of the facts.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to standard error

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    arguments = json.loads(sys.argv[1])
    work, facts = kinds[arguments["kind"]](arguments)
    loss = work(arguments["warm_up"])
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    if arguments["rewarm"]:
        give_memory_back()
    answer({"facts": {**facts, "loss": loss}})
    for line in sys.stdin:
        steps = int(line)
        if arguments["rewarm"]:  # not timed: the memory that was given back is asked for again
            work(arguments["rewarm"])
        start = time.perf_counter()
        work(steps)
        seconds = time.perf_counter() - start
        if arguments["rewarm"]:
            give_memory_back()
        answer({"seconds": seconds})


def give_memory_back() -> None:
    """Return what the C library keeps of freed memory; gigabytes, after steps of a large network.

    Nothing happens where the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
