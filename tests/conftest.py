"""What all tests share: a cache of checkpoints of their own, and fresh Python processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# A busy machine is no failure.
settings.register_profile("guide", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("guide")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache stays as it is, and the checkpoints are made once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DTYPE_GUIDE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def one_thread():
    """For tiny models: threads that wait for each other cost more than they bring."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def activated():
    """FlashAttention is switched on for the tests' own use of Transformers."""
    from helpers import backend

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_KERNELS", raising=False)
        backend.activate()
        yield
        patch.delenv("LOCAL_KERNELS", raising=False)


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory):
    """Run code in a new Python process; what its last line printed as JSON comes back."""
    script = tmp_path_factory.mktemp("fresh") / "script.py"

    def run(code, *arguments, cwd=ROOT, path=ROOT, env=None, unset=()):
        environment = {
            **os.environ,
            "PYTHONPATH": str(path),
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        for name in unset:
            environment.pop(name, None)
        script.write_text(code, "utf-8")
        done = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
