"""shards: store and features in parts, by several processes, each part whole or not there; `train` joins them."""

import json

import numpy as np
import pytest
import torch
from helpers import files_below, user_error, write_set
from test_experiment import BN, quiet, settings_in, tiny_networks  # noqa: F401

from ctutils import backbones, cli, config, data, features
from ctutils.plan import Plan
from ctutils.shards import make_features

PLAN = Plan(BN, precision="float32")


@pytest.fixture
def small_parts(monkeypatch):
    """Ten slices a part: four parts of 36 slices."""
    monkeypatch.setattr(data, "PART", 10)
    monkeypatch.setattr(features, "PART", 10)


@pytest.fixture
def settings(tmp_path):
    write_set(tmp_path / "set", per_class=4)
    return settings_in(tmp_path)


def decoded(monkeypatch) -> list:
    """Return a list that grows with every slice that is decoded."""
    real, calls = data.read_grey, []
    monkeypatch.setattr(data, "read_grey", lambda path, *how: calls.append(path) or real(path, *how))
    return calls


def test_parts_made_by_two_are_those_of_one_and_train_joins_them(settings, small_parts, monkeypatch, tmp_path):
    calls = decoded(monkeypatch)
    assert make_features(PLAN, settings, (1, 2)) == {"slices": 36, "parts": 4, "done": 2}
    adapted, own = 12, 10 + 6
    assert len(calls) == adapted + own, "a shard decodes its own slices, and those that adapt BatchNorm"
    assert make_features(PLAN, settings, (0, 2))["done"] == 4 and len(calls) == adapted + 36
    before = files_below(settings.cache_dir / "features")
    assert len(before) == 8 and make_features(PLAN, settings, (0, 2))["done"] == 4
    assert files_below(settings.cache_dir / "features") == before and len(calls) == adapted + 36
    joined = quiet(PLAN, settings, tmp_path / "joined")
    assert len(calls) == adapted + 36, "a head on cached features needs no store"
    assert len(files_below(settings.cache_dir / "features")) == 2, "the parts are left behind"
    assert make_features(PLAN, settings, (1, 2))["done"] == 4 and len(calls) == adapted + 36
    monkeypatch.undo()  # one part
    alone = quiet(PLAN, settings_in(tmp_path, cache_dir=tmp_path / "other"), tmp_path / "alone")
    # Not to the bit: the batches of a pass are others, and with several threads so is the order of its sums.
    for split in ("val", "test"):
        np.testing.assert_allclose(joined.y_score(split), alone.y_score(split), rtol=0, atol=1e-5)


def test_one_process_goes_on_where_it_stopped(settings, small_parts, monkeypatch):
    calls, real = decoded(monkeypatch), features.forward_pass

    def stop(*args, rows=None, **options):
        if rows[0] == 20:
            raise KeyboardInterrupt
        return real(*args, rows=rows, **options)

    monkeypatch.setattr(features, "forward_pass", stop)
    with pytest.raises(KeyboardInterrupt):
        make_features(PLAN, settings)
    monkeypatch.setattr(features, "forward_pass", real)
    before = len(calls)
    assert make_features(PLAN, settings)["done"] == 4
    assert len(calls) - before == 16, "a finished part was made again"
    (file,) = settings.cache_dir.glob("features/*.npy")
    assert np.load(file).shape == (1, 36, 1280) and not any(".tmp-" in name for name in files_below(settings.cache_dir))


def test_store_in_parts_is_the_store(settings, small_parts, monkeypatch):
    folder = data.load_folder(settings.data_dir, cache=settings.cache_dir)
    store = data.build_store(folder, 32, cache=settings.cache_dir)
    assert len(files_below(settings.cache_dir / "store")) == 1, "the parts are left behind"
    monkeypatch.undo()
    assert np.array_equal(store, data.build_store(folder, 32, cache=settings.cache_dir / "other"))


def test_many_features_are_standardised_without_loading_them(monkeypatch):
    values = torch.randn(50, 6) * torch.arange(6) + 100
    head, rows = torch.nn.Sequential(torch.nn.Linear(6, 2)), np.arange(1, 46)
    expected = backbones.standardise_head(head, values[1:46])
    monkeypatch.setattr(backbones, "AT_ONCE", 10)
    found = backbones.standardise_head(head, values, rows)
    for key in ("mean", "std"):
        torch.testing.assert_close(getattr(found.standardise, key), getattr(expected.standardise, key))


def test_command(settings, small_parts, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(config, "project_root", lambda: tmp_path)
    words = ["features", str(settings.data_dir), "--backbone", BN, "--size", "64", "--weights", "random", "--json"]
    assert cli.main([*words, "--shard", "3/4"]) == 0
    assert json.loads(capsys.readouterr().out) == {"slices": 36, "parts": 4, "done": 1}
    assert cli.main(words) == 0 and json.loads(capsys.readouterr().out)["done"] == 4
    for wrong in ("4/4", "-1/4", "0/0", "1", "a/b"):
        assert cli.main([*words, f"--shard={wrong}"]) == 2 and "shard" in capsys.readouterr().err
    with user_error("sees images"):
        make_features(Plan(BN, unfreeze="all"), settings)
