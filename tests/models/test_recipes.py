"""The recipes of every architecture and named size against what was printed or released."""

from __future__ import annotations

import pytest

from bench.registry import architecture, names

LEARNED = "iddpm linear learned_range mse"
DIT = ["S/2", "S/4", "S/8", "B/2", "B/4", "B/8", "L/2", "L/4", "L/8", "XL/2", "XL/4", "XL/8", "T/2"]  # T/2 is ours
# sizes, lr, betas, weight decay, warm-up, batch size, EMA decay, label dropout, cfg_channels, sampler, steps, process
PUBLISHED = [
    # DiT sec. 4. Dropout and the three guided channels: models.py of its code.
    ("dit", DIT, 1e-4, (0.9, 0.999), 0.0, 0, 256, 0.9999, 0.1, "3", "ddpm", 250, LEARNED),
    # Process, sampler and batch are printed; the rest is said to be DiT's, but for its code's three channels.
    ("diffussm", ["S", "L", "XL", "T"], 1e-4, (0.9, 0.999), 0.0, 0, 256, 0.9999, 0.1, "all", "ddpm", 250, LEARNED),
    # U-ViT's configs of CIFAR-10, then of CelebA 64: no labels, so that there the dropout is unused.
    ("uvit", ["S/2"], 2e-4, (0.99, 0.999), 0.03, 2500, 128, 0.9999, 0.15, "all", "euler_maruyama", 1000, "vp"),
    ("uvit", ["S/4"], 2e-4, (0.99, 0.99), 0.03, 5000, 128, 0.9999, 0.15, "all", "euler_maruyama", 1000, "vp"),
    # MS-COCO, with its depth of 16.
    ("uvit", ["S/2-Deep"], 2e-4, (0.9, 0.9), 0.03, 5000, 256, 0.9999, 0.1, "all", "dpm_solver_pp", 50, "sd_discrete"),
    # ImageNet 64, mid: 1000 classes, none of them null.
    ("uvit", ["M/4"], 3e-4, (0.99, 0.99), 0.03, 5000, 1024, 0.9999, 0.0, "all", "dpm_solver", 50, "vp"),
    # ImageNet 256 and 512, large. T/2 is ours.
    ("uvit", ["L/2", "L/4", "T/2"], 2e-4, (0.99, 0.99), 0.03, 5000, 1024, 0.9999, 0.15, "all", "dpm_solver", 50, "vp"),
    # ImageNet 256 and 512, huge.
    ("uvit", ["H/2", "H/4"], 2e-4, (0.99, 0.99), 0.03, 5000, 1024, 0.9999, 0.1, "all", "dpm_solver_pp", 50,
     "sd_discrete"),
]  # fmt: skip


@pytest.mark.parametrize("name, sizes, published", [(name, sizes, tuple(rest)) for name, sizes, *rest in PUBLISHED])
def test_a_size_has_the_recipe_it_was_published_with(name, sizes, published):
    _, config, _, module, _ = architecture(name)
    for size in sizes:
        recipe = module.recipe_for(config(size=size))
        optimizer, process = recipe.optimizer, recipe.process
        iddpm = [process.betas, process.variance, process.loss] if process.name == "iddpm" else []
        assert published == (
            optimizer.lr,
            optimizer.betas,
            optimizer.weight_decay,
            optimizer.warmup_steps,
            recipe.batch_size,
            recipe.ema_decay,
            recipe.label_dropout,
            recipe.cfg_channels,
            recipe.sampler.name,
            recipe.sampler.steps,
            " ".join([process.name, *iddpm]),
        ), size
        assert (process.num_timesteps, process.prediction) == (1000, "eps"), size
        assert (optimizer.grad_clip, optimizer.ssm_lr, recipe.ema_warmup) == (None, None, False), size
        assert (recipe.sampler.eta, recipe.sampler.spacing, recipe.sampler.clip_denoised) == (0.0, "even", False), size


def test_every_named_size_is_in_the_table():
    listed = [(name, size) for name, sizes, *_ in PUBLISHED for size in sizes]
    assert sorted(listed) == sorted((name, size) for name in names("models") for size in architecture(name).sizes)
