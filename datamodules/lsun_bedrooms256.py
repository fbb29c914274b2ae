"""LSUN-Bedrooms' training split at 256x256, unlabelled, out of its LMDB (datamodules/lmdb_images.py)."""

from datamodules.base import LatentDataModule
from datamodules.lmdb_images import open_lsun
from datamodules.sources import picture_set


class LSUNBedroomsDataModule(LatentDataModule):
    """LSUN-Bedrooms' 3,033,042 training images without classes, each seen mirrored half of the time (LDM)."""

    holds = ("lsun_bedrooms256",)


DATASET = picture_set(
    "LSUN-Bedrooms 256",
    side=256,
    num_classes=0,
    crop="adm_lsun",
    reader=open_lsun,
    module=LSUNBedroomsDataModule,
    wanted="the folder bedroom_train_lmdb, or one above it",
)
