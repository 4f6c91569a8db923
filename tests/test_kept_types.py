"""State that needs its range or its precision keeps its type, whatever happens around it."""

import importlib
import inspect
import io
import pkgutil

import pytest
import torch
from torch import nn

import sslkit
from sslkit import EMACentering, RASAProjector, SinkhornKnopp, SinkhornQueue
from sslkit.kept_types import KeepsTypes
from tests.noise import noise


def centering() -> EMACentering:
    part = EMACentering(3, momentum=0.0)
    part.update(torch.tensor([[1e5, 1.0, 0.1]]))  # 1e5 is infinite in float16
    return part


def queue() -> SinkhornQueue:
    part = SinkhornQueue(2, 3)
    part.update(torch.tensor([[1e5, 1.0, 0.1], [0.1, 0.2, 0.3]]))
    return part


def rasa() -> RASAProjector:
    return RASAProjector.from_planes([noise(2, 8), noise(2, 8, seed=1)])


PARTS = {"centering": centering, "queue": queue, "rasa": rasa}
CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "there and back": lambda m: m.half().float(),
}


def test_every_component_with_buffers_is_here():
    """What has a float buffer in the package, evaluation's fitted heads apart, keeps its type."""
    found = set()
    for module in pkgutil.walk_packages(sslkit.__path__, "sslkit."):
        if module.name.split(".")[1] in ("evaluation", "export", "commands", "__main__"):
            continue
        if "triton" in module.name:
            continue
        for _, one in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            own = issubclass(one, nn.Module) and one.__module__ == module.name
            if own and one is not KeepsTypes and "register_buffer" in inspect.getsource(one):
                found.add(one)
    assert found == {type(make()) for make in PARTS.values()}
    assert all(issubclass(one, KeepsTypes) for one in found)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_casts_of_the_module_around_leave_the_state_alone(make, cast):
    expected = make().state_dict()
    around = cast(nn.ModuleDict({"part": make(), "linear": nn.Linear(2, 2)}))
    state = around["part"].state_dict()
    assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    alone = cast(make()).state_dict()
    assert all(torch.equal(alone[name], expected[name]) for name in expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_checkpoints_in_half_precision_do_not_change_the_type(make, assign):
    part = nn.Sequential(make())
    types = {name: tensor.dtype for name, tensor in part.state_dict().items()}
    stored = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in part.state_dict().items()
    }
    part.load_state_dict(stored, assign=assign)
    assert {name: tensor.dtype for name, tensor in part.state_dict().items()} == types
    for name, tensor in part.state_dict().items():
        torch.testing.assert_close(tensor, stored[name].to(tensor.dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_devices_and_copies(make):
    part = make()
    types = {name: tensor.dtype for name, tensor in part.state_dict().items()}
    empty = make().to("meta")
    assert all(tensor.is_meta for tensor in empty.buffers())
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(part.state_dict())
    file = io.BytesIO()
    torch.save(part.half(), file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for one in (filled, again):
        assert {name: tensor.dtype for name, tensor in one.state_dict().items()} == types
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, part.state_dict()[name])


def test_a_centre_in_a_half_model_does_not_overflow():
    part = nn.Sequential(EMACentering(2, momentum=0.0)).half()[0]
    logits = torch.full((100, 2), 6e4).half()  # their sum is 6e6
    part.update(logits)
    torch.testing.assert_close(part.center, logits[0].float())
    assert part(logits, 0.04).probs().tolist() == [[0.5, 0.5]] * 100


def test_a_queue_in_a_half_model_balances_as_before():
    part, logits = nn.Sequential(queue()).half()[0], torch.tensor([[1e5, 0.0, 0.0]])
    found = SinkhornKnopp()(logits, 1e4, past=part(logits)).probs()
    assert torch.equal(found, SinkhornKnopp()(logits, 1e4, past=queue()(logits)).probs())
    assert found.isfinite().all()


def test_rasa_in_a_half_model_removes_as_before():
    x = noise(5, 8).double()
    assert torch.equal(nn.Sequential(rasa()).half()(x), rasa()(x))
