"""Nothing of the user's shell may change a unit test; notebooks/conftest.py does the same for the notebooks."""

import os

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
