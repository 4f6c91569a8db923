"""The figures of docs/parts and docs/rasa.md, each computed by the part that it is about.

    python -m docs.figures [NAME ...]

A figure is a function of one of the modules beside this file. It has the name of its page and of
its picture, ``docs/parts/NAME.png``. Without a name all are drawn. Nothing is drawn at random:
every number comes from a seeded generator. That of RASA needs the weights
``runs/cifar10/pretrain.safetensors`` of docs/cifar10.md.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from docs.figures.features import koleo_loss, matryoshka_projector, rasa_projector
from docs.figures.gram_and_sigreg import gram_loss, sigreg
from docs.figures.losses import dino_loss, factored_logits, ibot_loss
from docs.figures.masks_and_teacher import cyclic_mask_generator, ema_teacher
from docs.figures.targets import ema_centering, sinkhorn_knopp, sinkhorn_queue, targets

FIGURES: dict[str, Callable[..., Figure]] = {
    figure.__name__: figure
    for figure in (
        cyclic_mask_generator,
        dino_loss,
        ema_centering,
        ema_teacher,
        factored_logits,
        gram_loss,
        ibot_loss,
        koleo_loss,
        matryoshka_projector,
        rasa_projector,
        sigreg,
        sinkhorn_knopp,
        sinkhorn_queue,
        targets,
    )
}
FOLDER = Path(__file__).parents[1] / "parts"


def main() -> None:
    """Draw the figures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names or list(FIGURES)
    if unknown := set(names) - set(FIGURES):
        parser.error(f"no figure is called {sorted(unknown)}; there are {list(FIGURES)}")
    for name in names:
        FIGURES[name]().savefig(FOLDER / f"{name}.png", dpi=200)
        print(FOLDER / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
