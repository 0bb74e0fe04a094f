"""Nothing of the user's shell may change a unit test; notebooks/conftest.py does the same for the notebooks."""

import os

import pytest

for _name in [name for name in os.environ if name.startswith("CT_")]:
    del os.environ[_name]
os.environ.update(
    CT_PROFILE="quick",
    CT_PROGRESS="0",
    CT_WEIGHTS="random",  # no test downloads anything
    PYTHONHASHSEED="0",
    OMP_WAIT_POLICY="PASSIVE",  # spinning OpenMP threads cost 2.5 times under load
    MPLBACKEND="Agg",  # unit tests open no windows
)


@pytest.fixture
def made_up():
    """A function: name -> network with weights and statistics of no meaning, quicker than torch draws them."""

    def make(name: str):
        import torch

        from ctutils import backbones, registry

        with torch.device("meta"):
            model = backbones._make(registry.BACKBONES[name])
        draws = torch.randn(99_991, generator=torch.Generator().manual_seed(0))
        for key, tensor in model.to_empty(device="cpu").state_dict().items():
            values = draws.repeat(tensor.numel() // len(draws) + 1)[: tensor.numel()].view(tensor.shape)
            if tensor.ndim > 1:
                tensor.copy_(values * (2 / tensor[0].numel()) ** 0.5)
            elif key.endswith(("running_var", "weight")):
                tensor.copy_(1 + 0.2 * values.clamp(-3, 3))
            else:
                tensor.copy_(0.1 * values)
        return model.eval()

    return make


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """The test has an empty torch cache, has asked nothing yet, and torchvision's address answers nobody."""
    import torch

    from ctutils import weights
    from ctutils.registry import BACKBONES

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))  # what torch.hub.set_dir sets
    monkeypatch.setenv("no_proxy", "*")
    names = {name: weights._file_name(spec) for name, spec in BACKBONES.items()}
    monkeypatch.setattr(weights, "_torchvision_url", lambda spec: f"http://127.0.0.1:9/{names[spec.name]}")
    weights._silent.clear()
    weights._warn_once.cache_clear()


@pytest.fixture(scope="session")
def small_state():
    """Tensors of a MobileNetV3, the smallest of torchvision's six."""
    from ctutils.backbones import build_model

    return build_model("mobilenet_v3_large", "random", seed=5)[0].state_dict()
