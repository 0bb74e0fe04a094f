"""features: one pass of a frozen backbone, the same numbers as the plain network, cached under the right key."""

import errno
import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import files_below, tiny_cnn, user_error, write_set
from torch import nn

from ctutils import base, features, inference, models
from ctutils.augment import build_augment
from ctutils.data import SliceBatches, build_store, feature_loaders, load_folder, make_loaders, normalise
from ctutils.features import cached_features, extract_features
from ctutils.inference import choose_precision, inference_copy
from ctutils.models import (
    BACKBONES,
    build_model,
    freeze,
    get_module,
    join,
    replace_head,
    split_model,
    state_sha256,
)
from ctutils.training import train_model

NORMAL = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """The sizes of all batches that any backbone was given."""
    batches: list[int] = []
    real = features.inference_copy

    def counted(*args, **options):
        fast = real(*args, **options)
        fast.register_forward_pre_hook(lambda _module, inputs: batches.append(len(inputs[0])))
        return fast

    monkeypatch.setattr(features, "inference_copy", counted)
    return batches


def store_of(count: int = 5, size: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), np.uint8)


def backbone(seed: int = 0) -> nn.Sequential:
    """Return the frozen part of the tiny network, with statistics of its own: images -> (B, 96)."""
    part = tiny_cnn(seed=seed)[:2]
    part[0][1].running_mean += 0.3
    part[0][1].running_var *= 2
    return part.eval().requires_grad_(False)


@torch.no_grad()
def plainly(network: nn.Module, store: np.ndarray, mean, std) -> torch.Tensor:
    return network.eval()(normalise(torch.from_numpy(store)[:, None], mean, std))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- The same numbers ---


def made_up(name: str) -> nn.Module:
    """Return a network with weights and BatchNorm statistics of no meaning, quicker than torch draws them."""
    if BACKBONES[name].package:
        return build_model(name)[0]
    if name == "mobilenet_v3_large":  # made-up weights blow rounding up: even two plain batch sizes differ by 1e-5
        model = build_model(name, "random")[0]
        models.adapt_batchnorm(model, [normalise(torch.from_numpy(store_of(8, 64))[:, None], **NORMAL)])
        return model.eval()
    with torch.device("meta"):
        model = models._make(BACKBONES[name])
    model.to_empty(device="cpu")
    draws = torch.randn(99_991, generator=torch.Generator().manual_seed(0))
    for key, tensor in model.state_dict().items():
        values = draws.repeat(tensor.numel() // len(draws) + 1)[: tensor.numel()].view(tensor.shape)
        if tensor.ndim > 1:
            tensor.copy_(values * (2 / tensor[0].numel()) ** 0.5)
        elif key.endswith(("running_var", "weight")):
            tensor.copy_(1 + 0.2 * values.clamp(-3, 3))
        else:
            tensor.copy_(0.1 * values)
    return model.eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_features_are_those_of_the_plain_network(name):
    spec, store = BACKBONES[name], store_of(3, size=64)
    model = made_up(name)
    body, head = split_model(model, name)
    pass_of = {"mean": spec.mean, "std": spec.std, "precision": "float32", "batch_size": 2}
    expected = plainly(model, store, spec.mean, spec.std)
    assert relative(expected[:1], expected[1:2]) > 0.01, "this test could not tell slices apart"
    same = extract_features(body, store, **{**pass_of, "batch_size": 3}, fold=False)
    assert relative(same, plainly(body, store, spec.mean, spec.std)) <= 1e-6, "the same layers on the same batch"
    for fold, limit in ((False, 1e-5), (True, 1e-3)):
        found = extract_features(body, store, **pass_of, fold=fold)
        assert (found.dtype, found.shape) == (torch.float32, (3, spec.features))
        assert relative(found, plainly(body, store, spec.mean, spec.std)) <= limit
        with torch.no_grad():
            logits = head.eval()(found)
        assert relative(logits, expected) <= limit
        assert logits.argmax(1).equal(expected.argmax(1))


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "efficientnet_lite0"])
def test_bfloat16_says_about_the_same(name):
    spec = BACKBONES[name]
    body, _ = split_model(build_model(name, "auto" if spec.package else "random")[0], name)
    store = store_of(3, size=64)
    found = extract_features(body, store, mean=spec.mean, std=spec.std, precision="bfloat16")
    assert found.dtype == torch.float32 and torch.isfinite(found).all()
    exact = plainly(body, store, spec.mean, spec.std)
    assert torch.cosine_similarity(found, exact).min() > 0.99
    assert not torch.equal(found, exact), "this was not bfloat16"


def test_batches_do_not_matter():
    store, part = store_of(7), backbone()
    results = [extract_features(part, store, **NORMAL, precision="float32", batch_size=size) for size in (1, 3, 7, 99)]
    assert all(relative(result, plainly(part, store, **NORMAL)) < 1e-5 for result in results)


def test_copy_is_folded_and_the_backbone_stays_as_it_is():
    part = split_model(build_model("resnet50", "random")[0], "resnet50")[0]
    before = state_sha256(part)
    fast = inference_copy(part, "bfloat16")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules()), "BatchNorm costs a pass over memory"
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in part.modules()) == 53
    tensors = [layer.weight for layer in fast.modules() if getattr(layer, "weight", None) is not None]
    assert sum(t.ndim == 4 for t in tensors) == 53, "a weight for each of its convolutions"
    assert all(t.dtype == torch.bfloat16 and not t.requires_grad for t in tensors)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors if t.ndim == 4)
    assert state_sha256(part) == before and next(part.parameters()).dtype == torch.float32
    assert next(part.parameters()).requires_grad


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "efficientnet_lite0"])
def test_every_batchnorm_after_a_convolution_is_folded(name):
    part = split_model(made_up(name), name)[0]
    assert any(isinstance(layer, models.BatchNorm) for layer in part.modules())
    assert not any(isinstance(layer, models.BatchNorm) for layer in inference_copy(part).modules())


class Odd(nn.Module):
    """Whatever a careless fold gets wrong: shared layers, a second user, BatchNorm of other kinds and places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(5)])
        self.seen = nn.Conv2d(4, 4, 1)
        self.twice, self.used = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.batchwise = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, images):
        x = self.plain(self.first(images))
        x = self.norms[0](self.shared(x)) + self.norms[1](self.shared(x))
        y = self.seen(x)
        x = self.norms[2](y) + y
        x = self.twice(self.norms[3](self.twice(x)))
        x = self.used(self.used(x)) + self.norms[4](torch.relu(x))
        return self.batchwise(x).flatten(1)


def test_odd_networks_stay_what_they_are():
    torch.manual_seed(0)
    network = Odd().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    store = store_of()
    found = extract_features(network, store, **NORMAL, precision="float32")
    assert relative(found, plainly(network, store, **NORMAL)) < 1e-4
    left = [name for name, part in inference_copy(network).named_modules() if isinstance(part, models.BatchNorm)]
    assert "plain" not in left and "norms.0" in left, "the first can be folded, a shared one cannot"


@pytest.mark.parametrize("name", ["resnet50", "vgg16", "mobilenet_v3_large", "efficientnet_lite0"])
def test_activations_and_sums_are_done_by_the_convolutions(name):
    if not inference._onednn_fuses():
        pytest.skip("this torch has no fused convolutions")
    fast = inference_copy(split_model(made_up(name), name)[0])
    alone = [
        node
        for node in fast.graph.nodes
        if (node.op == "call_module" and isinstance(fast.get_submodule(node.target), (nn.ReLU, nn.ReLU6, nn.Hardswish)))
        or node.target in (operator.add, operator.iadd)
    ]
    # What is left follows a linear layer, or one of timm's convolutions that pad on their own.
    expected = {"resnet50": 0, "vgg16": 1, "mobilenet_v3_large": 1, "efficientnet_lite0": 5}
    assert len(alone) == expected[name], alone


class Sums(nn.Module):
    """Sums and activations in all places where they may not be drawn into a convolution carelessly."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if k == 0 else 4, 4, 3, padding=1) for k in range(7)])
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.relu, self.six, self.swish = nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish()
        self.gate = nn.Hardsigmoid()

    def forward(self, images):
        c = self.convs
        x = self.swish(c[0](images))
        y = c[1](x)
        x = self.relu(y + c[2](y)) * 0.1  # both sides are convolutions, and one is the other's input
        y = c[3](x)
        x = y + y  # one summand twice
        x = self.six(self.circular(x)) + self.same(x)
        x = self.gate(c[4](x)) * c[5](x)
        y = c[6](x)
        return (self.relu(y + x) + 1 + y).flatten(1)  # y is wanted later, and one summand is a number


@pytest.mark.parametrize("fuses", [True, False])
def test_sums_and_activations_stay_what_they_are(monkeypatch, fuses):
    if not fuses:
        monkeypatch.setattr(inference, "_onednn_fuses", lambda: False)
    torch.manual_seed(0)
    network, store = Sums().eval(), store_of()
    found = extract_features(network, store, **NORMAL, precision="float32")
    assert relative(found, plainly(network, store, **NORMAL)) < 1e-5


@pytest.mark.parametrize("state", ["another answer", "other arguments", "not there"])
def test_fused_convolutions_are_used_only_where_they_are_right(monkeypatch, state):
    def op(x, *args):
        if state == "other arguments":
            raise RuntimeError("expected at most 3 arguments")
        return torch.zeros(1, 4, 5, 5)

    calls = {"_convolution_pointwise": op, "_reorder_convolution_weight": lambda weight, *args: weight}
    ops = type("Ops", (), {} if state == "not there" else {name: staticmethod(call) for name, call in calls.items()})
    if state == "another answer":
        op.binary = op
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    assert inference._onednn_fuses() is False
    found = extract_features(backbone(), store_of(), **NORMAL, precision="float32")
    assert relative(found, plainly(backbone(), store_of(), **NORMAL)) < 1e-5


def test_random_views_do_not_depend_on_the_memory(monkeypatch):
    def views() -> torch.Tensor:
        torch.manual_seed(0)
        change = build_augment(("rotate", "noise"))
        return extract_features(backbone(), store_of(7), **NORMAL, precision="float32", batch_size=4, augment=change)

    expected, made = views(), features.inference_copy
    monkeypatch.setattr(features, "inference_copy", lambda *a, **k: narrow(made(*a, **k), 1))
    assert relative(views(), expected) < 1e-6


def narrow(module: nn.Module, limit: int) -> nn.Module:
    """Let a module say that the memory is full when it gets more than `limit` pictures."""

    def full(_module, inputs):
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    module.register_forward_pre_hook(full)
    return module


def test_pass_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state()
    extract_features(backbone(), store_of(), **NORMAL, precision="float32")
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_laid_out_once_and_means_are_quick(monkeypatch):
    if not inference._onednn_fuses():
        pytest.skip("this torch has no fused convolutions")
    network = split_model(made_up("mobilenet_v3_large"), "mobilenet_v3_large")[0]
    fast, layouts = inference_copy(network), []
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_convolution_weight", lambda *args: layouts.append(1) or reorder(*args)
    )
    with torch.no_grad():
        for count in (2, 2, 1):
            fast(torch.randn(count, 3, 64, 64))
    assert len(layouts) == sum(isinstance(layer, nn.Conv2d) for layer in network.modules())
    assert not any(isinstance(layer, nn.AdaptiveAvgPool2d) for layer in fast.modules())


def test_full_memory_halves_the_batch(seen, monkeypatch):
    expected = extract_features(backbone(), store_of(7), **NORMAL, precision="float32", batch_size=2)
    seen.clear()
    counted, limit = features.inference_copy, 2
    monkeypatch.setattr(features, "inference_copy", lambda *a, **k: narrow(counted(*a, **k), limit))
    found = extract_features(backbone(), store_of(7), **NORMAL, precision="float32", batch_size=8)
    assert relative(found, expected) < 1e-6
    assert seen == [7, 4, 2, 2, 2, 1]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        extract_features(backbone(), store_of(7), **NORMAL, precision="float32")


def test_bfloat16_leaves_statistics_that_are_not_folded_exact():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).eval()
    network[0].running_mean.fill_(100.1)
    fast = inference_copy(network, "bfloat16")
    norm, conv = fast.children()
    assert torch.equal(norm.running_mean, network[0].running_mean)
    assert conv.weight.dtype == torch.bfloat16


def test_network_that_cannot_be_traced_is_copied_as_it_stands():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = backbone()

        def forward(self, images):
            return self.inner(images) * (2.0 if images.mean() > 100 else 1.0)

    store = store_of()
    found = extract_features(Choosy(), store, **NORMAL, precision="float32")
    assert relative(found, plainly(backbone(), store, **NORMAL)) < 1e-5


@pytest.mark.parametrize("system", ["glibc", "old glibc", "no mallopt", "other"])
def test_allocator_is_set_where_there_is_one(monkeypatch, system):
    calls = []

    class Library:
        def mallopt(self, *args):
            calls.append(args)
            return 0 if system == "old glibc" and args == (-3, 1 << 30) else 1

    name = ("", "") if system == "other" else ("glibc", "2.40")
    monkeypatch.setattr(base.platform, "libc_ver", lambda: name)
    monkeypatch.setattr(base.ctypes, "CDLL", lambda _name: object() if system == "no mallopt" else Library())
    base.reuse_large_blocks.__wrapped__()
    threshold, trim, never = (-3, 1 << 30), (-1, 1 << 30), (-4, 0)
    expected = {"glibc": [threshold, trim], "old glibc": [threshold, never, trim]}
    assert calls == expected.get(system, [])


# --- Precision ---


def test_auto_precision_follows_the_processor(monkeypatch):
    for has, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert choose_precision("auto", "cpu") == choose_precision("auto", "cuda:1") == precision
        assert choose_precision("auto", "mps") == "float32"
        assert choose_precision("float32", "cpu") == "float32"
        assert choose_precision("bfloat16", "cpu") == "bfloat16"
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert choose_precision("auto", "cpu") == "float32", "a private name of torch may go"


def test_unknown_precision_lists_the_known():
    with user_error("precision 'float16'", "auto, float32, bfloat16"):
        choose_precision("float16", "cpu")


# --- Bad input ---


def test_no_slices():
    with user_error("no slices"):
        extract_features(backbone(), store_of(0), **NORMAL)


def test_features_that_are_not_finite():
    part = backbone()
    part[0][0].weight.data.fill_(1e38)
    with user_error("not finite (bfloat16)", "float32"):
        extract_features(part, store_of(), **NORMAL, precision="bfloat16")


# --- The cache ---


def ask(cache: Path, part=None, store=None, **changes) -> torch.Tensor:
    options = {"name": "tiny", "fingerprint": "f0", **NORMAL, "cache": cache, "precision": "float32"}
    return cached_features(part or backbone(), store_of() if store is None else store, **{**options, **changes})[0]


def test_second_time_no_backbone_is_called(tmp_path, seen):
    first = ask(tmp_path)
    assert sum(seen) == 5 and first.shape == (5, 96)
    seen.clear()
    again, seconds = cached_features(
        backbone(), store_of(), name="tiny", fingerprint="f0", **NORMAL, cache=tmp_path, precision="float32"
    )
    assert torch.equal(again, first) and seconds > 0
    assert seen == [], "the backbone saw slices that it had seen before"
    assert len(files_below(tmp_path)) == 1 and files_below(tmp_path)[0].startswith("features/tiny-")


def changed_weight():
    part = backbone()
    part[0][0].weight.data[0, 0, 0, 0] += 1e-6
    return part


def changed_statistics():
    part = backbone()
    part[0][1].running_var[2] += 1e-6
    return part


@pytest.mark.parametrize(
    "change",
    [
        {"part": changed_weight},
        {"part": changed_statistics},
        {"mean": (0.4, 0.5, 0.7)},
        {"std": (0.2, 0.3, 0.5)},
        {"store": lambda: store_of(size=44)},
        {"precision": "bfloat16"},
        {"fingerprint": "f1"},
        {"name": "other"},
    ],
    ids=["weights", "BatchNorm statistics", "mean", "std", "size", "precision", "data", "backbone"],
)
def test_whatever_decides_the_result_is_in_the_key(tmp_path, seen, change):
    first = ask(tmp_path)
    seen.clear()
    change = {key: value() if callable(value) else value for key, value in change.items()}
    ask(tmp_path, **change)
    assert sum(seen) == 5, "another pass's features were taken for these"
    assert torch.equal(ask(tmp_path), first) and sum(seen) == 5


def test_views_are_random_repeatable_and_leave_the_random_numbers_alone(tmp_path, seen):
    views = {"augmentations": ("rotate",), "views": 3, "seed": 1}
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    rows = np.array([4, 0, 2])
    found = ask(tmp_path, rows=rows, **views)
    assert torch.equal(torch.rand(1), expected_next)
    assert found.shape == (3, 3, 96) and sum(seen) == 9
    plain = ask(tmp_path, rows=rows)
    assert torch.equal(plain, ask(tmp_path)[rows])
    for a, b in ((0, 1), (1, 2)):
        assert (found[a] - found[b]).abs().max() > 1e-3, "two views are the same"
    seen.clear()
    assert torch.equal(ask(tmp_path, rows=rows, **views), found) and seen == []
    for change in ({"seed": 2}, {"views": 2}, {"augmentations": ("flip",)}, {"rows": np.array([0, 4, 2])}):
        assert not torch.equal(ask(tmp_path, **{"rows": rows, **views, **change}), found)
        assert seen, "another pass's views were taken for these"
        seen.clear()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other rows", "other name"])
def test_damaged_cache_is_made_again(tmp_path, seen, damage):
    first = ask(tmp_path)
    file = tmp_path / files_below(tmp_path)[0]
    content = file.read_bytes()
    if damage == "other rows":
        file.write_bytes(features.save({"features": first[:3].clone(), "seconds": torch.tensor(1.0)}))
    elif damage == "other name":
        file.write_bytes(features.save({"x": first}))
    else:
        file.write_bytes({"cut": content[:-9], "empty": b"", "text": b"hello"}[damage])
    assert torch.equal(ask(tmp_path), first)
    assert seen == [5, 5]
    assert torch.equal(ask(tmp_path), first) and seen == [5, 5], "the mended file is not used"


def test_full_disk_is_one_message_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with user_error("full disk", "tiny-"):
        ask(tmp_path)
    assert files_below(tmp_path) == []


def test_failed_pass_leaves_nothing(tmp_path):
    part = backbone()
    part[0][0].weight.data.fill_(1e38)
    with user_error("not finite"):
        ask(tmp_path, part)
    assert files_below(tmp_path) == []


# --- Trained on cached features as on images ---


def tiny_set(tmp_path: Path, size: int):
    folder = load_folder(write_set(tmp_path / "set", per_class=4), cache=tmp_path)
    return folder, build_store(folder, size, cache=tmp_path)


def train_head(name: str, tmp_path: Path, *, on_features: bool, epochs: int = 3):
    """Train a new head on a frozen network, on images or on cached features; return the result and the network."""
    spec = BACKBONES[name]
    folder, store = tiny_set(tmp_path / ("f" if on_features else "i"), 64)
    model, _ = build_model(name, "auto" if spec.package else "random")
    torch.manual_seed(1)
    replace_head(model, name, 3)
    freeze(model, train=get_module(model, spec.head))
    body, head = split_model(model, name)
    normal = {"mean": spec.mean, "std": spec.std}
    if on_features:
        key = {"name": name, "fingerprint": folder.fingerprint, "cache": tmp_path, "precision": "float32"}
        rows, _ = cached_features(body, store, **normal, **key)
        trained, data = head, feature_loaders(folder, rows, batch_size=5)
    else:
        trained, data = join(body, head), make_loaders(folder, store, **normal, batch_size=5)
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], 1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    result = train_model(trained, nn.CrossEntropyLoss(), optimizer, scheduler, data, epochs, seed=4)
    return result, join(body, head).eval(), (folder, store, normal, data)


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_large", "efficientnet_lite0"])
def test_cached_features_train_the_same_head_as_images(tmp_path, name):
    """Dropout included: alexnet and mobilenet_v3_large have it behind the cut."""
    fast, whole, (folder, store, normal, data) = train_head(name, tmp_path, on_features=True)
    slow, network, _ = train_head(name, tmp_path, on_features=False)
    for a, b in zip(fast.history, slow.history, strict=True):
        for key in ("train_loss", "val_loss"):
            assert a[key] == pytest.approx(b[key], rel=2e-3), key
        assert a["lr"] == b["lr"]
    assert len({row["train_loss"] for row in slow.history}) == 3
    # The reassembled network says of an image what the head said of its feature.
    images = normalise(torch.from_numpy(np.array(store))[:, None], **normal)
    with torch.no_grad():
        probs, expected = torch.softmax(whole(images), 1), torch.softmax(network(images), 1)
        by_head = [torch.softmax(fast.model(rows), 1) for rows, _ in data["val"]]
    torch.testing.assert_close(torch.cat(by_head), probs[folder.rows("val")], atol=1e-3, rtol=0)
    torch.testing.assert_close(probs, expected, atol=2e-3, rtol=0)


def test_training_draws_one_of_the_views_each_time(tmp_path):
    folder, _ = tiny_set(tmp_path, 16)
    count, train = len(folder.slices), folder.rows("train")
    plain = torch.arange(count, dtype=torch.float32)[:, None]
    views = torch.stack([plain[train] + 100 * k for k in (1, 2, 3)])
    loaders = feature_loaders(folder, plain, batch_size=5, views=views)
    torch.manual_seed(0)
    drawn: dict[int, set] = {}
    for _ in range(20):
        for batch, labels in loaders["train"]:
            for value, label in zip(batch[:, 0].int().tolist(), labels.tolist(), strict=True):
                assert folder.labels[value % 100] == label
                drawn.setdefault(value % 100, set()).add(value // 100)
    assert drawn == {int(row): {1, 2, 3} for row in train}
    assert torch.equal(torch.cat([batch for batch, _ in loaders["val"]]), plain[folder.rows("val")])


def test_batches_from_a_store_on_the_device_are_the_same(tmp_path):
    folder, store = tiny_set(tmp_path, 16)
    there = SliceBatches(torch.from_numpy(np.array(store)), folder.labels, folder.rows("train"), **NORMAL)
    here = SliceBatches(store, folder.labels, folder.rows("train"), **NORMAL)
    for a, b in zip(there[[3, 0, 5]], here[[3, 0, 5]], strict=True):
        assert torch.equal(a, b)


def test_backbone_sees_every_slice_once_in_five_epochs(tmp_path, seen):
    train_head("mobilenet_v3_large", tmp_path, on_features=True, epochs=5)
    assert sum(seen) == 36, "36 slices, each once, whatever the epochs"
