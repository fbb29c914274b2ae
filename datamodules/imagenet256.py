"""ImageNet-1k at 256x256, ADM's crop."""

from datamodules.imagenet import imagenet

DATASET = imagenet(256)
