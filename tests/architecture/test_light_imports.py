"""What does no arithmetic on tensors does not wait for torch."""

import subprocess
import sys

import pytest
from source_files import PACKAGE, sources


def modules_after(statement: str) -> set[str]:
    script = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_configuration_leaves_torch_out() -> None:
    files = [path for path in sources() if path.is_relative_to(PACKAGE / "config") and path.name != "__init__.py"]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in files]
    loaded = modules_after("import " + ", ".join(names))
    assert "moekit.config.run" in loaded
    assert not {"torch", "numpy", "transformers"} & loaded


@pytest.mark.parametrize("statement", ["import moekit", "import moekit.config.presets.load"])
def test_importing_the_package_leaves_torch_out(statement: str) -> None:
    assert "torch" not in modules_after(statement)
