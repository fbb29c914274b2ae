"""`import`, `export` and `sample --classes`: weights from elsewhere become runs, runs become files for others."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_recipe import weight
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from bench import cli
from bench.evaluate import load_trained
from bench.exchange.imported import printed_row, released
from bench.training.plan import plan_training
from models import autoencoder as autoencoders
from models.base import BackboneSpec
from models.diffussm import DiffuSSM, DiffuSSMConfig
from models.dit import DiT, DiTConfig
from models.noise import START, StepNoise, normal
from models.process import build_process
from models.samplers import guided, run_sampler
from models.uvit import UViT, UViTConfig

# Pixels of 16x16 in two classes, of which no picture is at hand.
DATA = ["--data", "folder", "--resolution", "16", "data.autoencoder=identity", "data.classes=[cat,dog]"]
SPECS = {
    "dit": (DiT, DiTConfig(size="T/2"), True),
    "uvit": (UViT, UViTConfig(size="T/2"), False),
    "diffussm": (DiffuSSM, DiffuSSMConfig(size="T"), True),
}


def state_of(name: str) -> dict[str, torch.Tensor]:
    """Seeded weights of the smallest size of an architecture, on DATA."""
    network, config, learn_sigma = SPECS[name]
    spec = BackboneSpec(in_channels=3, latent_size=16, num_classes=2, learn_sigma=learn_sigma)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = network(config, spec).state_dict()
    filled = {key: weight("import", key, tuple(value.shape)) for key, value in tensors.items() if "mixer" not in key}
    return {key: value if key == "pos_embed" else filled.get(key, value) for key, value in tensors.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files")
    for name in SPECS:
        torch.save(state_of(name), path / f"{name}.pt")
    return path


def bench(*words: object) -> int:
    """Exit code of `python -m bench words...`; 0 if it returns."""
    sys.argv = ["bench", *map(str, words)]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])


def imported(files: Path, runs: Path, name: str, *words: str) -> Path:
    """The run made of the weights of an architecture."""
    size = SPECS[name][1].size
    data = [] if "--data" in words else DATA
    given = ["--model", name, "--size", size, "--steps", 50, *data, *words]
    assert bench("import", files / f"{name}.pt", *given, f"paths.runs={runs}", "trainer.accelerator=cpu") == 0
    (run,) = runs.iterdir()
    return run


def stored(run: Path) -> dict[str, torch.Tensor]:
    (path,) = (run / "checkpoints").iterdir()
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("backbone."): value for name, value in state.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- import ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_in_out_and_in_again_is_bit_equal(files, tmp_path, name):
    run = imported(files, tmp_path / "runs", name)
    assert same(stored(run), state_of(name))
    assert bench("export", run, "--out", tmp_path / "out") == 0
    exported, ours = load_file(tmp_path / "out" / "model.safetensors"), state_of(name)
    assert exported.keys() == ours.keys() and all(torch.equal(exported[key], ours[key]) for key in ours)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # several entries would come in random order
    assert bench("import", tmp_path / "out", f"paths.runs={tmp_path / 'again'}") == 0
    (again,) = (tmp_path / "again").iterdir()
    assert again.name == run.name and same(stored(again), ours)


def test_a_run_says_where_its_weights_come_from_and_what_they_cost(files, tmp_path, capsys):
    run = imported(files, tmp_path, "uvit")
    record = json.loads((run / "run.json").read_text())
    config = load_trained(run)
    assert (record["state"], record["steps"], record["images_seen"]) == ("finished", 50, 50 * 1024)
    assert record["train_gflops"] == pytest.approx(3 * plan_training(config).cost.gflops * 50 * 1024)
    source = record["imported"]
    assert (source["file"], source["form"], source["taken"]) == ("uvit.pt", "state dict", "all of it")
    assert re.fullmatch("[0-9a-f]{64}", source["sha256"]) and source["steps"] == "as --steps says"
    assert (config.use.recipe, config.recipe.process.name) == ("paper", "vp")
    assert "50 steps (as --steps says), 51,200 images seen" in capsys.readouterr().out


@pytest.mark.parametrize("key", released(), ids=lambda key: "-".join(map(str, key)))
def test_released_weights_come_to_the_images_that_papers_print(key):
    row = released()[key]
    batch_size = {"dit": 256, "uvit": 1024}[row["model"]]
    assert int(row["steps"]) * batch_size == float(printed_row(row).values["images_m"]) * 1e6
    assert row["autoencoder"] in autoencoders.SD_NAMES


def test_steps_are_published_or_in_the_name_of_a_checkpoint_or_asked_for(files, tmp_path, capsys):
    state = torch.load(files / "dit.pt", weights_only=True)
    for name, stored in {
        "dit.pt": state,
        "0000400.pt": {"ema": state, "model": state},
        "last.pt": {"ema": state},
    }.items():
        torch.save(stored, tmp_path / name)
    words = ["--model", "dit", "--size", "T/2", *DATA, f"paths.runs={tmp_path / 'runs'}"]
    assert bench("import", tmp_path / "0000400.pt", *words) == 0
    assert "400 steps (by the name of the checkpoint, 0000400)" in capsys.readouterr().out
    for name in ("dit.pt", "last.pt"):
        assert bench("import", tmp_path / name, *words) == 2
        assert "Give --steps, the optimizer steps" in capsys.readouterr().err


def test_the_same_file_is_imported_once_and_another_never_in_its_place(files, tmp_path, capsys):
    run = imported(files, tmp_path / "runs", "dit")
    assert imported(files, tmp_path / "runs", "dit") == run
    assert "imported before" in capsys.readouterr().out
    shutil.rmtree(run / "checkpoints")
    assert imported(files, tmp_path / "runs", "dit") == run and same(stored(run), state_of("dit"))
    other = state_of("dit") | {"final_layer.linear.bias": torch.ones(24)}
    torch.save(other, tmp_path / "dit.pt")
    words = ["--model", "dit", "--size", "T/2", "--steps", 50, *DATA, f"paths.runs={tmp_path / 'runs'}"]
    assert bench("import", tmp_path / "dit.pt", *words) == 2
    assert "is there already, with other weights" in capsys.readouterr().err
    assert same(stored(run), state_of("dit"))


def changed(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Weights that do not fit DATA and T/2, by what is the matter with them."""
    if kind == "missing":
        return {key: value for key, value in state.items() if "blocks.5" not in key} | {"extra": torch.zeros(2)}
    if kind == "flipped":
        return state | {"pos_embed": state["pos_embed"].flip(1)}
    spec = BackboneSpec(in_channels=3, latent_size=16, num_classes=2, learn_sigma=True)
    other = {
        "larger": lambda: DiT(DiTConfig(size="T/2"), BackboneSpec(3, 32, 2, True)),
        "classes": lambda: DiT(DiTConfig(size="T/2"), BackboneSpec(3, 16, 7, True)),
        "no null": lambda: DiT(DiTConfig(size="T/2"), BackboneSpec(3, 16, 2, True, null_label=False)),
        "size": lambda: DiT(DiTConfig(size="S/8"), spec),
        "nothing fits": lambda: DiT(DiTConfig(size="T/2", width=32), spec),
    }
    return other[kind]().state_dict()


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", r"10 missing \(blocks.5.attn.qkv.weight, .* and 6 more\), 1 unexpected \(extra\)"),
        ("flipped", "pos_embed is not the table of DiT, which is a formula; .* trained with other positions"),
        ("larger", "positions for 32x32 latents, that is resolution 32: give --resolution 32"),
        ("classes", "labels for 7 classes and none, folder has 2: give --data"),
        ("no null", "no row for 'no class': give recipe.label_dropout=0"),
        ("size", "It fits --size S/8"),
        ("nothing fits", r"x_embedder.proj.weight is \(32, 3, 2, 2\), not \(64, 3, 2, 2\)"),
    ],
)
def test_weights_that_do_not_fit_are_told_what_would(files, tmp_path, capsys, kind, words):
    torch.save(changed(state_of("dit"), kind), tmp_path / "a.pt")
    given = ["--model", "dit", "--size", "T/2", "--steps", 50, *DATA, f"paths.runs={tmp_path / 'runs'}"]
    assert bench("import", tmp_path / "a.pt", *given) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.startswith("isodiff import: ") and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        (["uvit.pt", "--model", "dit", "--size", "T/2"], "holds weights of U-ViT, not of DiT. Give --model uvit"),
        (["dit.pt", "--model", "diffussm", "--size", "T"], "holds weights of DiT, not of DiffuSSM"),
        (["dit.pt"], "Say what"),
        (["dit.pt", "--model", "dot", "--size", "T/2"], "Did you mean dit?"),
        (["dit.pt", "--model", "dit", "--size", "B/3"], "'B/3' is not a DiT size"),
        (["dit.pt", "--model", "dit", "--size", "T/2", "--resolution", "128"], "There is no data set imagenet128"),
        (["none.pt", "--model", "dit", "--size", "T/2"], "There is no file or folder"),
    ],
)
def test_wrong_claims_are_one_sentence(files, tmp_path, capsys, words, expected):
    assert bench("import", files / words[0], *words[1:], "--steps", 5, f"paths.runs={tmp_path / 'runs'}") == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_imported_weights_are_not_trained(files, tmp_path, capsys):
    run = imported(files, tmp_path, "dit")
    before = (run / "run.json").read_bytes()
    assert bench("train", run / "config.yaml") == 0
    assert "weights imported from dit.pt, without optimizer: nothing to train" in capsys.readouterr().out
    assert (run / "run.json").read_bytes() == before


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_checkpoint_is_looked_for_before_anything_is_made_for_it(files, tmp_path, capsys, command):
    """Here the pictures that cache and reference are made from are missing, too; of both the step is named."""
    run = imported(files, tmp_path / "runs", "dit")
    (run / "run.json").write_text("{}")  # a run that was trained here and whose cache is gone
    assert bench(command, run) == 2
    assert "needs data.root" in capsys.readouterr().err
    assert bench(command, run, "--step", 999) == 2
    assert "no checkpoint of step 999; it has step-00000050.ckpt" in capsys.readouterr().err


def test_checkpoints_of_all_runs_are_looked_for_before_the_first_is_scored(files, tmp_path, capsys):
    """The first run's pictures are missing, too, so scoring it would end in that sentence."""
    first, second = imported(files, tmp_path / "runs", "dit"), imported(files, tmp_path / "others", "uvit")
    (first / "run.json").write_text("{}")
    (second / "checkpoints" / "step-00000050.ckpt").unlink()
    assert bench("evaluate", first, second) == 2
    assert f"{second} has no checkpoint of step 50" in capsys.readouterr().err


def test_an_imported_run_is_scored_without_its_data(files, tmp_path, capsys):
    run = imported(files, tmp_path / "runs", "uvit")
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images)
    settings = ["eval.extractor=effnet-lite0", "eval.metrics=[fid]", "eval.num_samples=8"]
    words = [*settings, "eval.sampler={name: dpm_solver, steps: 2}", f"paths.cache={tmp_path / 'cache'}"]
    assert bench("evaluate", run, "--reference", tmp_path / "real.npz", *words) == 0
    row = json.loads((tmp_path / "runs" / "results.jsonl").read_text())
    assert (row["weights"], row["steps"], row["images_seen"], row["recipe"]) == ("ema", 50, 51200, "paper")
    assert np.isfinite(row["scores"]["fd8[effnet-lite0]"])
    assert bench("evaluate", run, *words) == 2  # the reference would be the pictures, which are not here
    assert "needs data.root" in capsys.readouterr().err


# --- export ---------------------------------------------------------------------------------------------------------


def test_an_export_is_new_whole_and_without_paths_of_this_machine(files, tmp_path, capsys):
    run = imported(files, tmp_path / "runs", "dit", f"data.root={tmp_path}")
    assert bench("export", run, "--out", tmp_path / "out") == 0
    assert str(tmp_path) not in (tmp_path / "out" / "config.yaml").read_text()
    assert bench("export", run, "--out", tmp_path / "out") == 2
    assert "is there already" in capsys.readouterr().err
    assert bench("export", run, "--out", tmp_path / "other", "--step", 7) == 2
    assert "no checkpoint of step 7; it has step-00000050.ckpt" in capsys.readouterr().err
    assert bench("import", tmp_path / "out", "--model", "dit") == 2
    assert "Leave out --model" in capsys.readouterr().err
    uvit = imported(files, tmp_path / "uvit", "uvit")
    assert bench("export", uvit, "--out", tmp_path / "other", "--format", "diffusers") == 2
    assert "a network for DiT alone" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs", "uvit"]


def test_a_run_that_was_copied_is_read_where_it_lies(files, tmp_path, capsys):
    """Not the one of the same id where it was trained."""
    run = imported(files, tmp_path / "runs", "dit")
    copy = Path(shutil.copytree(run, tmp_path / "copies" / run.name))
    shutil.rmtree(run)
    assert bench("export", copy, "--out", tmp_path / "out") == 0
    capsys.readouterr()
    assert bench("export", copy, "--out", tmp_path / "again", f"paths.runs={tmp_path / 'elsewhere'}") == 2
    assert f"{copy} lies in {copy.parent}" in capsys.readouterr().err


def test_an_export_fills_the_empty_folder_one_stands_in(files, tmp_path, monkeypatch):
    run = imported(files, tmp_path / "runs", "dit")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert bench("export", run, "--out", ".") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.yaml", "model.safetensors"]


@pytest.mark.parametrize("how", ["truncated", "one bit"])
def test_a_damaged_checkpoint_is_not_exported(files, tmp_path, capsys, how):
    run = imported(files, tmp_path / "runs", "dit")
    (path,) = (run / "checkpoints").iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "one bit" else content[: len(content) // 2])
    assert bench("export", run, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error and error.count("\n") == 1
    assert [found.name for found in tmp_path.iterdir()] == ["runs"]


@pytest.fixture
def small_vae(tmp_path, monkeypatch) -> Path:
    """A folder of diffusers with a network of Stable Diffusion's shape and few channels."""
    from diffusers import AutoencoderKL

    small = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    monkeypatch.setattr(autoencoders, "SD_CONFIG", autoencoders.SD_CONFIG | small)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**autoencoders.SD_CONFIG).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_diffusers_draws_images_from_an_export_and_it_comes_back_bit_equal(tmp_path, small_vae, capsys):
    from diffusers import DiTPipeline

    net = DiT(DiTConfig(size="T/2"), BackboneSpec(latent_size=8, num_classes=2, learn_sigma=True))
    torch.save({"ema": net.state_dict()}, tmp_path / "100.pt")
    data = ["--data", "folder", "--resolution", "64", "data.classes=[cat,dog]", f"data.autoencoder_path={small_vae}"]
    given = ["--model", "dit", "--size", "T/2", *data]
    assert bench("import", tmp_path / "100.pt", *given, f"paths.runs={tmp_path / 'runs'}") == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert bench("export", run, "--format", "diffusers", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "vae/ (sd-vae-ft-mse)" in said and "use guidance_scale=1" in said
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 1], guidance_scale=1, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all()
    back = ["--steps", 100, f"paths.runs={tmp_path / 'back'}"]
    assert bench("import", tmp_path / "out", *given, *back) == 0
    (again,) = (tmp_path / "back").iterdir()
    assert same(stored(again), dict(net.state_dict())) and again.name == run.name


# --- looking --------------------------------------------------------------------------------------------------------

DDIM = "eval.sampler={name: ddim, steps: 3}"


def grid(run: Path, out: Path, *words: object) -> np.ndarray:
    assert bench("sample", run, "--out", out, DDIM, *words) == 0
    with Image.open(out) as image:
        return np.asarray(image)


def test_a_grid_has_a_row_for_each_class_drawn_by_the_runs_sampler(files, tmp_path, capsys):
    run = imported(files, tmp_path / "runs", "dit")
    drawn = grid(run, tmp_path / "a.png", "--classes", "1,0", "--cfg-scale", 4, "--count", 3, "eval.seed=5")
    assert drawn.shape == (16 + 2 + 16, 3 * 16 + 2 * 2, 3)
    config = load_trained(run)
    net = DiT(DiTConfig(size="T/2"), plan_training(config).spec)
    net.load_state_dict(state_of("dit"))
    sampler = load_trained(run, [DDIM]).eval.sampler
    process = build_process(config.recipe.process)
    for row, label in enumerate((1, 0)):
        x = normal(5, range(3), (3, 16, 16), START)
        denoiser = guided(net, torch.full((3,), label), cfg_scale=4, cfg_channels="3")
        with torch.no_grad():
            latents = run_sampler(sampler, process, denoiser, x, StepNoise(5, range(3), (3, 16, 16)))
        expected = (127.5 * latents + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for column in range(3):
            found = drawn[18 * row : 18 * row + 16, 18 * column : 18 * column + 16]
            assert np.abs(found.astype(int) - expected[column]).max() <= 1  # other batches round otherwise
    assert "3 images each of class 1, 0; ddim with 3 steps, cfg_scale 4, seed 5" in capsys.readouterr().out


def test_an_image_depends_on_seed_column_and_class_alone(files, tmp_path):
    run = imported(files, tmp_path / "runs", "dit")
    both = grid(run, tmp_path / "a.png", "--classes", "0,1")
    assert np.array_equal(grid(run, tmp_path / "b.png", "--classes", "0,1"), both)
    assert not np.array_equal(grid(run, tmp_path / "c.png", "--classes", "0,1", "eval.seed=1"), both)
    alone = grid(run, tmp_path / "d.png", "--classes", "1", "--count", 2)
    assert np.abs(alone.astype(int) - both[18:, : alone.shape[1]]).max() <= 1
    assert both.shape[1] == 4 * 16 + 3 * 2  # four of each class where nothing is said


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--classes", "0,2", "--out", "a.png"], "2 is no class of folder; choose from 0 to 1"),
        (["--classes", "0,-1", "--out", "a.png"], "give numbers with commas"),
        (["--classes", "cat", "--out", "a.png"], "give numbers with commas"),
        (["--classes", "0", "--out", "a.jpg"], "ends in .png"),
        (["--classes", "0", "--out", "a.png", "--count", "0"], "--count is 0"),
        (["--classes", "0"], "--classes and --out go together"),
        (["--count", "3"], "--classes and --out go together"),
        (["--classes", "0", "--out", "a.png", "--step", "7"], "no checkpoint of step 7"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_one_sentence(files, tmp_path, capsys, monkeypatch, words, expected):
    run = imported(files, tmp_path / "runs", "dit").resolve()
    monkeypatch.chdir(tmp_path)
    assert bench("sample", run, *words) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(tmp_path.glob("a.*"))


def test_a_run_without_classes_has_no_grid(tmp_path, capsys):
    net = DiT(DiTConfig(size="T/2"), BackboneSpec(3, 16, num_classes=0, learn_sigma=True))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    data = ["--data", "folder", "--resolution", "16", "data.autoencoder=identity", "data.conditional=false"]
    given = ["--model", "dit", "--size", "T/2", "--steps", 9, *data, f"paths.runs={tmp_path / 'runs'}"]
    assert bench("import", tmp_path / "a.pt", *given) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert bench("sample", run, "--classes", "0", "--out", tmp_path / "a.png") == 2
    assert "has no classes to choose from" in capsys.readouterr().err
