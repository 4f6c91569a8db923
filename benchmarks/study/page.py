"""docs/study.md from the rows: for each question what was done, figure, tables, what they say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study import figures
from benchmarks.study.runs import Row
from benchmarks.study.settings import ARMS, GROUPS, WHOLE, Group, groups_of
from benchmarks.study.summary import (
    SCORES,
    Difference,
    Spread,
    difference,
    failed,
    finished,
    is_share,
    score_spread,
)


@dataclass(frozen=True)
class Text:
    """What a section says beside its numbers."""

    what: str
    claim: str
    compared: tuple[tuple[str, str, str, int], ...]
    """What the claim says of (arm, reference, score): +1 higher, -1 lower."""
    why: str
    """Added where a claim does not show."""


_SMALL = (
    "At this size training has hardly begun: less than one pass over few images, a network of a "
    "hundredth of the paper's parameters. Three seeds cannot tell differences as small as the 0.2 "
    "points that the paper reports for CyclicMask, and in-context scores are so close to the floor "
    "that they have little room to differ."
)

TEXTS: dict[str, Text] = {
    "choice": Text(
        "Settings of the optimiser for so short a run, one seed each, scored on training images "
        "that no run saw (classification) and on a part of the training pictures with masks "
        "(dense). The first row is what all arms below are trained with. Nothing else was tuned: "
        "the arms that differ from the whole method run with what suits it.",
        "",
        (),
        "",
    ),
    "floor": Text(
        "The same network with fresh weights, and without a network: k-NN and a linear head on "
        "standardised pixels, dense scores on each patch's mean colour and place. Dense scores of "
        "fresh weights are about those of calling every pixel background.",
        "",
        (),
        "",
    ),
    "pieces": Text(
        "From one clustering head with block masks, one piece after another (the paper's figure "
        "2). RASA is fitted on the images of the in-context memory; its planes are taken out of "
        "all tokens, as when it is folded into the network.",
        "every piece gains in linear and in in-context scores: CyclicMask a little, nested heads "
        "most, above all in dense scores, RASA in dense ones.",
        (
            ("one_head", "one_head_block", "linear", 1),
            ("one_head", "one_head_block", "in_context", 1),
            (WHOLE, "one_head", "linear", 1),
            (WHOLE, "one_head", "in_context", 1),
            ("rasa", WHOLE, "in_context", 1),
        ),
        _SMALL + " Losses of five heads are summed, so nested arms also differ in the weight of "
        "KoLeo beside them.",
    ),
    "sizes": Text(
        "k-NN on the first D/16, D/8, ... features of the class token, in-context segmentation on "
        "those of the patches (figure 3).",
        "nested heads are ahead at every size, most under heavy compression.",
        (
            (WHOLE, "one_head", "knn_short", 1),
            (WHOLE, "one_head", "in_context_short", 1),
            (WHOLE, "one_head", "knn", 1),
            (WHOLE, "one_head", "in_context", 1),
        ),
        _SMALL,
    ),
    "position": Text(
        "Nine planes are removed one after another, without stopping early, from the whole "
        "method's patch features: a linear probe's R² of position on held-out pictures, the "
        "entropy over positions of the patch head's clusters (figure 5; dotted: the same clusters "
        "with patches shuffled within each picture), and in-context segmentation.",
        "position goes, clusters no longer stand for places, segmentation gains.",
        (("rasa", WHOLE, "position_r2", -1), ("rasa", WHOLE, "in_context", 1)),
        "Clusters of a network this young stand for colours rather than for places, so that their "
        "entropy is near its limit from the start, and RASA closes a part of a small gap. Objects "
        "here are pasted at random places: position says little of a class that its removal could "
        "mend.",
    ),
    "masks": Text(
        "Nested heads throughout; half of the global crops are masked, in the same shares "
        "(figure 4).",
        "inverse blocks leave the centre exposed and the border hidden, the cyclic shift evens "
        "that out and ends the bias towards places; CyclicMask scores best.",
        (
            (WHOLE, "inverse_block", "linear", 1),
            (WHOLE, "inverse_block", "in_context", 1),
            (WHOLE, "inverse_block", "position_r2", -1),
        ),
        _SMALL + " The grid has few patches, so that a block and a random draw hide much the same.",
    ),
    "norm": Text(
        "DINO's L2-normalised bottleneck and prototypes bound scores by one; the released head has "
        "neither, and a GELU after its last layer. Both with the preset's head of three layers and "
        "with one layer. After training, the teacher's scores of test images are balanced by the "
        "formula that papers print (`exp` in float32, then divisions), by the same with the "
        "largest score taken off, and by `sslkit.SinkhornKnopp`. The formula overflows above a "
        "score of 88.7 times the temperature; since these runs are short, scores that nothing "
        "bounds are also taken times 16 and 64.",
        "",
        (),
        "",
    ),
    "targets": Text(
        "Balanced targets by one, three and ten iterations of Sinkhorn, or an EMA of the teacher's "
        "scores as their centre (DINO). The paper takes Sinkhorn, the released code three "
        "iterations; neither reports a comparison.",
        "",
        (),
        "",
    ),
    "nesting": Text(
        "Each level of the nested heads reads the first m features (the paper), a learned "
        "m-to-m map of them, or a learned D-to-m map of all (the two released versions). The paper "
        "reports no comparison; with the last, short prefixes are not trained to stand alone.",
        "",
        (),
        "",
    ),
    "queue": Text(
        "A quarter of the batch, four times the steps: the same images, fewer rows than prototypes "
        "to balance them over. The queue adds the teacher's scores of past batches.",
        "",
        (),
        "",
    ),
}


def write(rows: Sequence[Row], page: Path) -> Path:
    """The page; figures are looked for beside it, in the folder of its name."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines(rows, page.stem)).rstrip() + "\n")
    return page


def lines(rows: Sequence[Row], folder: str) -> Iterator[str]:
    """The page, line by line."""
    yield "# Does each piece help?\n"
    if not rows:
        yield "Nothing has been run yet: `python -m benchmarks.study run`."
        return
    yield from introduction(rows)
    for name, group in groups_of(rows[0]["scale"]).items():
        yield f"## {group.question}\n"
        if done(rows, name):
            yield from section(rows, name, group, folder)
        else:
            missing = [arm for arm in group.arms if not of_arm(rows, arm, group)]
            yield f"Not run yet: `python -m benchmarks.study run --only {name}`."
            yield f"Missing: {', '.join(group.title(arm) for arm in missing)}.\n"
    yield from colophon(rows)


def of_arm(rows: Sequence[Row], arm: str, group: Group) -> list[Row]:
    """Rows of an arm on the split of a group, failed ones included."""
    return [row for row in rows if row["arm"] == arm and row["split"] == group.split]


def done(rows: Sequence[Row], name: str) -> bool:
    """Whether there is anything to compare: an arm of its own beside the reference."""
    arms = [arm for arm in GROUPS[name].arms if of_arm(rows, arm, GROUPS[name])]
    return len(arms) >= 2


def introduction(rows: Sequence[Row]) -> Iterator[str]:
    """What all arms share."""
    whole = [row for row in rows if row["arm"] == WHOLE and row["split"] == "test"] or list(rows)
    first = whole[0]
    yield (
        f"Arms that differ in one thing, trained with `examples/franca_recipe.py` on equal budgets "
        f"(scale `{first['scale']}`: {first['steps']:,} steps of {first['batch_size']} images, "
        f"{first['images']:,} images in all) and scored by `sslkit.evaluation`: k-NN (k = 20) and "
        "a linear head on class tokens of CIFAR-10, in-context segmentation and a linear position "
        "probe on patch tokens of the cut-outs, with the same encoders, trained on CIFAR-10 alone. "
        "The linear head's learning rate is chosen on held-out training images.\n"
    )
    yield (
        "Cells are the mean ± standard deviation over seeds. Differences are paired: a seed fixes "
        "the first weights, the order of the images and their crops in all arms. *Higher*, "
        "*lower*, and bold type: the 95 % t interval of the mean difference excludes 0; *in every "
        "seed*: it does not, but all seeds agree in sign. No correction is made for the number of "
        "comparisons. Generated by `python -m benchmarks.study page` from "
        "`benchmarks/study/results`.\n"
    )


def section(rows: Sequence[Row], name: str, group: Group, folder: str) -> Iterator[str]:
    """One question."""
    text = TEXTS[name]
    yield text.what + "\n"
    if name in figures.FIGURES and figures.drawable(rows, name):
        yield f"![{group.question}]({folder}/{name}.png)\n"
    yield from score_table(rows, group)
    yield from EXTRA.get(name, lambda _: iter(()))(rows)
    yield from difference_table(rows, group)
    said = list(findings(rows, group))
    if said:
        yield "**What it says.**\n"
        yield from (f"- {finding}".replace("- +", "- \\+") for finding in said)  # not a list in it
        yield ""
    if text.claim:
        yield from verdict(rows, text, group)


def score_table(rows: Sequence[Row], group: Group) -> Iterator[str]:
    """One row an arm."""
    yield table_head(["", *(f"{SCORES[s]}{unit(s)}" for s in group.scores), "seeds"])
    for arm in group.arms:
        spreads = [score_spread(rows, arm, score, group.split) for score in group.scores]
        if any(spreads):
            count = len(finished(rows, arm, group.split))
            cells = [cell(x, s) for s, x in zip(group.scores, spreads, strict=True)]
            yield table_row([group.title(arm), *cells, str(count)])
    yield ""


def difference_table(rows: Sequence[Row], group: Group) -> Iterator[str]:
    """Each arm minus what it is compared with; nothing of single seeds."""
    body = []
    for arm, reference in group.pairs():
        found = [difference(rows, arm, reference, s, group.split) for s in group.scores]
        if any(x is not None and len(x.values) > 1 for x in found):
            cells = [difference_cell(x, s) for s, x in zip(group.scores, found, strict=True)]
            body.append([f"{group.title(arm)}, less {group.title(reference)}", *cells])
    if body:
        yield table_head(["paired difference", *(SCORES[s] for s in group.scores)])
        yield from map(table_row, body)
        yield ""


def findings(rows: Sequence[Row], group: Group) -> Iterator[str]:
    """In words: each comparison, what lies below fresh weights, which trainings gave up."""
    for arm, reference in group.pairs():
        words: dict[str, list[str]] = {}
        for score in group.scores:
            found = difference(rows, arm, reference, score, group.split)
            if found is not None and len(found.values) > 1:
                words.setdefault(found.verdict, []).append(SCORES[score])
        if words:
            said = "; ".join(f"{verdict}: {', '.join(scores)}" for verdict, scores in words.items())
            yield f"{group.title(arm)}, against {group.title(reference)}: {said}."
    for arm in group.arms:
        for row in failed(rows, arm):
            yield f"{group.title(arm)}, seed {row['seed']}: training gave up: {row['failed']}"
        below = [
            SCORES[score]
            for score in ("knn", "linear", "in_context")
            if (found := difference(rows, arm, "fresh", score)) is not None
            and (found.verdict.startswith("lower") or max(found.values) < 0)
        ]
        if below and group.split == "test":
            yield f"{group.title(arm)}: below fresh weights in {', '.join(below)}."


def verdict(rows: Sequence[Row], text: Text, group: Group) -> Iterator[str]:
    """The paper's claim, and which part of it shows."""
    yield f"**The paper says:** {text.claim}\n"
    sides: dict[str, list[str]] = {
        "Shows here": [],
        "Does not show here": [],
        "The opposite shows here": [],
    }
    for arm, reference, score, sign in text.compared:
        found = difference(rows, arm, reference, score)
        if found is None:
            continue
        side = "Does not show here"
        if found.verdict in ("higher", "lower"):
            agrees = (found.mean > 0) == (sign > 0)
            side = "Shows here" if agrees else "The opposite shows here"
        sides[side].append(f"{SCORES[score]} of {group.title(arm)}")
    for side, what in sides.items():
        if what:
            yield f"- {side}: {'; '.join(what)}."
    yield ""
    if sides["Does not show here"] or sides["The opposite shows here"]:
        yield f"Why: {text.why}\n"


# ------------------------------------------------------------------------------------ own tables


def sizes_table(rows: Sequence[Row]) -> Iterator[str]:
    """Scores by embedding size."""
    titles = GROUPS["sizes"].titles
    arms = [arm for arm in ("fresh", "one_head", WHOLE) if finished(rows, arm)]
    for label, curve in (
        ("k-NN, %", lambda row: row["scores"]["knn_by_size"]),
        ("in-context mIoU, %", lambda row: row["in_context_by_size"]),
    ):
        by_size = list(curve(finished(rows, arms[0])[0]))
        yield table_head([f"{label}, by features kept", *by_size])
        for arm in arms:
            curves = [curve(row) for row in finished(rows, arm)]
            spreads = [Spread(tuple(100 * one[size] for one in curves)) for size in by_size]
            yield table_row([titles.get(arm, ARMS[arm].title), *(cell(x, "knn") for x in spreads)])
        yield ""


def position_table(rows: Sequence[Row]) -> Iterator[str]:
    """Plane by plane."""
    followed = [row["position"] for row in finished(rows, WHOLE) if "position" in row]
    if not followed:
        return
    names = {
        "position_r2": "position R²",
        "entropy": "entropy / log P",
        "entropy_shuffled": "of shuffled patches",
        "in_context": "in-context mIoU, %",
    }
    yield table_head(["planes removed", *names.values()])
    for at, step in enumerate(followed[0]):
        written = []
        for key in names:
            factor, like = (100, "in_context") if key == "in_context" else (1, key)
            values = tuple(factor * steps[at][key] for steps in followed)
            written.append(cell(Spread(values), like))
        yield table_row([str(step["planes"]), *written])
    yield ""
    first, last = (f"{followed[0][at]['planes']}" for at in (0, -1))
    words = []
    for key, label in names.items():
        if key != "entropy_shuffled":
            factor, like = (100, "in_context") if key == "in_context" else (1, key)
            changes = tuple(factor * (steps[-1][key] - steps[0][key]) for steps in followed)
            found = Difference(changes)
            words.append(f"{label} {signed(found.mean, like)} ({found.verdict})")
    yield f"From {first} to {last} planes: {', '.join(words)}.\n"
    removed = [row["planes_removed"] for row in finished(rows, "rasa")]
    if removed:
        yield (
            "Left to itself, as in the row *after RASA*, the fit stops after "
            f"{', '.join(map(str, removed))} planes (by seed).\n"
        )


def exposure_table(rows: Sequence[Row]) -> Iterator[str]:
    """The least and the most masked patch."""
    yield table_head(["masked images in which a patch is hidden, %", "least", "most"])
    for arm in GROUPS["masks"].arms:
        for row in finished(rows, arm)[:1]:
            shares = [100 * x for line in row["exposure"] for x in line]
            yield table_row(
                [GROUPS["masks"].title(arm), f"{min(shares):.1f}", f"{max(shares):.1f}"]
            )
    yield ""


def stability_table(rows: Sequence[Row]) -> Iterator[str]:
    """Formulas on the scores of trained teachers: the worst seed of each."""
    formulas = {
        "textbook": "textbook",
        "textbook_minus_max": "largest score off",
        "ours": "sslkit",
    }
    heads = [f"{label}, error" for label in formulas.values()]
    yield table_head(["head, temperature", "largest score", *heads])
    for arm in GROUPS["norm"].arms:
        found = [row["stability"] for row in finished(rows, arm) if "stability" in row]
        for same in zip(*found, strict=True):
            cells = [worst([one[formula] for one in same]) for formula in formulas]
            factor = same[0].get("factor", 1)
            times = "" if factor == 1 else f", scores times {factor}"
            label = (
                f"{GROUPS['norm'].title(arm)}: {same[0]['head']}, {same[0]['temperature']}{times}"
            )
            yield table_row([label, f"{max(one['largest'] for one in same):.3g}", *cells])
    yield ""
    yield "Errors are the largest of all probabilities, against logarithms in float64.\n"


EXTRA = {
    "sizes": sizes_table,
    "position": position_table,
    "masks": exposure_table,
    "norm": stability_table,
}


def colophon(rows: Sequence[Row]) -> Iterator[str]:
    """Where, when and with what."""
    yield "## How it was made\n"
    yield "```bash"
    scale = f"--scale {rows[0]['scale']}"
    if "choice" in groups_of(rows[0]["scale"]):
        yield f"python -m benchmarks.study run {scale} --only choice --seeds 0"
    yield f"python -m benchmarks.study run {scale} --budget 60  # until all is done"
    yield f"python -m benchmarks.study figures {scale}"
    yield f"python -m benchmarks.study page {scale}"
    yield "```\n"
    hardware = sorted({f"{row['hardware']}, {row['threads']} thread(s)" for row in rows})
    versions = sorted({f"{name} {v}" for row in rows for name, v in row["versions"].items()})
    versions = [one for one in versions if not one.endswith("absent")]
    dates = sorted(row["run"][:10] for row in rows)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    minutes = sum(row.get("train_seconds", 0) + row.get("score_seconds", 0) for row in rows) / 60
    trained = sum("train_seconds" in row for row in rows)
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    yield (
        f"{'; '.join(hardware)}; {', '.join(versions)}; commits {commits}; {when}. {len(rows)} "
        f"rows, {trained} trainings; {minutes:.0f} minutes, with other jobs on the machine."
    )


# --------------------------------------------------------------------------------------- cells


def unit(score: str) -> str:
    """Behind a score's name."""
    return ", %" if is_share(score) else ""


def number(value: float, score: str) -> str:
    """One decimal of percentages, two of R², three of entropies."""
    return f"{value:.{decimals(score)}f}"


def decimals(score: str) -> int:
    """How precisely a score is written."""
    return {"position_r2": 2, "entropy": 3, "entropy_shuffled": 3}.get(score, 1)


def signed(value: float, score: str) -> str:
    """With its sign."""
    return f"{value:+.{decimals(score)}f}"


def cell(x: Spread | None, score: str) -> str:
    """Mean ± standard deviation; of one seed its value."""
    if x is None:
        return ""
    mean = number(x.mean, score)
    return mean if len(x.values) == 1 else f"{mean} ± {number(x.sd, score)}"


def difference_cell(x: Difference | None, score: str) -> str:
    """The same with a sign, bold where the interval excludes 0."""
    if x is None:
        return ""
    words = f"{signed(x.mean, score)} ± {number(x.sd, score)}"
    return f"**{words}**" if x.verdict in ("higher", "lower") else words


def worst(errors: Sequence[Any]) -> str:
    """The largest error, or that it is no number."""
    if any(error is None for error in errors):
        return "**not finite**"
    return f"{max(errors):.0e}"


def table_head(cells: Sequence[str]) -> str:
    """Two lines of Markdown."""
    return table_row(cells) + "\n" + table_row(["---"] * len(cells))


def table_row(cells: Sequence[str]) -> str:
    """One line of Markdown."""
    return f"| {' | '.join(cells)} |"
