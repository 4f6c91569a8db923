"""The classes of COCO-Stuff: 182 fine ones in 27 groups, 12 of things and 15 of stuff.

Groups and members: Caesar et al. 2018, COCO-Stuff: Thing and Stuff Classes in Context, Figure 3;
machine-readable in https://github.com/nightrome/cocostuff10k, ``dataset/code/CocoStuffClasses.m``.
Fine classes are numbered as in its ``labels.txt``, less one, as the pixel maps have them: things
in COCO's order, then stuff in alphabetical order. Eleven things (hat, shoe, eye glasses, ...) were
never annotated. The groups are in the order of Ji et al. 2019 (IIC), which Cho et al. 2021 (PiCIE)
and Hamilton et al. 2022 (STEGO) evaluate with.
"""

_THINGS = {
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "outdoor": "traffic light, fire hydrant, street sign, stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket",
    "kitchen": "bottle, plate, wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, mirror, dining table, window, desk, toilet, "
    "door",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator, blender",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush",
}
_STUFF = {
    "ceiling": "ceiling-other, ceiling-tile",
    "floor": "carpet, floor-marble, floor-other, floor-stone, floor-tile, floor-wood",
    "food": "food-other, fruit, salad, vegetable",
    "furniture": "cabinet, counter, cupboard, desk-stuff, door-stuff, furniture-other, light, "
    "mirror-stuff, shelf, stairs, table",
    "rawmaterial": "cardboard, metal, paper, plastic",
    "textile": "banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, "
    "textile-other, towel",
    "wall": "wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood",
    "window": "window-blind, window-other",
    "building": "bridge, building-other, house, roof, skyscraper, tent",
    "ground": "dirt, gravel, ground-other, mud, pavement, platform, playingfield, railroad, road, "
    "sand, snow",
    "plant": "branch, bush, flower, grass, leaves, moss, plant-other, straw, tree",
    "sky": "clouds, sky-other",
    "solid": "hill, mountain, rock, solid-other, stone, wood",
    "structural": "cage, fence, net, railing, structural-other",
    "water": "fog, river, sea, water-other, waterdrops",
}
_COARSE_THINGS = (
    *("electronic", "appliance", "food", "furniture", "indoor", "kitchen"),
    *("accessory", "animal", "outdoor", "person", "sports", "vehicle"),
)

NUM_FINE_THINGS = 91
"""The first fine classes are things, the others stuff."""

NUM_COARSE_THINGS = len(_COARSE_THINGS)
"""The first groups are of things, the others of stuff."""

COARSE_CLASSES: tuple[str, ...] = (
    *(f"{name}-things" for name in _COARSE_THINGS),
    *(f"{name}-stuff" for name in _STUFF),
)
_GROUP = {
    **{fine: f"{group}-things" for group, names in _THINGS.items() for fine in names.split(", ")},
    **{fine: f"{group}-stuff" for group, names in _STUFF.items() for fine in names.split(", ")},
}

FINE_CLASSES: tuple[str, ...] = (
    *(fine for names in _THINGS.values() for fine in names.split(", ")),
    *sorted(fine for names in _STUFF.values() for fine in names.split(", ")),
)
"""What the values 0 to 181 of the pixel maps mean."""

COARSE_OF_FINE: tuple[int, ...] = tuple(COARSE_CLASSES.index(_GROUP[fine]) for fine in FINE_CLASSES)
"""The group of each fine class."""
