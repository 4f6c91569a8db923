"""Cases: one property of one adapter each, and what is found when it is run.

Hypothesis draws the inputs, always the same ones, and makes a failing input as small as it can.
"""

import traceback
from dataclasses import dataclass, is_dataclass
from types import ModuleType
from typing import Any, Protocol, TypeGuard

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.reporting import with_reporter
from torch import Tensor

from sslkit.testing.properties import Property, Stop, Violation, shown


class Adapter(Protocol):
    """A frozen dataclass that says how somebody's code is called, such as `Sinkhorn`."""

    @property
    def properties(self) -> tuple[Property, ...]:
        """What such code is held to."""


@dataclass(frozen=True)
class Finding:
    """What was found about one property of one adapter.

    Args:
        adapter: name of the adapter.
        promise: the property.
        inputs: the smallest input at which it fails, as lines ``name = value``; empty where it
            holds.
        expected, found: what the property asks for, and what came.
    """

    adapter: str
    promise: Property
    inputs: str = ""
    expected: str = ""
    found: str = ""

    @property
    def holds(self) -> bool:
        """Whether no input was found at which the property fails."""
        return not self.found

    def __str__(self) -> str:
        if self.holds:
            return f"{self.adapter}: {self.promise.name}: holds"
        lines = [f"{self.adapter}: {self.promise.sentence}"]
        if self.inputs:
            lines += ["  smallest input found:", *(f"    {x}" for x in self.inputs.splitlines())]
        lines += [f"  expected {self.expected}", f"  found    {self.found}"]
        lines += [f"  resembles: {fault}" for fault in self.promise.resembles]
        return "\n".join(lines)


class NotHeld(AssertionError):
    """Properties that do not hold, with the smallest failing inputs."""


@dataclass(frozen=True)
class Case:
    """One property of one adapter: ``str(case)`` names it, ``case.check()`` runs it."""

    name: str
    adapter: Any
    promise: Property

    def __str__(self) -> str:
        return f"{self.name}: {self.promise.name}"

    def run(self, *, effort: float = 1.0) -> Finding:
        """Try the property on many inputs.

        Args:
            effort: how many times the property's number of inputs is tried.

        Raises:
            TypeError: the adapter cannot be sent to another process.
        """
        number = max(1, round(effort * self.promise.max_examples))
        inputs: dict[str, str] = {}

        @settings(
            max_examples=number,
            derandomize=True,
            database=None,
            deadline=None,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(st.data())
        def examine(data: st.DataObject) -> None:
            drawn: dict[str, str] = {}

            def draw(strategy: st.SearchStrategy, name: str) -> Any:
                value = data.draw(strategy)
                drawn[name] = shown(value)  # before the code under test can change it
                return value.clone() if isinstance(value, Tensor) else value

            try:
                self.promise.holds(self.adapter, draw)
            except (Exception, Stop):
                inputs.clear()
                inputs.update(drawn)
                raise

        state = torch.get_rng_state()
        try:
            with with_reporter(lambda _: None):
                examine()
        except Stop as stop:
            return self._finding(stop.violation, inputs)
        except Exception as error:
            if isinstance(error, TypeError) and getattr(error, "of_the_adapter", False):
                raise
            return self._finding(error, inputs)
        finally:
            torch.set_rng_state(state)
        return Finding(self.name, self.promise)

    def check(self) -> None:
        """Run the property; raise `NotHeld` with the report if it fails."""
        finding = self.run()
        if not finding.holds:
            raise NotHeld(str(finding))

    def _finding(self, error: BaseException, inputs: dict[str, str]) -> Finding:
        lines = "\n".join(f"{name} = {value}" for name, value in inputs.items())
        if isinstance(error, Violation):
            return Finding(self.name, self.promise, lines, error.expected, error.found)
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        found = f"{type(error).__name__}: {message} ({place.filename}:{place.lineno})"
        return Finding(self.name, self.promise, lines, "a result", found)


def cases_of(adapter: Adapter, name: str = "") -> list[Case]:
    """A case for each property that the adapter promises."""
    name = name or type(adapter).__name__
    return [Case(name, adapter, each) for each in adapter.properties if each.applies(adapter)]


def cases(*modules: ModuleType) -> list[Case]:
    """The cases of all adapters that are variables of the modules, for a parametrised test::

    @pytest.mark.parametrize("case", cases(my_package.adapters), ids=str)
    def test_conforms(case):
        case.check()
    """
    return [
        case for name, adapter in adapters(*modules).items() for case in cases_of(adapter, name)
    ]


def adapters(*modules: ModuleType) -> dict[str, Adapter]:
    """The adapters that are variables of the modules, by their names.

    Raises:
        ValueError: two modules have different adapters of one name.
    """
    found: dict[str, Adapter] = {}
    for module in modules:
        for variable, value in vars(module).items():
            name = variable.replace("_", " ")
            if _is_adapter(value) and found.setdefault(name, value) != value:
                raise ValueError(f"two modules have an adapter that is called {variable}")
    return found


def _is_adapter(value: object) -> TypeGuard[Adapter]:
    fields = is_dataclass(value) and not isinstance(value, type)
    return fields and hasattr(value, "properties")


def check(adapter: Adapter, name: str = "") -> None:
    """Hold an adapter to all its properties; raise `NotHeld` with a report of those that fail."""
    findings = [case.run() for case in cases_of(adapter, name)]
    failed = [finding for finding in findings if not finding.holds]
    if failed:
        reports = "\n\n".join(map(str, failed))
        raise NotHeld(f"{len(failed)} of {len(findings)} properties do not hold\n\n{reports}")
