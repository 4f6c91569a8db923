"""The minimal Franca, and every example of a single part in another loop, run and learn."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import FakeData

from tests.on_disk import write_image
from tests.recipe import EXAMPLES, load_example


@pytest.fixture
def minimal() -> Any:
    example: Any = load_example("minimal_franca")
    example.BATCH = 8
    return example


def test_minimal_franca_trains(
    minimal: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, count in (("train", 40), ("test", 16)):
        for i in range(count):
            folder = tmp_path / split / "ab"[i % 2]
            write_image(folder / f"{i}.png", (30 + i % 3, 32), seed=i)
    scores = minimal.main(["--data", str(tmp_path), "--steps", "3"])
    assert list(scores) == ["random init", "trained", "after RASA"]
    assert all(0 <= score <= 1 for score in scores.values())
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"^step +\d+  loss (\S+)$", printed, re.M)]
    assert len(losses) == 2  # the first step and the last
    # A uniform student has ln K_l at each level, and a fifth of it for patches; KoLeo adds a few.
    uniform = 1.2 * sum(math.log(K) for K in (8, 16, 32, 64, 128))
    assert uniform < losses[0] < 1.3 * uniform
    before, after = (float(x) for x in re.findall(r"R2: (\S+), after RASA (\S+)", printed)[0])
    assert after < before


def test_minimal_franca_masks_only_what_the_student_sees(minimal: Any) -> None:
    torch.manual_seed(0)
    network = minimal.Network().eval()
    crops = [torch.randn(2 * 3, 3, 24, 24), torch.randn(4 * 3, 3, 12, 12)]
    masks = torch.rand(2 * 3, 6, 6) < 0.5
    cls, cls_levels, patch_levels = network(crops, masks, hide=True)
    assert cls.shape == (6, 3, 128)
    assert [logits.shape for logits in cls_levels] == [(6, 3, K) for K in (8, 16, 32, 64, 128)]
    assert patch_levels[-1].shape == (int(masks.sum()), 128)
    torch.testing.assert_close(cls[1, 2], network.encoder(crops[0][5:6], masks[5:6]).cls[0])
    torch.testing.assert_close(cls[3, 1], network.encoder(crops[1][4:5]).cls[0])
    seen, _, _ = network(crops[:1], masks, hide=False)
    torch.testing.assert_close(seen[1, 2], network.encoder(crops[0][5:6]).cls[0])


def test_minimal_franca_downloads_cifar10(
    minimal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def cifar10(folder: Path, *, train: bool, transform: Any, download: bool) -> FakeData:
        asked.append((folder, train, download))
        return FakeData(4, (3, 32, 32), transform=transform)

    monkeypatch.setattr(minimal, "CIFAR10", cifar10)
    views, _ = minimal.dataset(tmp_path, "train", minimal.random_views)[0]
    assert [tuple(x.shape) for x in views] == [(2, 3, 24, 24), (4, 3, 12, 12)]
    minimal.dataset(tmp_path, "test", minimal.EvalTransform(24))
    assert asked == [(tmp_path, True, True), (tmp_path, False, True)]


def test_minimal_franca_stays_short() -> None:
    assert len((EXAMPLES / "minimal_franca.py").read_text().splitlines()) <= 150


def test_cyclic_mask_in_mae() -> None:
    first, last = load_example("cyclic_mask_in_mae").main()
    assert first > 0.8  # 1 is the error of the mean
    assert last < 0.5


def test_matryoshka_head_in_dino() -> None:
    _, last = load_example("matryoshka_head_in_dino").main()
    uniform = [math.log(K) for K in (8, 16, 32, 64, 128)]
    for level, (loss, limit) in enumerate(zip(last, uniform, strict=True)):
        assert loss < 0.9 * limit, f"level {level}"
    assert last[-1] < 0.75 * uniform[-1]


def test_sinkhorn_in_swav() -> None:
    assert load_example("sinkhorn_in_swav").main() > 0.9  # purity; 1 / 10 by chance, .4 untrained


def test_rasa_on_timm_vit() -> None:
    before, after = load_example("rasa_on_timm_vit").main([])
    assert before > 0.1
    assert after < 0.05
