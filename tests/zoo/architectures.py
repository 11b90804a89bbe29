"""The architectures that are tried: one small member of each family, and what is known to stop it."""

from __future__ import annotations

from typing import NamedTuple


class Architecture(NamedTuple):
    """One trial."""

    family: str
    name: str
    """timm's."""
    refusal: str = ""
    """What the reason begins with, where this one is known not to pass."""
    note: str = ""
    """What is behind it, where the reason does not say."""


ATTENTION = (
    "torch cannot export this model to ONNX: Error when translating node %scaled_dot_product_attention",
    "torch's exporter knows attention over four axes only, and this has five",
)
PAD = (
    "B=1: features",
    "ONNX Runtime's optimizer Pad_Fusion makes zeros around a maximum into -inf, and here what they surround is "
    "negative; without that optimizer the difference is 1e-05",
)

ARCHITECTURES = (
    Architecture("ResNet", "resnet10t"),
    Architecture("ConvNeXt", "convnext_atto"),
    Architecture("EfficientNet", "efficientnet_b0"),
    Architecture("ViT", "vit_tiny_patch16_224"),
    Architecture("DeiT", "deit_tiny_patch16_224"),
    Architecture("Swin", "swin_tiny_patch4_window7_224"),
    Architecture("MobileNetV4", "mobilenetv4_conv_small"),
    Architecture("RegNet", "regnetx_002"),
    Architecture("MLP-Mixer", "mixer_s32_224"),
    Architecture("MobileOne", "mobileone_s0"),
    Architecture("RepVGG", "repvgg_a0"),
    Architecture("PoolFormer", "poolformer_s12"),
    Architecture("LeViT", "levit_128s", "the last layer of LevitDistilled is tuple"),
    Architecture("EfficientFormer", "efficientformer_l1", "the last layer of EfficientFormer is tuple"),
    Architecture("EdgeNeXt", "edgenext_xx_small"),
    Architecture("GhostNet", "ghostnet_050"),
    Architecture("DLA", "dla46_c", "the last layer of DLA is Conv2d"),
    Architecture("XCiT", "xcit_nano_12_p16_224"),
    Architecture("EVA", "eva02_tiny_patch14_336.mim_in22k_ft_in1k"),
    Architecture("PVT", "pvt_v2_b0"),
    Architecture("FastViT", "fastvit_t8"),
    Architecture("MobileViT", "mobilevit_xxs"),
    Architecture("RepViT", "repvit_m0_9", "the last layer of RepVit is RepVitClassifier"),
    Architecture("ResMLP", "resmlp_12_224"),
    Architecture("MambaOut", "mambaout_femto"),
    Architecture("StarNet", "starnet_s1"),
    Architecture("PiT", "pit_ti_224"),
    Architecture("TinyViT", "tiny_vit_5m_224.dist_in22k_ft_in1k"),
    Architecture("EfficientViT", "efficientvit_b0"),
    Architecture("LCNet", "lcnet_035"),
    Architecture("VoVNet", "ese_vovnet19b_slim_dw"),
    Architecture("HGNet", "hgnetv2_b0", *PAD),
    Architecture("InceptionNeXt", "inception_next_atto"),
    Architecture(
        "DeiT, distilled", "deit_tiny_distilled_patch16_224", "the last layer of VisionTransformerDistilled is tuple"
    ),
    Architecture("Hiera", "hiera_tiny_224", *ATTENTION),
    Architecture("CaiT", "cait_xxs24_224"),
    Architecture("Twins", "twins_svt_small", *ATTENTION),
    Architecture("DenseNet", "densenet121"),
    Architecture("ResNeXt", "resnext26ts"),
    Architecture("Inception", "inception_v3"),
    Architecture("CoAtNet", "coatnet_pico_rw_224"),
    Architecture("MaxViT", "maxvit_pico_rw_256"),
    Architecture("HRNet", "hrnet_w18_small"),
    Architecture("CrossViT", "crossvit_9_240", "the last layer of CrossVit is ModuleList"),
    Architecture("NFNet", "nf_regnet_b0"),
    Architecture("VGG", "vgg11"),
    Architecture("BEiT", "beit_base_patch16_224"),
)
