"""augment: random changes of whole batches, and rare classes."""

import numpy as np
import pytest
import torch
from helpers import Examples, picture, user_error, write_set
from torchvision.transforms.v2 import functional as reference

from ctutils.augment import AUGMENTATIONS, GEOMETRIC, balanced_loader, build_augment, class_weights, make_imbalanced
from ctutils.data import feature_loaders, load_folder


def batch(count: int = 6, size: int = 48) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(i % 3, i, (size, size)) for i in range(count)]))[:, None]


def change(names: tuple[str, ...], images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return build_augment(names)(images)


def fixed_draw(monkeypatch, value: float) -> None:
    """Let every random number be `value`."""
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), value))


@pytest.mark.parametrize("names", [(name,) for name in AUGMENTATIONS] + [AUGMENTATIONS])
def test_augmentation_keeps_shape_type_and_grey_range(names):
    images = batch()
    before, changed = images.clone(), change(names, images)
    assert (changed.dtype, changed.shape) == (torch.uint8, images.shape) and not changed.equal(images)
    assert images.equal(before) and change(names, images).equal(changed), "the same seed must give the same pictures"
    assert not change(names, images, seed=2).equal(changed)
    if not {"flip", "randaugment"} & set(names):
        same = change(names, batch(1).expand(8, -1, -1, -1))
        assert len({one.numpy().tobytes() for one in same}) > 5, "one draw for all"  # two faint blurs may agree


@pytest.mark.parametrize("names", [(name,) for name in GEOMETRIC] + [GEOMETRIC, ("blur",)])
def test_even_picture_stays_even_and_a_box_moves_with_its_pixels(names):
    flat = torch.tensor([0, 55, 250], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 48, 48)
    assert change(names, flat).equal(flat), "corners are filled with the air of each picture"
    images = torch.zeros(8, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 20:30, 36:50] = 200
    moved, box = change(names, images, seed=4), change(names, (images > 0).to(torch.uint8) * 255, seed=4)
    assert ((moved > 100) == (box > 127)).float().mean() > 0.999  # half a grey level at the rim


def test_flip_mirrors_about_half_of_the_pictures_exactly():
    images = batch(200, size=17)
    changed = change(("flip",), images)
    mirrored, same = ((changed == other).flatten(1).all(1) for other in (images.flip(3), images))
    assert (mirrored ^ same).all() and 70 < int(mirrored.sum()) < 130, "a flip must move pixels and nothing else"


def test_middle_of_every_range_and_no_names_change_nothing(monkeypatch):
    assert build_augment(()) is None
    fixed_draw(monkeypatch, 0.5)
    assert build_augment((*GEOMETRIC, "jitter"))(batch()).equal(batch())


def centre(image: torch.Tensor) -> np.ndarray:
    """Return the centre (x, y) of what is brighter than air (55), in pixels from the middle."""
    weight = (image[0].float() - 55).clamp(min=0)
    steps = torch.arange(len(weight)) - (len(weight) - 1) / 2
    return np.array([float((weight.sum(0) * steps).sum()), float((weight.sum(1) * steps).sum())]) / float(weight.sum())


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_how_far_it_goes(monkeypatch, draw):
    image = torch.full((1, 1, 100, 100), 55, dtype=torch.uint8)
    image[0, 0, 35:45, 70:80] = 235  # right of the middle and above
    x, y = centre(image[0])
    fixed_draw(monkeypatch, draw)
    results = {name: build_augment((name,))(image) for name in ("rotate", "zoom", "shift")}
    for name, changed in results.items():
        corners = changed[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert int(changed.min()) == int(corners.max()) == 55, f"{name} brings in other grey than the air's"
    moved = centre(results["shift"][0]) - (x, y)
    assert np.abs(np.abs(moved) - 5).max() < 0.1, f"shift by {moved} instead of 5 % of the side"
    new = centre(results["rotate"][0])
    turned = np.degrees(np.arctan2(new[1], new[0]) - np.arctan2(y, x))
    assert abs(abs(turned) - 10) < 0.3 and abs(np.hypot(*new) - np.hypot(x, y)) < 0.3
    zoomed = np.hypot(*centre(results["zoom"][0])) / np.hypot(x, y)
    area = float((results["zoom"].float() - 55).sum() / (image.float() - 55).sum())
    assert abs(zoomed - (0.9 if draw == 0 else 1.1)) < 0.01 and abs(area - zoomed**2) < 0.03


def test_unknown_augmentation_lists_the_known():
    with user_error("warp", "rotate, zoom, shift, flip, blur, noise, jitter, randaugment"):
        build_augment(("rotate", "warp"))


def test_blur_noise_and_jitter_are_as_strong_as_they_say(monkeypatch):
    fixed_draw(monkeypatch, 1.0)
    images = batch(3)
    expected, found = reference.gaussian_blur(images, [9, 9], [1.5, 1.5]), build_augment(("blur",))(images)
    inner = (..., slice(4, -4), slice(4, -4))  # the borders are padded in another way
    assert (found[inner].int() - expected[inner].int()).abs().max() <= 1
    even = torch.full((4, 1, 64, 64), 120, dtype=torch.uint8)
    noisy = change(("noise",), even).float()
    assert float(noisy.std()) == pytest.approx(8, rel=0.05) and float(noisy.mean()) == pytest.approx(120, abs=0.3)
    even[:, :, :, :32] = 80  # mean 100: 80 and 120 become 96 and 144
    assert build_augment(("jitter",))(even).unique().tolist() == [96, 144]
    assert build_augment(("jitter",))(torch.full_like(even, 250)).unique().tolist() == [255], "white is the end"


def test_randaugment_fills_with_the_air_of_each_picture():
    changed = change(("randaugment",), torch.full((40, 1, 32, 32), 55, dtype=torch.uint8))
    even = (changed == changed[:, :, :1, :1]).flatten(1).all(1)
    assert even.float().mean() > 0.85  # one whose grey was changed before it was moved may show its old air


def test_imbalanced_set_loses_training_slices_only_and_is_drawn_evenly(tmp_path):
    folder = load_folder(write_set(tmp_path / "set", per_class=20), cache=tmp_path / "cache")
    few = make_imbalanced(folder, 10)
    assert few.counts()["train"].tolist() == [20, 6, 2]
    assert all(few.rows(split).tolist() == folder.rows(split).tolist() for split in ("val", "test"))
    assert set(few.rows("train")) < set(folder.rows("train")) and len(few.slices) == len(folder.slices)
    assert few.rows("train").tolist() == make_imbalanced(folder, 10).rows("train").tolist()
    assert few.rows("train").tolist() != make_imbalanced(folder, 10, seed=1).rows("train").tolist()
    assert make_imbalanced(folder, None) is folder and make_imbalanced(folder, 1000).counts()["train"].min() == 2
    assert make_imbalanced(few, 1).counts()["train"].tolist() == [2, 2, 2]
    for ratio in (0.5, 0, float("nan")):
        with user_error(f"imbalance of {ratio}", "1 or more"):
            make_imbalanced(folder, ratio)
    data = feature_loaders(few, torch.arange(len(folder.slices)).float()[:, None])["train"].dataset
    loader = balanced_loader(data, few.labels[few.rows("train")], 8)
    rows = torch.cat([inputs for inputs, _ in loader])[:, 0].long().tolist()
    assert set(rows) <= set(few.rows("train").tolist()) and len(rows) == 28


def test_class_weights_even_out_the_classes():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights(labels, 3)
    assert weights.dtype == np.float32 and weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert weights[labels].mean() == pytest.approx(1)
    assert class_weights(labels, 4)[3] == pytest.approx(2.5), "a class without slices must not divide by zero"


def test_balanced_loader_draws_rare_classes_as_often():
    data = Examples(600)
    data.labels = torch.tensor([0] * 540 + [1] * 40 + [2] * 20)
    loader = balanced_loader(data, data.labels.numpy(), 32)
    torch.manual_seed(0)
    labels, others = (torch.cat([labels for _, labels in loader]) for _ in range(2))
    assert len(labels) == 600 and len(loader) == 19
    assert all(140 < int((labels == k).sum()) < 260 for k in range(3)), labels.bincount()
    torch.manual_seed(0)
    assert torch.cat([labels for _, labels in loader]).equal(labels) and not others.equal(labels)
