"""Forward processes against golden values, closed forms and torch.distributions."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from golden_recipe import golden
from torch import Tensor
from toy_denoisers import toy_eps, toy_eps_and_variance

from models.process import IDDPM, VP, SDDiscrete, _decoder_log_likelihood, build_process
from models.recipe import PROCESSES, ProcessConfig
from models.schedules import half_log_snr, kept_timesteps, noise_scale

SCHEDULE, LOSSES = golden("dit_schedule"), golden("dit_losses")
UVIT_SCHEDULE, UVIT = golden("uvit_schedule"), golden("uvit_sampling")
SETTINGS = {
    "learned_range": ProcessConfig(),
    "fixed_small": ProcessConfig(variance="fixed_small"),
    "fixed_large": ProcessConfig(variance="fixed_large"),
    "rescaled_kl": ProcessConfig(loss="rescaled_kl"),
    "rescaled_mse": ProcessConfig(loss="rescaled_mse"),
    "x0_pred": ProcessConfig(prediction="x0"),
    "cosine": ProcessConfig(betas="cosine"),
}


def close(actual: Tensor | np.ndarray, expected: np.ndarray, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=atol)


def named(arrays: dict[str, np.ndarray], *parts: str) -> list[str]:
    """The array names that contain one of `parts`."""
    return [name for name in arrays if any(part in name for part in parts)]


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named(SCHEDULE, "timesteps["))
def test_kept_timesteps_equal_the_golden_ones(name):
    spacing = name.removeprefix("timesteps[").removesuffix("]")
    assert kept_timesteps(1000, spacing) == SCHEDULE[name].tolist()


@pytest.mark.parametrize("name", named(SCHEDULE, "full.", "cosine.", "respaced.", "respaced_ddim."))
def test_iddpm_tables_equal_the_golden_ones(name):
    schedule, table = name.split(".")
    process = IDDPM(
        ProcessConfig(betas="cosine" if schedule == "cosine" else "linear"),
        {"respaced": "50", "respaced_ddim": "ddim25"}.get(schedule, ""),
    )
    ours = {
        "betas": process.betas,
        "alphas_cumprod": process.abar,
        "alphas_cumprod_prev": process.abar_previous,
        "posterior_variance": process.posterior_variance,
        "posterior_log_variance_clipped": process.tables.log_variance_small,
        "posterior_mean_coef1": process.tables.mean_latents,
        "posterior_mean_coef2": process.tables.mean_x,
    }[table]
    assert ours.dtype == torch.float64
    close(ours[: len(SCHEDULE[name])], SCHEDULE[name], rtol=1e-12)


@pytest.mark.parametrize("count", [250, 1000, 4000])
def test_linear_betas_add_up_to_the_same_noise_at_any_count(count):
    assert float(IDDPM(ProcessConfig(num_timesteps=count)).betas.sum()) == pytest.approx(1000 * (1e-4 + 0.02) / 2)


def test_a_spacing_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"No integer stride through 1000 timesteps gives 300 steps\. Use .*even"):
        kept_timesteps(1000, "ddim300")
    with pytest.raises(ValueError, match=r"Cannot take 1001 steps out of 1000 timesteps\. Set sampler.steps to 1 to"):
        kept_timesteps(1000, "1001")


def test_sections_differ_by_one_at_most_and_the_first_are_larger():
    assert kept_timesteps(10, "1,1,1") == [0, 4, 7]  # sections of 4, 3, 3
    assert kept_timesteps(10, "4,3,3") == list(range(10))


def test_sd_betas_equal_the_golden_ones():
    process = SDDiscrete()
    close(process.betas, UVIT_SCHEDULE["sd_betas"], rtol=1e-12)
    close(process.abar, UVIT_SCHEDULE["cum_alphas"], rtol=1e-12)
    close(1 - process.abar, UVIT_SCHEDULE["cum_betas"], rtol=1e-9)


def test_sd_abar_composes_from_s_to_t():
    """q(x_t | x_s) and the posterior variance of x_s follow from abar by Bayes."""
    s, t = int(UVIT_SCHEDULE["skip_s"]), int(UVIT_SCHEDULE["skip_t"])
    abar = SDDiscrete().abar
    skip_alpha = abar[t] / abar[s]
    close(skip_alpha, UVIT_SCHEDULE["skip_alpha"], rtol=1e-12)
    close(1 - skip_alpha, UVIT_SCHEDULE["skip_beta"], rtol=1e-12)
    close((1 - skip_alpha) * (1 - abar[s]) / (1 - abar[t]), UVIT_SCHEDULE["tilde_beta"], rtol=1e-12)


def test_vp_signal_and_noise_equal_the_golden_ones():
    log_abar = 2 * VP().schedule.log_alpha(torch.from_numpy(UVIT_SCHEDULE["vp_t"]))
    close(log_abar.exp(), UVIT_SCHEDULE["vp_cum_alpha"], rtol=1e-6)
    close(1 - log_abar.exp(), UVIT_SCHEDULE["vp_cum_beta"], rtol=1e-6)
    close(1 / torch.expm1(-log_abar), UVIT_SCHEDULE["vp_snr"], rtol=1e-6)


@pytest.mark.parametrize("prefix, process", [("ns", SDDiscrete()), ("lin", VP())])
def test_continuous_schedules_equal_the_golden_ones(prefix, process):
    log_alpha = process.schedule.log_alpha(torch.from_numpy(UVIT_SCHEDULE["ns_t"]))
    close(log_alpha, UVIT_SCHEDULE[f"{prefix}_log_alpha"], rtol=1e-6)
    close(half_log_snr(log_alpha), UVIT_SCHEDULE[f"{prefix}_lambda"], rtol=1e-6)
    inverse = process.schedule.time(torch.from_numpy(UVIT_SCHEDULE[f"{prefix}_lambda"]))
    close(inverse, UVIT_SCHEDULE[f"{prefix}_inv"], rtol=1e-6)
    if prefix == "ns":
        close(noise_scale(log_alpha), UVIT_SCHEDULE["ns_std"], rtol=1e-6)


@pytest.mark.parametrize("process", [IDDPM(ProcessConfig()), IDDPM(ProcessConfig(betas="cosine")), SDDiscrete()])
def test_continuous_time_passes_through_the_discrete_table(process):
    """log_alpha(n / N) is the table's entry of step n, and half-log-SNR maps back to that time."""
    n = torch.arange(1, 1001)
    log_alpha = process.schedule.log_alpha(n / 1000)
    close(log_alpha, 0.5 * process.abar[-1000:].log().numpy(), rtol=1e-4, atol=1e-7)
    inner = slice(99, None)  # below time 0.1 the float32 cancellation of half_log_snr shows
    close(process.schedule.time(half_log_snr(log_alpha))[inner], (n / 1000).numpy()[inner], rtol=1e-4)


# --- noising --------------------------------------------------------------------------------------------------------


def test_q_sample_and_posterior_equal_the_golden_ones():
    process = IDDPM(ProcessConfig())
    latents, t, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "t", "noise"))
    x = process.q_sample(latents, t, eps)
    close(x, LOSSES["q_sample"], rtol=1e-6)
    mean, log_variance = process.posterior(latents, x, t)
    close(mean, LOSSES["q_posterior_mean"], rtol=1e-6, atol=1e-7)
    close(log_variance.expand_as(latents), LOSSES["q_posterior_logvar"], rtol=1e-6)


@pytest.mark.parametrize("process, t, x, loss", [(VP(), *named(UVIT, "cont_")), (SDDiscrete(), *named(UVIT, "disc_"))])
def test_uvit_noising_and_loss_equal_the_golden_ones(process, t, x, loss):
    latents, eps, steps = (torch.from_numpy(UVIT[key]) for key in ("loss_x0", "loss_eps", t))
    close(process.q_sample(latents, steps, eps), UVIT[x], rtol=1e-6)
    close(process.losses(toy_eps, latents, steps, eps)["loss"], UVIT[loss], rtol=1e-5)


@pytest.mark.parametrize("name, first, last", [("iddpm", 0, 999), ("vp", 0.0, 1.0), ("sd_discrete", 1, 1000)])
def test_timesteps_cover_their_range(name, first, last):
    t = build_process(ProcessConfig(name=name)).timesteps(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert t.tolist() == [first, last]
    assert t.dtype == (torch.float32 if name == "vp" else torch.int64)


@pytest.mark.parametrize("name, t, seen", [("iddpm", 640, 640.0), ("vp", 0.25, 249.75), ("sd_discrete", 640, 640.0)])
def test_the_network_sees_time_on_its_own_scale(name, t, seen):
    times = []

    def denoiser(x, time):
        times.append(time)
        return toy_eps_and_variance(x, time)[:, : 8 if name == "iddpm" else 4]

    latents = torch.zeros(2, 4, 2, 2)
    build_process(ProcessConfig(name=name)).losses(denoiser, latents, torch.tensor([t, t]), latents)
    assert times[0].tolist() == [seen, seen]
    assert times[0].dtype == torch.float32


def test_a_respaced_process_shows_the_network_the_original_timestep():
    process = IDDPM(ProcessConfig()).respaced("10")
    assert process.coefficients(torch.arange(10)).network_time.flatten().tolist() == kept_timesteps(1000, "10")


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named(LOSSES, ".loss", ".mse", ".vb"))
def test_training_losses_equal_the_golden_ones(name):
    setting, part = name.split(".")
    process = IDDPM(SETTINGS[setting])
    latents, t, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "t", "noise"))
    losses = process.losses(toy_eps_and_variance if process.learn_sigma else toy_eps, latents, t, eps)
    close(losses[part][: len(LOSSES[name])], LOSSES[name], rtol=1e-5)


@pytest.mark.parametrize("name", named(LOSSES, ".p_"))
def test_predictions_equal_the_golden_ones(name):
    setting, part, clip = name.split(".")
    process = IDDPM(SETTINGS[setting])
    x, t = torch.from_numpy(LOSSES["q_sample"]), torch.from_numpy(LOSSES["t"])
    output = (toy_eps_and_variance if process.learn_sigma else toy_eps)(x, t)
    p = process.predict(output, x, t, clip_denoised=clip == "clip1")
    ours = {"p_mean": p.mean, "p_log_variance": p.log_variance, "p_pred_xstart": p.latents}[part]
    close(ours.expand_as(x), LOSSES[name], rtol=1e-5)


def test_the_variance_bound_trains_the_variance_only():
    process = IDDPM(ProcessConfig())
    output = toy_eps_and_variance(torch.from_numpy(LOSSES["q_sample"]), torch.tensor([0, 1, 500, 999])).requires_grad_()
    latents, t, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "t", "noise"))
    process.losses(lambda x, time: output, latents, t, eps)["vb"].sum().backward()
    assert output.grad[:, :4].abs().max() == 0
    assert output.grad[:, 4:].flatten(1).abs().sum(1).min() > 0


def test_rescaled_kl_trains_the_mean_as_well():
    process = IDDPM(ProcessConfig(loss="rescaled_kl"))
    output = toy_eps_and_variance(torch.from_numpy(LOSSES["q_sample"]), torch.tensor([0, 1, 500, 999])).requires_grad_()
    latents, t, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "t", "noise"))
    process.losses(lambda x, time: output, latents, t, eps)["loss"].sum().backward()
    assert output.grad.flatten(1).abs().sum(1).min() > 0
    assert output.grad[:, :4].flatten(1).abs().sum(1).min() > 0


def test_rescaled_mse_weighs_the_bound_with_its_share_of_1000_steps():
    latents, t, eps = torch.from_numpy(LOSSES["x0"]), torch.tensor([0, 1, 50, 99]), torch.from_numpy(LOSSES["noise"])
    plain, rescaled = (
        IDDPM(ProcessConfig(num_timesteps=100, loss=loss)).losses(toy_eps_and_variance, latents, t, eps)
        for loss in ("mse", "rescaled_mse")
    )
    torch.testing.assert_close(rescaled["vb"], 0.1 * plain["vb"])
    torch.testing.assert_close(rescaled["loss"], plain["mse"] + 0.1 * plain["vb"])


def test_the_bound_is_the_kl_divergence_in_bits():
    process = IDDPM(ProcessConfig())
    latents, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "noise"))
    t = torch.tensor([1, 10, 300, 999])
    x = process.q_sample(latents, t, eps)
    output = toy_eps_and_variance(x, t)
    p, (mean, log_variance) = process.predict(output, x, t), process.posterior(latents, x, t)
    q = torch.distributions.Normal(mean.double(), (0.5 * log_variance.double()).exp())
    kl = torch.distributions.kl_divergence(
        q, torch.distributions.Normal(p.mean.double(), (0.5 * p.log_variance.double()).exp())
    )
    expected = kl.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(process.bound(output, latents, x, t).double(), expected, rtol=2e-3, atol=0)


def test_decoder_probabilities_sum_to_one_and_follow_the_normal_distribution():
    levels = torch.linspace(-1, 1, 256)  # one 8-bit level each
    mean, log_scale = torch.tensor(0.3), torch.tensor(0.1).log()
    probabilities = _decoder_log_likelihood(levels, mean, log_scale).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    normal = torch.distributions.Normal(0.3, 0.1)
    expected = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=2e-4)


def test_only_latents_beyond_0999_take_the_whole_tail():
    """The outermost bins of IDDPM's decoder; one level, 2/255, everywhere else."""
    latents, normal = torch.tensor([-0.9995, -0.9985, -0.991, 0.991, 0.9985, 0.9995]), torch.distributions.Normal(0, 1)
    above, below = normal.cdf(latents + 1 / 255), normal.cdf(latents - 1 / 255)
    tails = [above[:1], (above - below)[1:-1], 1 - below[-1:]]
    probabilities = _decoder_log_likelihood(latents, torch.tensor(0.0), torch.tensor(0.0)).exp()
    torch.testing.assert_close(probabilities, torch.cat(tails), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_sample_has_the_same_loss_in_any_batch(name):
    process = build_process(ProcessConfig(name=name))
    denoiser = toy_eps_and_variance if process.learn_sigma else toy_eps
    latents, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "noise"))
    t = process.timesteps(torch.tensor([0.0, 0.2, 0.7, 0.99], dtype=torch.float64))
    together = process.losses(denoiser, latents, t, eps)["loss"]
    alone = [process.losses(denoiser, latents[i, None], t[i, None], eps[i, None])["loss"] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=0)


def test_losses_are_float32_behind_a_bfloat16_backbone():
    process = IDDPM(ProcessConfig())
    latents, t, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "t", "noise"))
    losses = process.losses(lambda x, time: toy_eps_and_variance(x, time).bfloat16(), latents, t, eps)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    close(losses["mse"], LOSSES["learned_range.mse"], rtol=1e-2)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_trains_after_it_was_used_in_inference_mode(name):
    process = build_process(ProcessConfig(name=name))
    denoiser = toy_eps_and_variance if process.learn_sigma else toy_eps
    latents, eps = (torch.from_numpy(LOSSES[key]) for key in ("x0", "noise"))
    t = process.timesteps(torch.tensor([0.0, 0.2, 0.7, 0.99], dtype=torch.float64))
    with torch.inference_mode():
        before = process.losses(denoiser, latents, t, eps)["loss"]
    weight = torch.ones((), requires_grad=True)
    after = process.losses(lambda x, time: weight * denoiser(x, time), latents, t, eps)["loss"]
    after.sum().backward()
    torch.testing.assert_close(after.detach(), before.clone())
    assert weight.grad.isfinite()


@pytest.mark.parametrize("name", PROCESSES)
def test_losses_stay_on_the_device_of_the_latents(name):
    """The meta device refuses to mix with tensors of the CPU as a GPU does."""
    process = build_process(ProcessConfig(name=name))
    denoiser = toy_eps_and_variance if process.learn_sigma else toy_eps
    latents = torch.zeros(4, 4, 4, 4, device="meta")
    t = process.timesteps(torch.zeros(4, dtype=torch.float64)).to("meta")
    assert process.losses(denoiser, latents, t, latents)["loss"].device.type == "meta"


def test_every_golden_schedule_and_loss_array_is_compared():
    tables = named(SCHEDULE, "timesteps[", "full.", "cosine.", "respaced.", "respaced_ddim.")
    assert set(tables) == set(SCHEDULE)
    inputs = {"x0", "noise", "t", "q_sample", "q_posterior_mean", "q_posterior_logvar"}
    assert inputs | set(named(LOSSES, ".loss", ".mse", ".vb", ".p_")) == set(LOSSES)
    sd = {"sd_betas", "cum_alphas", "cum_betas", "skip_s", "skip_t", "skip_alpha", "skip_beta", "tilde_beta", "ns_std"}
    continuous = {f"{prefix}_{name}" for prefix in ("ns", "lin") for name in ("log_alpha", "lambda", "inv")}
    vp = {"vp_t", "vp_cum_alpha", "vp_cum_beta", "vp_snr", "ns_t"}
    assert sd | continuous | vp == set(UVIT_SCHEDULE)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "sd_discrete"])
@pytest.mark.parametrize(
    "setting", [{"betas": "cosine"}, {"prediction": "x0"}, {"variance": "fixed_small"}, {"loss": "rescaled_kl"}]
)
def test_settings_of_iddpm_are_refused_elsewhere(name, setting):
    config = ProcessConfig(**{**asdict(ProcessConfig(name=name)), **setting})
    with pytest.raises(ValueError, match=f"'{name}' has fixed betas .* or choose iddpm"):
        build_process(config)


def test_linear_betas_of_too_few_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"num_timesteps is 20; with linear betas, .* must be above 20"):
        ProcessConfig(num_timesteps=20)
    for allowed in (
        ProcessConfig(num_timesteps=21),
        ProcessConfig(num_timesteps=20, betas="cosine"),
        ProcessConfig(name="vp", num_timesteps=20),
        ProcessConfig(name="sd_discrete", num_timesteps=20),
    ):
        process = build_process(allowed)
        denoiser = toy_eps_and_variance if process.learn_sigma else toy_eps
        t, ones = process.timesteps(torch.arange(20, dtype=torch.float64) / 20), torch.ones(20, 4, 2, 2)
        assert process.losses(denoiser, ones, t, ones)["loss"].isfinite().all()


@pytest.mark.parametrize("name", PROCESSES)
def test_only_iddpm_with_learned_range_learns_sigma(name):
    assert build_process(ProcessConfig(name=name)).learn_sigma == (name == "iddpm")
    assert not IDDPM(ProcessConfig(variance="fixed_large")).learn_sigma
