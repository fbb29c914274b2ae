"""The shared training step and sampling: what they draw depends on (seed, position) and (seed, index) alone."""

from __future__ import annotations

import contextlib
from dataclasses import fields

import pytest
import torch

from bench.registry import architecture, names
from datamodules.base import Batch
from models.base import BackboneSpec
from models.layers import Block
from models.recipe import OptimizerConfig, Recipe, SamplerConfig

SPEC = BackboneSpec(in_channels=4, latent_size=4, num_classes=5, learn_sigma=True)


def parameters(name: str, size: str) -> int:
    bundle = architecture(name)
    with torch.device("meta"):
        return sum(p.numel() for p in bundle.backbone(bundle.config(size=size), SPEC).parameters())


def smallest(name: str):
    """The configuration of the smallest named size that fits the latents here, of two blocks where depth is a part."""
    config, fitting = architecture(name).config, {}
    for size in architecture(name).sizes:
        with contextlib.suppress(ValueError):  # its patches are too large
            fitting[size] = parameters(name, size)
    size = min(fitting, key=fitting.__getitem__)
    return config(size=size, **({"depth": 2} if "depth" in {field.name for field in fields(config)} else {}))


NAMES = names("models")  # a new file there is tested by being found


def build(name: str, recipe: Recipe | None = None, spec: BackboneSpec = SPEC, seed: int = 0):
    """A small module with weights that make its output depend on everything (zero-initialised layers are filled)."""
    bundle = architecture(name)
    torch.manual_seed(0)
    module = bundle.module(bundle.backbone(smallest(name), spec), recipe or Recipe(), seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return module.eval()


def batch(positions: list[int], num_classes: int = 5) -> Batch:
    latents = torch.stack([torch.full((4, 4, 4), float(p)) for p in positions])
    return Batch(latents, torch.tensor([p % num_classes for p in positions]), torch.tensor(positions))


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_a_sample_do_not_depend_on_its_batch(name):
    module = build(name)
    whole = module.process.losses(*module.training_inputs(batch([3, 4, 5, 6])))
    halves = [module.process.losses(*module.training_inputs(batch(part))) for part in ([3, 5], [6, 4])]
    for key, value in whole.items():
        apart = torch.stack([halves[0][key][0], halves[1][key][1], halves[0][key][1], halves[1][key][0]])
        torch.testing.assert_close(value, apart, rtol=1e-5, atol=1e-6)


def test_draws_change_with_seed_and_position():
    first, second, other_seed = build("dit"), build("dit"), build("dit", seed=1)
    _, _, t, eps = first.training_inputs(batch([0, 1]))
    _, _, t_again, eps_again = second.training_inputs(batch([0, 1]))
    _, _, _, eps_later = first.training_inputs(batch([2, 3]))
    _, _, _, eps_other = other_seed.training_inputs(batch([0, 1]))
    assert torch.equal(t, t_again) and torch.equal(eps, eps_again)
    for different in (eps_later, eps_other, eps.flip(0)):
        assert not torch.equal(eps, different)


def labels_seen(module, positions: list[int]) -> torch.Tensor:
    """The labels that the backbone is given in training."""
    seen = []
    module.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    denoiser, latents, t, _ = module.training_inputs(batch(positions))
    denoiser(latents, t.float())
    return seen[0]


def test_label_dropout_gives_the_null_label_at_its_rate():
    positions = list(range(2000))
    labels = labels_seen(build("dit", Recipe(label_dropout=0.15)), positions)
    dropped = labels == 5  # num_classes, whatever it is; not ImageNet's 1000
    assert dropped.float().mean().item() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 2000) ** 0.5)
    asked = torch.tensor([p % 5 for p in positions])
    assert torch.equal(labels[~dropped], asked[~dropped])


def test_no_null_row_means_no_dropout():
    spec = BackboneSpec(4, 4, 5, learn_sigma=True, null_label=False)
    labels = labels_seen(build("dit", Recipe(label_dropout=0.0), spec), list(range(200)))
    assert labels.max() == 4


@pytest.mark.parametrize("name", NAMES)
def test_an_unconditional_backbone_trains_and_samples(name):
    module = build(name, spec=BackboneSpec(4, 4, 0, learn_sigma=True))
    losses = module.process.losses(*module.training_inputs(batch([0, 1])))
    losses["loss"].mean().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    latents = module.sample(range(2), None, sampler=SamplerConfig("ddim", 2))
    assert latents.shape == (2, 4, 4, 4) and latents.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler", [SamplerConfig("ddpm", 4), SamplerConfig("dpm_solver_pp", 4)], ids=lambda s: s.name)
def test_a_sample_depends_on_seed_index_and_label_alone(name, sampler):
    module = build(name)
    options = {"sampler": sampler, "cfg_scale": 2.0, "seed": 7}
    alone = module.sample(range(6), torch.arange(6) % 5, **options)
    shuffled = module.sample([4, 0], torch.tensor([4, 0]), **options)
    torch.testing.assert_close(shuffled, alone[[4, 0]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone, module.sample(range(6), torch.arange(6) % 5, **options | {"seed": 8}), atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_recomputed_activations_give_the_same_bits_and_keep_less(name):
    """Bytes that autograd keeps, counted by its hooks; parameters are kept anyway."""
    if not any(isinstance(part, Block) for part in build(name).modules()):
        pytest.skip("recomputing is for backbones of blocks")
    results = []
    for recompute in (False, True):
        module, kept = build(name).train(), {}
        if recompute:
            module.recompute_activations()

        def pack(tensor, kept=kept):
            if not isinstance(tensor, torch.nn.Parameter):
                kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = module.process.losses(*module.training_inputs(batch([3, 4, 5, 6])))["loss"]
        losses.mean().backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        results.append((losses, gradients, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())))
    (losses, gradients, kept), (again, recomputed, less) = results
    assert torch.equal(losses, again)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in gradients.items())
    assert less < 0.6 * kept  # of two blocks; the more blocks, the less is kept


def test_recomputing_needs_blocks():
    module = build("dit")
    module.backbone = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear cannot recompute activations"):
        module.recompute_activations()


def test_ssm_parameters_have_their_own_rate_and_no_decay():
    recipe = Recipe(optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.03, ssm_lr=1e-4))
    groups = build("diffussm", recipe).param_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.03), (1e-4, 0.0)]
    assert len(groups[1]["params"]) == 2 * 5  # log_dt, log_A_real, A_imag, B, C of each layer
    (everything,) = build("uvit", recipe).param_groups()
    assert everything["weight_decay"] == 0.03  # U-ViT decays every parameter


def test_warmup_rises_from_zero_and_then_stays():
    module = build("dit", Recipe(optimizer=OptimizerConfig(lr=1.0, warmup_steps=4)))
    optimizers = module.configure_optimizers()
    rates = []
    for _ in range(6):
        rates.append(optimizers["optimizer"].param_groups[0]["lr"])
        optimizers["optimizer"].step()
        optimizers["lr_scheduler"]["scheduler"].step()
    assert rates == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
