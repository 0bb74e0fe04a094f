"""The backbones: places, weights policy, freezing, cutting, BatchNorm, saving and restoring."""

import dataclasses
import errno
import http.server
import pickle
import re
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_image
from torch import nn

from ctutils import models, weights
from ctutils.base import CTError, file_sha256
from ctutils.models import (
    BACKBONES,
    Standardise,
    adapt_batchnorm,
    build_model,
    count_parameters,
    freeze,
    get_module,
    join,
    replace_head,
    restore_model,
    run_tensors,
    set_module,
    split_model,
    standardise_head,
    state_sha256,
    unfreeze,
)

SMALL = "mobilenet_v3_large"  # the smallest of torchvision's six


@pytest.fixture(autouse=True)
def no_cache_no_network(monkeypatch, tmp_path):
    """Each test has an empty torch cache, has not asked the network yet, and cannot reach it."""

    def refuse(*_args, **_kwargs):
        raise OSError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "_offline_until", 0.0)
    monkeypatch.setattr(weights, "_said", set())
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture(scope="module")
def small_state() -> dict[str, torch.Tensor]:
    return build_model(SMALL, "random", seed=5)[0].state_dict()


def images(count: int = 2, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- The registry and the cut ---


@pytest.mark.parametrize("name", BACKBONES)
def test_cut_and_joined_is_the_same_network(name):
    spec = BACKBONES[name]
    model = models._make(spec)
    head = get_module(model, spec.head)
    assert (head.in_features, head.out_features) == (spec.in_features, 1000)
    new = replace_head(model, name, 5)
    assert get_module(model, spec.head) is new

    backbone, head = split_model(model, name)
    x = images()
    with torch.no_grad():
        features = backbone(x)
        before = features.clone()
        assert features.shape == (2, spec.features)
        assert torch.equal(join(backbone, head).eval()(x), model(x)), "joined and whole network differ"

        # With dropout on, from the same random stream, head(features) is the network's output.
        assert not any(isinstance(part, nn.Dropout) for part in backbone.modules())
        for part in model.modules():
            part.train(isinstance(part, nn.Dropout))
        torch.manual_seed(1)
        whole = model(x)
        torch.manual_seed(1)
        assert torch.equal(head(features), whole)
        assert torch.equal(features, before), "the head overwrites the cached features"

    own = {id(p) for p in model.parameters()}
    assert own == {id(p) for p in join(backbone, head).parameters()}, "layers must be shared, not copied"


def test_registry_follows_the_deck():
    deck = {spec.title: (spec.head, spec.in_features, spec.deck_f1) for spec in BACKBONES.values() if spec.deck_f1}
    assert deck == {
        "VGG16": ("classifier.6", 4096, 0.769312),
        "AlexNet": ("classifier.6", 4096, 0.788558),
        "ResNet50": ("fc", 2048, 0.905039),
        "ResNet152": ("fc", 2048, 0.922059),
        "DenseNet161": ("classifier", 2208, 0.931303),
        "MobileNetV3": ("classifier.3", 1280, 0.936962),
    }
    import torchvision.models as tv

    for name in list(BACKBONES)[:6]:
        assert BACKBONES[name].url == tv.get_model_weights(name).IMAGENET1K_V1.url


def test_unknown_backbone_lists_the_names():
    with pytest.raises(CTError, match="resnet51.*resnet50.*efficientnet_lite0"):
        build_model("resnet51")


def test_split_of_another_network_is_an_error():
    with pytest.raises(CTError, match="no layer 'conv1'"):
        split_model(nn.Sequential(nn.Linear(2, 2)), "resnet50")


# --- Weights policy ---


def test_random_weights_come_from_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model, info = build_model(SMALL, "random", seed=1)
    assert torch.equal(torch.rand(2), expected), "the caller's random state was changed"
    assert (info.kind, info.seed, info.sha256) == ("random", 1, state_sha256(model))
    assert "MobileNetV3 has random weights" in info.note
    assert not model.training
    assert build_model(SMALL, "random", seed=1)[1].sha256 == info.sha256
    assert build_model(SMALL, "random", seed=2)[1].sha256 != info.sha256


def test_auto_without_network_is_random_and_says_so_once(caplog):
    _, info = build_model(SMALL)
    assert info.kind == "random" and info.sha256 == build_model(SMALL, "random")[1].sha256
    assert "connect to the network" in info.note and BACKBONES[SMALL].weights_file in info.note
    build_model(SMALL)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_imagenet_without_network_is_an_error():
    with pytest.raises(CTError, match="no real weights for MobileNetV3.*CT_WEIGHTS"):
        build_model(SMALL, "imagenet")


def test_hanging_network_is_given_up_and_remembered(monkeypatch, tmp_path):
    calls = []

    def hang(*_args, **_kwargs):
        calls.append(1)
        time.sleep(30)

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    monkeypatch.setattr(weights, "PROBE_SECONDS", 1.1)
    begin = time.monotonic()
    assert not weights._answers("http://x/a.pth")
    assert not weights._answers("http://x/b.pth")
    assert time.monotonic() - begin < 2 and len(calls) == 1
    monkeypatch.setattr(weights, "_offline_until", 0.0)  # as in a new process
    assert not weights._answers("http://x/a.pth") and len(calls) == 1, "the time stamp was not believed"
    monkeypatch.setattr(weights, "OFFLINE_SECONDS", 0.0)  # as if it were old
    monkeypatch.setattr(weights, "PROBE_SECONDS", 0.1)
    assert not weights._answers("http://x/a.pth") and len(calls) == 2
    monkeypatch.setattr(weights, "OFFLINE_SECONDS", 300.0)
    assert not weights._answers("http://x/a.pth", patient=True) and len(calls) == 3


@pytest.fixture
def server(monkeypatch, tmp_path, small_state):
    """A web server in this process with a weights file that has its true hash in its name."""
    content = tmp_path / "content"
    content.mkdir()
    torch.save(small_state, content / "x.pth")
    name = f"{SMALL}-{file_sha256(content / 'x.pth')[:8]}.pth"
    (content / "x.pth").rename(content / name)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(content), **kwargs)

        def log_message(self, *_args):
            pass

    monkeypatch.undo()
    for variable, value in (("TORCH_HOME", str(tmp_path / "torch")), ("no_proxy", "*")):
        monkeypatch.setenv(variable, value)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setitem(models.BACKBONES, SMALL, dataclasses.replace(BACKBONES[SMALL], weights_file=name))
    monkeypatch.setattr(models.BackboneSpec, "url", f"http://127.0.0.1:{web.server_port}/{name}")
    yield content / name
    web.shutdown()
    web.server_close()


def test_download_goes_to_the_cache_and_is_used_from_there(server, monkeypatch, small_state):
    model, info = build_model(SMALL)
    assert info.kind == "imagenet" and info.note == "" and info.seed is None
    assert info.sha256 == file_sha256(server)
    assert torch.equal(model.classifier[3].weight, small_state["classifier.3.weight"])
    server.unlink()
    assert build_model(SMALL, "imagenet")[1] == info


def test_download_cut_short_leaves_nothing(server):
    server.write_bytes(server.read_bytes()[:1000])
    with pytest.raises(CTError, match="cut short"):
        build_model(SMALL, "imagenet")
    assert build_model(SMALL, "auto")[1].kind == "random"
    checkpoints = server.parent.parent / "torch" / "hub" / "checkpoints"
    assert list(checkpoints.iterdir()) == []


def test_full_disk_is_told_without_a_path(server, monkeypatch):
    def full(*_args):
        raise CTError("no room for '/home/kim/x.pth'", "more", "make room") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(weights, "_download", full)
    note = build_model(SMALL, "auto")[1].note  # goes into the run record, which refuses paths of one machine
    assert "No space left" in note and "/home" not in note


def test_cached_file_cut_short_is_an_error(tmp_path):
    path = tmp_path / "torch" / "hub" / "checkpoints" / BACKBONES[SMALL].weights_file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    with pytest.raises(CTError, match="begins with 8738ca79.*delete this file"):
        build_model(SMALL, "auto")


@pytest.mark.parametrize("end", [".pth", ".pt", ".safetensors", "-ours.pth"])
def test_folder_of_weights(end, tmp_path, small_state):
    folder = tmp_path / "가중치 weights"
    folder.mkdir()
    path = folder / f"{SMALL}{end}"
    save_file(small_state, path) if end == ".safetensors" else torch.save(small_state, path)
    model, info = build_model(SMALL, folder)
    assert (info.kind, info.sha256, info.note) == ("folder", file_sha256(path), "")
    assert path.name in info.source and str(tmp_path) not in info.source
    assert state_sha256(model) == build_model(SMALL, "random", seed=5)[1].sha256
    assert all(p.requires_grad for p in model.parameters())


def test_older_files_lack_batch_counters(tmp_path, small_state):
    older = {key: value for key, value in small_state.items() if not key.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / f"{SMALL}.pth")
    model, _ = build_model(SMALL, str(tmp_path))
    assert torch.equal(model.features[0][0].weight, small_state["features.0.0.weight"])


def test_folder_errors(tmp_path, small_state):
    with pytest.raises(CTError, match="existing folder"):
        build_model(SMALL, tmp_path / "nowhere")
    with pytest.raises(CTError, match="no weights of ResNet50.*resnet50-0676ba61.pth"):
        build_model("resnet50", tmp_path)
    torch.save(small_state, tmp_path / "resnet50.pth")
    with pytest.raises(CTError, match="'resnet50.pth' without bn1.bias.*and .* more; with .*ResNet50"):
        build_model("resnet50", tmp_path)
    torch.save(small_state | {"classifier.3.bias": torch.zeros(5)}, tmp_path / f"{SMALL}.pth")
    with pytest.raises(CTError, match=r"classifier.3.bias \(5,\) instead of \(1000,\)"):
        build_model(SMALL, tmp_path)
    torch.save([1, 2], tmp_path / f"{SMALL}.pth")
    with pytest.raises(CTError, match="something else than named tensors"):
        build_model(SMALL, tmp_path)
    (tmp_path / f"{SMALL}.pth").write_text("<html>404</html>")
    with pytest.raises(CTError, match="cannot be read"):
        build_model(SMALL, tmp_path)
    (tmp_path / BACKBONES[SMALL].weights_file).write_bytes(b"0" * 100)
    with pytest.raises(CTError, match="cut short"):
        build_model(SMALL, tmp_path)


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_file_runs_no_code(tmp_path):
    victim = tmp_path / "made by the file"
    with open(tmp_path / f"{SMALL}.pth", "wb") as file:
        pickle.dump(Harmful(victim), file, protocol=2)
    with pytest.raises(CTError, match="cannot be read"):
        build_model(SMALL, tmp_path)
    assert not victim.exists()


def test_densenet_old_names_are_understood():
    with torch.device("meta"):
        expected = models._make(BACKBONES["densenet161"]).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): v for key, v in expected.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old  # as in torchvision's file
    assert set(models._rename(BACKBONES["densenet161"], old, expected)) == set(expected)


# --- EfficientNet-Lite0: real ImageNet weights from pip ---


@pytest.mark.parametrize("photo, label", [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_lite0_knows_photographs(photo, label):
    model, info = build_model("efficientnet_lite0")
    assert info.kind == "imagenet" and info.sha256.startswith("57934424") and info.note == ""
    spec = BACKBONES["efficientnet_lite0"]
    pixels = torch.from_numpy(load_sample_image(photo)[:, 106:533].copy())  # (427, 427, 3), the middle
    x = pixels.permute(2, 0, 1)[None].float() / 255
    x = nn.functional.interpolate(x, size=(224, 224), mode="bilinear", antialias=True)
    x = (x - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]
    with torch.no_grad():
        assert model(x).argmax() == label
    assert spec.mean == spec.std == (0.5, 0.5, 0.5), "not ImageNet's"


def test_lite0_in_another_order_is_refused(tmp_path):
    path, _ = weights.imagenet_file(BACKBONES["efficientnet_lite0"], patient=False)
    tensors = list(torch.load(path, weights_only=True).items())
    tensors[1], tensors[2] = tensors[2], tensors[1]  # weight and bias of a BatchNorm: equal shapes
    torch.save(dict(tensors), tmp_path / "efficientnet_lite0.pth")
    with pytest.raises(CTError, match="EfficientNet-Lite0"):
        build_model("efficientnet_lite0", tmp_path)


def test_lite0_without_its_package(monkeypatch):
    spec = dataclasses.replace(BACKBONES["efficientnet_lite0"], package="no_such_package_here")
    monkeypatch.setitem(models.BACKBONES, "efficientnet_lite0", spec)
    _, info = build_model("efficientnet_lite0")
    assert info.kind == "random" and "pip install no-such-package-here" in info.note


# --- Layers, freezing, counting ---


def tiny(num_classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(5, num_classes),
    )  # fmt: skip


def test_get_and_set_module():
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), nn.Linear(2, 3))})
    new = nn.Linear(2, 7)
    set_module(model, "a.1", new)
    assert get_module(model, "a.1") is model["a"][1] is new
    with pytest.raises(CTError, match="no layer 'a.2'.*begins with one of: a"):
        get_module(model, "a.2")
    with pytest.raises(CTError, match="no layer 'b'"):
        set_module(model, "b", new)


def test_freeze_unfreeze_count():
    model = tiny()
    total = sum(p.numel() for p in model.parameters())
    freeze(model, train=model[8])
    assert count_parameters(model) == {"trained": 18, "frozen": total - 18}
    freeze(model, train=[model[5], model[8]])
    assert count_parameters(model)["trained"] == 28
    unfreeze(model)
    assert count_parameters(model) == {"trained": total, "frozen": 0}
    old, model[8] = model[8], nn.Linear(5, 2)
    with pytest.raises(CTError, match="a Linear to train that is not in the model"):
        freeze(model, train=old)


def test_state_sha256_sees_every_change():
    model = tiny()
    first = state_sha256(model)
    assert state_sha256(tiny()) == first
    model[1].running_mean[0] += 1e-6
    assert state_sha256(model) != first
    assert state_sha256(nn.Sequential(nn.Linear(2, 3, bias=False))) != state_sha256(nn.Linear(2, 3, bias=False))
    flat, tall = (nn.Linear(*shape, bias=False) for shape in ((4, 1), (1, 4)))
    with torch.no_grad():
        tall.weight.copy_(flat.weight.T)
    assert state_sha256(flat) != state_sha256(tall)
    assert len(state_sha256(tiny().to(torch.bfloat16))) == 64


# --- BatchNorm adapted, features standardised ---


def test_adapt_batchnorm_estimates_the_statistics_of_the_images():
    model = tiny()
    model[1].running_mean.fill_(100)  # what was there before must not matter
    model[5].momentum = 0.01
    before = [p.clone() for p in model.parameters()]
    x = images(10, 16) * 3 + 1
    batches = [(x[:4], torch.zeros(4)), (x[4:8], torch.zeros(4)), (x[8:], torch.zeros(2))]
    assert adapt_batchnorm(model, batches) == 10
    with torch.no_grad():
        maps = model[0](x)  # (10, 4, 14, 14)
    assert torch.allclose(model[1].running_mean, maps.mean(dim=(0, 2, 3)), atol=1e-5)
    variance = sum(len(b) * model[0](b).var(dim=(0, 2, 3)) for b, _ in batches).detach() / 10
    assert torch.allclose(model[1].running_var, variance, rtol=1e-4)
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.01)
    assert not any(part.training for part in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    again = tiny()  # dropout is off in the pass: no randomness, whatever the seed
    torch.manual_seed(99)
    adapt_batchnorm(again, batches)
    assert torch.equal(again[5].running_mean, model[5].running_mean)


def test_adapt_batchnorm_without_batchnorm_or_images():
    def unread():
        raise AssertionError("the loader was read")
        yield

    assert adapt_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3)), unread()) == 0
    model = tiny()
    with pytest.raises(CTError, match="an empty loader"):
        adapt_batchnorm(model, [])
    assert model[1].momentum == 0.1


def test_standardise_head_scales_the_train_features():
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    features = features * torch.tensor([1e7, 1e7, 2e7, 3e7, 0.0, 1e-9])
    features[:, :4] += 5e7
    head = nn.Sequential(nn.Linear(6, 3))
    new = standardise_head(head, features)
    assert [name for name, _ in new.named_children()] == ["standardise", "0"] and new[1] is head[0]
    scaled = new.standardise(features)
    assert scaled[:, :4].mean(dim=0).abs().max() < 0.01
    assert (scaled[:, :4].std(dim=0) - 1).abs().max() < 0.01
    moved = new.standardise(features + 1.0)  # a column constant in train must not explode elsewhere
    assert moved[:, 4:].abs().max() < 1
    dead = standardise_head(head, torch.zeros(5, 6))
    assert torch.isfinite(dead(torch.ones(1, 6))).all()


# --- Run records ---


def make_run(name: str, *, bn: str, standardised: bool, trained: str = "head", weights="random", seed: int = 3):
    """Return (record, backbone, head) of a run whose head, and whatever else is asked for, has changed."""
    model, info = build_model(name, weights, seed=seed)
    replace_head(model, name, 4)
    backbone, head = split_model(model, name)
    if bn == "adapt":
        adapt_batchnorm(backbone, [images(6)])
    if standardised:
        with torch.no_grad():
            head = standardise_head(head, backbone(images(8, seed=2)))
    if trained == "all":  # the record holds everything, so the weights it began with need not be at hand
        info = dataclasses.replace(info, kind="imagenet", sha256="0" * 64, seed=None)
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.mul_(1.01)
    record = {
        "backbone": name,
        "classes": ["a", "b", "c", "d"],
        "weights": dataclasses.asdict(info),
        "bn": bn,
        "standardised": standardised,
        "trained": trained,
        "seed": 77,  # of the run, not of its weights
    }
    return record, backbone.eval(), head.eval()


@pytest.mark.parametrize(
    "name, bn, standardised, trained",
    [
        ("alexnet", "frozen", True, "head"),
        (SMALL, "adapt", True, "head"),
        (SMALL, "frozen", False, "head"),
        (SMALL, "adapt", True, "all"),
        ("efficientnet_lite0", "adapt", False, "head"),
    ],
)
def test_restored_model_predicts_the_same(name, bn, standardised, trained, tmp_path):
    weights = "imagenet" if name == "efficientnet_lite0" else "random"
    record, backbone, head = make_run(name, bn=bn, standardised=standardised, trained=trained, weights=weights)
    save_file(run_tensors(backbone, head, name, bn=bn, trained=trained), tmp_path / "head.safetensors")
    if trained == "head":
        assert (tmp_path / "head.safetensors").stat().st_size < 1e6, "frozen weights were saved"
    torch.manual_seed(8)
    expected = torch.rand(1)
    torch.manual_seed(8)
    model = restore_model(record, load_file(tmp_path / "head.safetensors"))
    assert torch.equal(torch.rand(1), expected), "the caller's random state was changed"
    x = images(3, seed=4)
    with torch.no_grad():
        logits = join(backbone, head)(x)
        assert torch.equal(model(x), logits)
    assert not model.training and logits.std() > 1e-12, "all logits equal: nothing was compared"


def test_restore_from_a_folder(tmp_path, small_state):
    torch.save(small_state, tmp_path / f"{SMALL}.pth")
    record, backbone, head = make_run(SMALL, bn="frozen", standardised=False, weights=tmp_path)
    tensors = run_tensors(backbone, head, SMALL)
    x = images()
    with torch.no_grad():
        assert torch.equal(restore_model(record, tensors, tmp_path)(x), join(backbone, head)(x))
    with pytest.raises(CTError, match=f"the run's weights .*file '{SMALL}.pth'.*give the folder"):
        restore_model(record, tensors)


def test_restore_refuses_other_weights_and_tensors():
    record, backbone, head = make_run(SMALL, bn="adapt", standardised=True)
    tensors = run_tensors(backbone, head, SMALL, bn="adapt")
    other = record | {"weights": record["weights"] | {"seed": 4}}
    with pytest.raises(CTError, match="random weights with SHA-256.*the run's weights.*train this run again"):
        restore_model(other, tensors)
    with pytest.raises(CTError, match="saved tensors without head.3.bias"):
        restore_model(record, {key: value for key, value in tensors.items() if key != "head.3.bias"})
    with pytest.raises(CTError, match=r"head.3.bias \(4,\) instead of \(5,\)"):
        restore_model(record | {"classes": list("abcde")}, tensors)
    with pytest.raises(CTError, match="saved tensors with bn."):
        restore_model(record | {"bn": "frozen"}, tensors)


def test_standardise_is_saved_with_the_model():
    layer = Standardise(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    assert set(layer.state_dict()) == {"mean", "std"} and not list(layer.parameters())
    np.testing.assert_allclose(layer(torch.tensor([[3.0, 2.0]])).numpy(), [[1.0, 0.0]])
