"""The autoencoders: DiT's rounding, the published network's size, a training that repeats bit for bit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import nn
from torch.nn.functional import interpolate, pad, silu

from models import autoencoder as module
from models.autoencoder import (
    SD_CONFIG,
    SD_NAMES,
    Autoencoder,
    AutoencoderConfig,
    TinyConfig,
    latent_shape,
    load_autoencoder,
    save_autoencoder,
    train_autoencoder,
)

TINY = TinyConfig(channels=(4, 4, 8), groups=2, steps=3, batch_size=4)
SMALL_SD = SD_CONFIG | {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}


def random_images(count, side=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def trained():
    return train_autoencoder(random_images(12), TINY, seed=3, progress=False)


@pytest.fixture
def quick(monkeypatch):
    """Training as `load_autoencoder` starts it, in three steps of a smaller network."""
    monkeypatch.setattr(module, "TinyConfig", lambda: TINY)


@pytest.fixture
def small_sd(monkeypatch):
    """A network with Stable Diffusion's names and few channels; -> its weights, under its name of today."""
    monkeypatch.setattr(module, "SD_CONFIG", SMALL_SD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(**SMALL_SD).state_dict()


# --- images and latents ---------------------------------------------------------------------------------------------


def test_identity_returns_every_byte_unchanged():
    pixels = load_autoencoder(AutoencoderConfig("identity"))
    images = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    mean, logvar = pixels.moments(images)
    assert (mean.min(), mean.max()) == (-1, 1)
    assert torch.equal(logvar.exp(), torch.zeros_like(mean))  # nothing is drawn around a pixel
    assert torch.equal(pixels.decode(mean), images)


def test_decoding_clamps_and_truncates_as_dit_does():
    pixels = load_autoencoder(AutoencoderConfig("identity"))
    x = torch.tensor([-9.0, -128 / 127.5, -127.01 / 127.5, 0.0, 0.99 / 127.5, 1.0, 9.0]).view(1, 1, 1, 7)
    assert pixels.decode(x.expand(1, 3, 1, 7))[0, 0, 0].tolist() == [0, 0, 0, 128, 128, 255, 255]


def test_moments_and_decode_are_the_library_network_between_the_stated_ranges(trained):
    images = random_images(5)
    posterior = trained.net.encode(images.float() / 127.5 - 1).latent_dist
    mean, logvar = trained.moments(images)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(logvar, posterior.logvar)
    scale, shift = (torch.tensor(values)[:, None, None] for values in (trained.scale, trained.shift))
    wanted = (127.5 * trained.net.decode(mean).sample + 128).clamp(0, 255)
    decoded = trained.decode((mean - shift) * scale).float()
    assert ((wanted - decoded) > -1e-3).all() and ((wanted - decoded) < 1 + 1e-3).all()  # truncated


def test_chunks_do_not_change_the_result(trained, monkeypatch):
    images = random_images(5)
    whole = trained.moments(images)
    monkeypatch.setattr(module, "CPU_CHUNK", 2 * 16**2)  # two images at a time
    for one, other in zip(trained.moments(images), whole, strict=True):
        torch.testing.assert_close(one, other)
    latents = whole[0]
    chunked = trained.decode(latents).int()
    monkeypatch.undo()
    assert (chunked - trained.decode(latents).int()).abs().max() <= 1  # a value on the edge of two bytes may tip


def test_reduced_precision_does_not_reach_the_autoencoder(trained):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = trained.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(trained.decode(latents), plain)
        assert trained.moments(random_images(2))[0].dtype == torch.float32


def test_reduced_precision_of_the_backends_does_not_either(trained):
    """TF32 is what CUDA's convolutions do unless they are told otherwise; on the CPU one sees what would be asked."""
    conv, seen = torch.backends.cudnn.conv, []
    hooks = [
        half.register_forward_pre_hook(lambda *_: seen.append(conv.fp32_precision))
        for half in (trained.net.encoder, trained.net.decoder)
    ]
    before, conv.fp32_precision = conv.fp32_precision, "tf32"
    try:
        trained.decode(trained.moments(random_images(2))[0])
        assert (seen, conv.fp32_precision) == (["ieee", "ieee"], "tf32")
    finally:
        conv.fp32_precision = before
        [hook.remove() for hook in hooks]


def test_threads_do_not_change_a_bit(small_sd, tmp_path):
    safetensors.torch.save_file(small_sd, tmp_path / "x.safetensors")
    coder = load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "x.safetensors")))
    images = random_images(20, side=64)  # more than one chunk of them
    latents = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([*coder.moments(images), coder.decode(latents)])
            assert torch.get_num_threads() == threads
            with ThreadPoolExecutor(1) as later:  # a new thread begins with as many, too
                assert later.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    assert not any(result.requires_grad for result in results[0])


# --- training -------------------------------------------------------------------------------------------------------


def test_training_repeats_bit_for_bit_and_leaves_global_random_numbers_alone(trained):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = train_autoencoder(random_images(12), TINY, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert (again.sha256, again.scale, again.shift) == (trained.sha256, trained.scale, trained.shift)
    for one, other in zip(again.net.state_dict().values(), trained.net.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert train_autoencoder(random_images(12), TINY, seed=4, progress=False).sha256 != trained.sha256


def test_training_reconstructs_images_it_could_not_before():
    # Two-tone images: the mean grey leaves an error of about 127^2 / 4; a trained network must be far below.
    half = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    half[::2, :, :8], half[1::2, :, :, 8:] = 255, 255
    psnr = [
        train_autoencoder(half, replace(TINY, steps=steps), seed=0, progress=False).card["psnr_db"]
        for steps in (1, 150)
    ]
    assert psnr[0] < 8 and psnr[1] > 16


def test_the_kl_term_draws_the_posterior_to_a_standard_normal():
    """A little at the weight in use, all the way at a large one."""
    divergence = []
    for weight in (0.0, TinyConfig().kl_weight, 10.0):
        config = replace(TINY, steps=50, kl_weight=weight)
        mean, logvar = train_autoencoder(random_images(12), config, seed=3, progress=False).moments(random_images(12))
        posterior, prior = torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
        divergence.append(torch.distributions.kl_divergence(posterior, prior).mean().item())
    assert divergence[1] < 0.8 * divergence[0]
    assert divergence[2] < 1e-3


def test_latents_of_the_training_images_have_unit_variance_in_each_channel(trained):
    images = random_images(12)
    mean, logvar = trained.moments(images)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator) for _ in range(50)])
    scale, shift = (torch.tensor(values)[:, None, None] for values in (trained.scale, trained.shift))
    latents = (draws - shift) * scale  # (50,12,4,4,4); the constants come from one draw of 192 values a channel
    torch.testing.assert_close(latents.mean((0, 1, 3, 4)), torch.zeros(4), atol=4 / 192**0.5, rtol=0)
    torch.testing.assert_close(latents.std((0, 1, 3, 4)), torch.ones(4), atol=4 / (2 * 192) ** 0.5, rtol=0)


def test_the_trained_autoencoder_is_kept_and_read_back(quick, tmp_path):
    config, calls = AutoencoderConfig("tiny-digits", str(tmp_path)), []

    def images():
        calls.append(1)
        return random_images(12)

    first = load_autoencoder(config, images=images, seed=3, progress=False)
    second = load_autoencoder(config, images=images, seed=3, progress=False)
    assert len(calls) == 1
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.decode(latents), second.decode(latents))
    for name in ("name", "factor", "latent_channels", "scale", "shift", "sha256"):
        assert getattr(first, name) == getattr(second, name)
    card = json.loads((tmp_path / "autoencoder.json").read_text())
    assert card["images"]["count"] == 12 and card["seed"] == 3 and card["training"]["steps"] == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["autoencoder.json", "autoencoder.safetensors"]


def test_an_interrupted_training_leaves_nothing(quick, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_autoencoder(AutoencoderConfig(path=str(tmp_path)), images=lambda: random_images(12), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_the_cards_are_refused(quick, trained, tmp_path):
    save_autoencoder(trained, tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "autoencoder.safetensors")
    weights["quant_conv.bias"] += 1
    safetensors.torch.save_file(weights, tmp_path / "autoencoder.safetensors")
    with pytest.raises(ValueError, match=r"does not match its autoencoder\.json.*train it anew"):
        load_autoencoder(AutoencoderConfig(path=str(tmp_path)))


def test_weights_trained_with_other_settings_are_refused(trained, tmp_path):
    save_autoencoder(trained, tmp_path)  # 3 steps, where the program's own settings say more
    with pytest.raises(ValueError, match="trained with other settings"):
        load_autoencoder(AutoencoderConfig(path=str(tmp_path)))


# --- Stable Diffusion -----------------------------------------------------------------------------------------------


def test_the_stable_diffusion_network_has_the_published_size():
    with torch.device("meta"):
        net = AutoencoderKL(**SD_CONFIG)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (net.encoder, net.decoder, net)]
    assert sizes == pytest.approx([34.16, 49.49, 83.65], abs=0.005)


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_stable_diffusion_weights_load_from_this_machine(small_sd, tmp_path, file, given):
    if file.endswith("bin"):
        torch.save(small_sd, tmp_path / file)
    else:
        safetensors.torch.save_file(small_sd, tmp_path / file)
    path = tmp_path if given == "folder" else tmp_path / file
    loaded = load_autoencoder(AutoencoderConfig("sd-vae-ft-ema", str(path)))
    assert (loaded.factor, loaded.scale, loaded.shift) == (8, (0.18215,) * 4, (0.0,) * 4)
    assert loaded.net.state_dict().keys() == small_sd.keys()
    assert all(torch.equal(value, small_sd[key]) for key, value in loaded.net.state_dict().items())
    assert loaded.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)


def test_attention_names_of_the_published_files_are_understood(small_sd, tmp_path):
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    published = {}
    for key, value in small_sd.items():
        for new, old in names.items():
            key = key.replace(new, old)
        published[key] = value
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in published
    for file, weights in (("now.safetensors", small_sd), ("published.safetensors", published)):
        safetensors.torch.save_file(weights, tmp_path / file)
    now, old = (
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / f"{era}.safetensors")))
        for era in ("now", "published")
    )
    assert now.sha256 == old.sha256


def test_foreign_weights_are_refused_with_the_difference(small_sd, tmp_path):
    small_sd["extra"] = small_sd.pop("quant_conv.bias")
    safetensors.torch.save_file(small_sd, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing \(first .*quant_conv\.bias.*1 are unknown .*extra"):
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "x.safetensors")))


@pytest.mark.parametrize("name", SD_NAMES)
def test_missing_weights_are_named(name, tmp_path):
    for path in (None, str(tmp_path)):
        with pytest.raises(ValueError, match=rf"{name} .*diffusion_pytorch_model\.safetensors"):
            load_autoencoder(AutoencoderConfig(name, path))


def test_a_missing_tiny_autoencoder_is_named(tmp_path):
    for path in (None, str(tmp_path)):
        with pytest.raises(ValueError, match=r"autoencoder\.safetensors and autoencoder\.json"):
            load_autoencoder(AutoencoderConfig("tiny-digits", path))


def test_unknown_names_are_refused_with_the_known():
    with pytest.raises(ValueError, match=r"'sd-vae-ft' is not known.*sd-vae-ft-ema.*identity"):
        AutoencoderConfig("sd-vae-ft")


@pytest.mark.parametrize("other", ["decoder.conv_in.bias", "post_quant_conv.bias"])
def test_decoders_of_one_encoder_share_its_hash_and_its_latents(small_sd, other, tmp_path):
    coders = []
    for name, changed in (("sd-vae", None), ("sd-vae-ft-mse", other), ("sd-vae-ft-ema", "quant_conv.bias")):
        weights = {key: value + 1 if key == changed else value for key, value in small_sd.items()}
        safetensors.torch.save_file(weights, tmp_path / f"{name}.safetensors")
        coders.append(load_autoencoder(AutoencoderConfig(name, str(tmp_path / f"{name}.safetensors"))))
    original, decoder, encoder = coders
    assert original.encoder_sha256 == decoder.encoder_sha256 != encoder.encoder_sha256
    assert len({coder.sha256 for coder in coders}) == 3
    latents = [coder.moments(random_images(2))[0] for coder in coders]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


def test_channels_last_stays_inside(small_sd, tmp_path):
    safetensors.torch.save_file(small_sd, tmp_path / "x.safetensors")
    coder = load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "x.safetensors")))
    assert coder.net.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    plain = Autoencoder("plain", AutoencoderKL(**SMALL_SD), 8, coder.scale, coder.shift)
    plain.net.load_state_dict(small_sd)
    for one, other in zip(coder.moments(random_images(3)), plain.moments(random_images(3)), strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other)
    assert coder.decode(torch.zeros(2, 4, 2, 2)).is_contiguous()


def test_weights_beside_a_config_of_another_scale_are_refused(small_sd, tmp_path):
    safetensors.torch.save_file(small_sd, tmp_path / "diffusion_pytorch_model.safetensors")
    for config in ({}, {"scaling_factor": 0.18215}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path)))
    (tmp_path / "config.json").write_text(
        '{"scaling_factor": 0.13025}'
    )  # Stable Diffusion XL's: equal names and shapes
    with pytest.raises(ValueError, match=r"config\.json has scaling_factor 0\.13025, not 0\.18215"):
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path)))


@pytest.mark.parametrize("content", ['{"scaling_fac', "[]", ""])
def test_a_damaged_config_beside_the_weights_is_named(small_sd, content, tmp_path):
    safetensors.torch.save_file(small_sd, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json is damaged"):
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path)))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no tensors"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_damaged_files_are_named(small_sd, suffix, content, tmp_path):
    file = tmp_path / f"x.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.{suffix} cannot be read as plain tensors: .*if it is damaged"):
        load_autoencoder(AutoencoderConfig("sd-vae", str(file)))


@pytest.mark.parametrize("content", [[1], {"state_dict": {"epoch": 3}}, {"callbacks": TinyConfig}])
def test_files_of_other_objects_are_refused_and_nothing_in_them_runs(small_sd, content, tmp_path):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be read as plain tensors"):
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "x.ckpt")))


# --- Latent Diffusion's own network, and its names ------------------------------------------------------------------

WIDTHS = (4, 8, 16, 24)  # all different: a level in the wrong place does not fit


class Residual(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(2, width, eps=1e-6) for width in (before, after))
        self.conv1, self.conv2 = (nn.Conv2d(width, after, 3, padding=1) for width in (before, after))
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x):
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        q, k, v = (project(self.norm(x)).flatten(2) for project in (self.q, self.k, self.v))  # (B,D,HW)
        seen = torch.softmax(q.mT @ k / q.shape[1] ** 0.5, dim=-1)  # (B,HW,HW)
        return x + self.proj_out((v @ seen.mT).view_as(x))


class Level(nn.Module):
    def __init__(self, before, after, blocks, **conv):
        super().__init__()
        self.block = nn.ModuleList([Residual(before if i == 0 else after, after) for i in range(blocks)])
        for name, arguments in conv.items():  # downsample, upsample
            setattr(self, name, nn.ModuleDict({"conv": nn.Conv2d(after, after, 3, **arguments)}))

    def forward(self, x):
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            return self.downsample["conv"](pad(x, (0, 1, 0, 1)))
        return self.upsample["conv"](interpolate(x, scale_factor=2)) if hasattr(self, "upsample") else x


class Half(nn.Module):
    """An encoder or a decoder, from `first` channels at its widest side to `last` at the other."""

    def __init__(self, inputs, outputs, first, last):
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, first, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (Residual(WIDTHS[-1], WIDTHS[-1]) for _ in range(2))
        self.mid.attn_1 = Attention(WIDTHS[-1])
        self.norm_out, self.conv_out = nn.GroupNorm(2, last, eps=1e-6), nn.Conv2d(last, outputs, 3, padding=1)

    def middle(self, h):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))

    def end(self, h):
        return self.conv_out(silu(self.norm_out(h)))


class LatentDiffusion(nn.Module):
    """The kl autoencoder of Rombach et al. 2022 as they built it: levels count from the finest, also on the way up."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Half(3, 8, WIDTHS[0], WIDTHS[-1]), Half(4, 3, WIDTHS[-1], WIDTHS[0])
        down = [{"downsample": {"stride": 2}}] * 3 + [{}]
        up = [{}] + [{"upsample": {"padding": 1}}] * 3
        before, after = (WIDTHS[0], *WIDTHS[:-1]), (*WIDTHS[1:], WIDTHS[-1])
        self.encoder.down = nn.ModuleList(Level(a, b, 2, **d) for a, b, d in zip(before, WIDTHS, down, strict=True))
        self.decoder.up = nn.ModuleList(Level(a, b, 3, **u) for a, b, u in zip(after, WIDTHS, up, strict=True))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def encode(self, x):
        """(B,3,H,W) in [-1, 1] -> mean, log variance (B,4,H/8,W/8) each"""
        h = self.encoder.conv_in(x)
        for level in self.encoder.down:
            h = level(h)
        return self.quant_conv(self.encoder.end(self.encoder.middle(h))).chunk(2, dim=1)

    def decode(self, z):
        h = self.decoder.middle(self.decoder.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.decoder.up):
            h = level(h)
        return self.decoder.end(h)


@pytest.fixture
def ldm(monkeypatch):
    """A small one with seeded weights, no two of them alike."""
    monkeypatch.setattr(module, "SD_CONFIG", SD_CONFIG | {"block_out_channels": WIDTHS, "norm_num_groups": 2})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LatentDiffusion().requires_grad_(False)
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def whole_stable_diffusion(weights):
    """The autoencoder in a checkpoint, beside the networks that it came with."""
    inside = {f"first_stage_model.{name}": value for name, value in weights.items()}
    return inside | {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}


@pytest.mark.parametrize(
    "file", ["autoencoder_kl.pth", "folder/autoencoder_kl.pth", "sd.ckpt", "sd.safetensors", "vae.pt"]
)
def test_latent_diffusions_names_give_the_network_they_came_from(ldm, file, tmp_path):
    weights, path = ldm.state_dict(), tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if file == "sd.safetensors":
        safetensors.torch.save_file(whole_stable_diffusion(weights), path)
    elif file == "sd.ckpt":
        torch.save({"state_dict": whole_stable_diffusion(weights), "global_step": 470_000}, path)
    elif file == "vae.pt":  # as its own training leaves it
        torch.save({"state_dict": weights | {"loss.discriminator.main.0.bias": torch.zeros(64)}}, path)
    else:
        torch.save(weights, path)
    loaded = load_autoencoder(AutoencoderConfig("sd-vae", str(path.parent if "/" in file else path)))

    theirs = convert_ldm_vae_checkpoint(weights, module.SD_CONFIG)
    assert loaded.net.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded.net.state_dict().items())

    images = random_images(2, side=32)
    for one, other in zip(loaded.moments(images), ldm.encode(images.float() / 127.5 - 1), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.net.decode(z).sample, ldm.decode(z), atol=2e-5, rtol=2e-5)


def test_both_conventions_name_one_autoencoder(ldm, tmp_path):
    torch.save(ldm.state_dict(), tmp_path / "ldm.pth")
    one = load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "ldm.pth")))
    weights = {name: value.contiguous() for name, value in one.net.state_dict().items()}
    safetensors.torch.save_file(weights, tmp_path / "diffusers.safetensors")
    other = load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "diffusers.safetensors")))
    assert (one.sha256, one.encoder_sha256) == (other.sha256, other.encoder_sha256)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_missing_and_unknown_names_are_told_as_the_file_has_them(ldm, prefix, tmp_path):
    weights = {prefix + name: value for name, value in ldm.state_dict().items()}
    weights[prefix + "encoder.conv_norm_out.weight"] = weights.pop(prefix + "encoder.norm_out.weight")
    weights[prefix + "decoder.up.3.block.0.conv1.bias"] = torch.zeros(5)
    torch.save(weights, tmp_path / "x.pth")
    message = (
        r"2 tensors are missing \(first .*'decoder\.up\.3\.block\.0\.conv1\.bias', \(24,\).*'encoder\.norm_out\.weight'"
        r".*2 are unknown .*conv1\.bias', \(5,\).*'encoder\.conv_norm_out\.weight'.*as Latent Diffusion names them"
    )
    with pytest.raises(ValueError, match=message):
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "x.pth")))


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_latent_shape_is_what_the_encoders_return(trained, small_sd, tmp_path):
    safetensors.torch.save_file(small_sd, tmp_path / "x.safetensors")
    coders: list[Autoencoder] = [
        trained,
        load_autoencoder(AutoencoderConfig("identity")),
        load_autoencoder(AutoencoderConfig("sd-vae", str(tmp_path / "x.safetensors"))),
    ]
    for coder in coders:
        channels, side = latent_shape(coder.name, 16)
        assert coder.moments(random_images(1))[0].shape == (1, channels, side, side)
        assert (coder.latent_channels, 16 // coder.factor) == (channels, side)


def test_latent_shape_refuses_sides_that_do_not_divide():
    with pytest.raises(ValueError, match="multiple of 8, not 36"):
        latent_shape("sd-vae", 36)
