"""Every part has a page and a figure that the part computes; the figures can be drawn again."""

import re

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import sslkit
from benchmarks import textbook
from docs.figures.__main__ import FIGURES, FOLDER
from docs.figures.losses import pair_weights, patch_weights
from sslkit import backbones
from tests.pages import ROOT, anchors

PAGES = {name: FOLDER / f"{name}.md" for name in FIGURES} | {
    "rasa_projector": ROOT / "docs" / "rasa.md"
}
SMALL = {
    "cyclic_mask_generator": {"grid": 6, "draws": 4, "num_masked": 20},
    "dino_loss": {"B": 4, "K": 8},
    "ema_centering": {"steps": 6, "B": 16, "K": 8},
    "ema_teacher": {"steps": 40},
    "factored_logits": {"B": 8, "D": 4, "counts": (16, 32)},
    "gram_loss": {"grid": 6, "D": 4, "steps": 3},
    "ibot_loss": {"grid": 6},
    "koleo_loss": {"B": 6, "steps": 3},
    "matryoshka_projector": {"steps": 1, "pixels": 8},
    "rasa_projector": {"num_images": 30, "size": 32},
    "sigreg": {"B": 8, "steps": 2, "num_slices": 2},
    "sinkhorn_knopp": {"B": 8, "K": 4},
    "sinkhorn_queue": {"N": 64, "clusters": 2, "per_cluster": 2, "batch_sizes": (2, 8)},
    "targets": {"N": 16, "clusters": 2, "per_cluster": 2, "counts": (1, 4)},
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_drawn_and_its_title_fits(name, tmp_path):
    given = dict(SMALL[name])
    if name == "rasa_projector":
        given["weights"] = tmp_path / "weights.safetensors"
        backbones.save(backbones.create("sslkit_vit_micro", img_size=32), given["weights"])
    figure = FIGURES[name](**given)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for text in figure.texts:
        assert text.get_window_extent(canvas.get_renderer()).x1 < figure.bbox.x1, text.get_text()
    assert all(axes.axison for axes in figure.axes)


@pytest.mark.parametrize("name", FIGURES)
def test_page_shows_the_figure_and_says_how_it_is_made(name):
    page = PAGES[name].read_text()
    (alternative,) = re.findall(rf"^!\[(.*)\]\((?:parts/)?{name}\.png\)$", page, re.MULTILINE)
    assert len(alternative.split()) > 8
    assert f"`python -m docs.figures {name}`" in page
    assert (FOLDER / f"{name}.png").stat().st_size > 0
    for wanted in ("$$", "**Shapes.**", "```python", "## Pitfalls", "**Source.**", "reference/"):
        assert wanted in page, wanted


def test_every_picture_of_a_part_is_of_the_command():
    assert {path.stem for path in FOLDER.glob("*.png")} == set(FIGURES)


def test_every_public_part_is_found_from_the_list():
    rows = dict(re.findall(r"^\| \[`(\w+)`\]\((\S+)\)", (FOLDER / "index.md").read_text(), re.M))
    assert set(rows) == set(sslkit.__all__)
    for name, link in rows.items():
        path, _, anchor = link.partition("#")
        page = (FOLDER / path).resolve().read_text()
        assert f"# {name}" in page
        assert not anchor or anchor in anchors(page)


def test_weights_are_read_from_gradients():
    weights = pair_weights(10, 2)
    torch.testing.assert_close(weights[:2], torch.tensor([[0.0, 1.0], [1.0, 0.0]]) / 18)
    torch.testing.assert_close(weights[2:], torch.full((8, 2), 1 / 18))
    masks = torch.tensor([[True, True, False], [False, True, False]])
    torch.testing.assert_close(patch_weights(masks), torch.tensor([0.25, 0.25, 0.5]))


def test_the_textbook_is_the_same_thing_until_it_overflows():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        textbook.sinkhorn(logits, 0.5),
        sslkit.SinkhornKnopp()(logits, 0.5).probs(),
        rtol=1e-4,
        atol=1e-6,
    )
    assert textbook.sinkhorn(torch.tensor([[3.6, 0.0]]), 0.04).isnan().any()
