"""What a command imports: a process that trains alone loads nothing that only others need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Runs
from PIL import Image

from moce.models.encoder import EncoderSpec
from moce.models.mae import MAESpec
from moce.models.uninitialized import Uninitialized

HEAVY = {
    *(
        "datasets",
        "jinja2",
        "lightning_fabric",
        "matplotlib",
        "pandas",
        "pytorch_lightning",
        "scipy",
    ),
    *("sklearn", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp"),
    *("torchvision.models", "torchvision.transforms.v2", "transformers", "wandb"),
    *("huggingface_hub.hf_api", "huggingface_hub.file_download"),
}
SMALL = {"patch_size": 8, "img_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
# What a backbone's card is made with.
OF_CARDS = {"huggingface_hub.hf_api", "huggingface_hub.file_download", "matplotlib"}
ENDING = "; import json, sys; print(json.dumps(sorted(sys.modules)))"


def modules_after(code: str) -> set[str]:
    """All modules of a fresh process that has run the code."""
    command = [sys.executable, "-c", code + ENDING]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def of_pretrain(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Modules after two steps of pretraining on a folder, with a checkpoint between them."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / "images" / f"{number}.png")
    settings = {"model": "vit_tiny_patch16_224", "model_args": SMALL, "decoder_dim": 16,
                "decoder_depth": 1, "decoder_heads": 2, "steps": 2, "save_every": 1, "batch_size": 4,
                "device": "cpu", "out": str(folder / "run")}  # fmt: skip
    return modules_after(f"import moce; moce.pretrain({str(folder / 'images')!r}, **{settings!r})")


def test_pretrain_imports_no_heavy_module_that_it_does_not_need(of_pretrain: set[str]) -> None:
    assert {"torch", "timm", "moce.training.trainer"} <= of_pretrain
    assert not HEAVY & of_pretrain


@pytest.mark.slow  # a process that imports torch
def test_customize_imports_no_library_of_evaluation(runs: Runs, tmp_path: Path) -> None:
    arguments = f"{str(runs.moce)!r}, {str(runs.task)!r}, out={str(tmp_path / 'b')!r}, device='cpu'"
    found = modules_after(f"import moce; moce.customize({arguments})")
    assert "moce.customization.bank" in found
    assert not (HEAVY - OF_CARDS) & found


def test_networks_to_be_loaded_draw_no_random_numbers() -> None:
    spec = MAESpec(EncoderSpec("vit_tiny_patch16_224", SMALL), 16, 1, 2)
    made = spec.build()
    before = torch.get_rng_state()
    with Uninitialized():
        loaded = spec.build()
    assert torch.equal(torch.get_rng_state(), before)
    same = [
        torch.equal(one, two) for one, two in zip(made.buffers(), loaded.buffers(), strict=True)
    ]
    assert all(same)
    loaded.load_state_dict(made.state_dict())
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_import_moce_is_light() -> None:
    assert not {"torch", "numpy", "pydantic", "timm"} & modules_after("import moce")


def test_help_is_light() -> None:
    found = modules_after("import moce.cli; moce.cli.build_parser().format_help()")
    assert not {"torch", "numpy", "timm", "PIL", "rich"} & found


@pytest.mark.slow  # a process that imports torch
def test_timm_is_whole_after_a_light_import() -> None:
    """What timm's import left out comes with its first use, from the real modules."""
    code = """
from moce.runtime.light_imports import StandIn, defer_imports
defer_imports()
import sys, timm, torch
assert not any(isinstance(module, StandIn) for module in sys.modules.values())
assert "torch._dynamo" not in sys.modules and "torchvision.models" not in sys.modules
from timm.layers import create_feature_extractor
net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
features = create_feature_extractor(net, ["blocks.0"])(torch.zeros(1, 3, 16, 16))
assert features["blocks.0"].shape == (1, 5, 16)
import torchvision
assert torchvision.models.resnet18(num_classes=2).fc.out_features == 2
from torchvision.ops import roi_align
assert roi_align(torch.ones(1, 1, 4, 4), [torch.tensor([[0.0, 0, 2, 2]])], 1).item() == 1
import torch.compiler, torch._dynamo
assert torch.compiler.disable.__module__ == "torch.compiler"
from timm.models._hub import hf_hub_download, has_hf_hub
assert has_hf_hub() and hf_hub_download.func.__name__
"""
    assert "torch._dynamo" in modules_after(code + "pass")
