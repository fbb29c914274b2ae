"""ImageNet-1k at 512x512, ADM's crop."""

from datamodules.imagenet import imagenet

DATASET = imagenet(512)
