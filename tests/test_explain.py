"""Grad-CAM, heat in a box and the most confident errors."""

from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from ctutils.base import CTError
from ctutils.explain import grad_cam, heat_in_box, most_wrong, pointing_hit
from ctutils.registry import BACKBONES


def finder() -> nn.Sequential:
    """Return a frozen CNN with constructed weights: class 1 is "something bright", class 0 "nothing"."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True),
        nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False),
    )  # fmt: skip
    model[0].weight.data[:] = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)  # map 0: brightness around a pixel
    model[6].weight.data[:] = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    return model.requires_grad_(False).eval()


def square(left: int, top: int) -> torch.Tensor:
    """Return a dark picture (1, 3, 32, 32) with a bright square of 8 x 8."""
    return nn.functional.pad(torch.ones(1, 3, 8, 8), (left, 24 - left, top, 24 - top))


def by_hand(maps: torch.Tensor, gradient: torch.Tensor, side: int) -> np.ndarray:
    """Return the heat that maps and gradient (B, K, h, w) mean, (B, side, side)."""
    heat = (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
    heat = nn.functional.interpolate(heat, size=(side, side), mode="bilinear")[:, 0]
    return (heat / heat.amax((1, 2), keepdim=True)).numpy()


def test_heat_moves_with_the_finding_and_is_of_the_class_asked_for():
    corners = [(0, 0), (24, 0), (8, 16)]
    images = torch.cat([square(*corner) for corner in corners])
    heat = grad_cam(finder(), images, 1, layer="0")
    assert heat.dtype == np.float32 and heat.min() == 0 and (heat.max(axis=(1, 2)) == 1).all()
    for one, (left, top) in zip(heat, corners, strict=True):
        box, other = (left, top, left + 8, top + 8), (16, 24, 24, 32)
        assert pointing_hit(one, box) and heat_in_box(one, box) > 0.7
        assert not pointing_hit(one, other) and heat_in_box(one, other) < 0.01
        np.testing.assert_allclose(grad_cam(finder(), square(left, top), layer="0")[0], one, atol=1e-6)  # predicted: 1
    both = grad_cam(finder(), images, torch.tensor([1, 0, 1], dtype=torch.int32), layer="3")
    assert both.min() == 0 and both.max((1, 2)).tolist() == [1, 0, 1], "an empty map stays empty"


def test_layers_before_an_in_place_relu_and_in_either_part():
    model, image = finder(), square(8, 8)
    maps = model[1](model[0](image))  # what follows is the mean of their positive part, then a linear
    expected = by_hand(maps, torch.tensor([1.0, -1.0]).view(1, 2, 1, 1) * (maps > 0), 32)
    for cut, layer in ((2, "1"), (1, "1"), (2, "backbone.1"), (1, "head.1"), (1, model[1])):
        parts = nn.Sequential(OrderedDict(backbone=model[:cut], head=model[cut:]))  # the layers keep their names
        np.testing.assert_allclose(grad_cam(parts, image, 1, layer=layer), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(grad_cam(model, image, 1, layer="1"), expected, atol=0.02)


def test_model_is_left_as_it_was_after_errors_too():
    model, image = finder().train(), square(0, 0)
    model[6].requires_grad_(True)
    model[4].eval()

    modes = [(part.training, len(part._forward_hooks)) for part in model.modules()]
    with torch.no_grad():
        heat = grad_cam(model, image, layer="0")
    with torch.inference_mode():
        assert np.array_equal(heat, grad_cam(model, square(0, 0), layer="0"))
    assert np.array_equal(heat, grad_cam(finder(), image, layer="0")), "train mode reached the map"
    wrong = [("nowhere", 1, "no layer 'nowhere'"), ("6", 1, r"Linear with output \(1, 2\)"), (nn.ReLU(), 1, "not pass")]
    wrong += [("0", 2, "index 2 is out"), ("0", -1, "index -1 is out"), ("0", torch.tensor([0, 1]), "expanded size")]
    for layer, target, message in wrong:
        with pytest.raises((CTError, IndexError, RuntimeError), match=message):
            grad_cam(model, image, target, layer=layer)
    assert modes == [(part.training, len(part._forward_hooks)) for part in model.modules()]
    assert [(t.requires_grad, t.grad) for t in model.parameters()] == [(False, None)] * 3 + [(True, None)]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in finder().state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_the_map_of_the_definition(name):
    torch.manual_seed(0)
    spec = BACKBONES[name]
    model = timm.create_model(spec.timm) if spec.timm else torchvision.models.get_model(name)
    maps, images = [], torch.randn(2, 3, 96, 96, requires_grad=True)
    if name == "densenet161":  # joined, as the course joins it: its ReLU is a module
        body = OrderedDict(features=model.features, relu=nn.ReLU(inplace=True), pool=nn.AdaptiveAvgPool2d(1))
        head = nn.Sequential(nn.Flatten(), model.classifier)
        model = nn.Sequential(OrderedDict(backbone=nn.Sequential(body), head=head))
    path = "backbone." * (name == "densenet161") + spec.cam_layer
    layer = model.eval().requires_grad_(False).get_submodule(path)
    with layer.register_forward_hook(lambda _layer, _given, output: maps.append(output)):
        logits = model(images)
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), maps[0])
    heat = grad_cam(model, images, layer=name)
    np.testing.assert_allclose(heat, by_hand(maps[0], gradient, 96), atol=1e-4)
    assert heat.std((1, 2)).min() > 0.01 and np.abs(heat[0] - heat[1]).max() > 1e-3, "no map of its picture"
    if name == "densenet161":  # after its ReLU, which gives another map than before it
        assert maps[0].min() == 0 and np.abs(grad_cam(model, images, layer="features.norm5") - heat).max() > 0.1


def test_heat_in_box_and_pointing():
    heat = np.zeros((4, 6))
    heat[1, 2], heat[3, 5] = 3.0, 1.0
    boxes = [(2, 1, 3, 2), (1.5, 0.5, 2.5, 1.5), (-5, -5, 99, 99), (0, 0, 2, 1)]  # touched pixels count
    assert [heat_in_box(heat, box) for box in boxes] == [0.75, 0.75, 1, 0]
    assert [pointing_hit(heat, box) for box in (*boxes, (3, 1, 6, 4), (10, 10, 12, 12))] == [True] * 3 + [False] * 3
    assert heat_in_box(np.zeros((4, 6)), (0, 0, 6, 4)) == 0 and not pointing_hit(np.zeros((4, 6)), (0, 0, 6, 4))


def test_most_wrong():
    y_true = np.array([0, 1, 2, 0, 1])
    y_score = np.array([[0.2, 0.8, 0], [0.6, 0.4, 0], [0, 0, 1], [0, 0.1, 0.9], [0.45, 0.55, 0]])
    assert most_wrong(y_true, y_score).tolist() == [3, 0, 1] and most_wrong(y_true, y_score, n=2).tolist() == [3, 0]
    assert most_wrong(y_true[[2]], y_score[[2]]).tolist() == []
