"""Grad-CAM, heat in a box and the most confident errors."""

import numpy as np
import pytest
import torch
from torch import nn

from ctutils import models
from ctutils.base import CTError
from ctutils.explain import grad_cam, heat_in_box, most_wrong, pointing_hit
from ctutils.models import BACKBONES, adapt_batchnorm, freeze, join, split_model


def finder() -> nn.Sequential:
    """Return a frozen CNN with constructed weights: class 1 is "something bright", class 0 "nothing"."""
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True),
        nn.AvgPool2d(4), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[0] = 1.0  # map 0: brightness around a pixel
        model[0].weight[1] = -1.0
        model[7].weight.copy_(torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
        model[7].bias.zero_()
    return model.requires_grad_(False).eval()


def slices(*corners: tuple[int, int]) -> torch.Tensor:
    """Return dark pictures (B, 3, 32, 32), each with one bright square of 8 x 8 at (left, top)."""
    images = torch.zeros(len(corners), 3, 32, 32)
    for image, (left, top) in zip(images, corners, strict=True):
        image[:, top : top + 8, left : left + 8] = 1
    return images


def test_heat_moves_with_the_finding():
    corners = [(0, 0), (24, 0), (8, 16)]
    heat = grad_cam(finder(), slices(*corners), target=1, layer="0")
    assert heat.shape == (3, 32, 32) and heat.dtype == np.float32
    assert heat.min() == 0 and (heat.max(axis=(1, 2)) == 1).all()
    for one, (left, top) in zip(heat, corners, strict=True):
        box = (left, top, left + 8, top + 8)
        assert pointing_hit(one, box) and heat_in_box(one, box) > 0.7
        other = (16, 24, 24, 32)
        assert not pointing_hit(one, other) and heat_in_box(one, other) < 0.01


def test_heat_is_that_of_the_formula():
    model, images = finder(), slices((8, 8))
    maps = model[3](model[2](model[1](model[0](images))))  # (1, 2, 8, 8); the head is their mean and a linear
    expected = torch.relu(maps[0, 0] * 1 / 64 + maps[0, 1] * -1 / 64)
    expected = nn.functional.interpolate(expected[None, None], size=(32, 32), mode="bilinear")[0, 0]
    heat = grad_cam(model, images, target=1, layer=model[3])
    np.testing.assert_allclose(heat[0], (expected / expected.max()).numpy(), atol=1e-6)


def test_target_chooses_the_class():
    images = slices((0, 0), (24, 24))
    both = grad_cam(finder(), images, target=torch.tensor([1, 0]), layer="3")
    assert both[0].max() == 1
    assert both[1].min() == both[1].max() == 0, "nothing speaks for class 0, and an empty map stays empty"
    predicted = grad_cam(finder(), images, layer="3")  # class 1 for both
    assert np.array_equal(predicted, grad_cam(finder(), images, target=1, layer="3"))


def test_images_do_not_influence_each_other():
    together = grad_cam(finder(), slices((0, 0), (24, 0)), layer="3")
    alone = grad_cam(finder(), slices((24, 0)), layer="3")
    np.testing.assert_allclose(together[1], alone[0], atol=1e-6)


def test_model_is_left_as_it_was():
    model = finder()
    model[7].requires_grad_(True)
    model.train()
    model[4].eval()
    modes = [part.training for part in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = slices((0, 0))
    with torch.no_grad():
        inside = grad_cam(model, images, layer="0")
    assert np.array_equal(inside, grad_cam(finder(), images, layer="0")), "train mode reached the map"
    with torch.inference_mode():
        assert np.array_equal(inside, grad_cam(model, images, layer="0"))
    with pytest.raises(CTError):
        grad_cam(model, images, layer="7")
    assert modes == [part.training for part in model.modules()]
    assert [p.requires_grad for p in model.parameters()] == [False] * 3 + [True] * 2
    assert all(p.grad is None for p in model.parameters()) and not images.requires_grad
    assert all(not part._forward_hooks for part in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_wholly_frozen(name):
    torch.manual_seed(0)
    model = models._make(BACKBONES[name])
    freeze(model, train=[])
    images = torch.randn(2, 3, 96, 96)
    adapt_batchnorm(model, [images])  # else random weights of 152 layers hardly see the picture
    heat = grad_cam(model, images, layer=name)
    assert heat.shape == (2, 96, 96) and np.isfinite(heat).all()
    assert (heat.max(axis=(1, 2)) == 1).all(), "a map without heat"
    assert heat.std(axis=(1, 2)).min() > 0.01, "heat everywhere is no map"
    assert np.abs(heat[0] - heat[1]).max() > 0.01, "two pictures, one map"
    joined = join(*split_model(model, name))
    assert np.array_equal(grad_cam(joined, images, layer=name), heat)


@pytest.mark.parametrize("name", BACKBONES)
def test_heat_of_every_backbone_moves_with_the_finding(name):
    torch.manual_seed(0)
    real = name == "efficientnet_lite0"  # the one whose weights are always there
    model = models.build_model(name, "imagenet")[0] if real else models._make(BACKBONES[name])
    freeze(model, train=[])
    images, patch = torch.zeros(2, 3, 160, 160), torch.randn(3, 48, 48)
    images[0, :, 56:104, 16:64] = images[1, :, 56:104, 80:128] = patch  # 64 pixels further right
    if not real:
        adapt_batchnorm(model, [images[:1] + 0.3 * torch.randn(4, 3, 160, 160)])
    with torch.no_grad():
        target = int((model(images[:1]) - model(torch.zeros(1, 3, 160, 160))).argmax())  # what the patch speaks for
    left, right = grad_cam(model, images, target, layer=name)
    moved, stayed = (np.corrcoef(view.ravel(), right.ravel())[0, 1] for view in (np.roll(left, 64, axis=1), left))
    assert moved > stayed + 0.2, f"moved {moved:.2f}, stayed {stayed:.2f}"


@pytest.mark.parametrize(
    "layer, target, message",
    [
        ("nowhere", 1, "no layer 'nowhere'"),
        ("7", 1, r"layer '7', with output \(1, 2\)"),
        (nn.ReLU(), 1, "layer 'ReLU', which the model does not pass through"),
        ("0", 2, r"target 2.*a class in \[0, 2\)"),
        ("0", torch.tensor([0, 1]), "target .*or 1 of them"),
    ],
)
def test_grad_cam_errors(layer, target, message):
    with pytest.raises(CTError, match=message):
        grad_cam(finder(), slices((0, 0)), target, layer=layer)


def test_heat_in_box_and_pointing():
    heat = np.zeros((4, 6))
    heat[1, 2], heat[3, 5] = 3.0, 1.0
    assert heat_in_box(heat, (2, 1, 3, 2)) == 0.75
    assert heat_in_box(heat, (1.5, 0.5, 2.5, 1.5)) == 0.75  # a pixel that is only touched counts
    assert heat_in_box(heat, (-5, -5, 99, 99)) == 1
    assert heat_in_box(heat, (0, 0, 2, 1)) == 0 and heat_in_box(np.zeros((4, 6)), (0, 0, 6, 4)) == 0
    assert pointing_hit(heat, (2, 1, 3, 2)) and not pointing_hit(heat, (3, 1, 6, 4))
    assert not pointing_hit(heat, (10, 10, 12, 12)) and not pointing_hit(np.zeros((4, 6)), (0, 0, 6, 4))


def test_most_wrong():
    y_true = np.array([0, 1, 2, 0, 1])
    y_score = np.array([[0.2, 0.8, 0], [0.6, 0.4, 0], [0, 0, 1], [0, 0.1, 0.9], [0.45, 0.55, 0]])
    assert most_wrong(y_true, y_score).tolist() == [3, 0, 1]
    assert most_wrong(y_true, y_score, n=2).tolist() == [3, 0]
    assert most_wrong(y_true[[2]], y_score[[2]]).tolist() == []
    with pytest.raises(CTError, match=r"labels \(4,\) and scores \(5, 3\)"):
        most_wrong(y_true[:4], y_score)
    with pytest.raises(CTError, match="labels from 0 to 3"):
        most_wrong(np.array([0, 1, 2, 0, 3]), y_score)
