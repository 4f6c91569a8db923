# %% [markdown]
# # What patch features look like
#
# The first three principal components of all patches as red, green and blue: like features, like
# colours. The network of the page on nested heads has trained for ninety steps, so do not expect
# parts of objects to be told apart.

# %%
import torch

from sslkit import RASAProjector, backbones
from sslkit.data import Scenes
from sslkit.evaluation.features import extract
from sslkit.evaluation.figures.features import pca_maps as draw
from sslkit.evaluation.pca import pca_maps
from sslkit.evaluation.views import EvalTransform

SIZE, view = 96, EvalTransform(96)
scenes = Scenes(6, size=(SIZE, SIZE), seed=1)
images = torch.stack([view(scenes[i][0]) for i in range(6)])
trained = backbones.load("scenes.safetensors")
torch.manual_seed(0)
fresh = backbones.create("sslkit_vit_tiny", img_size=24)


def patches(encoder):
    """Features of the six scenes, [6, 24, 24, D], at four times the size it was trained at."""
    return extract(encoder, scenes, transform=view, want=("patches",)).patches.float()


# %% [markdown]
# Fresh weights. They see the colour and brightness of a patch, and that alone parts things from
# ground:

# %%
draw(images, pca_maps(patches(fresh), threshold=None).rgb)

# %% [markdown]
# Trained. Colours are calmer within a thing, and textures count for less:

# %%
features = patches(trained)
draw(images, pca_maps(features, threshold=None).rgb)

# %% [markdown]
# Trained, without what tells the place (RASA, fitted on these features). Hardly anything changes:
# place is easy to predict from these features, and still a small share of their variance, most of
# which is left.

# %%
rasa = RASAProjector(features.shape[-1], num_iterations=6)
rasa.fit([features])
draw(images, pca_maps(rasa(features), threshold=None).rgb)
