"""Tensors and images on their way to and from devices; nothing is computed or copied twice."""

from __future__ import annotations

import threading

import torch
from builders import CLUSTERS, demo_images, tiny_encoder, tiny_mae, tiny_moce

from moce.config import TrainSettings
from moce.data.augment import normalize
from moce.data.loader import fetch, in_order, to_cpu
from moce.models.experts import apply_experts
from moce.runs.files import clone_shared_tensors
from moce.runtime.device import bincount, fits_on, to_device
from moce.training import objectives
from moce.training.trainer import Step

CPU = torch.device("cpu")


def test_bincount_is_that_of_torch() -> None:
    numbers = torch.randint(7, (100,))
    assert torch.equal(bincount(numbers, 9), numbers.bincount(minlength=9))
    assert bincount(torch.zeros(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    on_device = bincount(numbers.to("meta"), 9)  # as on accelerators: the shape is known beforehand
    assert on_device.shape == (9,) and on_device.dtype == torch.int64


def test_gate_inputs_are_computed_once_per_step(monkeypatch) -> None:
    made = []
    noise = objectives.gate_noise
    monkeypatch.setattr(objectives, "gate_noise", lambda *a: made.append(a[2]) or noise(*a))
    moce, images = tiny_moce(tiny_mae()).train(), demo_images()
    cluster_of = torch.arange(len(images)) % CLUSTERS
    settings = TrainSettings(data="-", mae="-", out="-")
    objective = objectives.MoCEObjective(moce, tiny_encoder(), images, cluster_of, settings)
    rows = torch.arange(16)
    for number in (0, 1):
        step = Step(number, rows)
        for step.micro_batch in range(4):
            own = rows[4 * step.micro_batch : 4 * step.micro_batch + 4]
            objective.loss(moce, fetch(images, own, torch.zeros_like(own), CPU), step)
    assert made == [0, 1]


def test_known_counts_give_the_same_expert_outputs() -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
    rows, expert = torch.randn(5, 4), torch.tensor([2, 0, 2, 2, 0])
    known = apply_experts(layers, rows, expert, [2, 0, 3])
    assert torch.equal(known, apply_experts(layers, rows, expert))


def test_a_scale_first_asked_for_under_inference_mode_can_be_trained_with() -> None:
    mean, std = (0.125, 0.25, 0.5), (0.5, 0.25, 0.75)
    pixels = torch.ones(1, 3, 2, 2)
    with torch.inference_mode():
        expected = normalize(pixels, mean, std)
    images = normalize(pixels.requires_grad_(), mean, std)
    images.sum().backward()
    assert torch.equal(images, expected.clone())


def test_a_tensor_already_on_the_device_is_not_copied() -> None:
    values = torch.ones(3)
    assert to_device(values, CPU) is values


def test_images_in_order_are_read_ahead_and_leaving_early_is_clean() -> None:
    images, taken = demo_images(), []

    class Watched(type(images)):  # type: ignore[misc]
        def take(self, rows):
            taken.append(rows)
            return super().take(rows)

    watched = Watched(**vars(images))
    batches = in_order(watched, 6, CPU, (16, 16), slice(5, 40))
    first = next(batches)
    assert torch.equal(first, images.pixels[5:11])
    batches.close()
    assert 1 <= len(taken) <= 3 and not [t for t in threading.enumerate() if "prefetch" in t.name]
    parts = list(in_order(watched, 6, CPU, (16, 16), slice(5, 40)))
    assert [len(part) for part in parts] == [6] * 5 + [5]
    assert torch.equal(torch.cat(parts), images.pixels[5:40])


def test_results_on_the_cpu_come_at_once() -> None:
    made: list[int] = []
    results = (made.append(n) or torch.full((2,), n) for n in range(3))
    for number, result in enumerate(to_cpu(results)):
        assert made == list(range(number + 1)) and result.tolist() == [number] * 2


def test_data_stay_on_a_gpu_with_room_to_spare(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4000, 8000))
    gpu = torch.device("cuda")
    assert fits_on(gpu, 1000) and not fits_on(gpu, 1001) and not fits_on(CPU, 1)


def test_a_file_gets_copies_of_shared_memory_only() -> None:
    one, two = torch.randn(4, 4), torch.randn(3)
    ready = clone_shared_tensors(
        {"one": one, "again": one, "row": one[1], "column": one[:, 1], "two": two}
    )
    assert ready["one"].data_ptr() == one.data_ptr() and ready["two"].data_ptr() == two.data_ptr()
    assert len({value.untyped_storage().data_ptr() for value in ready.values()}) == 5
    assert torch.equal(ready["column"], one[:, 1]) and torch.equal(ready["again"], one)
