"""Any pictures: in class folders, whose sorted names become the labels, or flat in one folder and unlabelled."""

from datamodules.base import LatentDataModule
from datamodules.raw import open_folder
from datamodules.sources import picture_set


class FolderDataModule(LatentDataModule):
    """All pictures of a folder for training, in as many classes as it has subfolders, mirrored half of the time."""

    holds = ("folder",)


DATASET = picture_set(
    "Folder",
    side=256,
    num_classes=0,  # as many as there are class folders
    crop="adm_imagenet",
    reader=lambda root, cache, *, progress: open_folder(root, progress=progress),
    module=FolderDataModule,
    wanted="a folder of pictures, or of one folder of pictures per class",
)
