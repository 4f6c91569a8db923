"""Data, budget, views and evaluation of the presets that every recipe has.

They are arguments of the settings of a recipe. Recipes with the same values see the same images the
same number of times, so their scores can be compared.
"""

from dataclasses import replace
from typing import Any

from sslkit.recipes.shared.settings import Crops, Evaluation

# Two CPU cores, minutes: 32 px views of 48 px scenes. Larger local crops than in DINOv2, and a blur
# as wide as 2 of 224 pixels. No worker: on two cores it, or a thread that renders ahead, would take
# one from one of the step's two threads, for which the other waits (docs/log.md, 2026-12-01).
# Rendering between the steps costs no more.
DEMO: dict[str, Any] = {
    "data": "scenes",
    "steps": 210,
    "batch_size": 48,
    "workers": 0,
    "scene_size": 48,
    "num_scenes": 4000,
    "log_every": 10,
    "checkpoint_every": 100,
    "keep_every": 0,
    "crops": Crops(
        global_size=32,
        global_scale=(0.5, 1.0),
        local_size=16,
        local_scale=(0.2, 0.5),
        num_local=4,
        blur_sigma=(0.1, 0.3),
    ),
    "evaluation": Evaluation(
        num_train=3000,
        num_test=1000,
        online_train=1000,
        online_test=500,
        online_every=70,
        lidar_images=200,
        lidar_views=4,
        resize_over_crop=1.0,
    ),
}
# Two CPU cores, meant for under 40 minutes on 20,000 images of CIFAR-10: 24 px views of 32 px
# images. Neither blur nor solarising, and smaller crops than in the demo: each scored a point more
# in short runs, which is within the noise (docs/log.md, 2026-12-01).
CIFAR10: dict[str, Any] = {
    **DEMO,
    "data": "cifar10.npz",
    "steps": 5000,
    "batch_size": 64,
    "log_every": 20,
    "checkpoint_every": 500,
    "crops": replace(
        DEMO["crops"],
        global_size=24,
        global_scale=(0.3, 1.0),
        local_size=12,
        local_scale=(0.1, 0.35),
        blur_probability=(0.0, 0.0, 0.0),
        solarise_probability=0.0,
    ),
    "evaluation": Evaluation(
        num_train=20_000,
        num_test=4_000,
        online_train=5_000,
        online_test=2_000,
        online_every=500,  # a call takes as long as 15 steps, 3 of them for LiDAR
        lidar_images=300,
        lidar_views=4,
        resize_over_crop=1.0,
    ),
}
# Seconds: whether everything runs.
SMOKE: dict[str, Any] = {
    **DEMO,
    "steps": 12,
    "batch_size": 16,
    "workers": 1,
    "num_scenes": 200,
    "log_every": 2,
    "checkpoint_every": 6,
    "evaluation": Evaluation(
        num_train=150,
        num_test=50,
        online_train=100,
        online_test=50,
        online_every=6,
        lidar_images=40,
        lidar_views=2,
        resize_over_crop=1.0,
    ),
}
