"""The import ladder, read from the sources: packages import downward only, and siblings on one rung do not meet."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "hptjax"
RUNGS = {
    0: {"errors", "records", "types"},
    1: {"masked"},
    2: {"losses", "models", "sharding", "data", "rewards", "tasks", "verify", "diagnostics"},
    3: {"hpt", "rollout"},
    4: {"train", "eval"},
}
RUNG_OF = {name: rung for rung, names in RUNGS.items() for name in names}
TOP_PACKAGES = {"audit", "bench", "build", "compare", "plan", "upge"}
TOP = 5  # cli, build, config, compare and whatever else stands at the package's top; siblings here do meet
WITHOUT_JAX = {"records", "rewards", "tasks", "verify"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}
NEVER = {"torch", "tensorflow", "trl", "tunix", "ray", "pickle", "cloudpickle", "dill"}
PEERS = (
    "hptjax.audit.peers.",
    {"torch", "trl", "tunix"},
)  # adapters for these trainers may import them; nobody else may
SYMPY = ("hptjax.verify.last_route", {"math_verify", "sympy", "latex2sympy2_extended"})  # runs in workers only
KIT = {  # of `hptjax audit`: runs where there is no jax, and knows nothing of the rest of hptjax
    f"hptjax.audit.{name}"
    for name in """decode effects findings job judge kit probe probe_clip probe_nan probe_rates probes problems read
    reference report run simulated split targets words""".split()
}


def imports_of(source: str, module: str) -> set[str]:
    """Dotted names that a module imports anywhere in its text, relative imports resolved."""
    names = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, module: str) -> list[str]:
    """What a module, such as `hptjax.losses.kl`, imports against the ladder; in words."""
    unit = module.split(".")[1] if "." in module else ""
    rung = RUNG_OF.get(unit, TOP)
    found = []
    for name in sorted(imports_of(source, module)):
        parts = name.split(".")
        if parts[0] in NEVER and not (module.startswith(PEERS[0]) and parts[0] in PEERS[1]):
            found.append(f"{module} imports {name}")
        if parts[0] in SYMPY[1] and module != SYMPY[0]:
            found.append(f"{module} imports {name}, which only {SYMPY[0]} may")
        if parts[0] in JAX and unit in WITHOUT_JAX:
            found.append(f"{module} imports {name}, but {unit} must not import jax")
        if module in KIT:
            if parts[0] in JAX:
                found.append(f"{module} imports {name}, but the kit must run without jax")
            if parts[0] == "hptjax" and ".".join(parts[:3]) not in KIT:
                found.append(f"{module} imports {name}, but the kit stands alone")
        if parts[0] != "hptjax":
            continue
        if len(parts) == 1:
            found.append(f"{module} imports the whole package")
            continue
        if parts[1] == "cli" and unit not in ("cli", "start"):
            found.append(f"{module} imports the commands")
        if unit.startswith("config") and not parts[1].startswith("config"):
            found.append(f"{module} imports {name}, but the config stands alone")
        other = parts[1]
        other_rung = RUNG_OF.get(other, TOP)
        if other != unit and rung < TOP and other_rung >= rung:
            found.append(f"{module} (rung {rung}) imports {name} (rung {other_rung})")
        if unit in WITHOUT_JAX and other == "types":
            found.append(f"{module} imports {name}, which imports flax")
    return found


def modules() -> list[tuple[str, pathlib.Path]]:
    """(dotted name, file) of every module of the package."""
    return [
        (".".join(("hptjax", *path.relative_to(PACKAGE).with_suffix("").parts)), path)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def test_layering_holds_in_every_module():
    found = [line for name, path in modules() for line in violations(path.read_text(), name)]
    assert not found, "\n".join(found)


def test_layering_knows_every_package():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    known = RUNG_OF.keys() | TOP_PACKAGES
    assert folders <= known, f"give {folders - known} a rung"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hptjax.losses.kl", "from hptjax.models.decoder import forward"),  # siblings
        ("hptjax.hpt.gate", "from hptjax.train import step"),  # upward
        ("hptjax.hpt.gate", "import hptjax.rollout.engine"),
        ("hptjax.masked", "from hptjax.types import Array\nfrom hptjax.losses import kl"),
        ("hptjax.train.loop", "from hptjax.config import Config"),  # below rung 5 nobody sees the config
        ("hptjax.eval.run", "from ..config import Config"),
        ("hptjax.rewards.pool", "def f():\n    import jax.numpy as jnp"),
        ("hptjax.tasks.task", "from hptjax.types import Array"),
        ("hptjax.models.llama", "import torch"),
        ("hptjax.cli", "import tensorflow as tf"),
        ("hptjax.train.loop", "import hptjax"),
        ("hptjax.build", "from hptjax.cli import main"),
        ("hptjax.config", "from hptjax.hpt.gate import gate"),
        ("hptjax.audit.kit", "import jax"),
        ("hptjax.verify.grade", "def f():\n    import math_verify"),
        ("hptjax.verify.grade", "from hptjax.tasks import countdown"),
        ("hptjax.audit.probes", "from hptjax.audit import job\nfrom hptjax.train import step"),
        ("hptjax.audit.adapters.jax_loop", "import torch"),
        ("hptjax.audit.peers.torch_loop", "import pickle"),
        ("hptjax.train.step", "from hptjax.audit.job import Job"),
    ],
)
def test_layering_sees_a_violation(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hptjax.losses.kl", "from hptjax.losses import upge\nfrom hptjax.masked import ratio"),
        ("hptjax.train.step", "from hptjax.hpt.gate import gate\nimport jax"),
        ("hptjax.rewards.pool", "from hptjax.records import Verdict\nimport numpy"),
        ("hptjax.cli", "from hptjax import build"),
        ("hptjax.start", "from hptjax.cli import main"),
        ("hptjax.compare", "from hptjax.build import train"),
        ("hptjax.audit.peers.torch_loop", "import torch\nfrom hptjax.audit.job import Job"),
        ("hptjax.audit.adapters.hptjax_step", "import optax\nfrom hptjax.train.step import make_micro_step"),
        ("hptjax.cli", "from hptjax.audit.kit import audit"),
    ],
)
def test_layering_allows_what_goes_downward(module, source):
    assert not violations(source, module)


def test_layering_masked_is_the_only_module_with_a_mean():
    """`jnp.mean` and `.mean(` stand in normalisation layers only; pmean nowhere; MultiSteps where it is audited."""
    audited = {"MultiSteps": "hptjax.audit.adapters.optax_multisteps"}
    allowed = {"hptjax.models.layers", "hptjax.masked"}
    found = []
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            banned = isinstance(node, ast.Attribute) and node.attr in ("pmean", "MultiSteps", "nanmean", "average")
            if banned and audited.get(node.attr) != name:
                found.append(f"{name}:{node.lineno} uses {node.attr}")
            if isinstance(node, ast.Attribute) and node.attr == "mean" and name not in allowed:
                owner = node.value.id if isinstance(node.value, ast.Name) else "an array"
                if owner != "masked":
                    found.append(f"{name}:{node.lineno} takes a mean of {owner}; use hptjax.masked")
    assert not found, "\n".join(found)


def test_layering_no_code_runs_from_text():
    """No eval, exec, pickle, shell or remote code anywhere in the package."""
    found = []
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                found.append(f"{name}:{node.lineno} calls {node.func.id}")
            if (
                isinstance(node, ast.keyword)
                and node.arg in ("shell", "trust_remote_code")
                and not (isinstance(node.value, ast.Constant) and node.value.value is False)
            ):
                found.append(f"{name}:{node.value.lineno} passes {node.arg}")
    assert not found, "\n".join(found)


def test_layering_verifiers_and_help_load_no_jax():
    """A second route for the same claim: what Python has loaded after the imports, not what the sources say."""
    light = [name for name, _ in modules() if name.split(".")[1] in WITHOUT_JAX and not name.endswith("__init__")]
    light += sorted(KIT)
    unwanted = JAX | SYMPY[1] | NEVER - {"pickle"}  # the standard library itself loads pickle
    imports = "\n".join(f"import {name}" for name in [*light, "hptjax.cli", "hptjax.explain"])
    code = f"{imports}\nimport sys\nloaded = {unwanted!r} & sys.modules.keys()\nassert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
