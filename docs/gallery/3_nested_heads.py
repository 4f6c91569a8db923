# %% [markdown]
# # Nested heads in a loop of your own
#
# A DINO loop of thirty lines, without the recipe: a small ViT, one nested head, rendered scenes,
# ninety steps. Then the question that nesting is for: how good are the first features alone? Ninety
# steps are few, so expect little; `make demo` trains for longer, with all of the method.

# %%
import torch
from einops import rearrange

from sslkit import (
    DINOLoss,
    EMATeacher,
    KoLeoLoss,
    MatryoshkaProjector,
    backbones,
    sinkhorn_many,
    sum_over_levels,
)
from sslkit.data import MultiCrop, MultiCropDataset, Scenes, make_loader
from sslkit.evaluation.features import extract
from sslkit.evaluation.figures.features import matryoshka
from sslkit.evaluation.knn import knn_accuracy
from sslkit.evaluation.matryoshka import matryoshka_curve
from sslkit.evaluation.views import EvalTransform
from sslkit.schedules import cosine, warmup_cosine

torch.manual_seed(0)
scenes = Scenes(2000, size=(32, 32), seed=0)
crops = MultiCrop(
    global_size=24,
    global_scale=(0.5, 1.0),
    local_size=12,
    local_scale=(0.2, 0.5),
    num_local=2,
    blur_sigma=(0.1, 0.3),
)
loader = iter(make_loader(MultiCropDataset(scenes, crops, seed=0), batch_size=48))

# %% [markdown]
# The student is an encoder and a head; the teacher is its average. The head has five levels, on
# the first 8, 16, 32, 64 and all 128 features.


# %%
class Network(torch.nn.Module):
    """Class tokens of crops of two sizes, to logits of five levels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = backbones.create("sslkit_vit_tiny", img_size=24)
        self.head = MatryoshkaProjector(128, 96, hidden_dim=256, bottleneck_dim=64)

    def forward(self, batches):
        cls = torch.cat([tokens.cls for tokens in self.encoder.forward_many(batches)])
        return cls, self.head(cls)


student = Network()
teacher = EMATeacher(student)
fresh = EMATeacher(student).module.encoder
print(student.head.nesting_dims, student.head.num_prototypes_per_level)

# %% [markdown]
# One step: targets from the teacher's two global views, balanced over the batch at every level;
# the student's four views are compared with them; the teacher follows.

# %%
STEPS, PEAK = 90, 1.3e-3
dino, koleo = DINOLoss(student_temp=0.1), KoLeoLoss()
optimizer = torch.optim.AdamW(student.parameters(), lr=PEAK, weight_decay=0.04)
for step in range(STEPS):
    batch = next(loader)
    globals_, locals_ = batch.global_crops.flatten(0, 1), batch.local_crops.flatten(0, 1)
    _, teacher_levels = teacher([globals_])
    targets = sinkhorn_many(teacher_levels, temperatures=0.04, bound=1.0)
    cls, student_levels = student([globals_, locals_])
    loss = 0.1 * sum(koleo(view) for view in cls[: len(globals_)].chunk(2))
    student_levels = [rearrange(logits, "(v b) k -> v b k", v=4) for logits in student_levels]
    loss = loss + sum_over_levels(dino, student_levels, targets)
    for group in optimizer.param_groups:
        group["lr"] = warmup_cosine(
            step, peak=PEAK, final=1e-6, total_steps=STEPS, warmup_steps=STEPS // 20
        )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
    optimizer.step()
    teacher.update(student, cosine(step, start=0.98, end=1.0, total_steps=STEPS))
    if step % 15 == 0 or step == STEPS - 1:
        print(f"step {step:3d}  loss {loss.item():.3f}")

# %% [markdown]
# k-NN with the first 8, 16, ... features of the class token, trained and fresh, on scenes of
# another seed:

# %%
view = EvalTransform(24)
train = Scenes(1200, size=(24, 24), seed=0)
test = Scenes(400, size=(24, 24), seed=1)
curves = {}
for name, encoder in {"trained": teacher.module.encoder, "fresh weights": fresh}.items():
    known, asked = (extract(encoder, s, transform=view, want=("cls",)) for s in (train, test))

    def score(keys, queries, known=known, asked=asked):
        return knn_accuracy(keys, known.labels, queries, asked.labels, ks=(20,))[20]

    curves[name] = matryoshka_curve(known.cls, asked.cls, score=score)
matryoshka(curves)

# %% [markdown]
# With 400 scenes, two points within five per cent of each other are not told apart. What ninety
# steps have gained shows with all features, if at all, and not yet with the first ones. The curve
# that nesting is for takes longer: [5,000 steps on CIFAR-10](../cifar10.md#matryoshka).
#
# The encoder is kept for the pages that follow.

# %%
backbones.save(teacher.module.encoder, "scenes.safetensors", {"of": "gallery"})
