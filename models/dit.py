"""DiT: a transformer on latent patches, conditioned by adaptive layer norm (Peebles and Xie 2023).

Shapes: B batch, C latent channels, H W latent size, P patch, L = HW/P^2 tokens, D width.
State-dict keys and shapes are those of the released DiT weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from timm.layers import GELUTanh, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from models.base import Architecture, BackboneSpec, DiffusionModule
from models.layers import (
    Block,
    LabelEmbedder,
    TimestepEmbedder,
    initialize_embedders,
    modulate,
    side_in_patches,
    sincos_positions,
    unpatchify,
    zero_linears,
)
from models.recipe import (
    OptimizerConfig,
    ProcessConfig,
    Recipe,
    SamplerConfig,
    fill_parts,
    require_positive,
    require_size,
)

# size -> (depth, width, heads, patch_size); DiT Table 1, patches 2, 4, 8. T/2 is ours, for 28 x 28 digits.
SIZES = {
    "S/2": (12, 384, 6, 2),
    "S/4": (12, 384, 6, 4),
    "S/8": (12, 384, 6, 8),
    "B/2": (12, 768, 12, 2),
    "B/4": (12, 768, 12, 4),
    "B/8": (12, 768, 12, 8),
    "L/2": (24, 1024, 16, 2),
    "L/4": (24, 1024, 16, 4),
    "L/8": (24, 1024, 16, 8),
    "XL/2": (28, 1152, 16, 2),
    "XL/4": (28, 1152, 16, 4),
    "XL/8": (28, 1152, 16, 8),
    "T/2": (6, 64, 2, 2),
}


@dataclass(frozen=True)
class DiTConfig:
    """A named size; a part that is set overrides the named one.

    Raises: ValueError on a value that is not known or does not fit.
    """

    size: str = "XL/2"
    depth: int | None = None  # blocks
    width: int | None = None  # a multiple of 4 (sin-cos positions) and of heads
    heads: int | None = None
    patch_size: int | None = None  # latent pixels per side
    mlp_ratio: float = 4.0  # hidden width of a block's MLP / width

    def __post_init__(self) -> None:
        require_size(self.size, SIZES, "DiT")
        fill_parts(self, dict(zip(("depth", "width", "heads", "patch_size"), SIZES[self.size], strict=True)))
        for key in ("depth", "width", "heads", "patch_size", "mlp_ratio"):
            require_positive(getattr(self, key), f"model.{key}")
        _, width, heads, _ = self.parts
        if width % 4 or width % heads:
            raise ValueError(f"model.width is {width}; it must be a multiple of 4 and of model.heads ({heads}).")

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """(depth, width, heads, patch_size), none of them None any more."""
        return cast(tuple[int, int, int, int], (self.depth, self.width, self.heads, self.patch_size))


class DiTBlock(Block):
    """Attention and MLP, each shifted, scaled and gated by the conditioning vector (adaLN-Zero, DiT sec. 3.2)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, L, D), cond (B, D) -> (B, L, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(cond).chunk(6, dim=-1)  # (B, D) each
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens (B, L, D) -> patches (B, L, P*P*C_out), after one last modulated norm."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=-1)  # (B, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The DiT backbone. Raises: ValueError if the latent size does not divide into patches."""

    def __init__(self, config: DiTConfig, spec: BackboneSpec) -> None:
        super().__init__()
        depth, width, heads, patch_size = config.parts
        self.config, self.spec = config, spec
        self.side = side_in_patches(spec.latent_size, patch_size)  # tokens per row and per column
        self.x_embedder = PatchEmbed(spec.latent_size, patch_size, spec.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(spec.label_rows, width) if spec.num_classes else None
        # A frozen parameter, not a buffer: the released weights, and the paper's parameter counts, contain it.
        self.pos_embed = nn.Parameter(sincos_positions(width, self.side, self.side), requires_grad=False)  # (1, L, D)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, config.mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size**2 * spec.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for linears and patches, N(0, 0.02) for the embeddings, zero where adaLN-Zero asks for it."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # the patches are a linear map, C*P*P to D
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        initialize_embedders(self.t_embedder, self.y_embedder)
        adaptive = [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]
        zero_linears([*adaptive, self.final_layer.linear])

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x (B, C, H, W), t (B,) on the scale 0..999, y (B,) or None if unconditional -> (B, C_out, H, W)."""
        cond = self.t_embedder(t)  # (B, D)
        if self.y_embedder is not None:
            cond = cond + self.y_embedder(y)
        h = self.x_embedder(x) + self.pos_embed  # (B, L, D)
        for block in self.blocks:
            h = block(h, cond)
        h = self.final_layer(h, cond)  # (B, L, P*P*C_out)
        return unpatchify(h, self.config.parts[-1], self.side, self.side)


class DiTModule(DiffusionModule):
    """DiT trained and sampled as in its paper."""

    paper_recipe = Recipe(
        # Linear betas 1e-4..0.02 over 1000 steps; noise and a learned variance, as in ADM (DiT sec. 4).
        process=ProcessConfig(name="iddpm", betas="linear", variance="learned_range", loss="mse"),
        optimizer=OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),  # AdamW, constant (sec. 4)
        sampler=SamplerConfig(name="ddpm", steps=250),  # sec. 4, evaluation
        batch_size=256,  # sec. 4
        ema_decay=0.9999,  # sec. 4
        label_dropout=0.1,  # class_dropout_prob of the released code
        cfg_channels="3",  # there too the fourth latent channel goes unguided: FID 2.27 at cfg_scale 1.5 depends on it
    )


ARCHITECTURE = Architecture("DiT", DiTConfig, DiT, DiTModule, SIZES)
