"""The networks of the gallery: every one built without a download, at a size of which a step takes a second or less.

A network is what its library's own constructor makes, made small by that constructor's arguments: fewer blocks or
channels, small images, ten classes. Two have hidden layers of 4,096 features that no argument reaches (AlexNet, VGG);
these are exchanged for narrow ones. Nothing is drawn in a step: dropout and drop path are set to 0 on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torchvision.models as tv
from timm.layers import GatedMlp
from timm.models import metaformer
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn
from torchvision.models import convnext, efficientnet, regnet, swin_transformer
from torchvision.models.resnet import BasicBlock, Bottleneck

CLASSES, BATCH = 10, 2
Build = Callable[[], Any]


@dataclass(frozen=True)
class Architecture:
    """A network of the gallery: where it comes from, the side of its square images, and how it is built."""

    library: str
    size: int
    build: Build


def _narrow(build: Build) -> Any:
    """A network whose classifier's hidden layers have 64 features instead of 4,096, which are never allocated."""
    with torch.device("meta"):
        model: Any = build()
    features = {model.classifier[-1].in_features: 64}
    for place, layer in enumerate(model.classifier):
        if isinstance(layer, nn.Linear):
            width = features.get(layer.in_features, layer.in_features)
            model.classifier[place] = nn.Linear(width, features.get(layer.out_features, layer.out_features))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def _vgg(norm: bool) -> Any:
    layers = tv.vgg.make_layers([16, "M", 32, "M", 64, "M", 512, "M"], batch_norm=norm)
    return tv.VGG(layers, num_classes=CLASSES, init_weights=False, dropout=0.0)


def _efficientnet_v2() -> Any:
    setting = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 16, 16, 1),
        efficientnet.FusedMBConvConfig(4, 3, 2, 16, 32, 2),
        efficientnet.MBConvConfig(4, 3, 2, 32, 64, 2),
    ]
    return tv.EfficientNet(setting, 0.0, 0.0, num_classes=CLASSES, last_channel=256)


def _convnext() -> Any:
    setting = [
        convnext.CNBlockConfig(24, 48, 2),
        convnext.CNBlockConfig(48, 96, 2),
        convnext.CNBlockConfig(96, None, 2),
    ]
    return tv.ConvNeXt(setting, stochastic_depth_prob=0.0, num_classes=CLASSES)


def _regnet(squeeze: float | None) -> Any:
    block = regnet.BlockParams.from_init_params(
        depth=6, w_0=24, w_a=24.0, w_m=2.5, group_width=8, se_ratio=squeeze
    )
    return tv.RegNet(block, num_classes=CLASSES, stem_width=16)


def _swin(**version: Any) -> Any:
    return tv.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES, **version
    )


def _maxvit() -> Any:
    return tv.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, stochastic_depth_prob=0.0, num_classes=CLASSES)


def _mlp(**kind: Any) -> Any:
    return MlpMixer(CLASSES, 32, patch_size=8, num_blocks=2, embed_dim=24, **kind)


def _poolformer() -> Any:
    return metaformer.MetaFormer(
        depths=(1, 1, 1, 1), dims=(16, 24, 32, 48), num_classes=CLASSES, downsample_norm=None,
        token_mixers=metaformer.Pooling, mlp_act=nn.GELU, mlp_bias=True, norm_layers=metaformer.GroupNorm1,
        layer_scale_init_values=1e-5, res_scale_init_values=None, use_mlp_head=False,
    )  # fmt: skip


def _resnet(block: Any, **options: Any) -> Build:
    return lambda: tv.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES, **options)


def _torchvision(name: str, **options: Any) -> Build:
    return partial(tv.get_model, name, weights=None, num_classes=CLASSES, **options)


def _timm(name: str, **options: Any) -> Build:
    return partial(timm.create_model, name, pretrained=False, num_classes=CLASSES, **options)


def _timm_swin() -> Build:
    options = {"window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    return _timm("swin_tiny_patch4_window7_224", img_size=32, **options)


_SWIN_V2 = {
    "block": swin_transformer.SwinTransformerBlockV2,
    "downsample_layer": swin_transformer.PatchMergingV2,
}
_TORCHVISION: dict[str, tuple[int, Build]] = {
    "alexnet": (64, lambda: _narrow(_torchvision("alexnet", dropout=0.0))),
    "vgg": (32, lambda: _narrow(lambda: _vgg(False))),
    "vgg_bn": (32, lambda: _narrow(lambda: _vgg(True))),
    "resnet18": (32, _resnet(BasicBlock)),
    "resnet50": (32, _resnet(Bottleneck, width_per_group=16)),
    "resnext50": (32, _resnet(Bottleneck, groups=8, width_per_group=4)),
    "wide_resnet50": (32, _resnet(Bottleneck, width_per_group=32)),
    "densenet": (32, lambda: tv.DenseNet(8, (2, 2, 2, 2), 16, 2, num_classes=CLASSES)),
    "googlenet": (
        64, _torchvision("googlenet", aux_logits=False, init_weights=False, dropout=0.0)
    ),
    "inception_v3": (
        75, _torchvision("inception_v3", aux_logits=False, init_weights=False, dropout=0.0)
    ),
    "squeezenet1_1": (64, _torchvision("squeezenet1_1", dropout=0.0)),
    "shufflenet_v2": (64, _torchvision("shufflenet_v2_x0_5")),
    "mobilenet_v2": (64, _torchvision("mobilenet_v2", width_mult=0.35, dropout=0.0)),
    "mobilenet_v3_small": (64, _torchvision("mobilenet_v3_small", width_mult=0.5, dropout=0.0)),
    "mobilenet_v3_large": (64, _torchvision("mobilenet_v3_large", width_mult=0.35, dropout=0.0)),
    "mnasnet": (64, lambda: tv.MNASNet(0.35, num_classes=CLASSES, dropout=0.0)),
    "efficientnet_b0": (64, _torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0)),
    "efficientnet_v2": (64, _efficientnet_v2),
    "regnet_x": (32, lambda: _regnet(None)),
    "regnet_y": (32, lambda: _regnet(0.25)),
    "convnext": (64, _convnext),
    "swin": (32, _swin),
    "swin_v2": (32, lambda: _swin(**_SWIN_V2)),
    "vit": (32, lambda: tv.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=CLASSES)),
    "maxvit": (64, _maxvit),
}  # fmt: skip
_TIMM: dict[str, tuple[int, Build]] = {
    "resnetv2_50": (32, _timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 64, 96, 128), stem_chs=16)),
    "seresnet18": (32, _timm("seresnet18", layers=(1, 1, 1, 1))),
    "ecaresnet50t": (32, _timm("ecaresnet50t", layers=(1, 1, 1, 1), base_width=16)),
    "resnest14d": (32, _timm("resnest14d", base_width=16, stem_width=16)),
    "res2net50_14w_8s": (32, _timm("res2net50_14w_8s", layers=(1, 1, 1, 1))),
    "skresnet18": (32, _timm("skresnet18", layers=(1, 1, 1, 1))),
    "mobilenetv3_small_050": (64, _timm("mobilenetv3_small_050")),
    "mobilenetv4_conv_small_035": (64, _timm("mobilenetv4_conv_small_035")),
    "efficientnet_lite0": (64, _timm("efficientnet_lite0")),
    "tinynet_e": (64, _timm("tinynet_e")),
    "lcnet_035": (64, _timm("lcnet_035")),
    "ghostnet_050": (64, _timm("ghostnet_050")),
    "repvgg_a0": (32, _timm("repvgg_a0")),
    "hardcorenas_a": (64, _timm("hardcorenas_a")),
    "hrnet_w18_small": (64, _timm("hrnet_w18_small")),
    "dla46_c": (64, _timm("dla46_c")),
    "ese_vovnet19b_slim_dw": (64, _timm("ese_vovnet19b_slim_dw")),
    "rexnet_100": (64, _timm("rexnet_100")),
    "convnext_atto": (32, _timm("convnext_atto", depths=(1, 1, 2, 1))),
    "nf_regnet_b0": (64, _timm("nf_regnet_b0")),
    "vit_tiny": (32, _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2)),
    "deit_tiny": (32, _timm("deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2)),
    "swin_tiny": (32, _timm_swin()),
    "beit": (32, _timm("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)),
    "cait_xxs24": (32, _timm("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)),
    "xcit_nano": (32, _timm("xcit_nano_12_p8_224", img_size=32, embed_dim=24, depth=2, num_heads=2)),
    "pit_ti": (32, _timm("pit_ti_224", img_size=32, patch_size=8, stride=4, base_dims=(16, 16, 16), depth=(1, 1, 1))),
    "pvt_v2_b0": (64, _timm("pvt_v2_b0", depths=(1, 1, 1, 1))),
    "levit_128s": (64, _timm("levit_128s", img_size=64)),
    "mixer": (32, lambda: _mlp()),
    "gmlp": (32, lambda: _mlp(block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=6)),
    "resmlp": (32, lambda: _mlp(block_layer=ResBlock, norm_layer=Affine, mlp_ratio=4)),
    "poolformer": (32, _poolformer),
    "mobilevit_xxs": (64, _timm("mobilevit_xxs")),
    "edgenext_xx_small": (64, _timm("edgenext_xx_small")),
    "efficientformerv2_s0": (64, _timm("efficientformerv2_s0", img_size=64)),
    "fastvit_t8": (64, _timm("fastvit_t8", layers=(1, 1, 1, 1))),
}  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    f"{library}:{name}": Architecture(library, size, build)
    for library, table in (("torchvision", _TORCHVISION), ("timm", _TIMM))
    for name, (size, build) in table.items()
}
