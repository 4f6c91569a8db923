"""EMATeacher against the closed form, what it copies, and sharded over two processes."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sslkit.ops import c_kernels
from sslkit.ops.dispatch import record_bodies
from sslkit.teacher import EMATeacher, ema_
from sslkit.testing.references.teacher import ema

numbers = st.floats(-100, 100)
momenta = st.floats(0, 1)


def make_student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def randomise_(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


@given(numbers, st.lists(st.tuples(numbers, momenta), max_size=8))
def test_equals_the_closed_form(start, updates):
    student = nn.ParameterDict({"w": nn.Parameter(torch.tensor([start], dtype=torch.float64))})
    teacher = EMATeacher(student)
    for value, momentum in updates:
        student["w"].data.fill_(value)
        teacher.update(student, momentum)
    expected = ema(start, [value for value, _ in updates], [momentum for _, momentum in updates])
    assert teacher.module["w"].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("momentum", [0.996, 0.3])
def test_float32_parameters_of_many_sizes(momentum):
    sizes = [(), (0,), (1,), (17,), (1000, 333)]
    student = nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])
    teacher = EMATeacher(student)
    randomise_(student)
    expected = [
        momentum * mine.double() + (1 - momentum) * theirs.detach().double()
        for mine, theirs in zip(teacher.module, student, strict=True)
    ]
    versions = [p._version for p in teacher.module]
    with record_bodies() as ran:
        teacher.update(student, momentum)
    assert ran == [("ema", "torch" if c_kernels.problem() else "c")]
    for mine, exact, version in zip(teacher.module, expected, versions, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-6)
        assert mine._version > version  # autograd knows that they have changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ends_are_exact_and_equal_tensors_stay(dtype, momentum):
    student = make_student().to(dtype)
    teacher = EMATeacher(student)
    start = snapshot(teacher.module)
    teacher.update(student, 0.3)
    assert all(torch.equal(start[k], v) for k, v in teacher.module.state_dict().items())
    randomise_(student)
    teacher.update(student, momentum)
    expected = start if momentum else snapshot(student)
    assert all(torch.equal(expected[k], v) for k, v in teacher.module.state_dict().items())


def test_buffers_are_copied_parameters_are_not_and_the_student_is_left_alone():
    student = make_student()
    teacher = EMATeacher(student, momentum=0.75)
    old = snapshot(teacher.module)
    randomise_(student)
    student(torch.randn(8, 4) + 3)  # moves the running statistics
    new = snapshot(student)
    teacher.update(student)
    assert all(torch.equal(new[name], value) for name, value in student.state_dict().items())
    now = teacher.module.state_dict()
    assert now["1.num_batches_tracked"] == 1
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(now[name], new[name])
        assert not torch.equal(now[name], old[name])
    for name, _ in student.named_parameters():
        torch.testing.assert_close(now[name], 0.75 * old[name] + 0.25 * new[name])


def test_default_momentum_and_override():
    student = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(student.weight)
    teacher = EMATeacher(student)
    nn.init.ones_(student.weight)
    teacher.update(student)
    assert teacher.module.weight.item() == pytest.approx(1 - 0.996)
    teacher.update(student, momentum=0.5)
    assert teacher.module.weight.item() == pytest.approx(0.5 + 0.5 * (1 - 0.996))


def test_frozen_in_eval_mode_without_gradients_whatever_train_says():
    student = make_student().train()
    student(torch.randn(8, 4)).sum().backward()
    teacher = EMATeacher(student)
    around = nn.ModuleList([student, teacher]).train()
    assert student.training
    assert around.training
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())

    x = torch.randn(8, 4, requires_grad=True)
    before = snapshot(teacher.module)
    output = teacher(x)
    assert not output.requires_grad
    assert torch.equal(output, student.eval()(x))
    assert all(torch.equal(before[k], v) for k, v in teacher.module.state_dict().items())
    # its outputs may be saved for a student's backward pass, which inference tensors may not
    (student(x) * output).sum().backward()


def test_mixed_dtypes():
    """Each parameter in its own precision; the teacher's holds where the student's is lower."""
    student = nn.ModuleDict(
        {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).double(), "c": nn.Linear(2, 2).bfloat16()}
    )
    teacher = EMATeacher(student, momentum=0.5)
    old = snapshot(teacher.module)
    student["a"].bfloat16()
    randomise_(student)
    teacher.update(student)
    for name, value in teacher.module.named_parameters():
        assert value.dtype == old[name].dtype
        expected = 0.5 * old[name].double() + 0.5 * student.get_parameter(name).double()
        torch.testing.assert_close(value, expected.to(value.dtype))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_student_that_keeps_tensors_of_its_graph():
    """Weight norm stores the product it computes, which deepcopy alone refuses to copy."""
    student = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    student(torch.randn(1, 3))
    assert not student.weight.is_leaf
    teacher = EMATeacher(student, momentum=0.0)
    randomise_(student)
    teacher.update(student)
    x = torch.randn(4, 3)
    assert torch.equal(teacher(x), student(x))
    assert not teacher.module.weight.requires_grad


def test_state_dict_round_trip():
    student = make_student()
    teacher, other = EMATeacher(student), EMATeacher(make_student())
    randomise_(teacher)
    other.load_state_dict(teacher.state_dict())
    assert list(teacher.state_dict()) == [f"module.{name}" for name in student.state_dict()]
    x = torch.randn(2, 4)
    assert torch.equal(teacher(x), other(x))


class Wrapper(nn.Module):
    """Renames like DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Wrapper, r"missing in the student \['0.weight', .* unexpected \['module.0.weight'"),
        (lambda s: s[:3], r"parameter names .* missing .*'3.weight', '3.bias'\], unexpected \[\]"),
        (lambda s: s.append(nn.PReLU()), r"missing in the student \[\], unexpected \['4.weight'\]"),
        (
            lambda s: nn.Sequential(nn.Linear(5, 3), *s[1:]),
            r"parameter '0.weight' has shape \(3, 5\) in the student and \(3, 4\) in the teacher",
        ),
        (
            lambda s: nn.Sequential(s[0], nn.BatchNorm1d(3, track_running_stats=False), *s[2:]),
            r"buffer names .* missing .*'1.running_mean'",
        ),
    ],
)
def test_update_refuses_a_different_student_and_changes_nothing(change, message):
    teacher = EMATeacher(make_student())
    before = snapshot(teacher)
    student = change(make_student())
    randomise_(student)
    with pytest.raises(ValueError, match=message):
        teacher.update(student)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_bad_momentum(momentum):
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got"):
        EMATeacher(make_student(), momentum=momentum)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got"):
        EMATeacher(make_student()).update(make_student(), momentum)


@pytest.mark.parametrize("momentum", ["0.5", None, True, torch.tensor([0.5, 0.6])])
def test_a_momentum_that_is_no_number(momentum):
    with pytest.raises(TypeError, match=r"momentum must be (a|one) number, got"):
        EMATeacher(make_student(), momentum=momentum)


def test_weights_that_would_not_follow_are_refused():
    """A dynamically quantised layer has no parameters: update would leave it as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(2, 2), nn.ReLU()), {nn.Linear}
        )
    with pytest.raises(ValueError, match=r"quantised weights .* such as '0\._packed_params"):
        EMATeacher(student)


class Counting(nn.Module):
    """Parameters that have no mean, among others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.count = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
        self.seen = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        self.phase = nn.Parameter(torch.tensor([1j]))
        self.last = nn.Parameter(torch.ones(1, dtype=torch.float64))


def test_integers_and_booleans_are_copied_and_complex_numbers_are_averaged():
    student = Counting()
    teacher = EMATeacher(student, momentum=0.75)
    with torch.no_grad():
        student.weight.fill_(5.0)
        student.count.copy_(torch.tensor([7, 8]))
        student.seen.copy_(torch.tensor([False, True]))
        student.phase.fill_(5.0 + 1j)
    teacher.update(student)
    assert teacher.module.weight.tolist() == [2.0] * 3
    assert teacher.module.count.tolist() == [7, 8]
    assert teacher.module.seen.tolist() == [False, True]
    assert teacher.module.phase.tolist() == [1.25 + 1j]


def with_parameter(name: str, value: torch.Tensor) -> Counting:
    student = Counting()
    setattr(student, name, nn.Parameter(value, requires_grad=False))
    return student


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (("last", torch.ones(1, dtype=torch.float8_e4m3fn)), None, "float8_e4m3fn have no mean"),
        (
            ("last", torch.ones(1)),
            ("last", torch.ones(1, dtype=torch.int64)),
            "'last' is torch.int",
        ),
        (("phase", torch.ones(1)), ("phase", torch.tensor([1j])), "'phase' is torch.complex64"),
        (
            ("last", torch.ones(1)),
            ("last", torch.ones(1, device="meta")),
            "'last' is on meta in the",
        ),
    ],
)
def test_what_cannot_be_moved_is_refused_before_anything_is(first, second, message):
    teacher = EMATeacher(with_parameter(*first))
    student = with_parameter(*(second or first))
    with torch.no_grad():
        student.weight.fill_(9.0)
    with pytest.raises(ValueError, match=message):
        teacher.update(student)
    assert teacher.module.weight.tolist() == [1.0] * 3
    assert teacher.module.count.tolist() == [1, 2]


def test_a_student_without_shapes_yet_is_refused():
    with pytest.raises(ValueError, match=r"'1.weight': run it on one batch"):
        EMATeacher(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_a_student_that_cannot_be_copied_is_refused_with_the_reason():
    class Unique(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError("there is one of me")

    with pytest.raises(ValueError, match="a Unique, cannot be copied: there is one of me"):
        EMATeacher(Unique(2, 2))


def test_a_student_of_inference_mode():
    with torch.inference_mode():
        student = make_student()
        teacher = EMATeacher(student, momentum=0.5)
    other = make_student()
    randomise_(other)
    old = snapshot(teacher.module)
    teacher.update(other)  # outside of inference mode
    for name, value in teacher.module.named_parameters():
        torch.testing.assert_close(value, (old[name] + dict(other.named_parameters())[name]) / 2)


def test_parametrised_students():
    student = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    teacher = EMATeacher(student, momentum=0.5)
    with torch.no_grad():
        student.parametrizations.weight.original0.add_(2.0)
    teacher.update(student)
    moved = teacher.module.parametrizations.weight.original0
    torch.testing.assert_close(moved, student.parametrizations.weight.original0 - 1.0)


def test_a_wrapped_student_is_named(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"DistributedDataParallel: pass .* ddp\.module"):
            EMATeacher(nn.parallel.DistributedDataParallel(nn.Linear(2, 2)))
    finally:
        dist.destroy_process_group()


def sharded_update(rank: int, init_file: str) -> None:
    """Two processes: the shards move as the whole would, among plain parameters too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    student = make_student()
    teacher = EMATeacher(student, momentum=0.75)
    old = snapshot(teacher.module)

    fully_shard(student[0], mesh=mesh)
    with pytest.raises(ValueError, match=r"'0.weight' is a DTensor .* shard both in the same way"):
        teacher.update(student)
    with pytest.raises(ValueError, match="sharded by fully_shard, build the teacher before"):
        EMATeacher(student)
    fully_shard(teacher.module[0], mesh=mesh, reshard_after_forward=True)

    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    student[1].running_mean.fill_(5.0)
    for _ in range(2):  # with a forward between them, as in training
        teacher(torch.randn(2, 4))
        teacher.update(student)
    for name, value in teacher.module.named_parameters():
        assert isinstance(value, DTensor) == name.startswith("0.")
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        torch.testing.assert_close(whole, old[name] + (1 - 0.75**2), rtol=1e-6, atol=1e-6)
    assert (teacher.module[1].running_mean == 5).all()
    dist.barrier()  # a rank that leaves earlier aborts now and then in gloo's threads at exit
    dist.destroy_process_group()


def test_sharded_parameters(tmp_path):
    mp.spawn(sharded_update, args=(str(tmp_path / "init"),), nprocs=2)


@pytest.mark.parametrize("momentum", [0, 1])
def test_whole_numbers_are_momenta(momentum):
    teacher, student = torch.zeros(3), torch.full((3,), 2.0)
    ema_([(teacher, student)], momentum)
    assert teacher.tolist() == [2.0 * (1 - momentum)] * 3
