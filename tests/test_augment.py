"""augment: random changes of whole batches, and rare classes."""

import numpy as np
import pytest
import torch
from helpers import CLASSES, Examples, picture, user_error, write_set

from ctutils import augment, config
from ctutils.augment import balanced_loader, build_augment, class_weights, make_imbalanced
from ctutils.data import build_store, feature_loaders, load_folder

# --- Pictures ---


def batch(count: int = 6, size: int = 48) -> torch.Tensor:
    return torch.from_numpy(np.stack([picture(i % 3, i, (size, size)) for i in range(count)]))[:, None]


@pytest.mark.parametrize("names", [(name,) for name in augment.AUGMENTATIONS] + [augment.AUGMENTATIONS])
def test_augmentation_keeps_shape_type_and_grey_range(names):
    images = batch()
    before = images.clone()
    torch.manual_seed(1)
    changed = build_augment(names)(images)
    assert (changed.dtype, changed.shape) == (torch.uint8, images.shape)
    assert images.equal(before), "the caller's pictures were changed"
    assert not changed.equal(images)
    torch.manual_seed(1)
    assert build_augment(names)(images).equal(changed), "the same seed must give the same pictures"
    torch.manual_seed(2)
    assert not build_augment(names)(images).equal(changed)


@pytest.mark.parametrize("names", [(name,) for name in augment.GEOMETRIC] + [augment.GEOMETRIC, ("blur",)])
def test_even_picture_stays_even(names):
    flat = torch.full((6, 1, 48, 48), 7, dtype=torch.uint8)
    assert build_augment(names)(flat).equal(flat), "corners included"


def test_every_picture_gets_its_own_draw():
    same = batch(1).expand(8, -1, -1, -1)
    for name in set(augment.AUGMENTATIONS) - {"flip", "randaugment"}:
        torch.manual_seed(0)
        changed = build_augment((name,))(same)
        assert len({picture.numpy().tobytes() for picture in changed}) > 5, name  # two faint blurs may agree


def test_flip_mirrors_about_half_of_the_pictures_exactly():
    images = batch(200, size=17)
    torch.manual_seed(0)
    changed = build_augment(("flip",))(images)
    mirrored = (changed == images.flip(3)).flatten(1).all(1)
    same = (changed == images).flatten(1).all(1)
    assert (mirrored ^ same).all(), "a flip must move pixels and nothing else"
    assert 70 < int(mirrored.sum()) < 130


def fixed_draw(monkeypatch, value: float) -> None:
    """Let every random number be `value`."""
    monkeypatch.setattr(torch, "rand", lambda count: torch.full((count,), value))


def test_middle_of_every_range_changes_nothing(monkeypatch):
    fixed_draw(monkeypatch, 0.5)
    images = batch()
    assert build_augment((*augment.GEOMETRIC, "jitter"))(images).equal(images)


def centre(image: torch.Tensor, air: int) -> np.ndarray:
    """Return the centre (x, y) of what is brighter than air, in pixels from the middle."""
    weight = (image[0].float() - air).clamp(min=0)
    steps = torch.arange(len(weight)) - (len(weight) - 1) / 2
    return np.array([float((weight.sum(0) * steps).sum()), float((weight.sum(1) * steps).sum())]) / float(weight.sum())


@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_how_far_it_goes(monkeypatch, draw):
    size, air = 100, 55
    image = torch.full((1, 1, size, size), air, dtype=torch.uint8)
    image[0, 0, 35:45, 70:80] = 235  # right of the middle and above
    x, y = centre(image[0], air)
    fixed_draw(monkeypatch, draw)
    results = {name: build_augment((name,))(image) for name in ("rotate", "zoom", "shift")}
    for name, changed in results.items():
        assert int(changed.min()) == air, f"{name} brings in pixels darker than the air"
        assert changed[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]].eq(air).all(), "corners are filled with air"
    moved = centre(results["shift"][0], air) - (x, y)
    assert np.abs(np.abs(moved) - 0.05 * size).max() < 0.1, f"shift by {moved} instead of 5 % of the side"
    new = centre(results["rotate"][0], air)
    turned = np.degrees(np.arctan2(new[1], new[0]) - np.arctan2(y, x))
    assert abs(abs(turned) - 10) < 0.3 and abs(np.hypot(*new) - np.hypot(x, y)) < 0.3
    zoomed = np.hypot(*centre(results["zoom"][0], air)) / np.hypot(x, y)
    assert abs(zoomed - (0.9 if draw == 0 else 1.1)) < 0.01
    area = (results["zoom"].float() - air).sum() / (image.float() - air).sum()
    assert abs(float(area) - zoomed**2) < 0.03


def test_air_is_that_of_each_picture(monkeypatch):
    fixed_draw(monkeypatch, 1.0)
    images = torch.stack([torch.full((1, 40, 40), air, dtype=torch.uint8) for air in (0, 55, 250)])
    images[:, :, 10:30, 10:30] = 128
    corners = build_augment(augment.GEOMETRIC)(images)[:, 0, [0, -1], [-1, 0]]
    assert corners.tolist() == [[0, 0], [55, 55], [250, 250]]


def test_no_names_no_augmentation():
    assert build_augment(()) is None


def test_unknown_augmentation_lists_the_known():
    with user_error("warp", "rotate, zoom, shift, flip, blur, noise, jitter, randaugment"):
        build_augment(("rotate", "warp"))


def test_box_moves_with_its_pixels():
    """The same seed makes the same draw, so that a box drawn as a picture follows its finding."""
    images = torch.zeros(8, 1, 64, 64, dtype=torch.uint8)
    images[:, :, 20:30, 36:50] = 200
    mask = (images > 0).to(torch.uint8) * 255
    for names in [(name,) for name in augment.GEOMETRIC] + [augment.GEOMETRIC]:
        torch.manual_seed(4)
        moved = build_augment(names)(images)
        torch.manual_seed(4)
        box = build_augment(names)(mask)
        assert ((moved > 100) == (box > 127)).float().mean() > 0.999, names  # half a grey level at the rim


def test_blur_takes_detail_and_keeps_the_mean():
    images = batch(8)
    torch.manual_seed(0)
    changed = build_augment(("blur",))(images).float()
    detail = [float((x[..., 1:] - x[..., :-1]).abs().mean()) for x in (changed, images.float())]
    assert detail[0] < 0.8 * detail[1]
    assert (changed.mean((1, 2, 3)) - images.float().mean((1, 2, 3))).abs().max() < 1


def test_blur_is_a_gaussian_of_the_sigma_drawn(monkeypatch):
    from torchvision.transforms.v2 import functional as reference

    fixed_draw(monkeypatch, 1.0)
    images = batch(3)
    expected = reference.gaussian_blur(images, [9, 9], [1.5, 1.5])
    inner = (..., slice(4, -4), slice(4, -4))  # the borders are padded in another way
    found = build_augment(("blur",))(images)
    assert (found[inner].int() - expected[inner].int()).abs().max() <= 1


def test_noise_and_jitter_are_as_strong_as_they_say(monkeypatch):
    fixed_draw(monkeypatch, 1.0)
    images = torch.full((4, 1, 64, 64), 120, dtype=torch.uint8)
    torch.manual_seed(0)
    noisy = build_augment(("noise",))(images).float()
    assert float(noisy.std()) == pytest.approx(8, rel=0.05) and float(noisy.mean()) == pytest.approx(120, abs=0.3)
    images[:, :, :, :32] = 80  # mean 100: 80 and 120 become 96 and 144
    assert build_augment(("jitter",))(images).unique().tolist() == [96, 144]


def test_grey_levels_stop_at_black_and_white(monkeypatch):
    fixed_draw(monkeypatch, 1.0)
    white = torch.full((2, 1, 40, 40), 250, dtype=torch.uint8)
    assert build_augment(("jitter",))(white).unique().tolist() == [255]


def test_randaugment_fills_with_the_air_of_each_picture():
    torch.manual_seed(0)
    images = torch.full((40, 1, 32, 32), 55, dtype=torch.uint8)
    changed = build_augment(("randaugment",))(images)
    even = (changed == changed[:, :, :1, :1]).flatten(1).all(1)
    # Two changes a picture: only one whose grey was changed before it was moved may show its old air.
    assert even.float().mean() > 0.85, "moved pictures of one grey must not get corners of another"


# --- Rare classes ---


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "project_root", lambda: tmp_path / "project")
    return load_folder(write_set(tmp_path / "set", per_class=20))


def test_imbalanced_set_loses_training_slices_only(folder):
    few = make_imbalanced(folder, 10)
    assert few.counts()["train"].tolist() == [20, 6, 2]
    for split in ("val", "test"):
        assert few.rows(split).tolist() == folder.rows(split).tolist()
    assert set(few.rows("train")) < set(folder.rows("train"))
    assert len(few.slices) == len(folder.slices), "rows of the store must stay where they are"
    assert few.rows("train").tolist() == make_imbalanced(folder, 10).rows("train").tolist()
    assert few.rows("train").tolist() != make_imbalanced(folder, 10, seed=1).rows("train").tolist()
    assert make_imbalanced(folder, None) is folder
    assert make_imbalanced(few, 1).counts()["train"].tolist() == [2, 2, 2]
    assert make_imbalanced(folder, 1000).counts()["train"].min() == 2
    for ratio in (0.5, 0, float("nan")):
        with user_error(f"imbalance of {ratio}", "1 or more"):
            make_imbalanced(folder, ratio)


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

    def drawn(seed):
        torch.manual_seed(seed)
        return torch.cat([labels for _, labels in loader])

    labels = drawn(0)
    assert len(labels) == 600 and len(loader) == 19
    assert all(140 < int((labels == k).sum()) < 260 for k in range(3)), labels.bincount()
    assert drawn(0).equal(labels) and not drawn(1).equal(labels)


def test_balanced_loader_over_cached_features(folder):
    few = make_imbalanced(folder, 10)
    features = torch.arange(len(folder.slices)).float()[:, None]
    plain = feature_loaders(few, features)["train"]
    loader = balanced_loader(plain.dataset, few.labels[few.rows("train")], 8)
    rows = torch.cat([inputs for inputs, _ in loader])[:, 0].long().tolist()
    assert set(rows) <= set(few.rows("train").tolist()) and len(rows) == 28
    assert len(build_store(few, 32, cache=folder.root / "cache")) == len(folder.slices)
    assert few.classes == CLASSES
