from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import CRD, FitInfo, Networks
from ackd_lightning.methods import crd_loss as losses
from ackd_lightning.methods.crd_loss import contrast_scores, crd_loss, moved_rows, normaliser, unit
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import twenty_steps

GOLDEN = Path(__file__).parents[1] / "golden"
CLASSES, WIDTH, IMAGES = 5, 6, 4
SPEC = NetSpec(CLASSES, embedding=WIDTH)
TARGETS = torch.arange(40) % CLASSES


def output(seed: int, images: int = IMAGES) -> NetOutput:
    generator = torch.Generator().manual_seed(seed)
    logits, embedding = (torch.randn(images, width, generator=generator) for width in (CLASSES, WIDTH))
    return NetOutput(logits.requires_grad_(), None, embedding.requires_grad_())


def batch_of(index: torch.Tensor, targets: torch.Tensor = TARGETS) -> Batch:
    return Batch(torch.zeros(len(index), 3, 2, 2), targets[index], index)


def method_for(targets: torch.Tensor = TARGETS, **options: object) -> CRD:
    torch.manual_seed(0)
    method = CRD(**{"negatives": 16, "embedding_size": 8, **options})
    method.build(Networks(student=SPEC, teachers=(SPEC,)))
    method.begin_fit(FitInfo(targets=targets))
    return method


def steps(method: CRD, count: int, start: int = 0) -> list[float]:
    """Values of the term over steps that update the memories, each with other images."""
    values = []
    for number in range(start, start + count):
        scene = output(number), output(100 + number), batch_of((torch.arange(IMAGES) + 7 * number) % len(TARGETS))
        values.append(method(*scene)["crd"].item())
        method.update(*scene)
    return values


# ---------------------------------------------------------------- the benchmark's numbers


@pytest.mark.parametrize("dense", [0, 64], ids=["rows gathered", "all rows scored"])
def test_two_calls_equal_the_golden_of_the_benchmark(monkeypatch, dense):
    monkeypatch.setattr(losses, "_DENSE", dense)
    golden = json.loads((GOLDEN / "losses.json").read_text())["crd"]["values"]
    with np.load(GOLDEN / "losses.npz") as arrays:
        names = [name for name in arrays if name.startswith("crd_") or name in ("rs_pool", "rt_pool")]
        given = {name: torch.from_numpy(arrays[name]) for name in names}
        logits, target = torch.from_numpy(arrays["logits_s"]), torch.from_numpy(arrays["target"])
    memory = {"s": given["crd_memory_v1_before"].clone(), "t": given["crd_memory_v2_before"].clone()}
    features = [(given["rs_pool"], given["rt_pool"]), (given["crd_fs2"], given["crd_ft2"])]
    constants: list[torch.Tensor] = []
    for call, pair in enumerate(features, 1):
        e = {
            side: unit(F.linear(each, given[f"crd_embed_{side}_weight"], given[f"crd_embed_{side}_bias"]))
            for side, each in zip("st", pair, strict=True)
        }
        index, samples = given[f"crd_idx{call}"], given[f"crd_contrast_idx{call}"]
        if call == 1:
            scores = [contrast_scores(e[a], memory[b], samples, temperature=0.07) for a, b in ("st", "ts")]
            constants = [normaliser(each, rows=200) for each in scores]
        loss = crd_loss(
            *(e["s"], e["t"], memory["s"], memory["t"], samples),
            temperature=0.07,
            student_normaliser=constants[0],
            teacher_normaliser=constants[1],
        )
        assert loss.item() == pytest.approx(golden[f"crd_call{call}.loss"], rel=2e-4)
        if call == 1:
            total = (F.cross_entropy(logits, target) + 0.8 * loss).item()
            assert total == pytest.approx(golden["RepDistiller.total(-r 1 -a 0 -b 0.8) with call1"], rel=2e-4)
        for side, version in (("s", 1), ("t", 2)):
            memory[side][index] = moved_rows(memory[side], index, e[side], momentum=0.5)
            expected = given[f"crd_memory_v{version}_rows_after{call}"]
            torch.testing.assert_close(memory[side][index], expected, rtol=1e-5, atol=1e-6)
    assert constants[0].item() == pytest.approx(golden["Z_v1"], rel=2e-4)
    assert constants[1].item() == pytest.approx(golden["Z_v2"], rel=2e-4)


def test_the_method_does_what_the_golden_does_in_order(monkeypatch):
    """Two steps of the class, given the golden's heads, memories and negatives."""
    golden = json.loads((GOLDEN / "losses.json").read_text())["crd"]["values"]
    with np.load(GOLDEN / "losses.npz") as arrays:
        names = [name for name in arrays if name.startswith("crd_") or name in ("rs_pool", "rt_pool")]
        given = {name: torch.from_numpy(arrays[name]) for name in names}
    method = CRD(negatives=32)
    method.build(Networks(student=NetSpec(CLASSES, embedding=64), teachers=(NetSpec(CLASSES, embedding=64),)))
    targets = torch.arange(200) % CLASSES
    method.begin_fit(FitInfo(targets=targets))
    state = {"memory_student": given["crd_memory_v1_before"], "memory_teacher": given["crd_memory_v2_before"]}
    for side, name in (("s", "student"), ("t", "teacher")):
        state |= {f"head_{name}.{part}": given[f"crd_embed_{side}_{part}"] for part in ("weight", "bias")}
    method.load_state_dict(state, strict=False)
    logits = torch.zeros(8, CLASSES)
    for call, (f_s, f_t) in enumerate([(given["rs_pool"], given["rt_pool"]), (given["crd_fs2"], given["crd_ft2"])], 1):
        negatives = given[f"crd_contrast_idx{call}"][:, 1:]
        monkeypatch.setattr(method.sampler, "forward", lambda index, target, step, negatives=negatives: negatives)
        scene = NetOutput(logits, None, f_s), NetOutput(logits, None, f_t), batch_of(given[f"crd_idx{call}"], targets)
        assert method(*scene)["crd"].item() == pytest.approx(golden[f"crd_call{call}.loss"], rel=2e-4)
        method.update(*scene)
    assert method.normalisers.tolist() == pytest.approx([golden["Z_v1"], golden["Z_v2"]], rel=2e-4)


def test_it_equals_the_printed_equation_in_loops():
    generator = torch.Generator().manual_seed(0)
    e_s, e_t, m_s, m_t = (unit(torch.randn(rows, 3, generator=generator)) for rows in (2, 2, 9, 9))
    samples = torch.tensor([[0, 3, 4, 4], [8, 1, 2, 7]])

    def one_way(e, m, constant):
        total, share = 0.0, 3 / 9
        for image, row in enumerate(samples.tolist()):
            h = [math.exp(float(e[image] @ m[place]) / 0.5) / constant for place in row]
            total -= math.log(h[0] / (h[0] + share)) + sum(math.log(share / (each + share)) for each in h[1:])
        return total / 2

    value = crd_loss(e_s, e_t, m_s, m_t, samples, temperature=0.5, student_normaliser=5.0, teacher_normaliser=7.0)
    assert value.item() == pytest.approx(one_way(e_s, m_t, 5.0) + one_way(e_t, m_s, 7.0), rel=1e-5)


def test_default_weights_are_the_benchmark_s_and_all_are_arguments():
    assert CRD().loss_weights == {"ce": 1.0, "kd": 0.0, "crd": 0.8}
    assert CRD(weight_ce=0.5, weight_kd=1.0, weight_crd=2.0).loss_weights == {"ce": 0.5, "kd": 1.0, "crd": 2.0}


# ---------------------------------------------------------------- negatives


def test_a_training_set_as_large_as_cifar_100():
    targets = torch.arange(50000) % 100
    method = CRD(negatives=16384)
    method.build(Networks(student=SPEC, teachers=(SPEC,)))
    method.begin_fit(FitInfo(targets=targets))
    scene = output(0, 8), output(1, 8), batch_of(torch.arange(8) * 6000, targets)
    first = method(*scene)["crd"]
    first.backward()
    method.update(*scene)
    assert first.item() == pytest.approx(2 * (1 + math.log(16384)), rel=0.1)  # the value by chance
    assert method(*scene)["crd"].isfinite()
    assert method.memory_student.shape == (50000, 128)


# ---------------------------------------------------------------- memories


def test_memories_start_equal_everywhere_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    method = CRD(embedding_size=8)
    before = torch.get_rng_state()
    method.begin_fit(FitInfo(targets=TARGETS))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(method_for().memory_student, method.memory_student)
    bound = 1 / math.sqrt(8 / 3)
    for memory in (method.memory_student, method.memory_teacher):
        assert memory.shape == (40, 8)
        assert 0.9 * bound < memory.abs().max() <= bound
        assert abs(memory.mean()) < 0.1
    assert not torch.equal(method.memory_student, method.memory_teacher)


def test_only_rows_of_the_batch_move_and_to_unit_length():
    method = method_for()
    before = method.memory_teacher.clone()
    index = torch.tensor([4, 9, 2, 30])
    scene = output(0), output(1), batch_of(index)
    method.update(*scene)
    others = torch.ones(40, dtype=torch.bool)
    others[index] = False
    assert torch.equal(method.memory_teacher[others], before[others])
    embedding = unit(method.head_teacher(scene[1].embedding))
    expected = 0.5 * before[index] + 0.5 * embedding
    torch.testing.assert_close(method.memory_teacher[index], expected / expected.norm(dim=1, keepdim=True))
    assert method.steps.item() == 1
    assert not method.memory_teacher.requires_grad


def test_an_image_twice_in_a_batch_has_one_new_row():
    memory = unit(torch.randn(5, 3))
    embedding = unit(torch.randn(3, 3))
    rows = moved_rows(memory, torch.tensor([4, 1, 4]), embedding, momentum=0.5)
    assert torch.equal(rows[0], rows[2])
    torch.testing.assert_close(rows[2], unit(0.5 * memory[4:] + 0.5 * embedding[2:])[0])


def test_the_constant_is_that_of_the_first_step_for_ever():
    method = method_for()
    assert method.normalisers.tolist() == [-1.0, -1.0]
    steps(method, 1)
    first = method.normalisers.clone()
    assert (first > 0).all()
    steps(method, 2, start=1)
    assert torch.equal(method.normalisers, first)


@pytest.mark.parametrize("told", [True, False], ids=["data first", "checkpoint first"])
def test_a_checkpoint_goes_on_where_the_run_was(told):
    method = method_for()
    steps(method, 3)
    state = copy.deepcopy(method.state_dict())
    expected = steps(method, 3, start=3)
    again = CRD(negatives=16, embedding_size=8)
    again.build(Networks(student=SPEC, teachers=(SPEC,)))
    if told:
        again.begin_fit(FitInfo(targets=TARGETS))
    again.load_state_dict(state, strict=True)
    if not told:
        again.begin_fit(FitInfo(targets=TARGETS))
    assert steps(again, 3, start=3) == expected
    for key, value in method.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_other_data_begin_anew():
    method = method_for()
    steps(method, 2)
    method.begin_fit(FitInfo(targets=TARGETS[:30]))
    assert method.memory_student.shape == (30, 8)
    assert method.normalisers.tolist() == [-1.0, -1.0]
    assert method.steps.item() == 0


# ---------------------------------------------------------------- gradients and numbers


def test_it_reaches_the_student_and_both_heads_and_nothing_of_the_teacher():
    method = method_for()
    scene = output(0), output(1), batch_of(torch.arange(IMAGES))
    method(*scene)["crd"].backward()
    assert scene[0].embedding.grad.abs().sum() > 0
    assert scene[1].embedding.grad is None
    assert scene[1].logits.grad is None
    for name, parameter in method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dense", [0, 64], ids=["gathered rows", "all rows"])
def test_the_gradient_is_that_of_the_equation_whatever_happens_to_the_memory(monkeypatch, dense):
    monkeypatch.setattr(losses, "_DENSE", dense)
    memory, samples = unit(torch.randn(40, 8)), torch.randint(0, 40, (IMAGES, 17))
    embeddings = [unit(torch.randn(IMAGES, 8)).requires_grad_() for _ in range(2)]
    options = {"student_normaliser": 30.0, "teacher_normaliser": torch.tensor(40.0)}
    other = unit(torch.randn(40, 8))
    loss = crd_loss(*embeddings, other, memory, samples, temperature=0.2, **options)
    slow = sum(
        losses.nce_loss((kept[samples] @ each[:, :, None])[..., 0] / 0.2, normaliser=constant, rows=40)
        for each, kept, constant in zip(embeddings, (memory, other), (30.0, 40.0), strict=True)
    )
    expected = torch.autograd.grad(3 * slow, embeddings)
    memory.zero_()
    other.zero_()
    torch.testing.assert_close(loss, slow)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, embeddings), expected)


def test_without_a_gradient_the_value_is_the_same_and_nothing_is_kept():
    memory, samples = unit(torch.randn(40, 8)), torch.randint(0, 40, (IMAGES, 17))
    embeddings = [unit(torch.randn(IMAGES, 8)).requires_grad_() for _ in range(2)]
    options = {"temperature": 0.2, "student_normaliser": 30.0, "teacher_normaliser": 40.0}
    value = crd_loss(*embeddings, memory, memory, samples, **options).item()
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            loss = crd_loss(*embeddings, memory, memory, samples, **options)
        assert loss.item() == value
        assert not loss.requires_grad


def test_a_small_gradient_of_half_precision_survives_until_it_is_scaled():
    memory, samples = unit(torch.randn(40, 8)), torch.randint(0, 40, (IMAGES, 3))
    embedding = unit(torch.randn(IMAGES, 8)).half().requires_grad_()
    options = {"temperature": 1e4, "student_normaliser": 30.0, "teacher_normaliser": 40.0}
    loss = crd_loss(embedding, unit(torch.randn(IMAGES, 8)), memory, memory, samples, **options)
    (scaled,) = torch.autograd.grad(2.0**16 * loss, embedding, retain_graph=True)
    (plain,) = torch.autograd.grad(loss, embedding)
    assert plain.abs().max() < 1e-4
    assert (scaled != 0).all()
    assert scaled.dtype is torch.float16


def test_lengths_of_embeddings_do_not_matter_to_the_contrast():
    method = method_for()
    with torch.no_grad():
        method.head_student.bias.zero_()
    student, teacher, batch = output(0), output(1), batch_of(torch.arange(IMAGES))
    longer = NetOutput(student.logits, None, 7 * student.embedding)
    terms = method(student, teacher, batch)["crd"], method(longer, teacher, batch)["crd"]
    assert terms[0].item() == pytest.approx(terms[1].item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [6e4, -6e4, 0.0])
def test_extreme_embeddings_give_finite_values_and_gradients(dtype, value):
    method = method_for()
    full = torch.full((IMAGES, WIDTH), value, dtype=dtype, requires_grad=True)
    student = NetOutput(torch.zeros(IMAGES, CLASSES), None, full)
    scene = student, output(1), batch_of(torch.arange(IMAGES))
    for _ in range(2):  # before and after the constant is set
        term = method(*scene)["crd"]
        (gradient,) = torch.autograd.grad(term, full)
        assert term.dtype is torch.float32
        assert term.isfinite()
        assert gradient.isfinite().all()
        method.update(*scene)
    assert all(each.isfinite().all() for each in method.state_dict().values())


def test_twenty_steps_lower_it():
    method = method_for()
    student, teacher, batch = output(0), output(1), batch_of(torch.arange(IMAGES))
    leaves = [student.embedding, *method.parameters()]
    losses = twenty_steps(lambda: method(student, teacher, batch)["crd"], leaves, lr=0.05)
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0 in CRD; it must be above 0"),
        ({"kd_temperature": -1.0}, "kd_temperature is -1.0 in CRD; it must be above 0"),
        ({"negatives": 0}, "negatives is 0 in CRD; it must be at least 1"),
        ({"embedding_size": 0}, "embedding_size is 0 in CRD; it must be at least 1"),
        ({"momentum": 1.0}, "momentum is 1.0 in CRD; it must be at least 0 and below 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, sentence):
    with pytest.raises(ACKDError, match=sentence):
        CRD(**arguments)


def test_one_class_has_no_negatives():
    with pytest.raises(ACKDError, match="all 7 training images belong to one class"):
        method_for(torch.full((7,), 3))


@pytest.mark.parametrize("wrong", [-1, 40])
def test_indices_that_are_not_known_are_refused(wrong):
    index = torch.tensor([0, 1, 2, wrong])
    batch = Batch(torch.zeros(IMAGES, 3, 2, 2), torch.tensor([0, 1, 2, 0]), index)
    with pytest.raises(ACKDError, match=rf"batch.index is from .*{wrong}.* has 40 training images"):
        method_for()(output(0), output(1), batch)


def test_indices_of_another_training_set_are_refused():
    index = torch.arange(IMAGES)
    with pytest.raises(ACKDError, match=r"batch.index does not fit batch.target"):
        method_for()(output(0), output(1), Batch(torch.zeros(IMAGES, 3, 2, 2), TARGETS[index + 1], index))


def test_without_targets_it_says_so():
    method = CRD()
    method.build(Networks(student=SPEC, teachers=(SPEC,)))
    with pytest.raises(ACKDError, match="call begin_fit"):
        method(output(0), output(1), batch_of(torch.arange(IMAGES)))


def test_a_checkpoint_of_other_data_is_refused():
    method = method_for()
    with pytest.raises(ACKDError, match="has 30 training images for method CRD and the data have 40"):
        method.load_state_dict(method_for(TARGETS[:30]).state_dict())


def test_a_network_without_a_known_embedding_is_refused():
    with pytest.raises(ACKDError, match=r"the teacher.*method CRD"):
        CRD().build(Networks(student=SPEC, teachers=(NetSpec(CLASSES),)))
