"""The autoencoders: DiT's rounding, the published network's size, a training that repeats bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL

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
    monkeypatch.setattr(module, "CHUNK", 2 * 16**2)  # two images at a time
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
