"""Raw pictures -> prepare -> train -> sample -> evaluate, as a user types it; what is wrong is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import data_tools, registry
from bench.config import load_run
from bench.errors import UserError
from bench.evaluate import evaluate
from bench.prepare import data_ends, load_data, prepare, prepare_data, request
from bench.training.train import train
from datamodules import sources
from datamodules.cache import LatentCache, read_manifest
from models.autoencoder import AutoencoderConfig, TinyConfig, load_autoencoder, save_autoencoder, train_autoencoder

sys.path.append(str(registry.ROOT / "tests" / "datamodules"))
import raw_layouts as layouts

PICTURES = layouts.imagenet_pictures()
MODELS = {"dit": ["model.depth=1"], "uvit": ["model.depth=2"], "diffussm": ["model.size=T", "model.depth=1"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an ImageNet-like tree, an LSUN-like database and the weights of a small autoencoder."""
    folder = tmp_path_factory.mktemp("world")
    layouts.write_split_tree(folder / "imagenet", PICTURES)
    layouts.write_lmdb(folder / "lsun" / "bedroom_train_lmdb", layouts.lsun_pictures(220))
    for seed, name in enumerate(("vae", "another-vae")):
        images = torch.randint(256, (32, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        autoencoder = train_autoencoder(images, TinyConfig(steps=3), seed, progress=False)
        autoencoder.card["training"] = asdict(TinyConfig())  # nobody looks at what it decodes
        save_autoencoder(autoencoder, folder / name)
    return folder


@pytest.fixture(autouse=True)
def fresh(world, monkeypatch):
    """Raw sets are opened anew, and what is learnt of them stays in the world."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "index"))
    for memo in (sources._opened, sources._readable, sources._cropped):
        memo.cache_clear()


def settings(world: Path, cache: Path, raw: str = "imagenet", *extra: str, vae: str = "vae") -> list[str]:
    given = [
        f"data.root={world / raw}",
        "data.resolution=32",
        "data.autoencoder=tiny-digits",
        f"data.autoencoder_path={world / vae}",
        f"data.on_error={'skip' if raw == 'imagenet' else 'stop'}",
        f"paths.cache={cache}",
        "trainer.accelerator=cpu",
    ]
    replaced = {word.partition("=")[0] for word in extra}
    return [word for word in given if word.partition("=")[0] not in replaced] + list(extra)


def without_root(words: list[str]) -> list[str]:
    return [word for word in words if not word.startswith("data.root")]


def run_settings(runs: Path, model: str) -> list[str]:
    return [
        f"use.model={model}", *MODELS[model], f"paths.runs={runs}", "tracking=off", "recipe.batch_size=8",
        "recipe.sampler.steps=2", "budget.train_gflops=null", "budget.steps=3", "eval.num_samples=24",
        "eval.batch_size=12", "eval.metrics=[fid,precision]",
    ]  # fmt: skip


def bench(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bench", *words],
        cwd=registry.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def succeed(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def contents(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}


# --- the whole path -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("raw, data, classes", [("imagenet", "imagenet256", 5), ("lsun", "lsun_bedrooms256", 0)])
def test_from_raw_pictures_to_a_score(world, caches, tmp_path, model, raw, data, classes):
    words = [f"use.data={data}", *settings(world, caches, raw), *run_settings(tmp_path, model)]
    config = load_run("digits", words)
    train(config)
    row = evaluate(config)
    assert row.steps == 3 and all(np.isfinite(value) for value in row.scores.values())
    count = 219 if raw == "imagenet" else 220
    assert row.protocol["reference_n"] == count and row.protocol["decoder"] == "tiny-digits"
    arrays = np.load(tmp_path / row.samples, allow_pickle=False)
    assert arrays["arr_0"].shape == (24, 32, 32, 3)
    assert ("labels" in arrays) == (classes > 0)
    assert data_ends(config).num_classes == classes
    manifest = read_manifest(prepare_data(config).latents)
    assert manifest["count"] == count and manifest["mirrors"] and manifest["dtype"] == "float16"


def test_pixels_go_the_same_way(world, tmp_path):
    words = settings(world, tmp_path, "imagenet", "data.autoencoder=identity", "data.autoencoder_path=null")
    config = load_run("digits", ["use.data=imagenet256", *words, *run_settings(tmp_path, "dit")])
    train(config)
    assert np.isfinite(evaluate(config).scores["fd24[effnet-lite0]"])
    data = prepare_data(config)
    cache, (images, _) = LatentCache(data.latents), data.dataset.images(config.data)
    assert cache.pixels and cache.manifest["dtype"] == "uint8"
    assert torch.equal(torch.from_numpy(cache.images(np.arange(219))), images[:].float() / 127.5 - 1)


@pytest.mark.distributed
def test_two_processes_prepare_and_train(world, tmp_path):
    words = settings(world, tmp_path / "two")
    succeed(bench("prepare", "imagenet256", *words, "trainer.devices=2"))
    prepare("imagenet256", settings(world, tmp_path / "one"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    words = ["use.data=imagenet256", *words]
    train(load_run("digits", [*words, *run_settings(tmp_path / "alone", "dit")]))
    succeed(bench("train", "digits", *words, *run_settings(tmp_path / "both", "dit"), "trainer.devices=2"))
    trained = [
        torch.load(next((tmp_path / runs).glob("*/checkpoints/step-00000003.ckpt")), weights_only=True)
        for runs in ("alone", "both")
    ]
    alone, both = (checkpoint["current_model_state"] for checkpoint in trained)
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.distributed
def test_killed_and_ended_by_another_number_of_processes(world, tmp_path):
    """SIGKILL in the middle; two processes, as torchrun starts them, end it: bit for bit what one writes."""

    def words(cache: str) -> list[str]:
        return settings(world, tmp_path / cache, "imagenet", "data.resolution=128")

    killed = bench("prepare", "imagenet256", *words("killed"))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("killed/*/*/moments-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    left = [file.name for file in tmp_path.glob("killed/*/*/moments-*")]
    assert 2 <= len(left) < 7 and not list(tmp_path.glob("killed/*/*/manifest.json"))
    both = [bench("prepare", "imagenet256", *words("killed"), RANK=str(r), WORLD_SIZE="2") for r in range(2)]
    [succeed(process) for process in both]
    prepare("imagenet256", words("whole"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.parametrize("damaged, code", [(5, 2), (35, -signal.SIGKILL)], ids=["of the first", "of the other"])
def test_one_process_that_fails_ends_the_other(world, tmp_path, damaged, code):
    """Their shards have 32 pictures. Lightning kills the first process when another fails, within seconds."""
    pictures = list(PICTURES)
    pictures[48] = replace(PICTURES[48], content=PICTURES[47].content)
    pictures[damaged] = replace(PICTURES[damaged], content=b"no picture")
    layouts.write_split_tree(tmp_path / "imagenet", pictures)
    words = settings(world, tmp_path / "cache", "imagenet", f"data.root={tmp_path / 'imagenet'}", "data.on_error=stop")
    process = bench("prepare", "imagenet256", *words, "trainer.devices=2")
    _, err = process.communicate(timeout=120)  # returns when both have ended: they share the pipe
    assert process.returncode == code and f"{pictures[damaged].name} cannot be decoded" in err


# --- what is in the cache -------------------------------------------------------------------------------------------


def test_moments_and_mirrors_are_the_autoencoders(world, tmp_path):
    config = load_data("imagenet256", settings(world, tmp_path))
    data = prepare_data(config)
    cache, (images, labels) = LatentCache(data.latents), data.dataset.images(config.data)
    rows = np.array([0, 31, 32, 218])
    autoencoder = load_autoencoder(AutoencoderConfig(path=str(world / "vae")))
    squares = torch.cat([images[row : row + 1] for row in rows.tolist()])
    for mirrored, seen in ((False, squares), (True, squares.flip(-1))):
        found = cache.moments(rows, np.full(4, mirrored))
        for got, wanted in zip(found.swapaxes(0, 1), autoencoder.moments(seen), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)  # float16
    assert torch.equal(cache.labels, labels)
    manifest = cache.manifest
    assert manifest["classes"] == list(layouts.SYNSETS) and manifest["class_histogram"] == [44, 43, 44, 44, 44]
    assert manifest["encoder_sha256"] == autoencoder.encoder_sha256
    assert manifest["skipped"][0].startswith(PICTURES[48].name)
    assert "220 pictures in 5 classes" in manifest["source"] and manifest["request"]["crop"] == "adm_imagenet"


def test_preparing_says_what_is_there_and_what_is_not(world, tmp_path, capsys):
    prepare("imagenet256", settings(world, tmp_path))
    said = capsys.readouterr().out
    for sentence in (
        "synset folders, 220 pictures in 5 classes",
        "5 classes; ImageNet-1k has 1000.",
        "219 images in 7 shards",
        f"left out: {PICTURES[48].name} cannot be decoded",
    ):
        assert sentence in said


def test_pictures_that_changed_are_prepared_again(world, tmp_path, capsys):
    """Grown, and cut back to what it was: each time `prepare` says what is there, and `train` gets the cache of it."""
    tree, states = tmp_path / "tree", []
    layouts.write_tree(tree, PICTURES[60:150])
    words = settings(tmp_path, tmp_path / "cache", "tree", f"data.autoencoder_path={world / 'vae'}")
    for found in ("90 pictures in 3 classes", "131 pictures in 4 classes", "90 pictures in 3 classes"):
        if found.startswith("131"):
            layouts.write_tree(tree, PICTURES[179:])
        elif states:
            shutil.rmtree(tree / layouts.SYNSETS[4])
            for picture in PICTURES[179:]:
                (tree / picture.name).unlink(missing_ok=True)
            layouts.write_tree(tree, PICTURES[60:150])
        sources._opened.cache_clear()
        prepare("imagenet256", words)
        count = int(found.split()[0])
        said = capsys.readouterr().out
        assert found in said and f"{count} images in" in said
        states.append(prepare_data(load_data("imagenet256", words)).latents)
        assert LatentCache(states[-1]).count == count
        assert prepare_data(load_data("imagenet256", without_root(words))).latents == states[-1]
    assert states[0] == states[2] != states[1]


def test_a_copy_elsewhere_takes_the_cache_over(world, tmp_path):
    words = {
        name: settings(tmp_path, tmp_path / "cache", name, f"data.autoencoder_path={world / 'vae'}") for name in "ab"
    }
    for name in "ab":
        layouts.write_tree(tmp_path / name, PICTURES[60:150])
    prepare("imagenet256", words["a"])
    before = contents(tmp_path / "cache")
    prepare("imagenet256", words["b"])
    after = contents(tmp_path / "cache")
    (changed,) = (name for name in before if before[name] != after[name])
    assert before.keys() == after.keys() and changed.endswith("manifest.json")
    assert read_manifest(prepare_data(load_data("imagenet256", words["b"])).latents)["root"] == str(tmp_path / "b")


def test_a_finished_cache_serves_without_the_pictures(world, tmp_path):
    prepare("imagenet256", settings(world, tmp_path))
    config = load_data("imagenet256", without_root(settings(world, tmp_path)))
    assert LatentCache(prepare_data(config).latents).count == 219
    assert data_ends(config).num_classes == 5


@pytest.mark.parametrize(
    "again", [prepare, lambda name, words: prepare_data(load_data(name, words))], ids=["prepare", "train"]
)
def test_preparing_again_makes_what_a_cache_lost(world, tmp_path, again):
    """`train` prepares what is not there, too."""
    prepare("imagenet256", settings(world, tmp_path))
    whole = contents(tmp_path)
    gone, cut = (next(tmp_path.glob(f"imagenet256/latents-*/moments-0000{k}.safetensors")) for k in (2, 4))
    gone.unlink()
    os.truncate(cut, cut.stat().st_size - 1)
    again("imagenet256", settings(world, tmp_path))
    assert contents(tmp_path) == whole


def test_a_reference_made_once_serves_without_the_pictures(world, tmp_path):
    words = ["use.data=imagenet256", *settings(world, tmp_path / "cache"), *run_settings(tmp_path / "runs", "dit")]
    here, away = (load_run("digits", given) for given in (words, without_root(words)))
    train(here)
    with pytest.raises(UserError, match=r"needs data\.root: "):
        evaluate(away)
    row = evaluate(here)
    (tmp_path / "runs" / "results.jsonl").unlink()
    again = evaluate(away)
    assert again.scores == row.scores and again.protocol == row.protocol


def test_decoders_of_one_encoder_share_a_cache():
    ema, mse, tiny = (
        request(load_data("imagenet256", [f"data.autoencoder={name}"]))
        for name in ("sd-vae-ft-ema", "sd-vae-ft-mse", "tiny-digits")
    )
    assert ema == mse != tiny


@pytest.mark.parametrize(
    "words, ends",
    [
        (["use.data=imagenet256"], (4, 32, 1000)),
        (["use.data=imagenet512"], (4, 64, 1000)),
        (["use.data=imagenet256", "data.conditional=false"], (4, 32, 0)),
        (["use.data=imagenet256", "data.classes=[n01440764,n01443537]"], (4, 32, 2)),
        (["use.data=imagenet256", "data.resolution=64", "data.autoencoder=identity"], (3, 64, 1000)),
        (["use.data=lsun_bedrooms256"], (4, 32, 0)),
        (["use.data=digits"], (4, 8, 10)),
    ],
)
def test_backbones_are_sized_without_the_pictures(tmp_path, words, ends):
    assert tuple(asdict(data_ends(load_run("digits", [*words, f"paths.cache={tmp_path}"]))).values()) == ends


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet256", "imagenet512", "lsun_bedrooms256", "folder"])
def test_nothing_is_done_without_pictures(name, tmp_path):
    with pytest.raises(UserError, match=r"needs data\.root: "):
        prepare(name, [f"paths.cache={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_a_damaged_picture_stops_with_nothing_half_written(world, tmp_path):
    with pytest.raises(UserError, match=rf"{PICTURES[48].name} cannot be decoded: .*data\.on_error=skip"):
        prepare("imagenet256", settings(world, tmp_path, "imagenet", "data.on_error=stop"))
    assert all(file.name == "moments-00000.safetensors" for file in tmp_path.rglob("*") if file.is_file())


def test_another_autoencoder_is_noticed(world, tmp_path):
    prepare("imagenet256", settings(world, tmp_path))
    words = without_root(settings(world, tmp_path, vae="another-vae"))
    with pytest.raises(UserError, match=r"latents were made with another autoencoder: .*data\.autoencoder_path"):
        prepare_data(load_data("imagenet256", words))
    prepare("imagenet256", settings(world, tmp_path, vae="another-vae"))  # with the pictures, a cache of its own
    assert len(list(tmp_path.glob("imagenet256/latents-*"))) == 2


def test_on_error_makes_no_other_cache_of_a_sound_set(world, tmp_path):
    found = []
    for choice in ("stop", "skip"):
        words = settings(world, tmp_path, "lsun", f"data.on_error={choice}")
        prepare("lsun_bedrooms256", words)
        found += [prepare_data(load_data("lsun_bedrooms256", given)).latents for given in (words, without_root(words))]
    assert len(set(found)) == 1 == len(list(tmp_path.glob("lsun_bedrooms256/latents-*")))


def test_a_cache_that_leaves_pictures_out_is_not_for_those_who_stop(world, tmp_path):
    prepare("imagenet256", settings(world, tmp_path))
    words = without_root(settings(world, tmp_path, "imagenet", "data.on_error=stop"))
    with pytest.raises(UserError, match=r"no latents of these settings, only: .*\(on_error skip, not stop\)"):
        prepare_data(load_data("imagenet256", words))


def test_other_settings_without_pictures_are_named(world, tmp_path):
    prepare("imagenet256", settings(world, tmp_path))
    words = without_root(settings(world, tmp_path, "imagenet", "data.crop=ldm"))
    with pytest.raises(UserError, match=r"no latents of these settings, only: .*\(crop adm_imagenet, not ldm\)"):
        prepare_data(load_data("imagenet256", words))


def test_a_manifest_of_another_program_is_named(checked, tmp_path, world):
    cache, latents = copied(checked, tmp_path)
    manifest = json.loads((latents / "manifest.json").read_text())
    del manifest["request"]
    (latents / "manifest.json").write_text(json.dumps(manifest))
    for look in (prepare_data, data_ends, data_tools.check):
        with pytest.raises(UserError, match=r"manifest\.json does not say request: .*Remove .*latents-"):
            look(load_data("imagenet256", without_root(settings(world, cache))))


def test_a_cache_folder_that_cannot_be_made_is_named(world, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"paths\.cache: the folder .*/file/lsun_\S* cannot be made: Not a directory"):
        prepare("lsun_bedrooms256", settings(world, tmp_path / "file", "lsun"))


def test_names_that_are_no_utf8_stop_nothing(world, tmp_path):
    """Latin-1 in a file's name, and a terminal that takes UTF-8 alone."""
    tree = tmp_path / "tree" / "caf\udce9"
    tree.mkdir(parents=True)
    for number, content in enumerate((*(picture.content for picture in PICTURES[:3]), b"")):
        (tree / f"\udce9{number}.jpg").write_bytes(content)
    words = settings(
        tmp_path, tmp_path, "tree", "data.on_error=skip", "data.autoencoder=identity", "data.autoencoder_path=null"
    )
    out = succeed(bench("prepare", "folder", *words, PYTHONIOENCODING="utf-8:strict"))
    assert r"left out: caf\udce9/\udce93.jpg cannot be decoded" in out


def test_a_class_that_is_not_there_is_named(world, tmp_path):
    with pytest.raises(UserError, match="has no class n09999999: its classes are n01440764"):
        prepare("imagenet256", settings(world, tmp_path, "imagenet", "data.classes=[n01440764,n09999999]"))


def test_pixels_have_no_type_to_choose(world, tmp_path):
    words = settings(world, tmp_path, "imagenet", "data.autoencoder=identity", "data.dtype=float32")
    with pytest.raises(UserError, match=r"data\.dtype is float32, but pixels"):
        prepare("imagenet256", words)


def test_the_command_line_answers_in_a_sentence(tmp_path):
    process = bench("prepare", "imagenet255", f"paths.cache={tmp_path}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.startswith("isodiff prepare: 'imagenet255' is not a data set")
    assert "Did you mean imagenet256?" in err


# --- data check, data show ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(world, tmp_path_factory):
    cache = tmp_path_factory.mktemp("checked")
    os.environ["XDG_CACHE_HOME"] = str(world / "index")
    prepare("imagenet256", settings(world, cache))
    return cache


def copied(checked: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(checked, tmp_path / "cache")
    return tmp_path / "cache", next(tmp_path.glob("cache/imagenet256/latents-*"))


def test_a_sound_cache_passes(world, checked, capsys):
    data_tools.check(load_data("imagenet256", without_root(settings(world, checked))))
    said = capsys.readouterr().out
    assert "219 images, float16 (4, 8, 8)" in said and "n01443537 43" in said and said.endswith("as it should be\n")


@pytest.mark.parametrize("damage", ["altered", "cut", "mean", "histogram", "labels", "fingerprint"])
def test_what_is_wrong_with_a_cache_is_found(world, checked, tmp_path, damage):
    cache, latents = copied(checked, tmp_path)
    file, manifest = latents / "moments-00003.safetensors", json.loads((latents / "manifest.json").read_text())
    if damage == "altered":
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        os.truncate(file, 1000)
    elif damage == "mean":
        manifest["latents"]["mean"][2] += 1e-6
    elif damage == "histogram":
        manifest["class_histogram"][0] -= 1
    elif damage == "labels":
        np.save(latents / "labels.npy", np.zeros(219, np.int64))
    else:
        manifest["fingerprint"] = "another"
    (latents / "manifest.json").write_text(json.dumps(manifest))
    named = {
        "altered": "moments-00003.safetensors was altered", "cut": "moments-00003.safetensors is missing or cut short",
        "mean": "the mean of the latents is not", "histogram": "class histogram is not",
        "labels": "labels.npy was altered", "fingerprint": "belongs to another preparation",
    }[damage]  # fmt: skip
    with pytest.raises(UserError, match=f"not as it should be:.*(?s:.)*{named}"):
        data_tools.check(load_data("imagenet256", without_root(settings(world, cache))))


def test_raw_pictures_are_checked_where_there_is_no_cache(world, tmp_path, capsys):
    skipping = settings(world, tmp_path)
    data_tools.check(load_data("imagenet256", skipping))
    said = capsys.readouterr().out
    assert "220 pictures in 5 classes" in said and f"left out: {PICTURES[48].name} cannot be decoded" in said
    stopping = [word for word in skipping if word != "data.on_error=skip"]
    with pytest.raises(UserError, match=f"{PICTURES[48].name} cannot be decoded"):
        data_tools.check(load_data("imagenet256", stopping))
    data_tools.check(load_data("lsun_bedrooms256", settings(world, tmp_path, "lsun")))
    assert "as it should be" in capsys.readouterr().out


def test_pictures_added_after_the_cache_are_noticed(world, checked, tmp_path):
    shutil.copytree(world / "imagenet", tmp_path / "grown")
    cache = tmp_path / "cache"
    words = settings(tmp_path, cache, "grown", f"data.autoencoder_path={world / 'vae'}", "data.on_error=skip")
    prepare("imagenet256", words)
    layouts.write_tree(tmp_path / "grown" / "train", layouts.imagenet_pictures(seed=5, per_class=9)[:1])
    sources._opened.cache_clear()
    with pytest.raises(UserError, match="was made from another state of"):
        data_tools.check(load_data("imagenet256", words))


def test_a_cache_of_the_same_pictures_elsewhere_is_checked(world, checked, tmp_path, capsys):
    cache, latents = copied(checked, tmp_path)
    shutil.copytree(world / "imagenet", tmp_path / "moved")
    config = load_data("imagenet256", settings(world, cache, "imagenet", f"data.root={tmp_path / 'moved'}"))
    data_tools.check(config)
    said = capsys.readouterr().out
    assert "220 pictures in 5 classes" in said and f"{latents}: 219 images" in said
    os.truncate(latents / "moments-00003.safetensors", 1000)
    with pytest.raises(UserError, match=r"moments-00003\.safetensors is missing or cut short"):
        data_tools.check(config)


def test_show_draws_raw_cropped_and_decoded(world, checked, tmp_path):
    config = load_data("imagenet256", settings(world, checked))
    data_tools.show(config, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 32, 10 * 32, 3)
    images, _ = registry.dataset("imagenet256").images(config.data)
    np.testing.assert_array_equal(grid[32:64, :32], images[:1][0].permute(1, 2, 0))  # the first crop, second line
    bare = load_data("imagenet256", settings(world, tmp_path / "bare"))
    data_tools.show(bare, tmp_path / "bare.png")
    assert (tmp_path / "bare.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert not list((tmp_path / "bare").rglob("latents-*"))  # ten pictures need no cache of all
    with pytest.raises(UserError, match=r"ends in \.png"):
        data_tools.show(config, tmp_path / "grid.jpg")
