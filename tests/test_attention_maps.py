"""Attention maps against the softmax written out and against fused attention."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sslkit import backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation.attention import cls_attention
from sslkit.evaluation.protocols.attention import Options, evaluate
from sslkit.evaluation.subject import Subject
from sslkit.testing.references import evaluation as oracle
from tests.noise import noise


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    prefix=st.integers(1, 5),
    scale=st.none() | st.sampled_from([0.1, 30.0]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_maps_are_those_of_the_loop(grid, prefix, scale, dtype):
    B, heads, d = 2, 3, 4
    shape = B, heads, prefix + grid[0] * grid[1], d
    q, k = noise(*shape).to(dtype), noise(*shape, seed=1).to(dtype)
    found = cls_attention(q, k, num_prefix_tokens=prefix, grid=grid, scale=scale)
    assert (found.shape, found.dtype) == ((B, heads, *grid), torch.float32)
    for b in range(B):
        for h in range(heads):
            expected = oracle.cls_attention(
                q[b, h].tolist(),
                k[b, h].tolist(),
                num_prefix_tokens=prefix,
                scale=d**-0.5 if scale is None else scale,
            )
            assert found[b, h].flatten().tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("prefix", [1, 3])
def test_maps_are_the_weights_of_fused_attention(prefix):
    q, k = noise(2, 4, prefix + 6, 8), noise(2, 4, prefix + 6, 8, seed=1)
    # With one-hot values, the output of a token is its attention to each token.
    weights = F.scaled_dot_product_attention(q, k, torch.eye(prefix + 6).expand(2, 4, -1, -1))
    found = cls_attention(q, k, num_prefix_tokens=prefix, grid=(2, 3))
    torch.testing.assert_close(found.flatten(2), weights[:, :, 0, prefix:])


@pytest.mark.parametrize("num_registers", [0, 2])
def test_maps_of_an_encoder(num_registers):
    encoder = backbones.create("sslkit_vit_micro", img_size=(8, 12), reg_tokens=num_registers)
    with torch.no_grad():
        q, k, _ = encoder.queries_keys_values(noise(2, 3, 8, 12))
    maps = cls_attention(q, k, num_prefix_tokens=encoder.num_prefix_tokens, grid=(2, 3))
    assert maps.shape == (2, 2, 2, 3)
    # The class token and the registers receive the rest.
    assert (maps.sum((2, 3)) < 1).all()


def test_a_patch_like_the_class_token_takes_all_attention():
    q, k = torch.zeros(1, 1, 7, 4), torch.zeros(1, 1, 7, 4)
    q[..., 0, 0] = k[..., 1 + 4, 0] = 20.0  # the patch in row 1, column 1 of 2 by 3
    maps = cls_attention(q, k, num_prefix_tokens=1, grid=(2, 3))[0, 0]
    assert maps[1, 1] == pytest.approx(1)
    assert maps.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("q", "k", "prefix", "message"),
    [
        (noise(1, 2, 7, 4), noise(1, 2, 6, 4), 1, r"\[1, 2, 7, 4\] and \[1, 2, 6, 4\]"),
        (noise(1, 2, 7, 4), noise(1, 2, 7, 4), 0, "num_prefix_tokens must be at least 1"),
        (noise(1, 2, 7, 4), noise(1, 2, 7, 4), 2, "7 tokens, .* grid 2 by 3 make 8"),
    ],
)
def test_refused(q, k, prefix, message):
    with pytest.raises(ValueError, match=message):
        cls_attention(q, k, num_prefix_tokens=prefix, grid=(2, 3))


@pytest.mark.parametrize("num_registers", [0, 2])
def test_command(num_registers):
    encoder = backbones.create("sslkit_vit_micro", img_size=16, reg_tokens=num_registers)
    subject = Subject("micro", encoder, {"test": Scenes(9, size=(20, 32))}, {}, dense_size=(16, 24))
    outcome = evaluate(subject, Options(num_images=3, block=0))
    assert not outcome.scores
    heads = outcome.details["attention on patches, by head"]
    assert len(heads) == encoder.num_heads
    images = torch.stack(subject.images("test", [0, 3, 6]))
    with torch.no_grad():
        q, k, _ = encoder.queries_keys_values(images, 0)
    maps = cls_attention(q, k, num_prefix_tokens=1 + num_registers, grid=(4, 6))
    assert heads == pytest.approx(maps.sum((2, 3)).mean(0).tolist(), abs=1e-4)
    figure = outcome.figures["attention_maps"]
    assert figure.get_label().startswith("Attention of the class token, block 0. ")
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    assert len(pictures) == 3 * (2 + encoder.num_heads)
    torch.testing.assert_close(torch.tensor(pictures[2]), maps[0, 0])
