"""Every example of a single part in a stranger's loop runs and learns what it is there to show."""

import math

from tests.recipe import load_example


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
