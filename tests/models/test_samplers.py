"""Samplers and guidance against golden values and closed forms for Gaussian latents."""

from __future__ import annotations

import itertools
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_recipe import draw, golden
from torch import Tensor
from toy_denoisers import gaussian_eps, toy_eps, toy_eps_and_variance

from models.process import IDDPM, build_process
from models.recipe import PROCESSES, SAMPLERS, ProcessConfig, SamplerConfig
from models.samplers import ddim_step, guided, run_sampler, solver_orders

DIT, UVIT = golden("dit_sampling"), golden("uvit_sampling")
PAIRS = [(sampler, process) for sampler, processes in SAMPLERS.items() for process in processes]
EXACT = {"ddpm", "ddim", "dpm_solver", "dpm_solver_pp"}  # exact for a single point, at any number of steps


class Recorded:
    """A denoiser that keeps what it was called with, and a step noise that counts its draws."""

    def __init__(self, denoiser, tag: str = "", shape: tuple[int, ...] = (2, 4, 4, 4)) -> None:
        self.denoiser, self.tag, self.shape = denoiser, tag, shape
        self.inputs: list[Tensor] = []
        self.times: list[float] = []
        self.draws = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.inputs.append(x)
        self.times.append(float(t[0]))
        return self.denoiser(x, t)

    def noise(self) -> Tensor:
        self.draws += 1
        return draw(self.tag, self.draws - 1, self.shape)


def scaled_error(actual: Tensor | np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


def toy(process):
    return toy_eps_and_variance if process.learn_sigma else toy_eps


# --- golden runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [250, 50, 10])
@pytest.mark.parametrize("run, name, eta", [("ddpm", "ddpm", 0.0), ("ddim0", "ddim", 0.0), ("ddim1", "ddim", 1.0)])
def test_iddpm_trajectories_equal_the_golden_ones(run, name, eta, steps):
    key = f"{run}.{steps}"
    denoiser = Recorded(toy_eps_and_variance, tag=key)
    config = SamplerConfig(name, steps, eta=eta)
    latents = run_sampler(config, IDDPM(ProcessConfig()), denoiser, torch.from_numpy(DIT[f"{key}.xT"]), denoiser.noise)
    after = [*denoiser.inputs[1:], latents]  # the result of a step is the input of the next
    kept = torch.stack([after[position] for position in DIT[f"{key}.steps_kept"]])
    assert scaled_error(kept, DIT[f"{key}.trajectory"]) < 1e-5
    assert denoiser.draws == (0 if run == "ddim0" else steps)


def test_clipped_ddpm_equals_the_golden_run():
    denoiser = Recorded(toy_eps_and_variance, tag="ddpm_clip.10")
    config = SamplerConfig("ddpm", 10, clip_denoised=True)
    x_T = torch.from_numpy(DIT["ddpm_clip.10.xT"])
    latents = run_sampler(config, IDDPM(ProcessConfig()), denoiser, x_T, denoiser.noise)
    assert scaled_error(latents, DIT["ddpm_clip.10.final"]) < 1e-5


def test_reverse_ddim_step_equals_the_golden_one():
    process = IDDPM(ProcessConfig()).respaced("10")
    for i, k in enumerate(DIT["ddim_reverse.t"].tolist()):
        x = torch.from_numpy(DIT["ddim_reverse.x"][i : i + 1])
        sample = ddim_step(process, toy_eps_and_variance, x, k, k + 1)
        np.testing.assert_allclose(sample, DIT["ddim_reverse.sample"][i : i + 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize(
    "run, name, process, scale",
    [("dpmpp_discrete", "dpm_solver_pp", "sd_discrete", 1000), ("dpm_linear", "dpm_solver", "vp", 999)],
)
def test_dpm_solver_equals_the_golden_runs(run, name, process, scale, steps):
    key = f"{run}.{steps}"
    denoiser = Recorded(toy_eps)
    x_T = torch.from_numpy(UVIT[f"{key}.xT"])
    latents = run_sampler(
        SamplerConfig(name, steps), build_process(ProcessConfig(name=process)), denoiser, x_T, denoiser.noise
    )
    assert scaled_error(latents, UVIT[f"{key}.x0"]) < 1e-5
    np.testing.assert_allclose(np.array(denoiser.times) / scale, UVIT[f"{key}.model_times"], rtol=2e-6)
    assert denoiser.draws == 0


@pytest.mark.parametrize("run, name, draws", [("em_sde", "euler_maruyama", 19), ("em_ode", "euler_ode", 0)])
def test_euler_equals_the_golden_runs(run, name, draws):
    denoiser = Recorded(toy_eps, tag="em")
    x_T = torch.from_numpy(UVIT["em_sde.20.xT"])
    process = build_process(ProcessConfig(name="vp"))
    latents = run_sampler(SamplerConfig(name, 20), process, denoiser, x_T, denoiser.noise)
    assert scaled_error(latents, UVIT[f"{run}.20.x0"]) < 1e-5
    assert denoiser.draws == draws


def test_every_golden_sampling_array_is_compared():
    """Runs above, and the noising and losses in test_process.py, name all of both files."""
    dit = {
        f"{run}.{steps}.{part}"
        for run, steps, part in itertools.product(
            ("ddpm", "ddim0", "ddim1"), (250, 50, 10), ("xT", "steps_kept", "trajectory")
        )
    }
    dit |= {"ddpm_clip.10.xT", "ddpm_clip.10.final", "ddim_reverse.x", "ddim_reverse.t", "ddim_reverse.sample"}
    uvit = {
        f"{run}.{steps}.{part}"
        for run, steps, part in itertools.product(
            ("dpmpp_discrete", "dpm_linear"), (10, 20, 50), ("xT", "x0", "model_times")
        )
    }
    uvit |= {"em_sde.20.xT", "em_sde.20.x0", "em_ode.20.x0", "loss_x0", "loss_eps"}
    uvit |= {"cont_t", "cont_xt", "cont_loss", "disc_n", "disc_xn", "disc_loss"}
    assert dit == set(DIT)
    assert uvit == set(UVIT)


# --- closed forms ---------------------------------------------------------------------------------------------------


def abar_seen(process, t: Tensor) -> Tensor:
    """abar (B,1,1,1) float64 at the time the network sees, on the schedule that solvers and tables share."""
    time = {"iddpm": (t + 1) / 1000, "vp": t / 999, "sd_discrete": t / 1000}[process.name]
    return torch.exp(2 * process.schedule.log_alpha(time).double())[:, None, None, None]


def optimal(process, mean: float, std: float):
    """The denoiser that is optimal for latents N(mean, std^2) in each element."""
    return lambda x, t: gaussian_eps(x, abar_seen(process, t), mean, std)


def eps_process(name: str):
    """A process whose network predicts eps alone."""
    return IDDPM(ProcessConfig(variance="fixed_large")) if name == "iddpm" else build_process(ProcessConfig(name=name))


def flow(process, x_T: Tensor, mean: float, std: float, end: float) -> Tensor:
    """Where the probability-flow ODE takes x_T: (x - a mean) / sd(x_t) stays as it was at time 1."""
    abar_1, abar = (
        float(torch.exp(2 * process.schedule.log_alpha(torch.tensor(time)).double())) for time in (1.0, end)
    )
    sd_1, sd = (math.sqrt(a * std**2 + 1 - a) for a in (abar_1, abar))
    return math.sqrt(abar) * mean + (x_T - math.sqrt(abar_1) * mean) * sd / sd_1


@pytest.mark.parametrize("sampler, steps, tolerance", [
    ("dpm_solver", 25, 0.01), ("dpm_solver", 100, 2e-4), ("dpm_solver_pp", 25, 0.1), ("dpm_solver_pp", 400, 3e-3),
])  # fmt: skip
@pytest.mark.parametrize("name", PROCESSES)
def test_dpm_solvers_converge_to_the_probability_flow_of_a_gaussian(sampler, steps, tolerance, name):
    """In standard deviations of the latents. A grid even in time wastes evaluations on noise: ++ needs more of them."""
    process = eps_process(name)
    x_T = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    latents = run_sampler(SamplerConfig(sampler, steps), process, optimal(process, 1.0, 0.5), x_T, None)
    expected = flow(process, x_T, mean=1.0, std=0.5, end=process.schedule.end)
    assert (latents - expected).abs().max() / 0.5 < tolerance


def test_ddim_of_a_gaussian_is_the_product_of_its_steps():
    """A DDIM step maps x - a mean to (a' a std^2 + s' s) / (a^2 std^2 + s^2) of itself; on 25 steps, in float64."""
    process = eps_process("iddpm")
    x_T = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    latents = run_sampler(
        SamplerConfig("ddim", 25), process, optimal(process, 1.0, 0.5), x_T, lambda: torch.zeros_like(x_T)
    )
    abar = [1.0, *process.respaced("25").abar.tolist()]
    gain = math.prod(
        (math.sqrt(to * at) * 0.25 + math.sqrt((1 - to) * (1 - at))) / (at * 0.25 + 1 - at)
        for to, at in itertools.pairwise(abar)
    )
    torch.testing.assert_close(latents, 1 + gain * (x_T - math.sqrt(abar[-1])), rtol=0, atol=2e-4)


def test_ddim_with_1000_steps_follows_the_probability_flow():
    process = eps_process("iddpm")
    x_T = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    latents = run_sampler(SamplerConfig("ddim", 1000), process, optimal(process, 1.0, 0.5), x_T, lambda: 0.0)
    expected = flow(process, x_T, mean=1.0, std=0.5, end=1e-3)
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.01)


def gains(sampler: SamplerConfig, process, denoiser) -> Tensor:
    """Derivative of the final sample by x_T and by each step's noise, for a linear denoiser -> (1 + steps,).

    Batch element 0 starts at 1 without noise; element j starts at 0 and meets noise 1 in draw j alone.
    """
    count, drawn = sampler.steps + 1, itertools.count(1)
    x_T = torch.zeros(count, 1, 1, 1)
    x_T[0] = 1

    def noise() -> Tensor:
        out = torch.zeros(count, 1, 1, 1)
        out[next(drawn)] = 1
        return out

    return run_sampler(sampler, process, denoiser, x_T, noise).flatten().double()


@pytest.mark.parametrize("sampler", [SamplerConfig("ddpm", 20), SamplerConfig("ddim", 20, eta=1.0)])
def test_ancestral_sampling_of_a_standard_normal_has_its_variance(sampler):
    """For N(0, 1) latents the true reverse step has variance beta, as DDPM has here: variance 1 until the last,
    noiseless step, which leaves abar of the first kept timestep. DDIM with eta 1 has the posterior variance instead.
    """
    process = eps_process("iddpm")
    abar = [1.0, *process.respaced("20").abar.tolist()]
    variance = float(gains(sampler, process, optimal(process, 0.0, 1.0)).square().sum())
    if sampler.name == "ddpm":
        assert variance == pytest.approx(abar[1], abs=1e-4)
        return
    expected = 1.0
    for to, at in reversed(list(itertools.pairwise(abar))):
        sigma2 = (1 - to) / (1 - at) * (1 - at / to)
        expected = (math.sqrt(to * at) + math.sqrt((1 - to - sigma2) * (1 - at))) ** 2 * expected + sigma2
    assert variance == pytest.approx(expected, abs=1e-4)


def test_euler_maruyama_of_a_standard_normal_gains_a_quarter_of_its_squared_steps():
    """x -> (1 - b/2) x + sqrt(b) z with b = beta(t) dt: the variance v becomes (1 - b/2)^2 v + b."""
    process = eps_process("vp")
    times = np.concatenate([np.linspace(1, 1e-3, 50), [0.0]])
    steps = (0.1 + 19.9 * times[:-1]) * -np.diff(times)
    expected = 1.0
    for k, b in enumerate(steps):
        expected = (1 - b / 2) ** 2 * expected + b * (k < 49)
    variance = gains(SamplerConfig("euler_maruyama", 50), process, optimal(process, 0.0, 1.0)).square().sum()
    assert float(variance) == pytest.approx(expected, abs=1e-4)


def test_the_probability_flow_leaves_a_standard_normal_where_it_is():
    process = eps_process("vp")
    x_T = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    latents = run_sampler(SamplerConfig("euler_ode", 20), process, optimal(process, 0.0, 1.0), x_T, None)
    torch.testing.assert_close(latents, x_T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("sampler, name", [pair for pair in PAIRS if pair[0] in EXACT])
def test_a_single_point_is_reached_in_any_number_of_steps(sampler, name, steps):
    """With std 0 the noise is known exactly; the discrete samplers end on the point, the solvers at its noised x."""
    process = eps_process(name)
    x_T = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    latents = run_sampler(
        SamplerConfig(sampler, steps), process, optimal(process, 0.5, 0.0), x_T, lambda: torch.zeros_like(x_T)
    )
    expected = torch.full_like(x_T, 0.5)
    if sampler.startswith("dpm_solver"):
        expected = flow(process, x_T, mean=0.5, std=0.0, end=process.schedule.end)
    torch.testing.assert_close(latents, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver", "dpm_solver_pp"])
def test_predicting_x0_or_eps_is_the_same_sampler(sampler):
    process = eps_process("iddpm")
    x0_process = IDDPM(ProcessConfig(variance="fixed_large", prediction="x0"))
    eps = optimal(process, 1.0, 0.5)

    def latents(x: Tensor, t: Tensor) -> Tensor:
        abar = abar_seen(process, t)
        return ((x - (1 - abar).sqrt() * eps(x, t)) / abar.sqrt()).float()

    x_T = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    ours, theirs = (
        run_sampler(SamplerConfig(sampler, 20), p, denoiser, x_T, lambda: torch.zeros_like(x_T))
        for p, denoiser in ((process, eps), (x0_process, latents))
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_encoding_with_ddim_is_undone_by_ddim():
    process = eps_process("iddpm").respaced("100")
    x = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    noised = ddim_step(process, toy_eps, x, 40, 41)
    assert (noised - x).abs().max() > 0.03
    torch.testing.assert_close(ddim_step(process, toy_eps, noised, 41, 40), x, rtol=0, atol=3e-3)


def test_clipped_ddim_takes_its_noise_from_the_clipped_latents():
    process = eps_process("iddpm").respaced("10")
    x = torch.linspace(-4, 4, 16).reshape(1, 1, 4, 4)
    at, to = float(process.abar[6]), float(process.abar[5])
    eps = toy_eps(x, process.coefficients(torch.tensor([6])).network_time.flatten())
    unclipped = (x - math.sqrt(1 - at) * eps) / math.sqrt(at)
    assert unclipped.abs().max() > 1
    latents = unclipped.clamp(-1, 1)
    expected = math.sqrt(to) * latents + math.sqrt((1 - to) / (1 - at)) * (x - math.sqrt(at) * latents)
    torch.testing.assert_close(ddim_step(process, toy_eps, x, 6, 5, clip_denoised=True), expected, rtol=1e-5, atol=1e-5)


# --- any sampler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, name", PAIRS)
def test_a_sample_does_not_depend_on_its_batch(sampler, name):
    process = build_process(ProcessConfig(name=name))
    x_T = draw("batch", 0, (3, 4, 4, 4))
    config = SamplerConfig(sampler, 7)

    def noise_of(rows: slice):
        drawn = itertools.count(1)
        return lambda: draw("batch", next(drawn), (3, 4, 4, 4))[rows]

    together = run_sampler(config, process, toy(process), x_T, noise_of(slice(None)))
    alone = [run_sampler(config, process, toy(process), x_T[i : i + 1], noise_of(slice(i, i + 1))) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler, name", PAIRS)
def test_the_backbone_is_evaluated_once_per_step_without_gradients(sampler, name):
    process = build_process(ProcessConfig(name=name))
    weight = torch.ones((), requires_grad=True)
    for steps in (1, 2, 3, 4, 5, 20):
        denoiser = Recorded(lambda x, t: weight * toy(process)(x, t), tag="any")
        x_T = draw("any.start", 0, denoiser.shape)
        latents = run_sampler(SamplerConfig(sampler, steps), process, denoiser, x_T, denoiser.noise)
        assert len(denoiser.times) == steps
        assert denoiser.times == sorted(denoiser.times, reverse=True)
        assert latents.isfinite().all()
        assert not latents.requires_grad


@pytest.mark.parametrize("sampler, name", PAIRS)
def test_a_sampler_stays_on_the_device_of_its_noise(sampler, name):
    """The meta device refuses to mix with tensors of the CPU as a GPU does."""
    process = build_process(ProcessConfig(name=name))
    x_T = torch.zeros(2, 4, 4, 4, device="meta")
    latents = run_sampler(SamplerConfig(sampler, 7), process, toy(process), x_T, lambda: torch.zeros_like(x_T))
    assert latents.device.type == "meta"


@pytest.mark.parametrize("sampler", ["dpm_solver", "dpm_solver_pp"])
def test_solvers_show_an_iddpm_backbone_times_it_was_trained_on(sampler):
    denoiser = Recorded(toy_eps_and_variance)
    x_T = draw("any.start", 0, denoiser.shape)
    run_sampler(SamplerConfig(sampler, 20), IDDPM(ProcessConfig()), denoiser, x_T, denoiser.noise)
    assert denoiser.times[0] == pytest.approx(999, abs=1e-3)
    assert all(-1e-3 < time < 999.001 for time in denoiser.times)


@pytest.mark.parametrize(
    "steps, orders",
    [(1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1]), (5, [3, 2]), (6, [3, 2, 1]), (50, [3] * 16 + [2])],
)
def test_solver_orders_add_up_to_the_evaluations(steps, orders):
    assert solver_orders(steps) == orders


@pytest.mark.parametrize(
    "sampler, name", [pair for pair in itertools.product(SAMPLERS, PROCESSES) if pair not in PAIRS]
)
def test_a_sampler_that_cannot_serve_a_process_is_refused(sampler, name):
    x_T = torch.zeros(1, 4, 2, 2)
    with pytest.raises(
        ValueError, match=rf"'{sampler}' cannot serve the process '{name}'\. Choose one of .*dpm_solver"
    ):
        run_sampler(SamplerConfig(sampler, 5), build_process(ProcessConfig(name=name)), toy_eps, x_T, lambda: x_T)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "ddpm", "eta": 0.5}, "sampler.eta is 0.5, but ddpm ignores it; use ddim"),
        ({"name": "dpm_solver", "spacing": "ddim"}, "sampler.spacing is ddim, but dpm_solver ignores it"),
        ({"name": "euler_ode", "clip_denoised": True}, "sampler.clip_denoised is True, but euler_ode ignores it"),
        ({"name": "ddim", "eta": 1.5}, r"sampler.eta is 1.5; it must lie in \[0, 1\]"),
        ({"name": "heun"}, "sampler.name 'heun' is not known. Choose one of ddpm, ddim"),
    ],
)
def test_a_setting_that_its_sampler_ignores_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**settings)


def test_ddim_spacing_takes_a_constant_stride():
    denoiser = Recorded(toy_eps_and_variance)
    x_T = draw("any.start", 0, denoiser.shape)
    config = SamplerConfig("ddim", 25, spacing="ddim")
    run_sampler(config, IDDPM(ProcessConfig()), denoiser, x_T, denoiser.noise)
    assert denoiser.times == list(range(960, -1, -40))


# --- guidance -------------------------------------------------------------------------------------------------------


class LabelledBackbone:
    """eps = x + label / 10, variance = x - label / 10; remembers the labels of each call."""

    def __init__(self, channels: int = 4, num_classes: int = 7, null_label: bool = True, learn_sigma: bool = True):
        self.spec = SimpleNamespace(in_channels=channels, num_classes=num_classes, null_label=null_label)
        self.learn_sigma = learn_sigma
        self.calls: list[list[int] | None] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.calls.append(None if y is None else y.tolist())
        shift = (
            torch.zeros(len(x), 1, 1, 1) if y is None else y[:, None, None, None] / 10 * (1 + t[:, None, None, None])
        )
        return torch.cat([x + shift, x - shift], dim=1) if self.learn_sigma else x + shift


X, T, LABELS = torch.linspace(-1, 1, 32).reshape(2, 4, 2, 2), torch.tensor([0.5, 3.0]), torch.tensor([2, 5])


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("cfg_channels, guided_channels", [("3", 3), ("all", 4)])
def test_guidance_extrapolates_the_chosen_eps_channels_in_one_forward(cfg_channels, guided_channels, learn_sigma):
    backbone = LabelledBackbone(learn_sigma=learn_sigma)
    out = guided(backbone, LABELS, cfg_scale=2.5, cfg_channels=cfg_channels)(X, T)
    assert backbone.calls == [[2, 5, 7, 7]]  # the null label is num_classes
    conditional, null = backbone(X, T, LABELS), backbone(X, T, torch.tensor([7, 7]))
    expected = conditional.clone()
    eps_c, eps_u = conditional[:, :guided_channels], null[:, :guided_channels]
    expected[:, :guided_channels] = eps_u + 2.5 * (eps_c - eps_u)
    torch.testing.assert_close(out, expected)


def test_guidance_on_one_channel_leaves_the_variance_channel_alone():
    backbone = LabelledBackbone(channels=1)
    x = X[:, :1]
    out = guided(backbone, LABELS, cfg_scale=2.5, cfg_channels="3")(x, T)
    torch.testing.assert_close(out[:, 1:], backbone(x, T, LABELS)[:, 1:])


def test_uvit_counts_its_scale_from_zero():
    """U-ViT writes eps_c + s (eps_c - eps_u); that is cfg_scale 1 + s."""
    backbone = LabelledBackbone(learn_sigma=False)
    out = guided(backbone, LABELS, cfg_scale=1.4, cfg_channels="all")(X, T)
    conditional, null = backbone(X, T, LABELS), backbone(X, T, torch.tensor([7, 7]))
    torch.testing.assert_close(out, conditional + 0.4 * (conditional - null))


@pytest.mark.parametrize("cfg_scale, labels", [(1.0, LABELS), (1.5, None), (1.0, None)])
def test_without_guidance_there_is_one_plain_forward(cfg_scale, labels):
    backbone = LabelledBackbone()
    out = guided(backbone, labels, cfg_scale=cfg_scale, cfg_channels="3")(X, T)
    assert backbone.calls == [None if labels is None else [2, 5]]
    torch.testing.assert_close(out, backbone(X, T, labels))


@pytest.mark.parametrize("backbone", [LabelledBackbone(null_label=False), LabelledBackbone(num_classes=0)])
def test_guidance_needs_a_null_label(backbone):
    with pytest.raises(ValueError, match=r"cfg_scale 1.5 needs a backbone with a null label.*label_dropout"):
        guided(backbone, LABELS, cfg_scale=1.5, cfg_channels="all")


def test_guidance_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"cfg_scale is -0.4; it must be at least 0\. 1 is unguided"):
        guided(LabelledBackbone(), LABELS, cfg_scale=-0.4, cfg_channels="all")
    with pytest.raises(ValueError, match="cfg_channels '2' is not known"):
        guided(LabelledBackbone(), LABELS, cfg_scale=1.5, cfg_channels="2")


def test_a_scale_below_one_warns_that_one_is_unguided():
    with pytest.warns(UserWarning, match="1 = unguided here"):
        guided(LabelledBackbone(), LABELS, cfg_scale=0.4, cfg_channels="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided(LabelledBackbone(), LABELS, cfg_scale=1.4, cfg_channels="all")
