"""U-ViT: label, timestep and patches are all tokens of one ViT with long skip connections (Bao et al. 2023).

Shapes: B batch, C latent channels, H W latent size, P patch, L = HW/P^2 patch tokens, D width,
E extra tokens (label and timestep, or timestep alone), N = E + L.
State-dict keys and shapes are those of the released U-ViT weights. Text conditioning (MS-COCO) is left out: the sizes
S/2 and S/2-Deep are the trunks of those models, without the text tokens and their linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from models.base import Architecture, BackboneSpec, DiffusionModule
from models.layers import Block, side_in_patches, timestep_features, unpatchify
from models.recipe import (
    OptimizerConfig,
    ProcessConfig,
    Recipe,
    SamplerConfig,
    fill_parts,
    require_positive,
    require_size,
)

# size -> (depth, width, heads, patch_size, conv); U-ViT's released configs. T/2 is ours, for 28 x 28 digits.
SIZES = {
    "S/2": (12, 512, 8, 2, True),
    "S/4": (12, 512, 8, 4, True),
    "S/2-Deep": (16, 512, 8, 2, True),
    "M/4": (16, 768, 12, 4, True),
    "L/2": (20, 1024, 16, 2, True),
    "L/4": (20, 1024, 16, 4, True),
    "H/2": (28, 1152, 16, 2, False),
    "H/4": (28, 1152, 16, 4, False),
    "T/2": (4, 48, 2, 2, True),
}


@dataclass(frozen=True)
class UViTConfig:
    """A named size; a part that is set overrides the named one.

    Raises: ValueError on a value that is not known or does not fit.
    """

    size: str = "L/2"
    depth: int | None = None  # depth // 2 in-blocks, one mid-block, as many out-blocks: 12 means 13 blocks
    width: int | None = None  # a multiple of heads
    heads: int | None = None
    patch_size: int | None = None  # latent pixels per side
    conv: bool | None = None  # 3x3 convolution on the output; every published model but the H sizes
    skip: bool = True  # long skip connections, in-block i to out-block depth // 2 - 1 - i
    mlp_time_embed: bool = False  # two linear layers on the timestep's sinusoid; no published model
    qkv_bias: bool = False
    mlp_ratio: float = 4.0  # hidden width of a block's MLP / width

    def __post_init__(self) -> None:
        require_size(self.size, SIZES, "U-ViT")
        fill_parts(self, dict(zip(("depth", "width", "heads", "patch_size", "conv"), SIZES[self.size], strict=True)))
        for key in ("depth", "width", "heads", "patch_size", "mlp_ratio"):
            require_positive(getattr(self, key), f"model.{key}")
        _, width, heads, _ = self.parts
        if width % heads:
            raise ValueError(f"model.width is {width}; it must be a multiple of model.heads ({heads}).")

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """(depth, width, heads, patch_size), none of them None any more."""
        return cast(tuple[int, int, int, int], (self.depth, self.width, self.heads, self.patch_size))


class UViTBlock(Block):
    """A pre-norm transformer block; an out-block first merges the stream with the skip it is given.

    The released code casts q, k, v to float32 before attention. Here they keep their type: without autocast that is
    float32, and under autocast `scaled_dot_product_attention` would cast them back, so both backbones attend alike.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads=heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))  # exact GELU
        self.skip_linear = nn.Linear(2 * width, width) if skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, D), or (B, N, 2D) = [stream | skip] if built with skip -> (B, N, D)."""
        x = self.skip_linear(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """The U-ViT backbone. Raises: ValueError if the latent size does not divide into patches."""

    def __init__(self, config: UViTConfig, spec: BackboneSpec) -> None:
        super().__init__()
        depth, width, heads, patch_size = config.parts
        self.config, self.spec = config, spec
        self.side = side_in_patches(spec.latent_size, patch_size)  # patches per row and per column
        self.extras = 2 if spec.num_classes else 1
        self.patch_embed = PatchEmbed(spec.latent_size, patch_size, spec.in_channels, width)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if config.mlp_time_embed
            else nn.Identity()
        )
        self.label_emb = nn.Embedding(spec.label_rows, width) if spec.num_classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.side**2, width))  # (1, N, D), learned

        def block(skip: bool = False) -> UViTBlock:
            return UViTBlock(width, heads, config.mlp_ratio, config.qkv_bias, skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(config.skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        channels = spec.out_channels
        self.decoder_pred = nn.Linear(width, patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.conv else nn.Identity()
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Linears and positions N(0, 0.02), biases 0; convolutions and the label table keep torch's defaults."""
        # The released code cuts at the absolute values -2 and 2, a hundred standard deviations: in effect no cut.
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x (B, C, H, W), t (B,) on the scale 0..1000, y (B,) or None if unconditional -> (B, C_out, H, W)."""
        _, width, _, patch_size = self.config.parts
        tokens = [self.time_embed(timestep_features(t, width))[:, None], self.patch_embed(x)]  # (B, 1, D), (B, L, D)
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(y)[:, None])  # (B, 1, D)
        h = torch.cat(tokens, dim=1) + self.pos_embed  # (B, N, D)
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(torch.cat([h, skips.pop()], dim=-1) if self.config.skip else h)  # last in, first out
        h = self.decoder_pred(self.norm(h))[:, self.extras :]  # (B, L, P*P*C_out)
        return self.final_layer(unpatchify(h, patch_size, self.side, self.side))


# L/2 on ImageNet 256 latents: continuous VP-SDE, noise loss, DPM-Solver. Values are those of the released config.
PAPER = Recipe(
    process=ProcessConfig(name="vp"),
    optimizer=OptimizerConfig(lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup_steps=5000),  # decays everything
    sampler=SamplerConfig(name="dpm_solver", steps=50),
    batch_size=1024,
    ema_decay=0.9999,  # of the released training loop
    label_dropout=0.15,  # dataset.p_uncond
    cfg_channels="all",
)
# The H sizes, and MS-COCO's models, use the betas of Stable Diffusion and DPM-Solver++, and a p_uncond of 0.1: their
# released configs (ImageNet 256 and 512 huge, MS-COCO) and the sampler that these are run with.
PAPER_H = replace(
    PAPER,
    process=ProcessConfig(name="sd_discrete"),
    sampler=SamplerConfig(name="dpm_solver_pp", steps=50),
    label_dropout=0.1,
)
EULER_MARUYAMA = SamplerConfig(name="euler_maruyama", steps=1000)

# Sizes whose published recipe is not L/2's, by the released config of the data set named. L/4 is the model of ImageNet
# 512 latents, with L/2's recipe (the L/4 of ImageNet 64x64 pixels takes M/4's); T/2 takes L/2's as well.
RECIPES = {
    "S/2": replace(  # CIFAR-10 pixels, unconditional
        PAPER,
        optimizer=replace(PAPER.optimizer, betas=(0.99, 0.999), warmup_steps=2500),
        sampler=EULER_MARUYAMA,
        batch_size=128,
    ),
    "S/4": replace(PAPER, sampler=EULER_MARUYAMA, batch_size=128),  # CelebA 64x64 pixels, unconditional
    "S/2-Deep": replace(PAPER_H, optimizer=replace(PAPER.optimizer, betas=(0.9, 0.9)), batch_size=256),  # MS-COCO
    "M/4": replace(PAPER, optimizer=replace(PAPER.optimizer, lr=3e-4), label_dropout=0.0),  # ImageNet 64x64, unguided
    "H/2": PAPER_H,
    "H/4": PAPER_H,
}


class UViTModule(DiffusionModule):
    """U-ViT trained and sampled as in its paper, which changes the recipe with the size."""

    paper_recipe = PAPER

    @classmethod
    def recipe_for(cls, config: UViTConfig) -> Recipe:
        """The published recipe of this size, whatever data it is used on."""
        return RECIPES.get(config.size, PAPER)


ARCHITECTURE = Architecture("U-ViT", UViTConfig, UViT, UViTModule, SIZES)
