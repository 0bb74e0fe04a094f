"""config: what the four environment variables mean, and what goes without them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import user_error

from ctutils import config
from ctutils.config import PROFILES, get_device, get_profile, get_settings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """No CT_ variable, no GPU, and a project folder of its own."""
    for name in config.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "project_root", lambda: tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_without_variables_a_laptop_gets_standard_and_the_synthetic_set(tmp_path):
    settings = get_settings()
    assert (settings.profile.name, settings.device, settings.weights) == ("standard", "cpu", "auto")
    assert settings.data_dir == tmp_path / "data" / "synthetic"
    assert settings.cache_dir == tmp_path / "data" / "cache"
    assert settings.runs_dir == tmp_path / "data" / "runs" / "standard"
    assert not settings.own_data
    assert str(settings) == "profile standard | device cpu | weights auto | data synthetic (synthetic)"
    assert not list(tmp_path.iterdir()), "asking for settings made a folder"


def test_with_cuda_the_profile_is_full(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = get_settings()
    assert (settings.profile.name, settings.device) == ("full", "cuda")
    monkeypatch.setenv("CT_PROFILE", "quick")
    assert get_settings().profile.name == "quick"
    monkeypatch.delenv("CT_PROFILE")
    monkeypatch.setenv("CT_DEVICE", "cpu")
    assert get_settings().profile.name == "standard", "the GPU's profile on a CPU would take a day"


def test_variables_are_followed(monkeypatch, tmp_path):
    monkeypatch.setenv("CT_PROFILE", "quick")
    monkeypatch.setenv("CT_WEIGHTS", "random")
    monkeypatch.setenv("CT_DATA", str(tmp_path / "내 데이터"))
    settings = get_settings()
    assert (settings.profile, settings.weights) == (PROFILES["quick"], "random")
    assert settings.data_dir == tmp_path / "내 데이터" and settings.own_data
    assert "내 데이터 (CT_DATA)" in str(settings)
    monkeypatch.setenv("CT_DATA", "~/slices")
    assert get_settings().data_dir == Path.home() / "slices"
    monkeypatch.setenv("CT_DATA", "")
    monkeypatch.setenv("CT_PROFILE", "")
    assert not get_settings().own_data and get_settings().profile.name == "standard", "empty counts as not set"


def test_profiles_never_share_records_or_synthetic_slices(monkeypatch):
    seen = []
    for name in PROFILES:
        monkeypatch.setenv("CT_PROFILE", name)
        settings = get_settings()
        seen += [settings.data_dir, settings.runs_dir]
    assert len(set(seen)) == 2 * len(PROFILES)


def test_full_is_the_decks_size():
    full = get_profile("full")
    assert (full.train, full.val, full.epochs) == (8001, 1000, 10)
    sizes = [PROFILES[name].train for name in ("quick", "standard", "full")]
    assert sizes == sorted(sizes)


def test_unknown_profile_names_the_three(monkeypatch):
    with user_error("profile 'huge'", "quick, standard, full", "CT_PROFILE"):
        get_profile("huge")
    monkeypatch.setenv("CT_PROFILE", "Quick")
    with user_error("profile 'Quick'"):
        get_settings()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "CPU", "cuda:-1"])
def test_unknown_device_names_the_known(name):
    with user_error(f"device '{name}'", "cpu, cuda, mps", "CT_DEVICE"):
        get_device(name)


def test_device_that_is_not_there(monkeypatch):
    for name in ("cuda", "cuda:0", "mps"):
        with user_error(f"device '{name}', which this machine does not have", "unset CT_DEVICE"):
            get_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert get_device("cuda:1") == "cuda:1"
    with user_error("device 'cuda:2'"):
        get_device("cuda:2")
    monkeypatch.setenv("CT_DEVICE", "cuda:2")
    with user_error("device 'cuda:2'"):
        get_settings()


def test_project_root_is_the_folder_with_pyproject():
    code = (
        "import sys, ctutils, ctutils.config as c; root = c.project_root(); "
        "assert (root / 'pyproject.toml').exists() and (root / 'ctutils').is_dir(); "
        "heavy = {'torch', 'numpy', 'pandas', 'PIL', 'tqdm'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


def test_a_relative_data_folder_is_found_from_the_notebooks_folder(monkeypatch, tmp_path):
    (tmp_path / "내 데이터").mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr("ctutils.config.project_root", lambda: tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("CT_DATA", "내 데이터")
    monkeypatch.setenv("CT_WEIGHTS", "files")
    settings = get_settings()
    assert settings.data_dir == tmp_path / "내 데이터"
    assert settings.weights == str(tmp_path / "files")


def test_records_of_other_data_stay_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("CT_PROFILE", "quick")
    monkeypatch.setenv("CT_DATA", str(tmp_path / "mine"))
    assert get_settings().runs_dir.name == "quick-mine"
    monkeypatch.delenv("CT_DATA")
    assert get_settings().runs_dir.name == "quick"
