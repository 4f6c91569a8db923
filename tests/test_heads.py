"""Projection heads: ours kept beside an encoder, and those of other code bases."""

import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sslkit.backbones import create, load, load_pretrained, read_metadata, save
from sslkit.backbones.encoder_file import HEADER_KEY
from sslkit.backbones.heads import misfit, read_head
from sslkit.matryoshka import MatryoshkaProjector
from tests import released
from tests.released import with_prefix


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


PROJECTORS = {
    "nested": {"num_prototypes": 24},
    "one level": {"num_prototypes": 24, "nesting_dims": (32,)},
    "released": {"num_prototypes": 24, "nesting": "slice_linear", "normalize": False},
    "first release": {"num_prototypes": 24, "nesting": "linear", "normalize": False},
    "one layer": {"num_prototypes": 24, "num_layers": 1},
    "four layers": {"num_prototypes": 33, "num_layers": 4, "nesting_dims": (3, 7)},
}


@pytest.mark.parametrize("case", PROJECTORS)
def test_our_heads_are_kept(tmp_path, case):
    head = MatryoshkaProjector(32, hidden_dim=7, bottleneck_dim=5, **PROJECTORS[case])
    other = MatryoshkaProjector(32, 32, hidden_dim=3, bottleneck_dim=2).bfloat16()
    encoder = create("sslkit_vit_micro", depth=1)
    path = tmp_path / "w.safetensors"
    save(encoder, path, {"step": "1"}, heads={"dino_head": head, "ibot_head": other})
    loaded = load_pretrained(path)
    assert list(loaded.heads) == ["dino_head", "ibot_head"]
    x = torch.randn(3, 32)
    for found, expected in zip(loaded.heads["dino_head"](x), head(x), strict=True):
        assert torch.equal(found, expected)
    assert repr(loaded.heads["dino_head"]) == repr(head)
    assert {p.dtype for p in loaded.heads["ibot_head"].parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in loaded.heads["dino_head"].parameters())
    assert read_metadata(path) == {"step": "1"}
    assert load(path).settings == encoder.settings
    assert "dino_head: MatryoshkaProjector" in str(loaded.report)


def test_files_of_version_1_have_no_heads(tmp_path):
    encoder = create("sslkit_vit_micro", depth=1)
    settings = {"name": "sslkit_vit_micro", "depth": 1, "in_chans": 3, "drop_path_rate": 0.0}
    described = {"version": 1, "settings": settings, "folded_norm": None}
    save_file(dict(encoder.state_dict()), tmp_path / "w", {HEADER_KEY: json.dumps(described)})
    loaded = load_pretrained(tmp_path / "w")
    assert loaded.heads == {}
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded.encoder.eval()(images).cls, encoder.eval()(images).cls)


def test_a_damaged_head_is_named(tmp_path):
    head = MatryoshkaProjector(32, 24, hidden_dim=7, bottleneck_dim=5)
    del head.heads[0][1].bias
    save(create("sslkit_vit_micro"), tmp_path / "w", heads={"dino_head": head})
    with pytest.raises(ValueError, match=r"heads\.0\.1\.bias is absent, expected \[7\]"):
        load(tmp_path / "w")


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ({"vit": MatryoshkaProjector(32, 24)}, ValueError, "cannot be called 'vit'"),
        ({"a.b": MatryoshkaProjector(32, 24)}, ValueError, "cannot be called 'a.b'"),
        ({"head": nn.Linear(32, 4)}, TypeError, "a Linear; only MatryoshkaProjector"),
    ],
)
def test_heads_that_cannot_be_kept(tmp_path, heads, error, message):
    with pytest.raises(error, match=message):
        save(create("sslkit_vit_micro"), tmp_path / "w", heads=heads)
    assert not list(tmp_path.iterdir())


class ReleasedHead(nn.Module):
    """Franca's: per level a Linear, an MLP with a last GELU, a linear layer under weight norm."""

    def __init__(self, dim, dims, prototypes, *, sliced, layers=3, hidden=7, bottleneck=5):
        super().__init__()
        self.dims, self.sliced = dims, sliced
        ins = dims if sliced else [dim] * len(dims)
        self.matryoshka_projections = nn.ModuleList(map(nn.Linear, ins, dims))
        self.mlps = nn.ModuleList()
        for size in dims:
            widths = [size, *[hidden] * (layers - 1), bottleneck]
            mlp = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
            self.mlps.append(nn.Sequential(*mlp))
        self.last_layers = nn.ModuleList()
        for size in dims:
            count = int(prototypes * (size / dims[-1]))
            last = nn.utils.weight_norm(nn.Linear(bottleneck, count, bias=False))
            last.weight_g.data.uniform_(0.5, 2)
            self.last_layers.append(last)

    def forward(self, x):
        outputs = []
        for i, size in enumerate(self.dims):
            z = self.matryoshka_projections[i](x[..., :size] if self.sliced else x)
            outputs.append(self.last_layers[i](self.mlps[i](z)))
        return outputs


class DINOHead(nn.Module):
    """DINO's, DINOv2's and iBOT's."""

    def __init__(self, dim, prototypes, *, layers=3, hidden=7, bottleneck=5):
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        mlp = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*mlp[:-1]) if layers > 1 else mlp[0]
        self.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        self.last_layer.weight_g.data.fill_(1)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("sliced", [True, False], ids=["later release", "first release"])
@pytest.mark.parametrize("dims", [[4, 8, 16, 32], [32]])
def test_francas_heads_compute_the_same(tmp_path, sliced, dims):
    head = ReleasedHead(32, dims, 40, sliced=sliced)
    state = released.values(released.dinov2_shapes(32, 1, 88, gated=True, grid=2, chunks=1))
    file = with_prefix(state, "backbone.") | with_prefix(head.state_dict(), "dino_head.")
    torch.save({"teacher": file}, tmp_path / "w.pth")
    loaded = load_pretrained(tmp_path / "w.pth", num_heads=1)
    found = loaded.heads["dino_head"]
    assert isinstance(found, MatryoshkaProjector)
    x = torch.randn(6, 32)
    for ours, theirs in zip(found(x), head(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    save(loaded.encoder, tmp_path / "own.safetensors", heads=loaded.heads)
    again = load_pretrained(tmp_path / "own.safetensors").heads["dino_head"]
    assert all(torch.equal(a, b) for a, b in zip(again(x), found(x), strict=True))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_dinos_head_is_a_projector_of_one_level(layers):
    head = DINOHead(16, 9, layers=layers)
    found, what = read_head(head.state_dict())
    x = torch.randn(6, 16)
    torch.testing.assert_close(found(x)[0], head(x), rtol=1e-5, atol=1e-6)
    assert what == "MatryoshkaProjector, prototypes 9"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_newer_weight_norm_of_torch():
    head = DINOHead(16, 9)
    new = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for name, tensor in head.state_dict().items()
    }
    assert new.keys() != head.state_dict().keys()
    torch.testing.assert_close(read_head(new)[0](torch.ones(16))[0], head(torch.ones(16)))


def other_heads():
    free = DINOHead(16, 9)
    free.last_layer.weight_g.data[3] = 2
    second = DINOHead(16, 9).state_dict()
    second |= {"last_layer2.weight_g": torch.ones(9, 1), "last_layer2.weight_v": torch.ones(9, 5)}
    normed = ReleasedHead(16, [8, 16], 9, sliced=True)
    normed.mlps[0].insert(1, nn.BatchNorm1d(7))
    return {
        "free norms": free.state_dict(),
        "a second last layer": second,
        "batch norm": normed.state_dict(),
        "one layer, which has no GELU after it": {
            name.replace("mlps.0.0.", "mlps.0.").replace("mlps.1.0.", "mlps.1."): tensor
            for name, tensor in ReleasedHead(16, [8, 16], 9, sliced=True, layers=1)
            .state_dict()
            .items()
        },
        "DINOv3": {"mlp.0.weight": torch.ones(7, 16), "last_layer.weight": torch.ones(9, 7)},
        "other prototypes": ReleasedHead(16, [8, 16], 9, sliced=True).state_dict()
        | {"last_layers.0.weight_g": torch.ones(3, 1), "last_layers.0.weight_v": torch.ones(3, 5)},
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("case", other_heads())
def test_what_no_projector_computes_is_kept_as_tensors(case):
    tensors = other_heads()[case]
    found, what = read_head(tensors)
    assert isinstance(found, dict)
    assert found.keys() == tensors.keys()
    assert what.startswith(f"{len(tensors)} tensors")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_dinos_head_beside_its_backbone(tmp_path):
    state = released.values(released.ibot_shapes(192, 1, grid=2))
    head = with_prefix(DINOHead(192, 9).state_dict(), "head.")
    torch.save({"teacher": with_prefix(state, "backbone.") | head}, tmp_path / "w.pth")
    assert isinstance(load_pretrained(tmp_path / "w.pth").heads["head"], MatryoshkaProjector)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("in_dim", 16, "in_dim=32 instead of 16"),
        ("num_prototypes", 12, "num_prototypes=24 instead of 12"),
        ("nesting_dims", (8, 32), "nesting_dims=[16, 32] instead of [8, 32]"),
        ("nesting", "linear", "nesting=slice instead of linear"),
        ("hidden_dim", 6, "hidden_dim=7 instead of 6"),
        ("bottleneck_dim", 6, "bottleneck_dim=5 instead of 6"),
        ("num_layers", 2, "num_layers=3 instead of 2"),
        ("normalize", False, "normalize=True instead of False"),
    ],
)
def test_what_keeps_a_head_of_a_file_from_being_used(name, value, shown):
    sizes = {"in_dim": 32, "num_prototypes": 24, "nesting_dims": (16, 32), "nesting": "slice"}
    sizes |= {"hidden_dim": 7, "bottleneck_dim": 5, "num_layers": 3, "normalize": True}
    if name == "in_dim":
        sizes["nesting_dims"] = (8, 16)
    head = MatryoshkaProjector(**sizes)
    with torch.device("meta"):
        same, other = MatryoshkaProjector(**sizes), MatryoshkaProjector(**{**sizes, name: value})
    assert misfit("dino_head", head, same) == ""
    assert misfit("dino_head", head, other) == f"the file's dino_head has {shown}"


def test_what_is_no_head():
    wanted = MatryoshkaProjector(8, 4, nesting_dims=(8,))
    assert misfit("ibot_head", None, wanted) == "the file has no ibot_head"
    tensors = {"mlp.weight": torch.zeros(3, 2)}
    assert misfit("ibot_head", tensors, wanted).startswith("the file's ibot_head is none that")
