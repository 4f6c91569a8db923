"""Projection heads from the tensors of a file, and what rebuilds them."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sslkit.backbones.settings import HEAD, check_settings
from sslkit.matryoshka import MatryoshkaProjector

Head = MatryoshkaProjector | dict[str, Tensor]


def describe_head(name: str, head: nn.Module) -> dict[str, Any]:
    """Arguments of `MatryoshkaProjector` that rebuild ``head``, as values that JSON can hold.

    Raises:
        TypeError: ``head`` is another module.

    >>> describe_head("dino_head", MatryoshkaProjector(8, 6, nesting_dims=(4, 8), hidden_dim=5))
    ... # doctest: +NORMALIZE_WHITESPACE
    {'in_dim': 8, 'num_prototypes': 6, 'nesting_dims': [4, 8], 'nesting': 'slice', 'hidden_dim': 5,
     'bottleneck_dim': 256, 'num_layers': 3, 'normalize': True}
    """
    if type(head) is not MatryoshkaProjector:
        raise TypeError(
            f"heads[{name!r}] is a {type(head).__name__}; only MatryoshkaProjector can be rebuilt "
            "from a file. Save another module's state_dict in a file of its own"
        )
    linears = [m for m in head.heads[-1].children() if isinstance(m, nn.Linear)]
    layers = linears[1:] if head.nesting in ("linear", "slice_linear") else linears
    return {
        "in_dim": head.in_dim,
        "num_prototypes": head.num_prototypes_per_level[-1],
        "nesting_dims": list(head.nesting_dims),
        "nesting": head.nesting,
        "hidden_dim": layers[0].out_features,
        "bottleneck_dim": layers[-1].out_features,
        "num_layers": len(layers),
        "normalize": head.normalize,
    }


def build_head(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MatryoshkaProjector:
    """The projector of :func:`describe_head` with these tensors, in their float type.

    Raises:
        ValueError: the tensors are not exactly the projector's.
    """
    try:
        with torch.device("meta"):
            head = MatryoshkaProjector(**check_settings("the head's arguments", arguments, HEAD))
    except (TypeError, RuntimeError) as error:  # an argument is missing, or sizes overflow
        raise ValueError(f"no head can be built of {dict(arguments)}: {error}") from error
    expected = {name: t.shape for name, t in head.state_dict().items()}
    found = {name: t.shape for name, t in tensors.items()}
    if found != expected:
        differ = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        raise ValueError(
            f"the head's tensors do not fit its arguments {dict(arguments)}: "
            + ", ".join(
                f"{name} is {_listed(found.get(name))}, expected {_listed(expected.get(name))}"
                for name in differ[:5]
            )
        )
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ValueError(f"the head's {odd[0]} is {tensors[odd[0]].dtype}, not floating point")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    head.load_state_dict(copies, assign=True)
    return head.requires_grad_()


def read_head(tensors: Mapping[str, Tensor]) -> tuple[Head, str]:
    """A head of another code base, as a projector where one computes the same.

    - Franca (``matryoshka_projections``, ``mlps``, ``last_layers``): L levels, ``normalize=False``,
      ``nesting="slice_linear"`` or, of the first release, ``"linear"``. The prototypes are
      ``g * v / |v|`` of its weight norm.
    - DINO, DINOv2, iBOT (``mlp``, ``last_layer`` with weight norm): one level, ``normalize=True``,
      if every ``g`` is 1.

    Anything else (batch norms, a second last layer, free norms, DINOv3's) is returned as the
    tensors, by name.

    Args:
        tensors: of the head alone, without its prefix.

    Returns:
        The head, and what it is in words.
    """
    try:
        arguments_and_tensors = _franca(tensors) or _dino(tensors)
    except ValueError:  # names with other parts than these heads have
        arguments_and_tensors = None
    if arguments_and_tensors is None:
        return dict(tensors), f"{len(tensors)} tensors, which no MatryoshkaProjector computes with"
    arguments, renamed = arguments_and_tensors
    try:
        head = build_head(arguments, renamed)
    except ValueError as error:
        return dict(tensors), f"{len(tensors)} tensors, kept as they are: {error}"
    return head, describe_projector(head)


def describe_projector(head: MatryoshkaProjector) -> str:
    """In words, for a report."""
    return f"MatryoshkaProjector, prototypes {', '.join(map(str, head.num_prototypes_per_level))}"


def misfit(name: str, found: Head | None, wanted: MatryoshkaProjector) -> str:
    """Why a head of a file cannot take the place of ``wanted``, in words; "" if it can.

    Args:
        name: of the head, such as ``"dino_head"``.
        found: what :func:`sslkit.backbones.load_pretrained` gives of that name, None if nothing.
        wanted: may be on the meta device.

    >>> head = MatryoshkaProjector(8, 6, nesting_dims=(4, 8), hidden_dim=5)
    >>> misfit("dino_head", head, MatryoshkaProjector(8, 9, nesting_dims=(4, 8), hidden_dim=5))
    "the file's dino_head has num_prototypes=6 instead of 9"
    """
    if found is None:
        return f"the file has no {name}"
    if not isinstance(found, MatryoshkaProjector):
        return f"the file's {name} is none that a MatryoshkaProjector computes"
    own, asked = describe_head(name, found), describe_head(name, wanted)
    differing = [f"{k}={own[k]} instead of {asked[k]}" for k in own if own[k] != asked[k]]
    return f"the file's {name} has {', '.join(differing)}" if differing else ""


def _franca(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    levels = len({name.split(".")[1] for name in tensors if name.startswith("last_layers.")})
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part == "matryoshka_projections":
            level, kind = rest.split(".")
            # Slicing is a layer of its own, before the linear one.
            renamed[f"heads.{level}.0.{kind}"] = tensor
        elif part == "mlps":
            level, _, rest = rest.partition(".")
            layer, _, kind = rest.rpartition(".")
            if not layer:  # a single linear layer, which has no GELU after it there
                return None
            renamed[f"heads.{level}.{int(layer) + 1}.{kind}"] = tensor
        elif part != "last_layers":
            return None
    projections: list[Tensor] = []
    for i in range(levels):
        projection = renamed.get(f"heads.{i}.0.weight")
        pair = _prototypes(tensors, f"last_layers.{i}.")
        if projection is None or projection.ndim != 2 or pair is None:
            return None
        projections.append(projection)
        renamed[f"prototypes.{i}.weight"] = pair[0] * pair[1]
    if not projections:
        return None
    dims = [len(projection) for projection in projections]
    sliced = projections[0].shape[1] == dims[0]
    in_dim = projections[-1].shape[1]
    if sliced:
        renamed = {_after_slice(name): tensor for name, tensor in renamed.items()}
    widths = _widths(renamed, start=2 if sliced else 1)
    if widths is None:
        return None
    arguments = {
        "in_dim": in_dim,
        "num_prototypes": len(renamed[f"prototypes.{levels - 1}.weight"]),
        "nesting_dims": dims,
        "nesting": "slice_linear" if sliced else "linear",
        **widths,
        "normalize": False,
    }
    return arguments, renamed


def _dino(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    prototypes = _prototypes(tensors, "last_layer.")
    mlp = {name: t for name, t in tensors.items() if name.startswith("mlp.")}
    known = len(mlp) + 2
    if prototypes is None or len(tensors) != known or not bool((prototypes[0] == 1).all()):
        return None
    renamed = {"prototypes.0.weight": prototypes[1]}
    for name, tensor in mlp.items():
        layer, _, kind = name.removeprefix("mlp.").rpartition(".")
        renamed[f"heads.0.{int(layer or 0) + 1}.{kind}"] = tensor
    widths = _widths(renamed, start=1)
    first = renamed.get("heads.0.1.weight")
    if widths is None or first is None or first.ndim != 2:
        return None
    arguments = {
        "in_dim": first.shape[1],
        "num_prototypes": len(prototypes[1]),
        "nesting_dims": [first.shape[1]],
        "nesting": "slice",
        **widths,
        "normalize": True,
    }
    return arguments, renamed


def _prototypes(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor] | None:
    """Norms [K, 1] and unit rows [K, b] of a linear layer under torch's weight norm."""
    for g, v in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        if prefix + g in tensors and prefix + v in tensors:
            norms, rows = tensors[prefix + g], tensors[prefix + v]
            if rows.ndim != 2 or norms.shape != (len(rows), 1) or not rows.is_floating_point():
                return None  # and nothing that broadcasts to more than the file holds
            return norms, rows / rows.norm(dim=1, keepdim=True)
    return None


def _after_slice(name: str) -> str:
    """``heads.<l>.<i>.`` one further, behind the parameterless slice."""
    match = re.fullmatch(r"heads\.(\d+)\.(\d+)\.(\w+)", name)
    return f"heads.{match[1]}.{int(match[2]) + 1}.{match[3]}" if match else name


def _widths(renamed: Mapping[str, Tensor], start: int) -> dict[str, int] | None:
    """Hidden and bottleneck size and the number of layers of level 0's MLP, from ``start``."""
    numbers = sorted(
        int(m[1]) for name in renamed if (m := re.fullmatch(r"heads\.0\.(\d+)\.weight", name))
    )
    layers = [renamed[f"heads.0.{n}.weight"] for n in numbers if n >= start]
    if not layers or any(layer.ndim != 2 for layer in layers):
        return None
    if any(b - a != 2 for a, b in pairwise(n for n in numbers if n >= start)):
        return None
    return {
        "hidden_dim": len(layers[0]),
        "bottleneck_dim": len(layers[-1]),
        "num_layers": len(layers),
    }


def _listed(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
