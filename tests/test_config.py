"""config: what the four environment variables mean, and what goes without them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import user_error

from ctutils import config
from ctutils.config import PROFILES, get_device, get_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """No CT_ variable, no GPU, and a project folder of its own."""
    for name in ("CT_PROFILE", "CT_DEVICE", "CT_WEIGHTS", "CT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "project_root", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_without_variables_a_laptop_gets_standard_and_the_synthetic_set(tmp_path):
    settings, data = get_settings(), tmp_path / "data"
    assert (settings.profile.name, settings.device, settings.weights) == ("standard", "cpu", "auto")
    assert (settings.data_dir, settings.cache_dir) == (data / "synthetic", data / "cache")
    assert settings.runs_dir == data / "runs" / "standard" and not settings.own_data
    assert str(settings) == "profile standard | device cpu | weights auto | data synthetic (synthetic)"
    assert not list(tmp_path.iterdir()), "asking for settings made a folder"


def test_with_cuda_the_profile_is_the_decks_size_unless_something_else_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings, full = get_settings(), PROFILES["full"]
    assert (settings.profile, settings.device) == (full, "cuda")
    assert (full.train, full.val, full.epochs) == (8001, 1000, 10)
    monkeypatch.setenv("CT_DEVICE", "cpu")
    assert get_settings().profile.name == "standard", "the GPU's profile on a CPU would take a day"
    monkeypatch.setenv("CT_PROFILE", "quick")
    assert get_settings().profile is PROFILES["quick"]
    monkeypatch.setenv("CT_PROFILE", "Quick")
    with user_error("profile 'Quick'", "quick, standard, full", "CT_PROFILE"):
        get_settings()


def test_folders_are_found_from_here_or_from_the_project(monkeypatch, tmp_path):
    for name in ("내 데이터", "files", "notebooks", "other/내 데이터"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("CT_DATA", "내 데이터")
    monkeypatch.setenv("CT_WEIGHTS", "files")
    settings = get_settings()
    assert settings.data_dir == tmp_path / "내 데이터" and str(settings).endswith("data 내 데이터 (your own)")
    assert settings.weights == str(tmp_path / "files")
    assert get_settings(tmp_path / "other").data_dir == tmp_path / "other", "an argument comes before CT_DATA"
    monkeypatch.setenv("CT_DATA", "~/slices")
    assert get_settings().data_dir == Path.home() / "slices"
    for name in ("CT_DATA", "CT_PROFILE", "CT_WEIGHTS"):
        monkeypatch.setenv(name, "")
    settings = get_settings()
    assert (settings.own_data, settings.profile.name, settings.weights) == (False, "standard", "auto"), "empty: not set"


def test_profiles_and_data_sets_never_share_records(monkeypatch, tmp_path):
    folders = (None, tmp_path / "a" / "mine", tmp_path / "b" / "mine")  # two data sets of one name
    runs, data = set(), set()
    for name in PROFILES:
        monkeypatch.setenv("CT_PROFILE", name)
        runs |= {get_settings(folder).runs_dir for folder in folders}
        data.add(get_settings().data_dir)
    assert len(runs) == 9 and len(data) == 3
    assert get_settings(folders[1]).runs_dir.name.startswith("full-mine-")
    monkeypatch.chdir(tmp_path)
    assert get_settings("a/mine").runs_dir == get_settings(folders[1]).runs_dir, "one folder, said in two ways"


def test_device_that_is_unknown_or_not_there(monkeypatch):
    for name in ("gpu", "cuda:x", "CPU", "cuda:-1"):
        with user_error(f"device '{name}'", "cpu, cuda, mps", "CT_DEVICE"):
            get_device(name)
    for name in ("cuda", "cuda:0", "mps"):
        with user_error(f"device '{name}', which this machine does not have", "unset CT_DEVICE"):
            get_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert get_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("CT_DEVICE", "cuda:2")
    with user_error("device 'cuda:2'"):
        get_settings()


def test_project_root_is_the_folder_with_pyproject_and_costs_no_large_import():
    code = (
        "import sys, ctutils.config as c; root = c.project_root(); "
        "assert (root / 'pyproject.toml').exists() and (root / 'ctutils').is_dir(); "
        "heavy = {'torch', 'numpy', 'pandas', 'PIL', 'tqdm'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
