"""plan: every field is checked where it enters, by its name; what would do nothing is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from helpers import check_message, user_error

from ctutils.base import CTError
from ctutils.config import PROFILES, Settings
from ctutils.plan import Plan
from ctutils.registry import BACKBONES

FIELDS = {field.name: field for field in dataclasses.fields(Plan)}
ODD = (
    *("3", "false", "", "\0", "x" * 300, "Adam", True, False, -1, 0, 0.5, 63, 10**400, -(10**400), 10**11, 1e300),
    *(math.nan, math.inf, -math.inf, [], ["warp"], [["flip"]], [3], {}, {"a": 1}, b"3", None, ("flip", None), 1j),
)


def test_fields_are_the_options_of_a_run():
    names = "backbone data test_data epochs weights optimizer lr scheduler patience batch_size at_once size bn "
    names += "standardise unfreeze discriminative start_size label_smoothing ema "
    names += "augment views balance imbalance precision seed"
    assert list(FIELDS) == names.split()
    assert all(field.metadata["help"] for field in FIELDS.values())


@pytest.mark.parametrize("name", FIELDS)
def test_odd_value_is_refused_by_its_name_or_has_the_right_type(name):
    """Whatever a plan file holds: a plan of the right types, or one message that names the key."""
    kind = FIELDS[name].metadata["kind"]
    kinds = {float: (float, str), Path: (str, Path)}.get(kind, kind)
    for value in ODD:
        try:
            plan = Plan(**{name: value})
        except CTError as error:
            check_message(str(error), name)
            continue
        found = getattr(plan, name)
        assert found is None or isinstance(found, kinds), value
        assert isinstance(found, bool) == (kind is bool) and not (isinstance(found, float) and not found < 1e12), value
        json.dumps(plan.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": "3"}, ("epochs = '3'", "a whole number, 1 or more")),
        ({"epochs": True}, ("epochs = True",)),
        ({"standardise": "false"}, ("standardise = 'false'", "true or false")),
        ({"backbone": "resnet18"}, ("backbone = 'resnet18'", "resnet50")),
        ({"lr": 0}, ("lr = 0", "above 0, or range")),
        ({"lr": math.nan}, ("lr = nan",)),
        ({"size": 63}, ("size = 63", "64 or more")),
        ({"size": 10**6}, ("size = 1000000", "at most")),
        ({"views": 10**6, "augment": ["flip"]}, ("views = 1000000", "at most")),
        ({"discriminative": 2}, ("discriminative = 2", "at most 1")),
        ({"augment": ["flip", "warp"]}, ("augment", "warp", "rotate, zoom, shift, flip")),
        ({"bn": "melt"}, ("bn = 'melt'", "adapt, drift, train")),
    ],
    ids=str,
)
def test_limits_are_said(changes, words):
    with user_error(*words):
        Plan(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"views": 2}, "views without augment"),
        ({"views": 2, "augment": ["flip"], "unfreeze": "all"}, "views with all layers learning"),
        ({"views": 2, "augment": ["flip"], "bn": "drift"}, "views with bn 'drift'"),
        ({"discriminative": 0.3}, "discriminative with a frozen backbone"),
        ({"bn": "train"}, "bn 'train' with a frozen backbone"),
        ({"unfreeze": "last", "standardise": False}, "no standardise with layers that learn"),
        ({"at_once": 4}, "at_once with cached features"),
        ({"at_once": 4, "augment": ["flip"], "views": 2}, "at_once with cached features"),
    ],
    ids=str,
)
def test_field_that_would_do_nothing_is_refused(changes, words):
    with user_error(words, "would do nothing"):
        Plan(**changes)


@pytest.mark.parametrize(
    ("changes", "cached"),
    [
        ({}, True),
        ({"augment": ["flip"], "views": 2}, True),
        ({"unfreeze": "last"}, True),
        ({"augment": ["flip"], "at_once": 4}, False),
        ({"bn": "drift", "at_once": 4}, False),
        ({"unfreeze": "all", "discriminative": 0.3, "bn": "adapt", "augment": ["blur"]}, False),
    ],
    ids=str,
)
def test_fields_that_act_together_are_taken(changes, cached):
    assert Plan(**changes).cached is cached


def test_open_fields_come_from_the_settings():
    settings = Settings(PROFILES["full"], "cpu", "random", *[Path()] * 3)
    plan = Plan("vgg16", size=96, unfreeze=True).resolved(settings)
    assert (plan.epochs, plan.batch_size, plan.size, plan.weights, plan.unfreeze) == (10, 16, 96, "random", "all")
    assert (plan.lr, plan.scheduler) == (0.0001, "onecycle") and BACKBONES["vgg16"].unfrozen_lr == 0.0001
    assert (Plan().resolved(settings).lr, Plan().resolved(settings).scheduler) == (0.001, "step"), "the deck's"


def test_record_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path / "set")
    plan = Plan(data=tmp_path / "set", test_data=".", weights=str(tmp_path / "w"), lr="range", augment=["flip"])
    stored = plan.to_json()
    assert (stored["data"], stored["test_data"], stored["weights"]) == ("set", "set", "w")
    assert Plan(**json.loads(json.dumps(stored))).to_json() == stored, "it can be read back"
