"""pipeline: from a folder of slices to a run record, and from a record to predictions."""

import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from helpers import CLASSES, check_message, files_below, picture, user_error, write_set
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

from ctutils import config, data, features, pipeline, training
from ctutils.base import CTError
from ctutils.config import Profile, Settings
from ctutils.importers import dicom_to_uint8
from ctutils.metrics import macro_f1
from ctutils.models import build_model
from ctutils.pipeline import Plan, predict_files, run_plan
from ctutils.runs import claim, load_run

REAL, SMALL = "efficientnet_lite0", "mobilenet_v3_large"  # real weights by pip; the quickest of the deck's
EXACT = {"precision": "float32"}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a data set, shared by the module: its store and features are made once."""
    folder = tmp_path_factory.mktemp("room with 한글")
    write_set(folder / "set", per_class=4)
    return folder


def settings_in(folder: Path, **changes) -> Settings:
    profile = Profile("quick", train=0, val=0, test=0, epochs=2, image_size=64, batch_size=8)
    places = {"data_dir": folder / "set", "cache_dir": folder / "cache", "runs_dir": folder / "runs"}
    return Settings(**{"profile": profile, "device": "cpu", "weights": "random", **places, **changes})


@pytest.fixture
def settings(room) -> Settings:
    return settings_in(room)


@pytest.fixture
def plan(room) -> Plan:
    return Plan(SMALL, data=room / "set", **EXACT)


def change(plan: Plan, **changes) -> Plan:
    return dataclasses.replace(plan, **changes)


@pytest.fixture(scope="module")
def real_run(room):
    """Two epochs on real ImageNet weights, with what was said."""
    said: list[str] = []
    plan = Plan(REAL, data=room / "set", weights="imagenet", **EXACT)
    return run_plan(plan, settings_in(room), room / "real run", say=said.append), said


@pytest.fixture(scope="module")
def random_run(room):
    """Two epochs on random weights, with what was said."""
    said: list[str] = []
    return run_plan(Plan(SMALL, data=room / "set", **EXACT), settings_in(room), room / "random", say=said.append), said


def numbers(run) -> list:
    """Return what two equal runs share: history without seconds, and all predictions."""
    return [run.history.drop(columns="seconds").to_csv(), run.predictions.to_csv()]


# --- The record ---


def test_run_writes_a_whole_record(real_run, room):
    run, said = real_run
    assert files_below(run.folder) == ["head.safetensors", "history.csv", "predictions.csv", "run.json"]
    record = json.loads((room / "real run" / "run.json").read_text(encoding="utf-8"))
    counts = {split: dict.fromkeys(CLASSES, 4) for split in ("train", "val", "test")}
    assert record["data"]["counts"] == counts and record["classes"] == list(CLASSES)
    assert record["data"]["fingerprint"] == data.load_folder(room / "set", cache=room / "cache").fingerprint
    assert record["data"]["test_from_val"] is False
    assert (record["name"], record["profile"], record["device"]) == ("real run", "quick", "cpu")
    assert (record["backbone"], record["weights"]["kind"], record["bn"]) == (REAL, "imagenet", "frozen")
    assert (record["standardised"], record["trained"], record["augment"]) == (True, "head", [])
    assert (record["seed"], record["epochs"], record["batch_size"], record["image_size"]) == (0, 2, 8, 64)
    assert record["optimizer"] == {"name": "Adam", "lr": 1e-3}
    assert record["scheduler"] == {"name": "StepLR", "step_size": 7, "gamma": 0.1}
    assert record["parameters"]["trained"] == 1280 * 3 + 3
    assert record["interrupted"] is False and record["precision"] == "float32"
    assert set(record["seconds"]) == {"features", "train", "total"} and min(record["seconds"].values()) > 0
    assert said == [], "real weights need no banner"
    assert not list(room.glob("*.lock")) and not list(room.glob(".real run*"))


def test_scores_of_the_record_are_those_of_its_predictions(real_run):
    run, _ = real_run
    assert run.splits == ("val", "test")
    for split in run.splits:
        assert len(run.of_split(split)) == 12
        found = macro_f1(run.y_true(split), run.y_score(split).argmax(1), 3)
        assert run.record["scores"][split]["macro_f1"] == pytest.approx(found)
    best = run.history.iloc[run.record["best_epoch"] - 1]
    assert best["val_macro_f1"] == pytest.approx(run.record["scores"]["val"]["macro_f1"])
    test = run.record["scores"]["test"]
    assert test["low"] <= test["macro_f1"] <= test["high"] and list(test["per_class"]) == list(CLASSES)


def test_random_weights_are_said_adapted_and_standardised(random_run):
    run, said = random_run
    record = run.record
    assert (record["weights"]["kind"], record["bn"], record["standardised"]) == ("random", "adapt", True)
    assert len(said) == 1 and "random weights" in said[0] and said[0] == record["weights"]["note"]


def pictures(run, room: Path) -> list[Path]:
    return [room / "set" / path for path in run.predictions["path"]]


def check_predictions(run, room: Path) -> None:
    """Assert that the restored model says of the files what the record says of them."""
    rows = predict_files(run, pictures(run, room))
    found = np.array([[row["probabilities"][name] for name in CLASSES] for row in rows])
    stored = run.predictions[[f"p_{name}" for name in CLASSES]].to_numpy()
    np.testing.assert_allclose(found, stored, atol=2e-3)
    assert [row["image"] for row in rows] == [str(path) for path in pictures(run, room)]
    sure = np.ptp(np.sort(stored)[:, 1:], axis=1) > 0.01
    assert [row["class"] for row, s in zip(rows, sure, strict=True) if s] == [
        CLASSES[k] for k in stored[sure].argmax(1)
    ]
    assert np.ptp(stored, axis=0).max() > 0.01, "this test could not tell slices apart"


def test_record_predicts_what_it_stored(real_run, random_run, room):
    check_predictions(real_run[0], room)
    check_predictions(random_run[0], room)


@pytest.mark.parametrize(
    ("change_", "expected"),
    [
        ({"unfreeze": True}, {"trained": "all", "bn": "train", "standardised": False}),
        ({"bn": "drift"}, {"trained": "head", "bn": "drift", "standardised": False}),
        (
            {"bn": "adapt", "optimizer": "rmsprop", "standardise": False},
            {"bn": "adapt", "optimizer": {"name": "RMSprop", "lr": 1e-3}, "standardised": False},
        ),
        (
            {"backbone": SMALL, "weights": "random", "augment": ("rotate", "flip")},
            {"trained": "head", "bn": "adapt", "standardised": True, "augment": ["rotate", "flip"]},
        ),
    ],
    ids=["unfreeze", "drift", "adapt", "augment"],
)
def test_other_ways_to_train(plan, settings, room, tmp_path, change_, expected):
    plan = change(plan, **{"backbone": REAL, "weights": "imagenet", "epochs": 1, **change_})
    run = run_plan(plan, settings, tmp_path / "run", say=lambda text: None)
    assert {key: run.record[key] for key in expected} == expected
    whole = expected.get("trained") == "all"
    assert run.tensors_path.name == ("model" if whole else "head") + ".safetensors"
    assert (run.record["parameters"]["frozen"] == 0) == whole
    check_predictions(run, room)


def test_every_optimizer_is_the_one_it_is_called(plan):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    made = {name: make(parameters, lr=0.5) for name, make in pipeline.OPTIMIZERS.items()}
    assert {name: type(optimizer).__name__.lower() for name, optimizer in made.items()} == {
        name: name for name in ("adam", "adamw", "sgd", "rmsprop")
    }
    assert made["sgd"].defaults["momentum"] == 0.9 and all(o.defaults["lr"] == 0.5 for o in made.values())


def test_set_without_test_split_reports_on_half_of_val(plan, settings, tmp_path):
    root = write_set(tmp_path / "set", splits=("Training", "Validation"), per_class=4)
    mine = dataclasses.replace(settings, cache_dir=tmp_path / "cache")
    run = run_plan(change(plan, data=root), mine, tmp_path / "run", say=lambda text: None)
    assert run.record["data"]["test_from_val"] is True
    assert [len(run.of_split(split)) for split in ("val", "test")] == [6, 6]
    assert not set(run.of_split("val")["path"]) & set(run.of_split("test")["path"])


def test_without_data_the_settings_set_is_taken(plan, settings, tmp_path, monkeypatch):
    asked = []
    real = data.load_folder(settings.data_dir, cache=settings.cache_dir)
    monkeypatch.setattr(pipeline, "default_folder", lambda given: asked.append(given) or real)
    run = run_plan(change(plan, data=None), settings, tmp_path / "run", say=lambda text: None)
    assert asked == [settings] and run.record["data"]["name"] == "set"


# --- Schedules, unfreezing by blocks, balance ---


def parts_of(plan: Plan, name: str = SMALL):
    """Return a network cut in two, frozen as planned, and the names of what learns."""
    model, _ = build_model(name, "random")
    pipeline.models.replace_head(model, name, 3)
    backbone, head = pipeline.models.split_model(model, name)
    last_block = pipeline._set_learning(model, backbone, head, plan)
    whole = pipeline.models.join(backbone, head)
    return whole, last_block, {key for key, value in whole.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("name", sorted(pipeline.LAST_BLOCK))
def test_last_block_is_the_coarsest_resolution(name):
    with torch.device("meta"):
        model = pipeline.models._make(pipeline.models.get_spec(name))
        pipeline.models.replace_head(model, name, 3)
        backbone, head = pipeline.models.split_model(model, name)
        sizes = {}
        for key, part in backbone.named_modules():
            if isinstance(part, torch.nn.Conv2d):
                part.register_forward_hook(lambda _m, given, out, key=key: sizes.update({key: out.shape[-1]}))
        backbone.eval()(torch.zeros(1, 3, 224, 224))
    pipeline._set_learning(model, backbone, head, Plan(name, unfreeze="last"))
    whole = pipeline.models.join(backbone, head)
    learning = {key for key, value in whole.named_parameters() if value.requires_grad}
    convolutions = [key for key in sizes if f"backbone.{key}.weight" in learning]
    found = [sizes[key] for key in convolutions if sizes[key] > 1]  # 1: squeeze and excitation
    smallest = min(size for size in sizes.values() if size > 1)
    assert found and max(found) <= 2 * smallest, "a block's first convolutions may still see the finer grid"
    assert sum(size == smallest for size in found) > len(found) / 2
    assert all(key in learning for key, _ in whole.named_parameters() if key.startswith("head."))
    assert len(learning) < len(list(whole.parameters())) - 2, "the rest stays frozen"


def test_what_learns_and_at_which_rate():
    whole, last_block, learning = parts_of(Plan(SMALL))
    assert learning == {"head.3.weight", "head.3.bias"}
    whole, last_block, learning = parts_of(Plan(SMALL, unfreeze="all"))
    assert learning == {name for name, _ in whole.named_parameters()}
    groups = pipeline._parameter_groups(whole, last_block, 0.1)
    assert [share for _, share in groups] == pytest.approx([1, 0.1, 0.01])
    assert [len(parameters) for parameters, _ in groups][0] == 2
    assert {id(p) for p in groups[1][0]} == last_block and sum(len(p) for p, _ in groups) == len(learning)
    optimizer = pipeline._build_optimizer("adam", groups, 0.5, True)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05, 0.005])
    (one,) = pipeline._parameter_groups(whole, last_block, 1.0)
    assert len(one[0]) == len(learning)
    whole, last_block, _ = parts_of(Plan(SMALL, unfreeze="last"))
    assert [share for _, share in pipeline._parameter_groups(whole, last_block, 0.1)] == [1, 0.1]


def statistics(run) -> dict:
    return {key: value for key, value in run.load_tensors().items() if key.endswith(("running_mean", "running_var"))}


def test_batchnorm_of_an_unfrozen_network(plan, settings, tmp_path):
    """Frozen: as it came; adapted: estimated anew and then kept; trained: moved with the weights."""
    runs = {}
    for bn in ("frozen", "adapt", "train"):
        more = change(plan, unfreeze="all", bn=bn, epochs=1, lr=1e-2)
        runs[bn] = run_plan(more, settings, tmp_path / bn, say=lambda text: None)
        assert (runs[bn].record["bn"], runs[bn].record["trained"]) == (bn, "all")
    found = {bn: statistics(run) for bn, run in runs.items()}
    assert all((found["frozen"][key] == key.endswith("var")).all() for key in found["frozen"]), "0 and 1 at the start"
    momenta = set()
    real = pipeline.train_model

    def look(trained, *args, **kwargs):
        momenta.update(part.momentum for part in trained.modules() if isinstance(part, pipeline.models.BatchNorm))
        return real(trained, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train_model", look)
        run_plan(change(plan, unfreeze="all", epochs=1), settings, tmp_path / "again", say=lambda text: None)
    assert momenta == {0.1}, "MobileNetV3's own 0.01 cannot follow a short training"
    learned = {bn: run.load_tensors()["backbone.features.0.1.weight"] for bn, run in runs.items()}
    assert (learned["frozen"] == 1).all() and (learned["adapt"] == 1).all() and not (learned["train"] == 1).all()
    head_only = run_plan(change(plan, bn="adapt"), settings, tmp_path / "head", say=lambda text: None)
    adapted = {key.removeprefix("bn."): value for key, value in head_only.load_tensors().items() if key[:3] == "bn."}
    for key, value in adapted.items():
        np.testing.assert_allclose(found["adapt"][f"backbone.{key}"], value, rtol=1e-4, atol=1e-5)
        assert not np.array_equal(found["train"][f"backbone.{key}"], value)


def test_last_block_of_random_weights_stands_on_adapted_statistics(plan, settings, room, tmp_path):
    run = run_plan(change(plan, unfreeze="last", epochs=1), settings, tmp_path / "run", say=lambda text: None)
    assert (run.record["trained"], run.record["bn"]) == ("last", "train")
    tensors, start = run.load_tensors(), build_model(SMALL, "random")[0].state_dict()
    key = "backbone.features.{}.0.weight"
    assert np.array_equal(tensors["backbone.features.0.0.weight"], start["features.0.0.weight"])
    assert not np.array_equal(tensors["backbone.features.16.0.weight"], start["features.16.0.weight"]), key
    assert not (tensors["backbone.features.0.1.running_var"] == 1).all()
    check_predictions(run, room)


@pytest.mark.parametrize("scheduler", sorted(pipeline.SCHEDULERS))
def test_schedule_of_the_record(plan, settings, tmp_path, scheduler):
    run = run_plan(change(plan, scheduler=scheduler, epochs=4), settings, tmp_path / "run", say=lambda text: None)
    rates = run.history["lr"].tolist()
    names = {"none": "none", "step": "StepLR", "cosine": "CosineAnnealingLR", "onecycle": "OneCycleLR"}
    assert run.record["scheduler"]["name"] == names[scheduler]
    assert run.record["optimizer"]["lr"] == 1e-3
    if scheduler in ("none", "step"):
        assert rates == [1e-3] * 4
    elif scheduler == "cosine":
        assert rates == pytest.approx([1e-3 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)])
    else:
        assert rates[0] == pytest.approx(1e-3 / 25) and rates[1] > rates[0] and rates[3] < max(rates)


def test_early_stopping_in_the_record(plan, settings, tmp_path):
    run = run_plan(change(plan, patience=1, epochs=50, lr=0.3), settings, tmp_path / "run", say=lambda text: None)
    assert run.record["patience"] == 1 and len(run.history) == run.record["best_epoch"] + 1 < 50


def test_rate_by_a_range_test(plan, settings, tmp_path):
    run = run_plan(change(plan, lr="range", optimizer="sgd"), settings, tmp_path / "run", say=lambda text: None)
    tried = run.record["lr_range"]
    best = min(tried, key=lambda point: point["val_loss"])["lr"]
    assert run.record["optimizer"]["lr"] == pytest.approx(best / 3) and len(tried) > 5
    assert run.history["lr"][0] == pytest.approx(best / 3)
    again = run_plan(change(plan, lr="range", optimizer="sgd"), settings, tmp_path / "b", say=lambda text: None)
    assert numbers(again) == numbers(run)


def test_imbalance_and_its_cures(plan, settings, tmp_path, monkeypatch):
    root = write_set(tmp_path / "set", per_class=12)
    mine = dataclasses.replace(settings, cache_dir=tmp_path / "cache")
    losses, real = {}, pipeline.train_model
    monkeypatch.setattr(
        pipeline,
        "train_model",
        lambda *a, **kw: losses.update({balance: a[1].weight, "loader": a[4]["train"]}) or real(*a, **kw),
    )
    runs = {}
    for balance in ("none", "loss", "sampler"):
        one = change(plan, data=root, imbalance=6.0, balance=balance)
        runs[balance] = run_plan(one, mine, tmp_path / balance, say=lambda text: None)
        assert (runs[balance].record["balance"], runs[balance].record["imbalance"]) == (balance, 6)
        counts = runs[balance].record["data"]["counts"]
        assert list(counts["train"].values()) == [12, 5, 2] and list(counts["test"].values()) == [12] * 3
    assert losses["none"] is None and losses["sampler"] is None
    assert losses["loss"].tolist() == pytest.approx([19 / 36, 19 / 15, 19 / 6])
    torch.manual_seed(0)
    drawn = torch.cat([labels for _ in range(20) for _, labels in losses["loader"]]).bincount()
    assert drawn.min() > 0.25 * drawn.sum(), "the sampler draws the classes alike"
    assert len({str(numbers(run)) for run in runs.values()}) == 3


def test_views_are_cached_and_change_the_training(plan, settings, tmp_path, monkeypatch):
    calls, real = [], pipeline.cached_features
    monkeypatch.setattr(pipeline, "cached_features", lambda *a, **kw: calls.append(kw) or real(*a, **kw))
    plain = run_plan(plan, settings, tmp_path / "plain", say=lambda text: None)
    some = run_plan(change(plan, augment=("flip",), views=3), settings, tmp_path / "views", say=lambda text: None)
    assert [kw.get("views") for kw in calls] == [None, None, 3] and calls[2]["augmentations"] == ("flip",)
    assert len(calls[2]["rows"]) == 12 and some.record["views"] == 3 and some.record["trained"] == "head"
    assert numbers(some) != numbers(plain)
    assert numbers(run_plan(change(plan, augment=("flip",), views=3), settings, tmp_path / "b")) == numbers(some)


def test_memory_that_does_not_hold_the_batch(plan, settings, tmp_path, monkeypatch, caplog):
    real, seen = pipeline.models.join, []

    def hungry(*args):
        whole = real(*args)

        def look(_module, inputs):
            seen.append(len(inputs[0]))
            if len(inputs[0]) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

        whole.register_forward_pre_hook(look)
        return whole

    monkeypatch.setattr(pipeline.models, "join", hungry)
    one = change(plan, unfreeze="all", epochs=1)
    run = run_plan(one, settings, tmp_path / "run", say=lambda text: None)
    assert (run.record["batch_size"], run.record["at_once"]) == (8, 4)
    assert len([text for text in caplog.messages if "Out of memory" in text]) == 1
    assert [n for n in seen if n > 4] == [8], "asked once more after it was known"
    given = run_plan(change(one, at_once=2), settings, tmp_path / "given", say=lambda text: None)
    assert given.record["at_once"] == 2 and given.record["batch_size"] == 8


def test_test_split_of_another_set(plan, settings, tmp_path):
    for name, classes in (("a", CLASSES), ("b", CLASSES), ("other", ("x", "y", "z"))):
        write_set(tmp_path / name, per_class=3 if name == "a" else 4, classes=classes)
    write_set(tmp_path / "no test", splits=("train", "val"), per_class=3)
    mine = dataclasses.replace(settings, cache_dir=tmp_path / "cache")
    one = change(plan, data=tmp_path / "a", test_data=tmp_path / "b")
    folder = pipeline.load_plan_data(one, mine)
    counts = {split: len(folder.rows(split)) for split in ("train", "val", "test")}
    assert counts == {"train": 9, "val": 9, "test": 12} and folder.name == "a, tested on b"
    assert all((folder.root / path).is_file() for path in folder.slices["path"])
    assert set(folder.slices["path"].str.split("/").str[0]) == {"a", "b"}
    alone = data.load_folder(tmp_path / "a", cache=tmp_path / "cache")
    assert folder.fingerprint not in (alone.fingerprint, "")
    with user_error("classes ('x', 'y', 'z')"):
        pipeline.load_plan_data(change(one, test_data=tmp_path / "other"), mine)
    with user_error("no test split in 'no test'"):
        pipeline.load_plan_data(change(one, test_data=tmp_path / "no test"), mine)


def test_depthwise_networks_train_in_float32_on_a_cpu(plan, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "choose_precision", lambda *_: "bfloat16")
    asked, real = [], pipeline.train_model
    monkeypatch.setattr(
        pipeline, "train_model", lambda *a, **kw: asked.append(kw["batching"].bfloat16) or real(*a, **kw)
    )
    for precision, depthwise in (("auto", (SMALL,)), ("auto", ()), ("bfloat16", (SMALL,))):
        monkeypatch.setattr(pipeline, "DEPTHWISE", depthwise)
        one = change(plan, unfreeze="last", precision=precision, epochs=1)
        run = run_plan(one, settings, tmp_path / "run", say=lambda text: None)
        assert (run.record["precision"] == "bfloat16") == asked[-1]
    assert asked == [False, True, True]


# --- By count ---


def test_slices_are_decoded_once_and_seen_once_by_each_backbone(tmp_path, monkeypatch):
    """One pass over the data, whatever the epochs and backbones; none at all the second time."""
    decoded, seen = [], []
    read_small, inference_copy = data.read_small, features.inference_copy

    def counted(*args, **options):
        fast = inference_copy(*args, **options)
        fast.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
        return fast

    monkeypatch.setattr(data, "read_small", lambda *args: decoded.append(args[0]) or read_small(*args))
    monkeypatch.setattr(features, "inference_copy", counted)
    settings = settings_in(tmp_path)
    write_set(tmp_path / "set", per_class=3)
    plans = [
        Plan(SMALL, data=tmp_path / "set", epochs=5, bn="frozen", **EXACT),
        Plan(REAL, data=tmp_path / "set", epochs=1, weights="imagenet", **EXACT),
    ]
    for number, one in enumerate(plans, 1):
        run_plan(one, settings, tmp_path / one.backbone, say=lambda text: None)
        assert len(decoded) == len(set(decoded)) == 27
        assert sum(seen) == 27 * number
    for one in plans:
        run_plan(change(one, epochs=3, lr=0.1), settings, tmp_path / "again", say=lambda text: None)
    assert len(decoded) == 27 and sum(seen) == 54, "the second run made a pass of its own"


# --- Seeds, Ctrl-C, resume ---


def test_seed_decides_all(plan, settings, random_run, tmp_path, monkeypatch):
    seeds, real = [], pipeline.train_model
    monkeypatch.setattr(pipeline, "train_model", lambda *a, **kw: seeds.append(kw["seed"]) or real(*a, **kw))
    again = run_plan(plan, settings, tmp_path / "again", say=lambda text: None)
    assert numbers(again) == numbers(random_run[0])
    other = run_plan(change(plan, seed=1), settings, tmp_path / "other", say=lambda text: None)
    assert numbers(other) != numbers(again)
    assert other.record["weights"]["sha256"] != again.record["weights"]["sha256"]
    assert seeds == [0, 1], "shuffling and dropout"


def stop_in_epoch(monkeypatch, number: int) -> None:
    """Press Ctrl-C in an epoch, after its training steps."""
    calls, real = [], training.train_one_epoch

    def stopped(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        if len(calls) == number:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(training, "train_one_epoch", stopped)


@pytest.mark.parametrize("way", [{}, {"unfreeze": True}, {"augment": ("shift",), "bn": "drift"}], ids=str)
def test_interrupted_run_is_saved_and_resumed_to_the_same_numbers(plan, settings, tmp_path, monkeypatch, way):
    plan, said = change(plan, **way), []
    whole = run_plan(plan, settings, tmp_path / "whole", say=lambda text: None)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        part = run_plan(plan, settings, tmp_path / "run", say=said.append)
    assert part.record["interrupted"] is True and len(part.history) == 1 and part.record["best_epoch"] == 1
    assert "Stopped early" in said[-1] and "--resume" in said[-1]
    resumed = run_plan(plan, settings, tmp_path / "run", resume=True, say=lambda text: None)
    assert numbers(resumed) == numbers(whole)
    assert resumed.record["interrupted"] is False
    assert not [name for name in files_below(tmp_path) if "checkpoint" in name]


def test_resume_after_other_choices_is_refused(plan, settings, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        run_plan(plan, settings, out, say=lambda text: None)
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    other_data = write_set(tmp_path / "other", splits=("train", "val", "test"), per_class=3)
    for word, other in {
        "data": {"data": other_data},
        "lr": {"lr": 0.5},
        "optimizer": {"optimizer": "sgd"},
        "seed": {"seed": 3},
        "batch_size": {"batch_size": 5},
        "augment": {"augment": ("flip",)},
        "unfreeze": {"unfreeze": True},
    }.items():
        with user_error("another run", word, "--resume"):
            run_plan(change(plan, **other), settings, out, resume=True, say=lambda text: None)
    after = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path) if "other" not in name}
    assert after == before, "a refused resume changed something"
    longer = run_plan(change(plan, epochs=4), settings, out, resume=True, say=lambda text: None)
    assert longer.history["epoch"].tolist() == [1, 2, 3, 4], "more epochs are no other run"


def test_new_run_does_not_take_up_an_old_checkpoint(plan, settings, random_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        run_plan(change(plan, lr=0.5), settings, out, say=lambda text: None)
    with monkeypatch.context() as patch, user_error("before its first epoch ended"):
        stop_in_epoch(patch, 1)
        run_plan(plan, settings, out, say=lambda text: None)
    assert load_run(out).record["optimizer"]["lr"] == 0.5, "the older record is lost"
    run = run_plan(plan, settings, out, resume=True, say=lambda text: None)
    assert numbers(run) == numbers(random_run[0])


# --- Nothing lost, one message ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "resnet18"}, ("backbone 'resnet18'", "resnet50")),
        ({"optimizer": "lion"}, ("optimizer 'lion'", "adam, adamw, sgd, rmsprop")),
        ({"precision": "float16"}, ("precision 'float16'", "bfloat16")),
        ({"augment": ("flip", "warp")}, ("warp", "rotate, zoom, shift, flip")),
        ({"lr": 0.0}, ("learning rate of 0.0",)),
        ({"lr": float("nan")}, ("learning rate of nan",)),
        ({"lr": float("inf")}, ("learning rate of inf",)),
        ({"epochs": 0}, ("epochs 0", "1 or more")),
        ({"batch_size": 0}, ("batch size 0",)),
        ({"batch_size": -4}, ("batch size -4",)),
        ({"size": 0}, ("size 0", "64 or more")),
        ({"size": 63}, ("size 63",)),
        ({"scheduler": "linear"}, ("scheduler 'linear'", "none, step, cosine, onecycle")),
        ({"unfreeze": "some"}, ("unfreeze 'some'", "none, last, all")),
        ({"balance": "luck"}, ("balance 'luck'", "none, loss, sampler")),
        ({"bn": "melt"}, ("bn 'melt'", "adapt")),
        ({"bn": "train"}, ("frozen backbone", "unfreeze")),
        ({"lr": "auto"}, ("learning rate of auto", "range")),
        ({"discriminative": 0.0}, ("discriminative 0.0",)),
        ({"discriminative": 2.0}, ("discriminative 2.0",)),
        ({"views": -1}, ("views -1",)),
        ({"patience": 0}, ("patience 0",)),
        ({"at_once": 0}, ("at_once 0",)),
        ({"imbalance": 0.5}, ("imbalance 0.5",)),
    ],
    ids=str,
)
def test_bad_choice_is_said_before_any_work(plan, tmp_path, changes, words):
    root = write_set(tmp_path / "set")
    before = files_below(tmp_path)
    with user_error(*words):
        run_plan(change(plan, data=root, **changes), settings_in(tmp_path), tmp_path / "runs" / "run")
    assert files_below(tmp_path) == before


def test_smallest_size_is_enough_for_alexnet():
    with torch.device("meta"):
        model = pipeline.models._make(pipeline.models.get_spec("alexnet"))
        size = pipeline.SMALLEST_INPUT
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 1000)


def test_data_that_is_not_there_leaves_nothing(plan, tmp_path):
    with user_error("no folder", "nowhere"):
        run_plan(change(plan, data=tmp_path / "nowhere"), settings_in(tmp_path), tmp_path / "run")
    assert files_below(tmp_path) == []


def test_weights_of_another_network(plan, settings, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(build_model("alexnet", "random")[0].features.state_dict(), folder / f"{SMALL}.pth")
    with user_error(f"{SMALL}.pth", "MobileNetV3", "find the weights file of this network"):
        run_plan(change(plan, weights=str(folder)), settings, tmp_path / "run")
    with user_error("no weights of ResNet50"):
        run_plan(change(plan, backbone="resnet50", weights=str(folder)), settings, tmp_path / "run")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("*.lock"))


def test_second_run_into_the_same_record_waits_outside(plan, settings, random_run, room, monkeypatch):
    """The first run holds the record's name in another thread; the second is told before it works for nothing."""
    monkeypatch.setattr(pipeline, "load_folder", lambda *_args, **_kwargs: pytest.fail("it began to work"))
    held, done = threading.Event(), threading.Event()

    def first():
        with claim(room / "random"):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert held.wait(60)
        with user_error("the record 'random' held by", "one run at a time"):
            run_plan(change(plan, lr=0.5), settings, room / "random", say=lambda text: None)
    finally:
        done.set()
        thread.join()
    assert numbers(load_run(room / "random")) == numbers(random_run[0])


def test_failed_run_leaves_the_older_record_and_frees_its_name(plan, settings, tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = run_plan(plan, settings, out, say=lambda text: None)
    with monkeypatch.context() as patch, user_error("boom"):

        def fail(*_args, **_kwargs):
            raise CTError("boom", "none", "wait")

        patch.setattr(pipeline, "save_run", fail)
        run_plan(change(plan, lr=0.1), settings, out, say=lambda text: None)
    assert numbers(load_run(out)) == numbers(first)
    run_plan(change(plan, lr=0.1), settings, out, say=lambda text: None)
    assert load_run(out).record["optimizer"]["lr"] == 0.1, "an older record is replaced"


def test_folder_with_other_things_is_never_replaced(plan, settings, tmp_path):
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("three years of work")
    for out in (thesis.parent, thesis, settings.data_dir):
        with user_error("something else than a run record", "was left as it was"):
            run_plan(plan, settings, out, say=lambda text: None)
    assert thesis.read_text() == "three years of work"
    (tmp_path / "empty").mkdir()
    assert run_plan(plan, settings, tmp_path / "empty", say=lambda text: None).name == "empty"
    (tmp_path / "empty" / "run.json").unlink()  # a damaged record says: train this run again
    assert run_plan(plan, settings, tmp_path / "empty", say=lambda text: None).name == "empty"


# --- Prediction ---


def write_dicom(path: Path, frames: np.ndarray) -> None:
    """Write uint16 frames (F, H, W) as stored values, HU + 1024."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CT", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = frames.shape[1:]
    if len(frames) > 1:
        dataset.NumberOfFrames = len(frames)
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
    dataset.PixelData = frames.astype("<u2").tobytes()
    dataset.save_as(path, enforce_file_format=True)


def test_dicom_of_several_frames_is_read_like_pictures(real_run, tmp_path):
    run, _ = real_run
    frames = np.stack([picture(k, k, (60, 50)).astype(np.uint16) * 6 for k in range(3)])
    write_dicom(tmp_path / "세 장.dcm", frames)
    write_dicom(tmp_path / "no suffix", frames[1:2])
    grey = dicom_to_uint8(tmp_path / "세 장.dcm")
    for k, frame in enumerate(grey):
        Image.fromarray(frame).save(tmp_path / f"{k}.png")
    paths = [tmp_path / name for name in ("세 장.dcm", "0.png", "1.png", "2.png", "no suffix")]
    rows = predict_files(run, paths)
    names = [f"{paths[0]} frame {k}" for k in (1, 2, 3)] + [str(path) for path in paths[1:]]
    assert [row["image"] for row in rows] == names
    probabilities = np.array([list(row["probabilities"].values()) for row in rows])
    np.testing.assert_allclose(probabilities[:3], probabilities[3:6], atol=1e-5)
    np.testing.assert_allclose(probabilities[6], probabilities[4], atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert np.ptp(probabilities, axis=0).max() > 1e-3


def test_more_pictures_than_a_batch_any_kind(real_run, room, tmp_path):
    run, _ = real_run
    one = pictures(run, room)[0]
    with Image.open(one) as image:
        Image.merge("RGBA", [image] * 4).save(tmp_path / "A.PNG")
    rows = predict_files(run, [one] * 17 + [tmp_path / "A.PNG"])
    values = np.array([list(row["probabilities"].values()) for row in rows])
    assert len(rows) == 18 and np.abs(values - values[0]).max() < 1e-4


@pytest.mark.parametrize("kind", ["missing", "folder", "zero bytes", "text", "cut", "vast"])
def test_file_that_cannot_be_predicted(real_run, room, tmp_path, monkeypatch, kind):
    run, _ = real_run
    file = tmp_path / "slice.png"
    content = pictures(run, room)[0].read_bytes()
    if kind == "folder":
        file.mkdir()
    elif kind == "vast":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        file.write_bytes(content)
    elif kind != "missing":
        file.write_bytes({"zero bytes": b"", "text": b"hello", "cut": content[: len(content) // 2]}[kind])
    with user_error("slice.png"):
        predict_files(run, [file])


def test_record_without_weights_or_from_other_weights(random_run, room, tmp_path):
    run, _ = random_run
    picture_ = pictures(run, room)[:1]
    with user_error("no weights in the record"):
        predict_files(dataclasses.replace(run, tensors_path=None), picture_)
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(build_model(SMALL, "random", seed=9)[0].state_dict(), folder / f"{SMALL}.pth")
    with pytest.raises(CTError) as caught:
        predict_files(run, picture_, weights=str(folder))
    check_message(str(caught.value), "SHA-256", "the run's weights")


def test_module_uses_no_folder_of_the_project(room):
    assert config.cache_dir() not in room.parents and (room / "cache" / "features").is_dir()


# --- GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "way",
    [{}, {"augment": ("rotate", "noise"), "views": 2}, {"augment": ("flip",), "unfreeze": "all"}, {"bn": "drift"}],
    ids=str,
)
def test_run_on_a_gpu_goes_on_after_a_stop(plan, settings, tmp_path, monkeypatch, way):
    on_gpu = dataclasses.replace(settings, device="cuda")
    whole = run_plan(change(plan, **way), on_gpu, tmp_path / "whole", say=lambda text: None)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        run_plan(change(plan, **way), on_gpu, tmp_path / "run", say=lambda text: None)
    resumed = run_plan(change(plan, **way), on_gpu, tmp_path / "run", resume=True, say=lambda text: None)
    assert numbers(resumed) == numbers(whole) and whole.record["device"] == "cuda"
