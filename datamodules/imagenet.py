"""ImageNet-1k's training split at any side, out of the layouts people have (datamodules/imagenet_raw.py)."""

from __future__ import annotations

from datamodules.base import DataSet, LatentDataModule
from datamodules.imagenet_raw import IMAGENET_CLASSES, open_imagenet
from datamodules.sources import picture_set


class ImageNetDataModule(LatentDataModule):
    """ImageNet-1k's 1,281,167 training images in 1,000 classes, each seen mirrored half of the time (ADM, DiT, U-ViT).

    Labels index the sorted synsets of the cache, `classes`.
    """

    holds = ("imagenet256", "imagenet512")


def imagenet(side: int) -> DataSet:
    return picture_set(
        f"ImageNet {side}",
        side=side,
        num_classes=IMAGENET_CLASSES,
        crop="adm_imagenet",
        reader=open_imagenet,
        module=ImageNetDataModule,
        wanted="a folder with synset folders, ILSVRC2012_img_train.tar, the unpacked Kaggle archive, Parquet shards or "
        "WebDataset shards, at any depth",
    )
