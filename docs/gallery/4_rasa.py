# %% [markdown]
# # RASA on two networks
#
# Patch features know where in the picture they are. RASA finds the directions that tell, and
# projects them away, on any ViT and without training it: here a timm ViT with random weights, and
# the small network of the page before.

# %%
import timm
import torch

from sslkit import RASAProjector, backbones
from sslkit.data import Scenes
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.features import extract
from sslkit.evaluation.figures.position import position_maps
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.views import EvalTransform

torch.manual_seed(0)
vit = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=128)
networks = {
    "timm ViT, random weights": (as_encoder(vit), 128),
    "trained on scenes": (backbones.load("scenes.safetensors"), 48),
}

# %% [markdown]
# Features of 60 pictures to fit on, and of 60 others to measure on: how well does linear
# regression predict row and column of a patch?

# %%
errors = {}
for name, (encoder, size) in networks.items():
    fitted, held_out = (
        extract(
            encoder,
            Scenes(60, size=(size, size), seed=seed),
            transform=EvalTransform(size),
            want=("patches",),
            batch_size=20,
        ).patches.float()
        for seed in (0, 1)
    )
    rasa = RASAProjector(fitted.shape[-1], num_iterations=6)
    steps = rasa.fit(fitted.split(20))
    before = position_probe(fitted, held_out)
    after = position_probe(rasa(fitted), rasa(held_out))
    kept = (rasa(held_out).var((0, 1, 2)).sum() / held_out.var((0, 1, 2)).sum()).item()
    planes = int((rasa.basis.norm(dim=1) > 0).sum()) // 2
    print(
        f"{name}: R^2 {before.r2:.2f} -> {after.r2:.2f}, planes: {planes}, variance kept {kept:.2f}"
    )
    print("  error of the heads:", " ".join(f"{e:.4f}" for e in steps))
    for when, probe in (("before", before), ("after", after)):
        errors[f"{name.split(',')[0].split(' on')[0]}, {when}"] = probe.squared_errors.mean((0, 3))

# %% [markdown]
# The error of the probe at each place. Before, it is low nearly everywhere in the trained network;
# afterwards the best guess is the centre, and the error grows towards the corners.

# %%
position_maps(errors)

# %% [markdown]
# All planes together are one matrix, equal to its own square, so a linear layer can carry it.
# Folded into a ViT, the result is an ordinary checkpoint:

# %%
encoder, size = networks["trained on scenes"]
P = rasa.matrix()
print(f"|P P - P| = {(P @ P - P).norm():.1e}")
folded = rasa.fold_into_vit(encoder.vit)
print(type(folded).__name__, "with norm", type(folded.norm).__name__)
