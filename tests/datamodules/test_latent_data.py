"""The order of training: a function of (seed, position), whoever reads it and whenever it is resumed."""

from __future__ import annotations

from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch

from datamodules.base import LatentDataModule, mirror_bits, permutation, posterior_eps, rows_at
from datamodules.cache import CacheMeta
from datamodules.digits import DigitsDataModule
from datamodules.prepare import prepare_cache
from datamodules.synthetic import write_cache

COUNT, BATCH = 21, 8  # batches run over the borders of epochs


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("latents"), (2, 4, 4), COUNT)


@pytest.fixture
def data(latents):
    return LatentDataModule(latents, batch_size=BATCH, seed=7)


def batches(loader, number):
    return list(islice(loader, number))


def joined(parts):
    """Batches -> one, in the order of positions."""
    latents, labels, positions = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = positions.argsort()
    return latents[order], labels[order], positions[order]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- order and noise ------------------------------------------------------------------------------------------------


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    rows = rows_at(np.arange(5 * COUNT), 7, COUNT).reshape(5, COUNT)
    assert (np.sort(rows) == np.arange(COUNT)).all()
    assert len({tuple(row) for row in rows}) == 5


def test_the_order_is_philox_keyed_by_seed_and_epoch():
    stream = np.random.Generator(np.random.Philox(key=(7, 3), counter=(0, 0, 0, 17)))
    np.testing.assert_array_equal(permutation(7, 3, COUNT), stream.permutation(COUNT))


def test_posterior_noise_is_philox_keyed_by_seed_and_position():
    positions = np.array([5, 0, 2**40, 5])
    expected = [
        np.random.Generator(np.random.Philox(key=(7, p), counter=(0, 0, 0, 16))).standard_normal((2, 4, 4), np.float32)
        for p in positions.tolist()
    ]
    np.testing.assert_array_equal(posterior_eps(7, positions, (2, 4, 4)), np.stack(expected))


def test_seeds_do_not_share_noise_even_beyond_32_bits():
    positions = np.arange(4)
    draws = [posterior_eps(seed, positions, (16,)) for seed in (1, 2, 1 + 2**32)]
    rows = np.concatenate(draws)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_mirrors_are_a_coin_of_philox_keyed_by_seed_and_position():
    positions = np.array([5, 0, 2**40, 5])
    expected = [
        bool(np.random.Philox(key=(7, p), counter=(0, 0, 0, 18)).random_raw() >> 63) for p in positions.tolist()
    ]
    assert mirror_bits(7, positions).tolist() == expected
    heads = mirror_bits(3, np.arange(10_000))
    assert abs(heads.mean() - 0.5) < 0.02  # 4 standard deviations
    assert abs(np.corrcoef(heads[1:], heads[:-1])[0, 1]) < 0.04


# --- batches --------------------------------------------------------------------------------------------------------


def test_latents_are_scaled_posterior_samples(data):
    cache = data.cache
    cache.scale, cache.shift = np.float32([[[2.0]], [[0.5]]]), np.float32([[[1.0]], [[-1.0]]])
    batch = batches(data.loader(start=16), 1)[0]
    assert batch.positions.tolist() == list(range(16, 24))
    for latent, label, position in zip(*batch, strict=True):
        row = rows_at(np.array([int(position)]), 7, COUNT)
        mean, logvar = torch.from_numpy(cache.moments(row)[0])  # (2,4,4)
        eps = torch.from_numpy(posterior_eps(7, position[None].numpy(), (2, 4, 4))[0])
        z = mean + logvar.exp().sqrt() * eps
        wanted = torch.stack([(z[0] - 1.0) * 2.0, (z[1] + 1.0) * 0.5])
        torch.testing.assert_close(latent, wanted)
        assert label == cache.labels[row[0]]


def mirrored_cache(path, dtype):
    """Two latents, or images, whose mirrors are told apart; posterior std 0.5."""
    images = torch.randint(256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def encode(images):
        mean = images[:, :2, ::2, ::2].float() / 64  # (B,2,2,2)
        return mean, torch.full_like(mean, 2 * np.log(0.5))

    shape = (3, 4, 4) if dtype == "uint8" else (2, 2, 2)
    meta = CacheMeta(
        "toy", 2, 4, "none", "toy-ae", "abc", shape, (2.0,) * shape[0], (1.0,) * shape[0], dtype, mirrors=True
    )
    prepare_cache(images, torch.arange(6) % 2, encode, path, meta, shard_rows=4, progress=False)
    return images, encode


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_half_of_the_samples_are_mirrored_images(tmp_path, dtype):
    images, encode = mirrored_cache(tmp_path, dtype)
    data = LatentDataModule(tmp_path, batch_size=BATCH, seed=7)
    latents, _, positions = joined(batches(data.loader(), 20))
    coins = mirror_bits(7, positions.numpy())
    for latent, position, mirrored in zip(latents, positions.numpy(), coins, strict=True):
        seen = images[rows_at(position[None], 7, 6)]
        seen = seen.flip(-1) if mirrored else seen
        if dtype == "uint8":
            z = seen[0].float() / 127.5 - 1
        else:
            mean, logvar = encode(seen)
            z = mean[0] + (0.5 * logvar[0]).exp() * torch.from_numpy(posterior_eps(7, position[None], (2, 2, 2))[0])
        torch.testing.assert_close(latent, (z - 1.0) * 2.0, atol=2e-3 if dtype == "float16" else 1e-6, rtol=0)


def test_latents_have_the_statistics_of_the_posterior(tmp_path):
    """20,000 draws of a normal posterior: mean and variance within 5 standard errors of the closed form."""
    mirrored_cache(tmp_path, "float32")
    data = LatentDataModule(tmp_path, batch_size=2000, seed=1)
    latents, _, positions = joined(batches(data.loader(), 10))
    rows, coins = rows_at(positions.numpy(), 1, 6), mirror_bits(1, positions.numpy())
    mean, _ = data.cache.moments(rows, coins).swapaxes(0, 1)
    residual = latents.numpy() / 2 + 1 - mean  # z - E z
    n = residual.size
    assert abs(residual.mean()) < 5 * 0.5 / n**0.5
    assert abs(residual.var() / 0.25 - 1) < 5 * (2 / n) ** 0.5
    whole = data.cache.manifest["latents"]  # over both mirrors of all images; each is drawn about as often
    np.testing.assert_allclose(latents.mean((0, 2, 3)), whole["mean"], atol=0.05)
    np.testing.assert_allclose(latents.std((0, 2, 3)), whole["std"], rtol=0.02)


def test_posterior_noise_is_fresh_in_each_epoch(tmp_path):
    mirrored_cache(tmp_path, "float32")
    data = LatentDataModule(tmp_path, batch_size=6, seed=7)
    epochs = [joined([batch]) for batch in batches(data.loader(), 2)]
    first, second = (rows_at(epoch[2].numpy(), 7, 6).argsort() for epoch in epochs)
    assert (epochs[0][0][first] != epochs[1][0][second]).all()


def test_a_module_for_another_set_is_refused(latents):
    with pytest.raises(ValueError, match="holds synthetic; DigitsDataModule reads digits"):
        DigitsDataModule(latents, batch_size=BATCH)


def test_batches_run_over_epoch_borders_without_loss(data):
    _, labels, positions = joined(batches(data.loader(), COUNT))  # COUNT x BATCH samples = BATCH epochs
    assert positions.tolist() == list(range(COUNT * BATCH))
    for epoch in labels.view(BATCH, COUNT):
        assert torch.equal(epoch.sort().values, data.labels.sort().values)


@pytest.mark.parametrize("world_size, accumulate", [(2, 1), (4, 1), (8, 1), (1, 2), (2, 2)])
def test_any_number_of_processes_sees_the_same_global_batches(data, world_size, accumulate):
    alone = batches(data.loader(), 6)
    ranks = [
        batches(data.loader(rank=r, world_size=world_size, accumulate=accumulate), 6 * accumulate)
        for r in range(world_size)
    ]
    for step, whole in enumerate(alone):
        parts = [part for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate]]
        assert equal(joined(parts), whole)
    assert all(set((batch.positions % world_size).tolist()) == {r} for r, rank in enumerate(ranks) for batch in rank)


def test_a_restart_with_other_processes_goes_on_with_the_same_samples(data):
    whole = joined(batches(data.loader(), 6))
    before = batches(data.loader(rank=0, world_size=2), 3) + batches(data.loader(rank=1, world_size=2), 3)
    after = [b for r in range(4) for b in batches(data.loader(rank=r, world_size=4, start=3 * BATCH), 3)]
    assert equal(joined(before + after), whole)


def test_loader_processes_keep_the_order(latents, data):
    workers = LatentDataModule(latents, batch_size=BATCH, seed=7, num_workers=2)
    for one, other in zip(batches(workers.loader(start=8), 5), batches(data.loader(start=8), 5), strict=True):
        assert equal(one, other)


@pytest.mark.parametrize("world_size, accumulate", [(3, 1), (2, 3), (16, 1)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(data, world_size, accumulate):
    product = world_size * accumulate
    with pytest.raises(ValueError, match=f"batch_size 8 is global.* {world_size} x {accumulate} = {product}"):
        data.loader(world_size=world_size, accumulate=accumulate)


def test_positions_stay_on_the_cpu(data):
    """Reading them off the device would wait for all it still has to do."""
    batch = next(iter(data.loader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert [part.device.type for part in moved] == ["meta", "meta", "cpu"]
    assert torch.equal(moved.positions, batch.positions) and moved.latents.shape == batch.latents.shape


def test_a_trainer_is_needed_for_its_loader(data):
    with pytest.raises(ValueError, match=r"no trainer yet.*loader\(\)"):
        data.train_dataloader()


# --- resume ---------------------------------------------------------------------------------------------------------


class Recorder(L.LightningModule):
    """Learns one number and notes every batch it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(part.clone() for part in batch))
        return (batch.latents - self.weight).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, steps, tmp_path, checkpoint=None, accumulate=1):
    module = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module, trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(latents, tmp_path, accumulate):
    def fresh():
        return LatentDataModule(latents, batch_size=BATCH, seed=7)

    whole, _ = fit(fresh(), 7, tmp_path, accumulate=accumulate)
    first, trainer = fit(fresh(), 4, tmp_path, accumulate=accumulate)  # 32 samples: 11 into the second epoch
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second, _ = fit(fresh(), 7, tmp_path, tmp_path / "last.ckpt", accumulate)

    pieces = first.seen + second.seen
    assert len(pieces) == len(whole.seen) == 7 * accumulate
    assert all(equal(one, other) for one, other in zip(pieces, whole.seen, strict=True))
    assert torch.cat([batch[2] for batch in pieces]).tolist() == list(range(7 * BATCH))
    assert torch.equal(second.weight, whole.weight)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["LatentDataModule"]
    assert saved["samples_consumed"] == 4 * BATCH


@pytest.mark.parametrize("change, named", [({"seed": 8}, "seed 7"), ({"batch_size": 4}, "batch_size 8")])
def test_a_checkpoint_of_another_order_is_refused(latents, data, change, named):
    data.trainer = L.Trainer(logger=False, barebones=True, accelerator="cpu")
    other = LatentDataModule(latents, **({"batch_size": BATCH, "seed": 7} | change))
    with pytest.raises(ValueError, match=f"trained with {named}, this run has .*start a new run"):
        other.load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    "classes, sentence",
    [(["b", "a"], "in another order: label 0 is a, not b"), (["a", "c"], r"lacks 1 of the 2 expected classes \(c\)")],
)
def test_a_checkpoint_of_other_classes_is_refused(data, classes, sentence):
    data.trainer = L.Trainer(logger=False, barebones=True, accelerator="cpu")
    data.cache.classes = ("a", "b")
    with pytest.raises(ValueError, match=f"trained on other classes.*{sentence}"):
        data.load_state_dict(data.state_dict() | {"classes": classes})


def test_a_checkpoint_of_other_latents_is_refused(data, tmp_path):
    data.trainer = L.Trainer(logger=False, barebones=True, accelerator="cpu")
    other = LatentDataModule(write_cache(tmp_path / "other", (2, 4, 4), COUNT - 1), batch_size=BATCH, seed=7)
    with pytest.raises(ValueError, match="trained with latents "):
        other.load_state_dict(data.state_dict())
