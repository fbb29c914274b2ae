"""DiffuSSM: gated bidirectional state space layers instead of attention, on unpatched latents (Yan et al. 2024).

No code of the authors is public, and what is printed of a layer leaves several widths open. `READINGS` holds the ways
to read it. R4 is the default: it keeps every printed shape (U is L x D, Y is L x 2D, I' is J x 2D, O is J x D), grows
with M as the printed 2 M D^2 does, and has the printed 673 M parameters (673.1) at XL. Its Gflops, S4D kernel and FFTs
left out, are 276.0 where 280.3 are printed and 1103.6 where 1066.2 are; no reading can meet both, for each costs about
four times as much on four times the positions. R4 has 10 D^2 + 2 M D^2 weights in a layer; 9 D^2 + 2 M D^2 are printed.

Shapes: B batch, C latent channels, H W latent size, P patch, L = HW/P^2 positions in row-major order, M positions in a
group, J = L/M groups, D width, T tokens of the residual stream (J, or L with stream "L").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from models.base import Architecture, BackboneSpec, DiffusionModule
from models.dit import FinalLayer
from models.layers import (
    Block,
    LabelEmbedder,
    TimestepEmbedder,
    initialize_embedders,
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
    require,
    require_positive,
    require_size,
)
from models.s4d import DISCRETIZATIONS, INITS, S4D

# size -> (depth, width, d_state). Printed: depth and width of XL; widths of S and L. Their depth is taken to be XL's,
# d_state is S4D's usual one. T is ours, for 28 x 28 digits.
SIZES = {
    "S": (29, 384, 64),
    "L": (29, 768, 64),
    "XL": (29, 1152, 64),
    "T": (4, 48, 16),
}


class Reading(NamedTuple):
    """The parts of a layer that the paper leaves open."""

    h: int  # width of W0 / D
    bi_merge: str  # the two directions of the SSM: concat (Y is 2D wide) | sum (Y is D wide)
    g: int  # width of the gated product / D
    ssm_out_linear: str  # on Y, after an activation: none | linear | glu (S4D's own output layer)
    cond: str  # key of COND


READINGS = {
    "R4": Reading(2, "concat", 1, "none", "adaln3"),
    "R1": Reading(1, "sum", 2, "none", "adaln3"),  # the printed 9 D^2 + 2 M D^2; 634.6 M
    "R1b": Reading(1, "sum", 2, "none", "adaln4"),
    "R1c": Reading(1, "sum", 2, "none", "adaln6"),
    "R2": Reading(1, "sum", 2, "linear", "adaln3"),  # the printed cost 13 (L/M) D^2 + L D^2
    "R2g": Reading(1, "sum", 2, "glu", "adaln3"),
    "R3": Reading(1, "concat", 2, "none", "adaln3"),
    "R3b": Reading(1, "concat", 2, "none", "adaln2"),
}

# Vectors that a block draws from the conditioning, each for D^2 weights, taken from the front of this list: shift and
# scale of the layer's input, gate of its output (adaLN-Zero), scale of the SSM's input, shift and scale of W1's input.
# Where a fourth to sixth would act is nowhere printed. "none": blocks see nothing, the conditioning joins every token.
COND = {"none": 0, "adaln2": 2, "adaln3": 3, "adaln4": 4, "adaln6": 6}

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}

CHOICES: dict[str, tuple[str, ...]] = {
    "reading": tuple(READINGS),
    "direction": ("bi", "forward"),
    "bi_merge": ("concat", "sum"),
    "mixer": ("s4d", "attention"),
    "ssm_out_linear": ("none", "linear", "glu"),
    "cond": tuple(COND),
    "disc": DISCRETIZATIONS,
    "init": tuple(INITS),
    "activation": tuple(ACTIVATIONS),
    "stream": ("J", "L"),
    "pos_embed": ("sincos", "none"),
}


@dataclass(frozen=True)
class DiffuSSMConfig:
    """A named size and a reading of the layer; a part that is set overrides the named one.

    Raises: ValueError on a value that is not known or does not fit.
    """

    size: str = "XL"
    depth: int | None = None  # blocks
    width: int | None = None
    d_state: int | None = None  # real state size N of each channel and direction
    reading: str = "R4"
    h: int | None = None  # this and the next four: see Reading
    bi_merge: str | None = None
    g: int | None = None
    ssm_out_linear: str | None = None
    cond: str | None = None
    M: int = 2  # positions that share one token outside the SSM (hourglass ratio)
    patch_size: int = 1  # latent pixels per side of a position
    direction: str = "bi"  # bi | forward (Y is D wide)
    mixer: str = "s4d"  # s4d | attention (softmax over all positions, inside the same hourglass)
    gating: bool = True  # off: without W1 and the product
    activation: str = "gelu"  # gelu (exact) | silu | relu
    stream: str = "J"  # tokens of the residual stream: J groups | L positions, averaged into each layer's groups
    pos_embed: str = "sincos"  # sincos (DiT's, frozen, at each group's first position) | none; the paper names none
    skip: bool = False  # long skip connections as in U-ViT; left out by the paper
    disc: str = "zoh"  # zoh | bilinear
    init: str = "lin"  # lin | inv | legs
    dt_min: float = 1e-3  # initial time steps are log-uniform between these
    dt_max: float = 1e-1
    trainable_B: bool = True

    def __post_init__(self) -> None:
        require_size(self.size, SIZES, "DiffuSSM")
        require(self.reading, CHOICES["reading"], "model.reading")
        named = dict(zip(("depth", "width", "d_state"), SIZES[self.size], strict=True))
        fill_parts(self, named | READINGS[self.reading]._asdict())
        for key, allowed in CHOICES.items():
            require(getattr(self, key), allowed, f"model.{key}")
        for key in ("depth", "width", "d_state", "h", "g", "M", "patch_size", "dt_min"):
            require_positive(getattr(self, key), f"model.{key}")
        _, width, d_state = self.parts
        if width % 4 or 2 * width % self.M:
            raise ValueError(f"model.width is {width}; it must be a multiple of 4, and twice it of model.M ({self.M}).")
        if d_state % 2:
            raise ValueError(f"model.d_state is {d_state}; it must be even, for its modes come in conjugate pairs.")
        if self.dt_max < self.dt_min:
            raise ValueError(f"model.dt_max is {self.dt_max}; it must be at least model.dt_min ({self.dt_min}).")
        if self.mixer == "attention" and self.direction != "bi":
            raise ValueError("model.direction 'forward' is for model.mixer s4d; attention sees both sides. Choose bi.")

    @property
    def parts(self) -> tuple[int, int, int]:
        """(depth, width, d_state), none of them None any more."""
        return cast(tuple[int, int, int], (self.depth, self.width, self.d_state))

    @property
    def layer(self) -> Reading:
        """The reading with what overrides it."""
        return Reading._make(getattr(self, part) for part in Reading._fields)


def build_mixer(config: DiffuSSMConfig, out_width: int) -> nn.Module:
    """What mixes the positions, U (B, L, D) -> Y (B, L, out_width)."""
    _, width, d_state = config.parts
    if config.mixer == "attention":
        heads = max(n for n in range(1, max(2, width // 72 + 1)) if width % n == 0)  # 72 per head at XL, as in DiT-XL
        return Attention(width, heads, dim_out=out_width, qkv_bias=True)
    return S4D(
        width,
        d_state,
        direction=config.direction,
        bi_merge=config.layer.bi_merge,
        disc=config.disc,
        init=config.init,
        dt_min=config.dt_min,
        dt_max=config.dt_max,
        trainable_B=config.trainable_B,
    )


class DiffuSSMBlock(Block):
    """Hourglass, SSM and gate (DiffuSSM sec. 4), with sigma the activation, l = jM + k and k = 0..M-1:

    U_l = sigma(Wup_k sigma(W0 I_j)), Y = BiSSM(U), I'_j = concat_k sigma(Wdown_k Y_l),
    O_j = W3 (sigma(W2 I'_j) * sigma(W1 I_j)).
    """

    def __init__(self, config: DiffuSSMConfig) -> None:
        super().__init__()
        (_, width, _), layer = config.parts, config.layer
        self.M, self.stream, self.width = config.M, config.stream, width
        y_width = 2 * width if config.direction == "bi" and layer.bi_merge == "concat" else width
        self.vectors = COND[layer.cond]
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.w0 = nn.Linear(width, layer.h * width)
        self.w_up = nn.Linear(layer.h * width, self.M * width)  # Wup_0 .. Wup_{M-1}, one below the other
        self.mixer = build_mixer(config, y_width)
        self.mixer_out = nn.Sequential()
        if layer.ssm_out_linear != "none":
            glu = layer.ssm_out_linear == "glu"
            self.mixer_out.append(ACTIVATIONS[config.activation]())
            self.mixer_out.append(nn.Linear(y_width, 2 * y_width if glu else y_width))
            if glu:
                self.mixer_out.append(nn.GLU())
        self.w_down = nn.ModuleList(nn.Linear(y_width, 2 * width // self.M) for _ in range(self.M))
        self.w1 = nn.Linear(width, layer.g * width) if config.gating else None
        self.w2 = nn.Linear(2 * width, layer.g * width)
        self.w3 = nn.Linear(layer.g * width, width)
        self.activation = ACTIVATIONS[config.activation]()
        self.adaLN_modulation = (
            nn.Sequential(nn.SiLU(), nn.Linear(width, self.vectors * width)) if self.vectors else None
        )

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (B, T, D), cond (B, D) -> (B, T, D)."""
        act = self.activation
        vectors: list[Any] = [None] * 6
        if self.adaLN_modulation is not None:
            vectors[: self.vectors] = self.adaLN_modulation(cond)[:, None].chunk(self.vectors, dim=-1)
        shift, scale, gate, scale_u, shift_1, scale_1 = vectors  # (B, 1, D) each, or None

        i = affine(self.norm(x), scale, shift)  # (B, T, D)
        if self.stream == "L":
            i = i.unflatten(1, (-1, self.M)).mean(2)  # (B, J, D)
        u = act(self.w_up(act(self.w0(i)))).reshape(len(x), -1, self.width)  # (B, J, M D) -> (B, L, D)
        y = self.mixer_out(self.mixer(affine(u, scale_u)))  # (B, L, 2D), or D wide
        i_prime = torch.cat([act(w(y[:, k :: self.M])) for k, w in enumerate(self.w_down)], dim=-1)  # (B, J, 2D)
        o = act(self.w2(i_prime))  # (B, J, g D)
        if self.w1 is not None:
            o = o * act(self.w1(affine(i, scale_1, shift_1)))
        o = self.w3(o)  # (B, J, D)
        if self.stream == "L":
            o = o[:, :, None].expand(-1, -1, self.M, -1).flatten(1, 2)  # (B, L, D)
        return x + (o if gate is None else gate * o)


class DiffuSSM(nn.Module):
    """The DiffuSSM backbone. Raises: ValueError if the latent size does not divide into patches and groups."""

    def __init__(self, config: DiffuSSMConfig, spec: BackboneSpec) -> None:
        super().__init__()
        (depth, width, _), patch = config.parts, config.patch_size
        self.config, self.spec = config, spec
        self.side = side_in_patches(spec.latent_size, patch)  # positions per row and per column
        if self.side**2 % config.M:
            raise ValueError(
                f"The {self.side} x {self.side} positions of this latent do not divide into groups of {config.M}. "
                f"Choose a model.M that divides {self.side**2}."
            )
        group = config.M if config.stream == "J" else 1  # positions in one token of the stream
        self.tokens = self.side**2 // group
        self.x_embedder = nn.Linear(group * patch**2 * spec.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(spec.label_rows, width) if spec.num_classes else None
        positions = sincos_positions(width, self.side, self.side)[:, ::group] if config.pos_embed == "sincos" else None
        self.register_buffer("pos_embed", positions, persistent=False)  # (1, T, D); a function of the config alone
        self.blocks = nn.ModuleList(DiffuSSMBlock(config) for _ in range(depth))
        self.skips = depth // 2 if config.skip else 0
        self.skip_linears = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(self.skips))
        self.final_layer = FinalLayer(width, group * patch**2 * spec.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DiT's rules: Xavier for linears, N(0, 0.02) for the embeddings, zero for modulations and the output.

        The paper says no more than that the network starts as a vision transformer does. S4D has its own rules.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DiffuSSMBlock):
                for matrix in module.w_up.weight.chunk(module.M):  # M maps, each with its own fan-out
                    nn.init.xavier_uniform_(matrix)
        initialize_embedders(self.t_embedder, self.y_embedder)
        layers = (*self.blocks, self.final_layer)
        adaptive = [layer.adaLN_modulation[1] for layer in layers if layer.adaLN_modulation is not None]
        zero_linears([*adaptive, self.final_layer.linear])

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """x (B, C, H, W), t (B,) on the scale 0..999, y (B,) or None if unconditional -> (B, C_out, H, W)."""
        cond = self.t_embedder(t)  # (B, D)
        if self.y_embedder is not None:
            cond = cond + self.y_embedder(y)
        patches = patchify(x, self.config.patch_size).reshape(len(x), self.tokens, -1)  # (B, T, L/T P*P*C)
        h = self.x_embedder(patches).to(x.dtype)  # (B, T, D); under autocast the stream stays in the latents' type
        if self.pos_embed is not None:
            h = h + self.pos_embed
        if self.config.layer.cond == "none":
            h = h + cond[:, None]
        skips: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            from_end = len(self.blocks) - index
            if from_end <= self.skips:  # the last in, first out
                h = self.skip_linears[from_end - 1](torch.cat([h, skips.pop()], dim=-1))
            h = block(h, cond)
            if index < self.skips:
                skips.append(h)
        h = self.final_layer(h, cond).reshape(len(x), self.side**2, -1)  # (B, L, P*P*C_out)
        return unpatchify(h, self.config.patch_size, self.side, self.side)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """x (B, C, H, W) -> (B, HW/P^2, P*P*C), positions row-major, channel fastest: the inverse of `unpatchify`."""
    p = patch_size
    patches = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/P, P, W/P, P)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None = None) -> Tensor:
    """x (1 + scale) + shift, without what is None."""
    if scale is not None:
        x = x * (1 + scale)
    return x if shift is None else x + shift


class DiffuSSMModule(DiffusionModule):
    """DiffuSSM trained and sampled as in its paper, which keeps DiT's recipe for all its models."""

    paper_recipe = Recipe(
        # Printed: noise and a diagonal covariance are predicted, with DiT's linear betas.
        process=ProcessConfig(name="iddpm", betas="linear", variance="learned_range", loss="mse"),
        optimizer=OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0),  # not printed: DiT's
        sampler=SamplerConfig(name="ddpm", steps=250),  # printed
        batch_size=256,  # printed
        ema_decay=0.9999,  # printed as constant; its value is DiT's
        label_dropout=0.1,  # not printed: DiT's
        cfg_channels="all",  # not printed; DiT's three channels are a trait of its own code
    )


ARCHITECTURE = Architecture("DiffuSSM", DiffuSSMConfig, DiffuSSM, DiffuSSMModule, SIZES)
