"""experiment: from a folder of slices to a run record, in five steps that notebooks and the command line share."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CLASSES, files_below, user_error, write_set
from torch import nn

from ctutils import backbones, cli, config, data, experiment, features, training
from ctutils.config import Profile, Settings, get_settings
from ctutils.experiment import OPTIMIZERS, build, build_optimizer, featurise, fit, load, record, run_plan
from ctutils.metrics import macro_f1
from ctutils.plan import SCHEDULERS, Plan
from ctutils.runs import claim, load_run

BN, PLAIN = "mobilenet_v3_large", "alexnet"  # the tiny networks below have these names: with BatchNorm and without
quiet = functools.partial(run_plan, say=lambda text: None)


real_make = backbones._make


def tiny(spec) -> nn.Module:
    """Return a small network whose layers have the names of the real one's."""
    if spec.name not in (BN, PLAIN):
        return real_make(spec)
    norm = nn.BatchNorm2d if spec.name == BN else lambda channels, **_: nn.Identity()
    block, dropout = int(spec.last_block.split(".")[1]), nn.Dropout(0.2)
    layers = {k: nn.Identity() for k in range(block + 4)}
    layers[0] = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), norm(8, momentum=0.01), nn.ReLU())
    layers[block] = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), norm(16, momentum=0.01), nn.ReLU())
    wide, last = [nn.Linear(16, spec.in_features), nn.Hardswish()], nn.Linear(spec.in_features, 1000)
    classifier = [*wide, dropout, last]
    if spec.name == PLAIN:
        classifier = [dropout, *wide, dropout, nn.Identity(), nn.Identity(), last]
    model = nn.Module()
    model.features, model.avgpool = nn.Sequential(*layers.values()), nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Sequential(*classifier)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def tiny_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "_make", tiny)
        yield


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with a data set, shared by the module: its store and features are made once."""
    folder = tmp_path_factory.mktemp("room with 한글")
    write_set(folder / "set", per_class=4)
    return folder


def settings_in(folder: Path, **changes) -> Settings:
    profile = Profile("quick", train=0, val=0, test=0, epochs=2, image_size=64, batch_size=8)
    places = {"data_dir": folder / "set", "cache_dir": folder / "cache", "runs_dir": folder / "runs"}
    return Settings(**{"profile": profile, "device": "cpu", "weights": "random", **places, "own_data": True, **changes})


@pytest.fixture
def settings(room) -> Settings:
    return settings_in(room)


@pytest.fixture
def plan() -> Plan:
    return Plan(BN, precision="float32")


change = dataclasses.replace


@pytest.fixture(scope="module")
def first_run(room):
    """Two epochs on random weights, with what was said."""
    said: list[str] = []
    return run_plan(Plan(BN, precision="float32"), settings_in(room), room / "first", say=said.append), said


def numbers(run) -> list:
    """Return what two equal runs share: history without seconds, and all predictions."""
    return [run.history.drop(columns="seconds").to_csv(), run.predictions.to_csv()]


# --- The record ---


def test_run_writes_a_whole_record(first_run, room, settings):
    run, said = first_run
    assert files_below(run.folder) == ["head.safetensors", "history.csv", "predictions.csv", "run.json"]
    stored = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    counts = {split: dict.fromkeys(CLASSES, 4) for split in ("train", "val", "test")}
    fingerprint = data.load_folder(room / "set", cache=room / "cache").fingerprint
    assert stored["data"] == {
        **{"name": "set", "kind": "unknown", "fingerprint": fingerprint, "counts": counts, "test_from_val": False},
        **{"shortcut": None, "window": None, "patients": None, "depth": "", "notes": []},
    }
    assert stored["classes"] == list(CLASSES) and stored["name"] == "first"
    assert [stored[key] for key in ("profile", "device", "precision", "trained")] == ["quick", "cpu", "float32", "head"]
    assert (stored["bn"], stored["standardised"], stored["lr"], stored["at_once"]) == ("adapt", True, 1e-3, None)
    assert stored["parameters"] == {"trained": 1280 * 3 + 3, "frozen": 608 + 1168 + 17 * 1280 + 48}
    assert stored["interrupted"] is False and min(stored["seconds"].values()) > 0
    resolved = Plan(BN, precision="float32").resolved(settings)
    assert run.plan == resolved and stored["plan"] == resolved.to_json()
    assert said == [stored["weights"]["note"]] and "random weights" in said[0]
    assert [name for name in files_below(room) if "checkpoint" in name] == []
    for split in run.splits:
        scores = run.record["scores"][split]
        assert len(run.of_split(split)) == 12 and list(scores["per_class"]) == list(CLASSES)
        assert scores["macro_f1"] == pytest.approx(macro_f1(run.y_true(split), run.y_score(split).argmax(1), 3))
        assert scores["low"] <= scores["macro_f1"] <= scores["high"] and scores["resampled"] == "slices"
    best = run.history.iloc[stored["best_epoch"] - 1]
    assert run.splits == ("val", "test") and best["val_macro_f1"] == pytest.approx(stored["scores"]["val"]["macro_f1"])


@pytest.mark.parametrize("name", [BN, PLAIN])
def test_command_line_and_the_five_steps_of_a_notebook_are_one(settings, tmp_path, monkeypatch, capsys, name):
    """Random weights with BatchNorm to adapt, and real ones from a folder."""
    weights = "random" if name == BN else str(tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    torch.save(tiny(backbones.get_spec(PLAIN)).state_dict(), tmp_path / "weights" / f"{PLAIN}.pth")
    words = ["--backbone", name, "--weights", weights, "--size", "64", "--batch-size", "5", "--epochs", "2"]
    words += ["--precision", "float32", "--seed", "3", "--out", str(tmp_path / "command")]
    monkeypatch.setattr(config, "project_root", lambda: tmp_path)
    monkeypatch.setattr(config, "cache_dir", lambda: tmp_path / "cache")  # nothing is taken from a cache
    assert cli.main(["train", str(settings.data_dir), *words]) == 0, capsys.readouterr().err

    torch.manual_seed(99)  # whatever a notebook did before
    plan = Plan(name, weights=weights, size=64, batch_size=5, epochs=2, precision="float32", seed=3)
    folder = load(plan, settings)
    network = build(plan, settings, folder)
    loaders = featurise(plan, settings, folder, network)
    result = fit(plan, settings, folder, network, loaders)
    run = record(plan, settings, folder, network, loaders, result, tmp_path / "notebook")
    command = load_run(tmp_path / "command")
    assert numbers(run) == numbers(command) and run.record["weights"] == command.record["weights"]
    assert run.record["bn"] == ("adapt" if name == BN else "frozen")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"unfreeze": "all", "at_once": 4}, {"trained": "all", "bn": "train", "standardised": False, "at_once": 4}),
        ({"unfreeze": "last", "optimizer": "adamw"}, {"trained": "last", "bn": "train", "standardised": False}),
        ({"unfreeze": "all", "bn": "adapt", "ema": 0.5}, {"trained": "all", "bn": "adapt"}),
        ({"bn": "drift", "optimizer": "sgd"}, {"trained": "head", "bn": "drift", "standardised": False}),
        ({"bn": "frozen", "optimizer": "rmsprop", "standardise": False}, {"bn": "frozen", "standardised": False}),
        ({"augment": ("rotate", "flip")}, {"trained": "head", "bn": "adapt", "standardised": True}),
        ({"augment": ("flip",), "views": 2}, {"trained": "head", "standardised": True}),
        ({"backbone": PLAIN, "bn": "adapt"}, {"bn": "frozen"}),
    ],
    ids=str,
)
def test_other_ways_to_train_and_the_record_predicts_what_it_stored(plan, settings, tmp_path, changes, expected):
    run = quiet(change(plan, epochs=1, **changes), settings, tmp_path / "run")
    assert {key: run.record[key] for key in expected} == expected
    whole = run.record["trained"] != "head"
    assert run.tensors_path.name == ("model" if whole else "head") + ".safetensors"
    assert (run.record["parameters"]["frozen"] == 0) == (run.plan.unfreeze == "all" and run.record["bn"] == "train")
    folder, network = load(run.plan, settings), backbones.restore_model(run)
    store, spec = data.build_store(folder, 64, cache=settings.cache_dir), backbones.get_spec(run.plan.backbone)
    batches = data.make_loaders(folder, store, mean=spec.mean, std=spec.std)
    for split in run.splits:
        np.testing.assert_allclose(training.evaluate(network, batches[split])[2], run.y_score(split), atol=2e-3)


def test_set_without_test_split_and_with_odd_names(plan, settings, tmp_path):
    """What a data set's own files may say costs no finished training."""
    root = write_set(tmp_path / "set", splits=("Training", "Validation"), per_class=4, classes=("file:x", "NA"))
    about = {"name": "lungs from /data/hospital", "kind": 3, "arguments": None, "window": {"level": "x"}}
    (root / "dataset.json").write_text(json.dumps(about))
    patients = pd.DataFrame({"path": [f"Validation/NA/slice {i}.png" for i in range(4)], "patient": list("abca")})
    patients.to_csv(root / "patients.csv", index=False)
    run = quiet(change(plan, data=root, epochs=1), change(settings, cache_dir=tmp_path / "cache"), tmp_path / "run")
    found = run.record["data"]
    assert (found["name"], found["kind"], found["window"], found["patients"]) == (about["name"], "unknown", None, 3)
    assert found["test_from_val"] is True and run.classes == ("NA", "file:x")
    assert [len(run.of_split(split)) for split in ("val", "test")] == [4, 4]
    assert not set(run.of_split("val")["path"]) & set(run.of_split("test")["path"])
    assert run.record["scores"]["test"]["resampled"] == "patients" and set(run.patients("test")) <= set("abc") | {""}
    (root / "Training" / "NA" / "a\rb.png").write_bytes((root / "Training" / "NA" / "slice 0.png").read_bytes())
    with user_error("the name", r"a\rb.png"):
        quiet(change(plan, data=root), settings, tmp_path / "run")


def test_test_split_of_another_set(plan, settings, tmp_path):
    for name, count in (("a", 3), ("elsewhere/b", 4)):
        write_set(tmp_path / name, per_class=count)
    mine = change(settings, cache_dir=tmp_path / "cache")
    one = change(plan, data=tmp_path / "a", test_data=tmp_path / "elsewhere" / "b", epochs=1)
    run = quiet(one, mine, tmp_path / "runs" / "run")  # beside the sets, in the folder that holds both
    assert [len(run.of_split(split)) for split in ("val", "test")] == [9, 12]
    assert run.record["data"]["name"] == "a, tested on b"
    assert set(run.of_split("test")["path"].str.split("/").str[0]) == {"b"}, "no folders of this machine"


def test_two_data_folders_of_one_name_have_different_records(tmp_path):
    places = [get_settings(write_set(tmp_path / name / "set")).runs_dir for name in ("a", "b")]
    assert places[0] != places[1] and all("set" in place.name for place in places)


# --- What learns, and how ---


def test_what_learns_and_at_which_rate(plan, settings):
    folder = load(plan, settings)

    def groups(**changes):
        one = change(plan, optimizer="sgd", **changes)
        network = build(one, settings, folder)
        learning = {name for name, p in network.whole.named_parameters() if p.requires_grad}
        found = build_optimizer(one, network, 0.5).param_groups
        assert sum(len(group["params"]) for group in found) == len(learning)
        return {round(group["lr"], 4): len(group["params"]) for group in found}, learning

    rates, learning = groups()
    assert rates == {0.5: 2} and learning == {"head.classifier.3.weight", "head.classifier.3.bias"}
    rates, learning = groups(unfreeze="last", discriminative=0.1)
    assert rates == {0.5: 2, 0.05: 6} and all(".13." in name or "classifier" in name for name in learning)
    assert groups(unfreeze="all", discriminative=0.1)[0] == {0.5: 2, 0.05: 6, 0.005: 4}
    assert groups(unfreeze="all")[0] == {0.5: 12}
    made = {name: make([nn.Parameter(torch.zeros(1))], lr=0.5) for name, make in OPTIMIZERS.items()}
    assert [type(optimizer).__name__.lower() for optimizer in made.values()] == list(made)
    assert groups(unfreeze="all", bn="adapt")[0] == {0.5: 8}, "weights of BatchNorm stay as they are"
    network = build(change(plan, unfreeze="all"), settings, folder)
    momenta = {part.momentum for part in network.whole.modules() if isinstance(part, nn.BatchNorm2d)}
    assert momenta == {0.1}, "MobileNetV3's own 0.01 cannot follow a short training"


def test_pictures_grow_and_the_running_average_is_what_is_scored(plan, settings, monkeypatch):
    plan, seen = change(plan, unfreeze="all", size=96, start_size=64, epochs=4, ema=0.9), []
    folder = load(plan, settings)
    network = build(plan, settings, folder)
    loaders = featurise(plan, settings, folder, network)
    network.whole.register_forward_pre_hook(lambda module, given: seen.append((module.training, given[0].shape[-1])))
    averaged = experiment.Averaged(nn.Linear(2, 2), 0.9)
    with torch.no_grad():
        averaged.average.update_parameters(averaged.model)  # the first counts whole
        averaged.model.bias += 1
        averaged.average.update_parameters(averaged.model)
        inputs = torch.zeros(1, 2)
        assert torch.allclose(averaged.train()(inputs) - averaged.eval()(inputs), torch.tensor(0.9))
    result = fit(plan, settings, folder, network, loaders)
    sizes = [size for training, size in seen if training]
    assert sizes == [64] * (len(sizes) // 2) + [96] * (len(sizes) // 2), "half of the epochs are small"
    assert {size for training, size in seen if not training} <= {96} and len(result.history) == 4
    user_error("start_size with cached features", lambda: change(plan, unfreeze="last"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedule_of_the_record(plan, settings, tmp_path, scheduler):
    rates = quiet(change(plan, scheduler=scheduler, epochs=8), settings, tmp_path / "run").history["lr"].tolist()
    wanted = {"none": [1e-3] * 8, "step": [1e-3] * 7 + [1e-4]}
    wanted["cosine"] = [1e-3 * (1 + np.cos(np.pi * k / 8)) / 2 for k in range(8)]
    assert rates == pytest.approx(wanted.get(scheduler, rates))
    assert scheduler != "onecycle" or (rates[0] == pytest.approx(1e-3 / 25) and rates[2] > rates[0] > rates[7])


def test_early_stopping_and_a_rate_by_a_range_test(plan, settings, tmp_path):
    one = change(plan, lr="range", optimizer="sgd", patience=1, epochs=30)
    run = quiet(one, settings, tmp_path / "run")
    assert len(run.history) == run.record["best_epoch"] + 1 < 30
    tried = run.record["lr_range"]
    best = min(tried, key=lambda point: point["val_loss"])["lr"]
    assert run.record["lr"] == run.history["lr"][0] == pytest.approx(best / 3) and len(tried) > 5


def test_imbalance_and_its_cures(plan, settings, tmp_path, monkeypatch):
    root = write_set(tmp_path / "set", per_class=12)
    mine, seen, real = change(settings, cache_dir=tmp_path / "cache"), {}, training.train_model
    monkeypatch.setattr(training, "train_model", lambda *a, **kw: seen.update({balance: a}) or real(*a, **kw))
    for balance in ("none", "loss", "sampler"):
        run = quiet(change(plan, data=root, imbalance=6.0, balance=balance, epochs=1), mine, tmp_path / balance)
        counts = run.record["data"]["counts"]
        assert list(counts["train"].values()) == [12, 5, 2] and list(counts["test"].values()) == [12] * 3
    assert seen["none"][1].weight is None and seen["sampler"][1].weight is None
    assert seen["loss"][1].weight.tolist() == pytest.approx([19 / 36, 19 / 15, 19 / 6])
    drawn = torch.cat([labels for _ in range(20) for _, labels in seen["sampler"][4]["train"]]).bincount()
    assert drawn.min() > 0.25 * drawn.sum(), "the sampler draws the classes alike"


def test_slices_are_decoded_and_passed_once(settings, plan, tmp_path, monkeypatch):
    decoded, passed, read, real = [], [], data.read_grey, features.forward_pass
    monkeypatch.setattr(data, "read_grey", lambda *args: decoded.append(args[0]) or read(*args))
    monkeypatch.setattr(
        features, "forward_pass", lambda *a, **kw: (passed.append(len(batch)) or batch for batch in real(*a, **kw))
    )
    mine = change(settings, cache_dir=tmp_path / "cache")
    for changes in ({}, {"epochs": 3, "lr": 0.1}, {"augment": ("flip",), "views": 3}):
        quiet(change(plan, **changes), mine, tmp_path / "run")
    assert len(decoded) == 36 and sum(passed) == 36 + 3 * 12, "a second run made a pass of its own"


# --- Seeds, memory, Ctrl-C, resume ---


def test_seed_decides_all(plan, settings, first_run, tmp_path):
    again = quiet(plan, settings, tmp_path / "again")
    assert numbers(again) == numbers(first_run[0])
    other = quiet(change(plan, seed=1), settings, tmp_path / "other")
    assert numbers(other) != numbers(again)
    assert other.record["weights"]["sha256"] != again.record["weights"]["sha256"]


def test_memory_that_does_not_hold_the_batch(plan, settings, tmp_path, monkeypatch):
    """The second epoch finds the memory full once: it goes on from the first one's checkpoint, in halves."""
    one, said, seen = change(plan, unfreeze="all", bn="adapt", epochs=3), [], []
    whole = quiet(one, settings, tmp_path / "whole")
    real = backbones.Joined.forward

    def hungry(network, images):
        seen.append(network.at_once)
        if len(seen) == 6:  # two training batches and two of validation an epoch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(network, images)

    monkeypatch.setattr(backbones.Joined, "forward", hungry)
    run = run_plan(one, settings, tmp_path / "run", say=said.append)
    assert run.record["at_once"] == 4 and run.plan.batch_size == 8 and seen[5:7] == [None, 4]
    assert len(seen) == 4 + 2 + 4 + 4 + 4, "the first epoch was trained again"
    assert [text for text in said if "Out of memory" in text] == [
        "Out of memory with 8 slices at once: 4 from here on, the same batch size."
    ]
    np.testing.assert_allclose(run.y_score("test"), whole.y_score("test"), atol=1e-4)

    def always(network, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(backbones.Joined, "forward", always)
    with user_error("memory too small for one slice"):
        quiet(one, settings, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_settings_of_cudnn_are_given_back(plan, settings, monkeypatch):
    """Training the whole network on a GPU is deterministic; what comes after runs as before."""
    one, seen = change(plan, unfreeze="all", epochs=1), []
    folder, on_gpu = load(one, settings), change(settings, device="cuda")
    network = build(one, settings, folder)
    loaders = featurise(one, settings, folder, network)

    flags = lambda: (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)  # noqa: E731
    monkeypatch.setattr(experiment, "build_optimizer", lambda *_args: seen.append(flags()) or 1 / 0)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False):
        with pytest.raises(ZeroDivisionError):
            fit(one, on_gpu, folder, network, loaders)
        assert seen == [(True, False)] and flags() == (False, True)


def stop_in_epoch(patch, number: int) -> None:
    """Press Ctrl-C in an epoch, after its training steps."""
    calls, real = [], training.epoch_scores

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * number - 1:  # one call for train, one for val
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    patch.setattr(training, "epoch_scores", stopped)


RECIPE = {"unfreeze": "all", "size": 96, "start_size": 64, "ema": 0.5, "label_smoothing": 0.1}


@pytest.mark.parametrize("way", [{}, RECIPE, {"augment": ("shift",), "bn": "drift"}], ids=str)
def test_interrupted_run_is_saved_and_resumed_to_the_same_numbers(plan, settings, tmp_path, monkeypatch, way):
    plan, said = change(plan, **way), []
    whole = quiet(plan, settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        part = run_plan(plan, settings, tmp_path / "run", say=said.append)
    assert part.record["interrupted"] is True and len(part.history) == 1 and part.record["best_epoch"] == 1
    assert "Stopped early" in said[-1] and "--resume" in said[-1]
    resumed = quiet(plan, settings, tmp_path / "run", resume=True)
    assert numbers(resumed) == numbers(whole) and resumed.record["interrupted"] is False
    assert not [name for name in files_below(tmp_path) if "checkpoint" in name]


def test_no_checkpoint_is_written_where_none_is_wanted(plan, settings, first_run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "save_checkpoint", None)
    assert numbers(quiet(plan, settings, tmp_path / "run", resume=None)) == numbers(first_run[0])
    with pytest.raises(TypeError):
        quiet(plan, settings, tmp_path / "other")


def test_resume_after_other_choices_is_refused(plan, settings, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        quiet(plan, settings, out)
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    write_set(tmp_path / "other", per_class=3)
    others = {"data": tmp_path / "other", "lr": 0.5, "optimizer": "sgd", "seed": 3, "batch_size": 5, "unfreeze": "all"}
    for name, value in others.items():
        with user_error("another plan, other slices or other weights", "--resume"):
            quiet(change(plan, **{name: value}), settings, out, resume=True)
    after = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path) if "other" not in name}
    assert after == before, "a refused resume changed something"
    longer = quiet(change(plan, epochs=4), settings, out, resume=True)
    assert longer.history["epoch"].tolist() == [1, 2, 3, 4], "more epochs are no other run"


def test_new_run_does_not_take_up_an_old_checkpoint(plan, settings, first_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        quiet(plan, settings, out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_in_epoch(patch, 1)
        quiet(change(plan, lr=0.5), settings, out)
    assert load_run(out).record["interrupted"], "the older record is lost"
    assert numbers(quiet(plan, settings, out)) == numbers(first_run[0])
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        quiet(plan, settings, out)
    (checkpoint,), said = tmp_path.glob(".run.*.checkpoint.pt"), []
    checkpoint.write_bytes(b"half a file")
    resumed = run_plan(plan, settings, out, resume=True, say=said.append)
    assert numbers(resumed) == numbers(first_run[0]) and any("Training starts again" in text for text in said)


# --- Nothing lost ---


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(experiment, "load", lambda *_args: pytest.fail("it began to work"))


def test_second_run_into_the_same_record_waits_outside(plan, settings, first_run, room, no_work):
    with claim(room / "first"), user_error("the record 'first' held by", "one run at a time"):
        quiet(change(plan, lr=0.5), settings, room / "first")


def test_record_inside_a_data_set_is_refused(plan, settings, tmp_path, no_work):
    other = write_set(tmp_path / "other")
    before = files_below(settings.data_dir), files_below(other)
    for out, changes in (
        (settings.data_dir / "run", {}),
        (settings.data_dir / "train" / "new class" / "run", {"data": settings.data_dir}),
        (other / "test" / "run", {"test_data": other}),
    ):
        with user_error("inside the data set", "--out"):
            quiet(change(plan, **changes), settings, out)
    assert (files_below(settings.data_dir), files_below(other)) == before
    assert not (settings.data_dir / "train" / "new class").exists()


def test_files_of_the_user_stop_a_run_before_it_begins(plan, settings, tmp_path, no_work):
    (tmp_path / "run").mkdir()
    for name in ("run.json", "history.csv", "notes.md"):
        (tmp_path / "run" / name).write_text("mine")
    with user_error("something else than a run record", "notes.md"):
        quiet(plan, settings, tmp_path / "run")
    assert files_below(tmp_path) == ["run/history.csv", "run/notes.md", "run/run.json"]


# --- GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", [{}, {"augment": ("flip",), "unfreeze": "all"}, {"bn": "drift"}], ids=str)
def test_run_on_a_gpu_goes_on_after_a_stop(plan, settings, tmp_path, monkeypatch, way):
    on_gpu = change(settings, device="cuda")
    whole = quiet(change(plan, **way), on_gpu, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        quiet(change(plan, **way), on_gpu, tmp_path / "run")
    resumed = quiet(change(plan, **way), on_gpu, tmp_path / "run", resume=True)
    assert numbers(resumed) == numbers(whole) and whole.record["device"] == "cuda"
