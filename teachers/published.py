"""Teachers of the literature by their timm names, and the ImageNet-1k top-1 that timm measured.

| name | timm name | paper | top-1, % | size |
|---|---|---|---|---|
| BEiTV2-B | beitv2_base_patch16_224.in1k_ft_in22k_in1k | arXiv 2208.06366 | 86.494 | 224 |
| DeiT-B | deit_base_patch16_224.fb_in1k | arXiv 2012.12877 | 81.980 | 224 |
| DeiT-B distilled | deit_base_distilled_patch16_224.fb_in1k | arXiv 2012.12877 | 83.388 | 224 |
| DeiT-B, 384 px | deit_base_patch16_384.fb_in1k | arXiv 2012.12877 | 83.116 | 384 |
| DeiT-B distilled, 384 px | deit_base_distilled_patch16_384.fb_in1k | arXiv 2012.12877 | 85.428 | 384 |
| DeiT III-B | deit3_base_patch16_224.fb_in1k | arXiv 2204.07118 | 83.794 | 224 |
| DeiT III-B, ImageNet-22k | deit3_base_patch16_224.fb_in22k_ft_in1k | arXiv 2204.07118 | 85.728 | 224 |
| DeiT III-B, 384 px | deit3_base_patch16_384.fb_in1k | arXiv 2204.07118 | 85.086 | 384 |
| DeiT III-B, ImageNet-22k, 384 px | deit3_base_patch16_384.fb_in22k_ft_in1k | arXiv 2204.07118 | 86.744 | 384 |
| ResNet-101, A1H | resnet101.a1h_in1k | arXiv 2110.00476 | 81.950 | 224 |

The figures are those of results/results-imagenet.csv in huggingface/pytorch-image-models at commit 7479d451, each
at the size above. BEiTV2 takes ImageNet's mean and standard deviation, unlike BEiT, which takes 0.5. A distilled DeiT
gives the average of its two heads. ResNet-101 reaches 82.802 at timm's test size of 288.
"""

from typing import NamedTuple

_BEITV2 = "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, arXiv 2208.06366; timm"
_DEIT = "Training data-efficient image transformers & distillation through attention, arXiv 2012.12877; timm"
_DEIT3 = "DeiT III: Revenge of the ViT, arXiv 2204.07118; timm"
_RESNET = "ResNet strikes back: An improved training procedure in timm, arXiv 2110.00476; timm"


class Published(NamedTuple):
    """`top1` is in percent, at the size of the model's pretrained_cfg."""

    name: str
    source: str
    top1: float


PUBLISHED = {
    "beitv2_base_patch16_224.in1k_ft_in22k_in1k": Published("BEiTV2-B", _BEITV2, 86.494),
    "deit_base_patch16_224.fb_in1k": Published("DeiT-B", _DEIT, 81.980),
    "deit_base_distilled_patch16_224.fb_in1k": Published("DeiT-B distilled", _DEIT, 83.388),
    "deit_base_patch16_384.fb_in1k": Published("DeiT-B, 384 px", _DEIT, 83.116),
    "deit_base_distilled_patch16_384.fb_in1k": Published("DeiT-B distilled, 384 px", _DEIT, 85.428),
    "deit3_base_patch16_224.fb_in1k": Published("DeiT III-B", _DEIT3, 83.794),
    "deit3_base_patch16_224.fb_in22k_ft_in1k": Published("DeiT III-B, ImageNet-22k", _DEIT3, 85.728),
    "deit3_base_patch16_384.fb_in1k": Published("DeiT III-B, 384 px", _DEIT3, 85.086),
    "deit3_base_patch16_384.fb_in22k_ft_in1k": Published("DeiT III-B, ImageNet-22k, 384 px", _DEIT3, 86.744),
    "resnet101.a1h_in1k": Published("ResNet-101, A1H", _RESNET, 81.950),
}
