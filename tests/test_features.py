"""features and fast: one pass of a frozen backbone, the same numbers as the plain network, cached under its key."""

import dataclasses
import operator
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import files_below, tiny_cnn, user_error, write_set
from torch import nn

import ctutils
from ctutils import fast, features
from ctutils.augment import build_augment
from ctutils.backbones import BatchNorm, adapt_batchnorm, build_model, join, replace_head, split_model, state_sha256
from ctutils.data import build_store, feature_loaders, load_folder, make_loaders, normalise
from ctutils.features import adapt_cached, cached_features, choose_precision, extract_features
from ctutils.registry import BACKBONES
from ctutils.training import train_model

SPEC = dataclasses.replace(BACKBONES["alexnet"], name="tiny", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def store_of(count: int = 5, size: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), np.uint8)


def backbone() -> nn.Sequential:
    """Return the frozen part of the tiny network, with statistics of its own: images -> (B, 96)."""
    part = tiny_cnn()[:2]
    part[0][1].running_mean += 0.3
    part[0][1].running_var *= 2
    return part.eval().requires_grad_(False)


def extract(part, store=None, spec=SPEC, **options) -> torch.Tensor:
    return extract_features(part, store_of() if store is None else store, spec, **{"precision": "float32", **options})


@torch.no_grad()
def plainly(network: nn.Module, store=None, spec=SPEC) -> torch.Tensor:
    store = store_of() if store is None else store
    return network.eval()(normalise(torch.from_numpy(store)[:, None], spec.mean, spec.std))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def watched(monkeypatch, limit: int = 99) -> list[int]:
    """Note the size of every batch that a backbone is given; more than `limit` pictures fill the memory."""
    batches, real = [], features._inference_copy

    def note(_module, inputs):
        batches.append(len(inputs[0]))
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def made(*args):
        copy = real(*args)
        copy.register_forward_pre_hook(note)
        return copy

    monkeypatch.setattr(features, "_inference_copy", made)
    return batches


@pytest.mark.parametrize("name", BACKBONES)
def test_features_are_those_of_the_plain_network(name, made_up):
    spec, store = BACKBONES[name], store_of(3, size=64)
    model = build_model(name)[0] if spec.package else made_up(name)
    if name == "mobilenet_v3_large":  # made-up statistics blow rounding up: even two plain batch sizes differ by 1e-5
        adapt_batchnorm(model, [normalise(torch.from_numpy(store_of(8, 64))[:, None], SPEC.mean, SPEC.std)])
    body, head = split_model(model, name)
    logits, expected = plainly(model, store, spec), plainly(body, store, spec)
    assert relative(logits[:1], logits[1:2]) > 0.01, "this test could not tell slices apart"
    assert relative(extract(body, store, spec, fold=False), expected) <= 1e-6, "the same layers on the same batch"
    found = extract(body, store, spec, batch_size=2)
    assert (found.dtype, found.shape) == (torch.float32, expected.shape)
    assert relative(found, expected) <= 1e-3
    assert head.eval()(found).argmax(1).equal(logits.argmax(1))


def test_bfloat16_and_no_room_fast_say_about_the_same(monkeypatch):
    name, store = "efficientnet_lite0", store_of(3, size=64)
    spec, (body, _) = BACKBONES[name], split_model(build_model(name)[0], name)
    exact, found = plainly(body, store, spec), [extract(body, store, spec, precision="bfloat16")]
    monkeypatch.delattr(ctutils, "fast")
    monkeypatch.setitem(sys.modules, "ctutils.fast", None)
    found.append(extract(body, store, spec, precision="bfloat16"))
    for some in found:
        assert some.dtype == torch.float32 and not torch.equal(some, exact), "this was not bfloat16"
        assert torch.cosine_similarity(some, exact).min() > 0.99
    assert relative(extract(body, store, spec), exact) < 1e-5


def test_batches_and_memory_do_not_matter(monkeypatch):
    store, random = store_of(7), torch.get_rng_state()
    expected = plainly(backbone(), store)
    seen = watched(monkeypatch)
    for size in (1, 3, 99):
        assert relative(extract(backbone(), store, batch_size=size), expected) < 1e-5
    assert seen == [1] * 7 + [3, 3, 1] + [7] and torch.equal(torch.get_rng_state(), random)

    def views():
        torch.manual_seed(0)
        return extract(backbone(), store, batch_size=4, augment=build_augment(("rotate", "noise")))

    whole = views()
    seen = watched(monkeypatch, limit=2)
    assert relative(extract(backbone(), store, batch_size=8), expected) < 1e-5
    assert seen == [7, 4, 2, 2, 2, 1], "a batch that the memory does not hold goes through in halves"
    assert relative(views(), whole) < 1e-6, "random views depend on the memory"
    watched(monkeypatch, limit=0)
    with pytest.raises(torch.OutOfMemoryError):
        extract(backbone())


def test_auto_precision_follows_the_processor(monkeypatch):
    for has, precision in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert choose_precision("auto", "cpu") == choose_precision("auto", "cuda:1") == precision
        assert choose_precision("auto", "mps") == choose_precision("float32", "cpu") == "float32"
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert choose_precision("auto", "cpu") == "float32", "a private name of torch may go"


@pytest.mark.parametrize("name, left", {"resnet50": 0, "mobilenet_v3_large": 1, "efficientnet_lite0": 5}.items())
def test_copy_is_folded_and_fused_and_the_backbone_stays_as_it_is(name, left, made_up):
    part = split_model(made_up(name), name)[0]
    before, convs = state_sha256(part), sum(isinstance(layer, nn.Conv2d) for layer in part.modules())
    copy = fast.inference_copy(part, "bfloat16")
    assert not any(isinstance(layer, BatchNorm) for layer in copy.modules()), "BatchNorm costs a pass over memory"
    tensors = [layer.weight for layer in copy.modules() if getattr(getattr(layer, "weight", None), "ndim", 0) == 4]
    assert len(tensors) == convs and all(t.dtype == torch.bfloat16 and not t.requires_grad for t in tensors)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    assert state_sha256(part) == before and next(part.parameters()).requires_grad
    if fast._onednn_fuses("float32"):
        copy, alone = fast.inference_copy(part), (nn.ReLU, nn.ReLU6, nn.Hardswish)
        nodes = [
            n for n in copy.graph.nodes if n.op == "call_module" and isinstance(copy.get_submodule(n.target), alone)
        ]
        nodes += [n for n in copy.graph.nodes if n.target in (operator.add, operator.iadd)]
        assert len(nodes) == left, "more than what follows a linear layer or a convolution that pads on its own"


class Odd(nn.Module):
    """Whatever a careless fold or fusion gets wrong: shared layers, second users, sums, other BatchNorm, padding."""

    def __init__(self):
        super().__init__()
        self.first, self.plain = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=k > 0) for k in range(10)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(6)])
        self.batchwise = nn.BatchNorm2d(4, track_running_stats=False)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.relu, self.six, self.swish, self.gate = nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid()

    def forward(self, images):
        conv, norm = self.convs, self.norms
        x = self.plain(self.first(images))
        x = norm[0](conv[1](x)) + norm[1](conv[1](x))  # a shared convolution
        y = conv[2](x)
        x = norm[2](y) + y
        x = conv[0](norm[3](conv[0](x)))
        x = self.batchwise(norm[4](norm[4](x)) + norm[5](torch.relu(x)))
        y = conv[3](self.swish(conv[4](x)))
        x = self.relu(y + conv[5](y)) * 0.1  # both sides are convolutions, and one is the other's input
        y = conv[6](x)
        x = y + y  # one summand twice
        x = self.six(self.circular(x)) + self.same(x)
        x = self.gate(conv[7](x)) * conv[8](x)
        y = conv[9](x)
        return (self.relu(y + x) + 1 + y).flatten(1)  # y is wanted later, and one summand is a number


@pytest.mark.parametrize("fuses", [True, False])
def test_odd_networks_stay_what_they_are(monkeypatch, fuses):
    if not fuses:
        monkeypatch.setattr(fast, "_onednn_fuses", lambda _precision: False)
    torch.manual_seed(0)
    network = Odd().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    assert relative(extract(network), plainly(network)) < 1e-4
    left = [name for name, part in fast.inference_copy(network).named_modules() if isinstance(part, BatchNorm)]
    assert "plain" not in left and "norms.0" in left, "the first can be folded, a shared one cannot"


@pytest.mark.parametrize("fault", [lambda *_: torch.zeros(1, 4, 5, 5), lambda x: x, None])
def test_fused_convolutions_are_used_only_where_they_are_right(monkeypatch, fault):
    """Another answer, other arguments (a TypeError), no such calls."""
    ops = SimpleNamespace(_reorder_convolution_weight=lambda weight, *_: weight)
    if fault:
        ops._convolution_pointwise = fault
        fault.binary = fault
    monkeypatch.setattr(torch.ops, "mkldnn", ops)
    assert not fast._onednn_fuses("float32") and not fast._onednn_fuses("bfloat16")
    assert relative(extract(backbone()), plainly(backbone())) < 1e-5


def test_what_cannot_be_folded_or_traced_stays_as_it_stands():
    class Choosy(nn.Sequential):
        def forward(self, images):
            return super().forward(images) * (2.0 if images.mean() > 100 else 1.0)

    assert relative(extract(Choosy(*backbone())), plainly(backbone())) < 1e-5
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).eval()
    network[0].running_mean.fill_(100.1)
    norm, conv = fast.inference_copy(network, "bfloat16").children()
    assert torch.equal(norm.running_mean, network[0].running_mean) and conv.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "libc, taken, keep, calls",
    [
        ("glibc", 1, True, [(-3, 1 << 30), (-1, 1 << 30)]),  # map from this size on; trim from this size on
        ("glibc", 0, True, [(-3, 1 << 30), (-4, 0), (-1, 1 << 30)]),  # an older one: never map
        ("glibc", 0, False, [(-3, 1 << 25), (-4, 1 << 16), (-1, 1 << 25), "trimmed"]),
        ("", 1, True, []),
        ("", 1, False, []),
    ],
)
def test_allocator_is_set_where_there_is_one(monkeypatch, libc, taken, keep, calls):
    made = []
    monkeypatch.setattr(fast.platform, "libc_ver", lambda: (libc, "2.40"))
    library = {"mallopt": lambda *args: made.append(args) or taken, "malloc_trim": lambda _: made.append("trimmed")}
    monkeypatch.setattr(fast.ctypes, "CDLL", lambda _name: SimpleNamespace(**library))
    fast.reuse_large_blocks(keep)
    assert made == calls


def test_memory_of_a_pass_is_given_back(monkeypatch):
    copies, asked, real = [], [], features._inference_copy
    monkeypatch.setattr(features, "_inference_copy", lambda *args: copies.append(real(*args)) or copies[-1])
    monkeypatch.setattr(fast, "reuse_large_blocks", lambda keep=True: asked.append(keep))
    extract(backbone())
    assert asked == [True, False] and all(p.device.type == "meta" for p in copies[0].parameters())


def ask(cache: Path, part=None, store=None, spec=SPEC, fingerprint="f0", **options) -> torch.Tensor:
    folder, settings = SimpleNamespace(fingerprint=fingerprint), SimpleNamespace(device="cpu", cache_dir=cache)
    store, options = store_of() if store is None else store, {"precision": "float32", **options}
    return cached_features(part or backbone(), store, spec, folder, settings, **options)[0]


def changed(name: str, by: float = 1e-6) -> nn.Module:
    part = backbone()
    part.state_dict()[name].view(-1)[0] += by
    return part


CHANGES = {
    **{key: {"part": changed(key)} for key in ("0.0.weight", "0.1.running_var")},
    **{key: {"spec": dataclasses.replace(SPEC, **{key: (0.1, 0.2, 0.3)})} for key in ("mean", "std")},
    "name": {"spec": dataclasses.replace(SPEC, name="other")},
    "size": {"store": store_of(size=44)},
    "data": {"fingerprint": "f1"},
    "rows": {"rows": np.array([4, 0, 2])},
    "precision": {"precision": "bfloat16"},
    "augment": {"augmentations": ("rotate",)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_decides_the_result_is_in_the_key(tmp_path, monkeypatch, change):
    seen, before = watched(monkeypatch), torch.get_rng_state()
    first = ask(tmp_path)
    assert seen == [5] and first.shape == (1, 5, 96) and relative(first[0], plainly(backbone())) < 1e-5
    other = ask(tmp_path, **change)
    assert len(seen) == 2, "another pass's features were taken for these"
    assert torch.equal(ask(tmp_path), first) and torch.equal(ask(tmp_path, **change), other) and len(seen) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert len(files_below(tmp_path)) == 4 and all(name.startswith("features/") for name in files_below(tmp_path))


def test_file_is_mapped_and_bfloat16_kept_as_bits(tmp_path):
    made = ask(tmp_path, precision="bfloat16")
    assert made.dtype == torch.bfloat16
    assert torch.equal(made[0].float(), extract(backbone(), precision="bfloat16"))
    made.zero_()
    assert ask(tmp_path, precision="bfloat16").abs().max() > 0, "what is done to the features reached the file"
    if Path("/proc/self/maps").exists():
        assert next(tmp_path.glob("features/*.npy")).name in Path("/proc/self/maps").read_text()


def test_views_are_random_and_repeatable(tmp_path):
    rows, views = np.array([4, 0, 2]), {"augmentations": ("rotate",), "views": 3, "seed": 1}
    found = ask(tmp_path / "a", rows=rows, **views)
    assert found.shape == (3, 3, 96) and torch.equal(ask(tmp_path / "b", rows=rows, **views), found)
    assert torch.equal(ask(tmp_path, rows=rows), ask(tmp_path)[:, rows])
    assert (found - found.roll(1, 0)).flatten(1).abs().amax(1).min() > 1e-3, "two views are the same"
    for change in ({"seed": 2}, {"views": 2}, {"augmentations": ("flip",)}, {"rows": rows[::-1].copy()}):
        assert not torch.equal(ask(tmp_path / "a", **{"rows": rows, **views, **change}), found), change


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "json gone", "json text"])
def test_damaged_cache_is_made_again(tmp_path, monkeypatch, damage):
    seen, first = watched(monkeypatch), ask(tmp_path)
    file = next(tmp_path.glob("features/*.json" if "json" in damage else "features/*.npy"))
    content, first = file.read_bytes(), first.clone()
    file.unlink()  # the first tensor still maps it
    if damage != "json gone":
        file.write_bytes({"cut": content[:-9], "empty": b""}.get(damage, b"hello"))
    assert torch.equal(ask(tmp_path), first) and len(seen) == 2
    assert torch.equal(ask(tmp_path), first) and len(seen) == 2, "the mended file is not used"


def test_a_pass_that_fails_leaves_nothing(tmp_path, monkeypatch):
    with user_error("not finite (bfloat16)", "float32"):
        ask(tmp_path, changed("0.1.bias", torch.inf), precision="bfloat16")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with user_error("0.0 GB free", "features", "free some space"):
        ask(tmp_path)
    assert files_below(tmp_path) == []


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    folder = load_folder(write_set(path / "set", per_class=4), cache=path)
    return folder, build_store(folder, 64, cache=path), SimpleNamespace(device="cpu", cache_dir=path)


def test_adapted_batchnorm_is_that_of_the_training_slices_and_cached(tiny_set, monkeypatch):
    folder, store, settings = tiny_set

    def adapted(at: int, weights: str = "a1") -> nn.Sequential:
        part = tiny_cnn()
        adapt_cached(join(part[:at], part[at:]), weights, store, SPEC, folder, settings, precision="float32")
        return part

    part, plain = adapted(1), tiny_cnn()
    pixels = torch.from_numpy(store[folder.rows("train")])[:, None]
    adapt_batchnorm(plain, [normalise(pixels, SPEC.mean, SPEC.std)])  # 12 slices are one batch
    torch.testing.assert_close(part.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(features, "adapt_batchnorm", None)  # not called again, nor without BatchNorm
    assert state_sha256(adapted(2)) == state_sha256(part), "the same network, cut elsewhere"
    with pytest.raises(TypeError):
        adapted(1, weights="a2")
    adapt_cached(join(nn.Conv2d(3, 4, 3), nn.ReLU()), "a1", store, SPEC, folder, settings)


@pytest.mark.parametrize("name", ["vgg16", "densenet161", "efficientnet_lite0"])
def test_a_pass_goes_on_where_one_to_the_last_block_ended(tmp_path, monkeypatch, made_up, name):
    spec, store, passed = BACKBONES[name], store_of(3, size=64), []
    model = build_model(name)[0] if spec.package else made_up(name)
    body, trunk = split_model(model, name)[0], split_model(model, name, spec.last_block)[0]
    whole, real = ask(tmp_path / "whole", body, store, spec), features._inference_copy
    monkeypatch.setattr(features, "_inference_copy", lambda part, *rest: passed.append(part) or real(part, *rest))
    ask(tmp_path, trunk, store, spec)
    assert relative(ask(tmp_path, body, store, spec), whole) < 1e-4
    counts = [sum(p.numel() for p in part.parameters()) for part in (*passed, body)]
    assert len(counts) == 3 and counts[0] + counts[1] == counts[2], "the trunk was passed twice"
    ask(tmp_path, body, store, spec, rows=np.array([2, 0]))
    assert passed[2] is body, "other slices than those of the earlier pass"


@pytest.mark.parametrize(
    "name, at", [*((name, "last_block") for name in BACKBONES), ("alexnet", "cut"), ("efficientnet_lite0", "cut")]
)
def test_cached_features_train_the_same_as_images(tiny_set, monkeypatch, made_up, name, at):
    """Dropout included: alexnet has it behind the cut."""
    (folder, store, settings), spec = tiny_set, BACKBONES[name]
    results, networks, seen = [], [], watched(monkeypatch)
    pixels = normalise(torch.from_numpy(np.array(store))[:, None], spec.mean, spec.std)
    for cached in (True, False):
        model = build_model(name)[0] if spec.package else made_up(name)
        torch.manual_seed(1)
        replace_head(model, name, 3)
        if not spec.package:  # made-up weights of a deep network explode
            adapt_batchnorm(model, [pixels])
        body, head = split_model(model, name, getattr(spec, at))
        for part in [body, *(part for part in head.modules() if isinstance(part, BatchNorm))]:
            part.requires_grad_(False)  # bn="frozen"
        if cached:
            (rows,), _ = cached_features(body, store, spec, folder, settings, precision="float32")
            learner, data = head, feature_loaders(folder, rows, batch_size=5)
        else:
            learner = join(body, head)
            data = make_loaders(folder, store, mean=spec.mean, std=spec.std, batch_size=5)
        optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], 1e-3)
        results.append(train_model(learner, nn.CrossEntropyLoss(), optimizer, None, data, 2, seed=4))
        networks.append(join(body, head).eval())
    assert sum(seen) == 36, "36 slices, each once, whatever the epochs"
    quick, slow = ([row[key] for row in result.history for key in ("train_loss", "val_loss")] for result in results)
    assert quick == pytest.approx(slow, rel=2e-3) and abs(slow[0] - slow[2]) > 0.01 * slow[0]
    probs = [torch.softmax(plainly(network, np.array(store), spec), 1) for network in networks]
    torch.testing.assert_close(*probs, atol=2e-3, rtol=0)
