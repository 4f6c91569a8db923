"""Position probes of a model, by `sslkit.evaluation.position`."""

from dataclasses import replace

from einops import reduce

from sslkit.evaluation import figures
from sslkit.evaluation.options import Position as Options
from sslkit.evaluation.position import PositionProbe, position_probe
from sslkit.evaluation.scores import Outcome, Score
from sslkit.evaluation.subject import Subject


def evaluate(subject: Subject, options: Options) -> Outcome:
    """R² on the test images by the linear and the two-layer probe; with RASA, before it too."""
    subjects = {"": subject}
    if subject.rasa is not None:
        subjects["before RASA: "] = replace(subject, rasa=None)
    probes: dict[str, PositionProbe] = {}
    for stage, one in subjects.items():
        train, test = (one.features(name, "patches", view="dense") for name in ("train", "test"))
        for name, hidden_dim in (("linear", None), ("two layers", options.hidden_dim)):
            if hidden_dim != 0:
                probes[stage + name] = position_probe(
                    train.patches,
                    test.patches,
                    hidden_dim=hidden_dim,
                    generator=subject.generator(),
                )
    maps = {
        name: reduce(probe.squared_errors, "b h w yx -> h w", "mean")
        for name, probe in probes.items()
    }
    return Outcome(
        {
            f"{name} R²": Score.mean(
                probe.r2_by_image(), items=test.indices, higher_is_better=False, percent=False
            )
            for name, probe in probes.items()
        },
        {"position": figures.position_maps(maps)},
        {"mean squared error": {name: probe.error for name, probe in probes.items()}},
    )
