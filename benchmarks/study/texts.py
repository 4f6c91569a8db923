"""What the page says beside its numbers: of each question what was done, and the paper's claims."""

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.study.settings import WHOLE


class Claim(NamedTuple):
    """``arm`` is higher than ``reference`` in ``score``, or lower where ``sign`` is -1."""

    arm: str
    reference: str
    score: str
    sign: int = 1


@dataclass(frozen=True)
class Text:
    """What a section says beside its numbers."""

    what: str
    claim: str = ""
    """The paper's, in words; empty where it makes none."""
    claims: tuple[Claim, ...] = ()
    """The same as comparisons of the study."""
    why: str = ""
    """Said where a claim does not show, after the size of the runs."""


_FEW_SEEDS = (
    "A few seeds cannot tell differences as small as the 0.2 points that the paper reports for "
    "CyclicMask."
)

TEXTS: dict[str, Text] = {
    "choice": Text(
        "Settings of the optimiser for so short a run, scored on training images that no run saw "
        "(classification) and on a part of the training pictures with masks (dense): one seed "
        "each, so a hint and no finding. The first row is what all arms below are trained with. "
        "Nothing else was tuned: the arms that differ from the whole method run with what suits "
        "it.",
    ),
    "floor": Text(
        "The same network with fresh weights, and without a network: k-NN and a linear head on "
        "standardised pixels, dense scores on each patch's mean colour and place. Dense scores of "
        "fresh weights are about those of calling every pixel background.",
    ),
    "pieces": Text(
        "From one clustering head with block masks, one piece after another (the paper's figure "
        "2). RASA is fitted on the images of the in-context memory; its planes are taken out of "
        "all tokens, as when it is folded into the network.",
        "every piece gains in linear and in in-context scores: CyclicMask 0.2 points, nested heads "
        "most, above all in dense scores.",
        tuple(
            Claim(arm, reference, score)
            for arm, reference in (
                ("one_head", "one_head_block"),
                (WHOLE, "one_head"),
                ("rasa", WHOLE),
            )
            for score in ("linear", "in_context")
        ),
        _FEW_SEEDS
        + " Losses of five heads are summed, so nested arms also differ in the weight of "
        "KoLeo beside them.",
    ),
    "sizes": Text(
        "k-NN on the first D/16, D/8, ... features of the class token, in-context segmentation on "
        "those of the patches (figure 3).",
        "nested heads are ahead at every size, most under heavy compression.",
        (
            Claim(WHOLE, "one_head", "knn_short"),
            Claim(WHOLE, "one_head", "knn"),
            Claim(WHOLE, "one_head", "knn_lost", -1),
            Claim(WHOLE, "one_head", "in_context_short"),
            Claim(WHOLE, "one_head", "in_context"),
            Claim(WHOLE, "one_head", "in_context_lost", -1),
        ),
    ),
    "position": Text(
        "Nine planes are removed one after another, without stopping early, from the whole "
        "method's patch features: a linear probe's R² of position on held-out pictures, the "
        "entropy over positions of the patch head's clusters (figure 5; dotted: the same clusters "
        "with patches shuffled within each picture), and in-context segmentation.",
        "position goes, clusters no longer stand for places, segmentation gains.",
        (
            Claim("9 planes", "0 planes", "position_r2", -1),
            Claim("9 planes", "0 planes", "entropy"),
            Claim("9 planes", "0 planes", "in_context"),
            Claim("rasa", WHOLE, "in_context"),
        ),
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
            Claim(WHOLE, "inverse_block", "exposure_gap", -1),
            Claim(WHOLE, "inverse_block", "position_r2", -1),
            *(
                Claim(WHOLE, other, score)
                for other in ("inverse_block", "block", "random")
                for score in ("linear", "in_context")
            ),
        ),
        _FEW_SEEDS,
    ),
    "norm": Text(
        "DINO's L2-normalised bottleneck and prototypes bound scores by one; the released head has "
        "neither, and a GELU after its last layer. Both with the preset's head of three layers and "
        "with one layer. After training, the teacher's scores of test images are balanced by the "
        "formula that papers print (`exp` in float32, then divisions), by the same with the "
        "largest score taken off, and by `sslkit.SinkhornKnopp`. The formula overflows above a "
        "score of 88.7 times the temperature; since these runs are short, scores that nothing "
        "bounds are also taken times 16 and 64. The paper reports no comparison.",
    ),
    "nesting": Text(
        "Each level of the nested heads reads the first m features (the paper), a learned "
        "m-to-m map of them, or a learned D-to-m map of all (the two released versions). The paper "
        "reports no comparison; with the last, short prefixes are not trained to stand alone.",
    ),
    "targets": Text(
        "Balanced targets by one, three and ten iterations of Sinkhorn, or an EMA of the teacher's "
        "scores as their centre (DINO). The paper takes Sinkhorn, the released code three "
        "iterations; neither reports a comparison.",
    ),
    "queue": Text(
        "A quarter of the batch, four times the steps: the same images, fewer rows than prototypes "
        "to balance them over. The queue adds the teacher's scores of past batches. The paper has "
        "neither.",
    ),
}
