"""Between images and latents: Stable Diffusion's autoencoders, a small one trained on the spot, or none.

Images are uint8 (B,3,H,W). Latents are float32 (B,C,h,w) with h = H / factor, scaled: latents = (z - shift) * scale,
where z is what the network itself encodes and decodes. Scale and shift belong to the autoencoder and are applied here
(decode) and by the latent cache (training), nowhere else. Everything runs in full float32, inside autocast too, and on
the CPU gives the same bits for any number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.arithmetic import full_float32, one_thread_each
from models.sd_weights import FILES, in_diffusers_shapes, is_ldm, ldm_name, read_weights

SD_NAMES = ("sd-vae-ft-ema", "sd-vae-ft-mse", "sd-vae")  # fine-tuned decoders, and the original; one encoder
TINY = "tiny-digits"
NAMES = (TINY, *SD_NAMES, "identity")

# diffusers' arguments for the kl-f8 autoencoder of Latent Diffusion (Rombach et al. 2022): 83.65 M parameters.
SD_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
}
SD_FACTOR = 8
SD_SCALE = 0.18215  # 1 / std of z: Latent Diffusion, appendix G; DiT and U-ViT use it, without a shift
ENCODER = ("encoder.", "quant_conv.")  # names of the weights that latents depend on

TINY_FACTOR = 4
WEIGHTS, CARD = "autoencoder.safetensors", "autoencoder.json"  # of an autoencoder trained here
CHUNK, CPU_CHUNK = 2**20, 2**16  # pixels per forward: 16 images at 256; 1 on the CPU, whose threads take one each


@dataclass(frozen=True)
class AutoencoderConfig:
    """Which autoencoder, and where its weights lie on this machine."""

    name: str = TINY
    path: str | None = None  # tiny-digits: folder it is kept in; Stable Diffusion: folder or file; identity: None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"Autoencoder {self.name!r} is not known. Choose one of {', '.join(NAMES)}.")


@dataclass(frozen=True)
class TinyConfig:
    """A small kl autoencoder of factor 4 and its training; the defaults suit 5,000 digits of 32x32 and two cores."""

    channels: tuple[int, ...] = (8, 16, 16)  # at the full, half and quarter resolution
    groups: int = 4  # of the group norms
    latent_channels: int = 4
    steps: int = 700
    batch_size: int = 16
    lr: float = 1e-2  # peak; linear warm-up over the first tenth, times a half cosine to 0
    kl_weight: float = 2e-4  # beside the mean squared error, both averaged over elements


class Autoencoder(nn.Module):
    """A frozen autoencoder. `net` is a diffusers AutoencoderKL, or None: pixels as latents in [-1, 1]."""

    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        name: str,
        net: Any,
        factor: int,
        scale: Sequence[float],
        shift: Sequence[float],
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.factor, self.latent_channels = name, factor, len(scale)
        self.scale, self.shift = tuple(scale), tuple(shift)  # one value per channel
        self.card = card or {}  # how it was trained, if it was trained here
        self.net: Any = net.eval().requires_grad_(False) if net is not None else None
        self.register_buffer("_scale", torch.tensor(self.scale)[:, None, None], persistent=False)  # (C,1,1)
        self.register_buffer("_shift", torch.tensor(self.shift)[:, None, None], persistent=False)
        self.sha256 = weights_sha256(net.state_dict() if net is not None else {})

    @cached_property
    def encoder_sha256(self) -> str:
        """Hash of the weights that latents depend on; the published Stable Diffusion decoders share one encoder."""
        weights = self.net.state_dict() if self.net is not None else {}
        return weights_sha256({name: value for name, value in weights.items() if name.startswith(ENCODER)})

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B,3,H,W) -> posterior mean and log variance of z, (B,C,h,w) each; pixels have variance 0."""
        parts = self._in_chunks(self._posterior, images, images.shape[-1])
        mean, logvar = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
        return mean, logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> uint8 (B,3,H,W), rounded as DiT does: clamp(127.5 x + 128, 0, 255), truncated."""
        return torch.cat(self._in_chunks(self._pixels, latents, latents.shape[-1] * self.factor)).contiguous()

    def _in_chunks(self, work: Callable[[Tensor], Any], batch: Tensor, side: int) -> list[Any]:
        """`work` on parts of a batch, as equal as can be: a small rest would have other bits than its neighbours."""
        on_cpu = self._scale.device.type == "cpu"
        chunk = max(1, (CPU_CHUNK if on_cpu else CHUNK) // side**2)
        parts = batch.tensor_split(max(1, -(-len(batch) // chunk)))
        with full_float32():
            return one_thread_each(work, parts) if on_cpu else [work(part) for part in parts]

    @torch.no_grad()
    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = self._scale.device
        x = images.to(device, torch.float32) / 127.5 - 1  # (B,3,H,W) in [-1, 1]
        if self.net is None:
            return x, torch.full_like(x, -math.inf)
        with torch.autocast(device.type, enabled=False):
            posterior = self.net.encode(x).latent_dist  # log variance clamped to [-30, 20]
        return posterior.mean, posterior.logvar

    @torch.no_grad()
    def _pixels(self, latents: Tensor) -> Tensor:
        device = self._scale.device
        z = latents.to(device, torch.float32) / self._scale + self._shift
        if self.net is not None:
            with torch.autocast(device.type, enabled=False):
                z = self.net.decode(z).sample  # (B,3,H,W)
        return (127.5 * z + 128).clamp(0, 255).to(torch.uint8)


def load_autoencoder(
    config: AutoencoderConfig, *, images: Callable[[], Tensor] | None = None, seed: int = 0, progress: bool = True
) -> Autoencoder:
    """The autoencoder `config` names, never from the network.

    `images` gives the uint8 (n,3,H,W) that tiny-digits is trained on if its folder is still empty; it is kept there.

    Raises: ValueError naming the expected files if they are missing, damaged or not those of this autoencoder.
    """
    if config.name == "identity":
        return Autoencoder("identity", None, 1, (1.0,) * 3, (0.0,) * 3)
    if config.path is None:
        raise ValueError(f"Autoencoder {config.name} needs data.autoencoder_path: {_expected(config.name)}.")
    path = Path(config.path)
    if config.name in SD_NAMES:
        try:
            net = _filled(SD_CONFIG, *read_weights(path, SD_SCALE))
        except FileNotFoundError:
            raise ValueError(
                f"Autoencoder {config.name} was not found at {path}. Expected is {_expected(config.name)}."
            ) from None
        return stable_diffusion(config.name, net)
    if images is not None and not (path / CARD).exists():
        save_autoencoder(train_autoencoder(images(), TinyConfig(), seed, progress), path)
    return _load_tiny(path)


def stable_diffusion(name: str, net: Any) -> Autoencoder:
    """`net`, an AutoencoderKL of SD_CONFIG, as the autoencoder `name`; it runs in channels_last, the faster order."""
    channels = SD_CONFIG["latent_channels"]
    scale, shift = (SD_SCALE,) * channels, (0.0,) * channels
    return Autoencoder(name, net.to(memory_format=torch.channels_last), SD_FACTOR, scale, shift)


def train_autoencoder(images: Tensor, config: TinyConfig, seed: int, progress: bool = True) -> Autoencoder:
    """Train a small autoencoder on uint8 images (n,3,H,W), on the CPU; its `card` says how.

    Loss: mean squared error + kl_weight x KL(posterior, standard normal). Scale and shift make posterior samples of the
    images zero-mean with unit variance in each channel. Bit-equal when repeated with the same number of threads; no
    global random state is touched. Progress (terminal only) shows rate and remaining time.
    """
    generator = torch.Generator().manual_seed(seed)
    net = _build(_tiny_arguments(config, images.shape[-1]), seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.99), fused=True)
    warmup = config.steps // 10 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * k / config.steps))
    )
    rows = torch.empty(0, dtype=torch.long)
    for _ in tqdm(range(config.steps), desc="train autoencoder", unit="step", disable=None if progress else True):
        if len(rows) < config.batch_size:  # the next epoch
            rows = torch.cat([rows, torch.randperm(len(images), generator=generator)])
        chosen, rows = rows[: config.batch_size], rows[config.batch_size :]
        x = images[chosen].float() / 127.5 - 1  # (B,3,H,W)
        posterior = net.encode(x).latent_dist
        decoded = net.decode(posterior.sample(generator=generator)).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = (decoded - x).square().mean() + config.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    unit, zero = (1.0,) * config.latent_channels, (0.0,) * config.latent_channels
    neutral = Autoencoder(TINY, net, TINY_FACTOR, unit, zero)  # its latents are z itself
    mean, logvar = neutral.moments(images)  # (n,C,h,w) each
    z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
    error = (neutral.decode(z).float() - images.float()).square().mean().item()
    z = z.double()
    shift, scale = z.mean((0, 2, 3)).tolist(), (1 / z.std((0, 2, 3))).tolist()
    card = {
        "training": asdict(config),
        "seed": seed,
        "images": {"count": len(images), "side": images.shape[-1], "sha256": weights_sha256({"images": images})},
        "psnr_db": 10 * math.log10(255**2 / error),  # of decoded posterior samples of the training images
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "diffusers")},
    }
    return Autoencoder(TINY, net, TINY_FACTOR, scale, shift, card)


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> None:
    """Write weights, then the card with scale, shift and hash; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    card = {key: getattr(autoencoder, key) for key in ("sha256", "scale", "shift")} | autoencoder.card
    weights = safetensors.torch.save(autoencoder.net.state_dict())
    for name, content in ((WEIGHTS, weights), (CARD, json.dumps(card, indent=1).encode())):
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)


def latent_shape(name: str, image_size: int) -> tuple[int, int]:
    """(channels, side) of the latents of square images behind the autoencoder `name`.

    Raises: ValueError if the side in pixels is no multiple of its factor.
    """
    if name == "identity":
        return 3, image_size
    factor = SD_FACTOR if name in SD_NAMES else TINY_FACTOR
    if image_size % factor:
        raise ValueError(f"Autoencoder {name} needs an image side that is a multiple of {factor}, not {image_size}.")
    return SD_CONFIG["latent_channels"] if name in SD_NAMES else TinyConfig().latent_channels, image_size // factor


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Hash of names, shapes, types and bytes, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tiny_arguments(config: TinyConfig, side: int) -> dict[str, Any]:
    """diffusers' arguments for a `TinyConfig`, without the attention in the middle."""
    levels = len(config.channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(config.channels),
        "layers_per_block": 1,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": False,
        "sample_size": side,
    }


def _build(arguments: dict[str, Any], seed: int) -> Any:
    """An untrained AutoencoderKL; its weights are a function of the seed, and the global generator stays as it was."""
    from diffusers import AutoencoderKL  # seconds to import, and only needed here

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoencoderKL(**arguments)


def _filled(arguments: dict[str, Any], weights: dict[str, Tensor], source: Path) -> Any:
    """An AutoencoderKL holding `weights`, under diffusers' names or LDM's.

    Raises: ValueError if names or shapes differ from what it needs.
    """
    with torch.device("meta"):
        net = _build(arguments, seed=0)
    names, convention = {name: name for name in net.state_dict()}, "diffusers"
    if is_ldm(weights):
        names = {ldm_name(name, len(arguments["block_out_channels"])): name for name in names}
        weights, convention = in_diffusers_shapes(weights), "Latent Diffusion"
    needed = {(name, tuple(net.state_dict()[ours].shape)) for name, ours in names.items()}
    given = {(name, tuple(value.shape)) for name, value in weights.items()}
    if needed != given:
        missing, unknown = sorted(needed - given)[:3], sorted(given - needed)[:3]
        raise ValueError(
            f"{source} does not hold this autoencoder: {len(needed - given)} tensors are missing (first {missing}), "
            f"{len(given - needed)} are unknown (first {unknown}). Expected are the weights of an AutoencoderKL as "
            f"{convention} names them."
        )
    net.load_state_dict({names[name]: value.float() for name, value in weights.items()}, assign=True)
    return net


def _expected(name: str) -> str:
    if name == TINY:
        return f"the folder for {WEIGHTS} and {CARD}"
    return f"a folder with {', '.join(FILES[:-1])} or {FILES[-1]}, such a file, or a checkpoint of Stable Diffusion"


def _load_tiny(folder: Path) -> Autoencoder:
    if not ((folder / CARD).exists() and (folder / WEIGHTS).exists()):
        raise ValueError(f"No trained autoencoder at {folder}. Expected is {_expected(TINY)}.")
    try:
        card, weights = json.loads((folder / CARD).read_text()), safetensors.torch.load_file(folder / WEIGHTS)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"The autoencoder at {folder} is damaged ({error}). Remove it to train it anew.") from None
    if card["training"] != json.loads(json.dumps(asdict(TinyConfig()))):
        raise ValueError(f"The autoencoder at {folder} was trained with other settings. Remove it to train it anew.")
    arguments = _tiny_arguments(TinyConfig(), card["images"]["side"])
    net = _filled(arguments, weights, folder / WEIGHTS)
    sha256, scale, shift = (card.pop(key) for key in ("sha256", "scale", "shift"))
    autoencoder = Autoencoder(TINY, net, TINY_FACTOR, scale, shift, card)
    if autoencoder.sha256 != sha256:
        raise ValueError(f"{folder / WEIGHTS} does not match its {CARD}. Remove {folder} to train it anew.")
    return autoencoder
