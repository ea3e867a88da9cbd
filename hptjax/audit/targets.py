"""Names of targets that come with the kit, and how `module:function` becomes a function."""

from __future__ import annotations

import importlib
import os
import re
import sys

from hptjax.audit.job import Target
from hptjax.audit.run import raised

SHIPPED = {
    "hptjax": "hptjax.audit.adapters.hptjax_step:target",
    "optax.MultiSteps": "hptjax.audit.adapters.optax_multisteps:mean_target",
    "optax.MultiSteps-sum": "hptjax.audit.adapters.optax_multisteps:sum_target",
    "jax-loop": "hptjax.audit.adapters.jax_loop:target",
    "torch-loop": "hptjax.audit.peers.torch_loop:target",
    "transformers": "hptjax.audit.peers.transformers_trainer:target",
    "trl": "hptjax.audit.peers.trl_sft:target",
    "tunix": "hptjax.audit.peers.tunix_trainer:target",
}
SIMULATED = {
    "simulated-deepspeed": "hptjax.audit.simulated:deepspeed",
    "simulated-deepspeed-first-only": "hptjax.audit.simulated:deepspeed_first_only",
    "simulated-openrlhf": "hptjax.audit.simulated:openrlhf",
    "simulated-huggingface-2024": "hptjax.audit.simulated:huggingface_2024",
}
NAMES = SHIPPED | SIMULATED
EXTRAS = {
    **dict.fromkeys(("torch", "accelerate", "transformers", "trl", "datasets", "tokenizers"), "audit-torch"),
    "tunix": "audit-tunix",
}


def load(name: str) -> Target:
    """The function that a name or `module:function` stands for; modules of the current folder are found.

    Raises ValueError, saying what to write instead: a malformed name, a module that cannot be imported, no function.
    """
    path = NAMES.get(name, name)
    if re.fullmatch(r"[\w/.-]*\.py:\w+", path):
        raise ValueError(f"expected module:function, got a file, '{name}'; {_without_file(path)}")
    module_name, colon, function_name = path.partition(":")
    if not colon or not function_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(
            f"expected module:function, such as my_trainer:train, or one of {', '.join(NAMES)}; got '{name}'"
        )
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if name in NAMES and missing in EXTRAS:
            install = f"pip install 'hptjax[{EXTRAS[missing]}]'"
            raise ValueError(f"target {name} needs {missing}, which is not installed here; {install}") from error
        if error.name != module_name and not module_name.startswith(f"{error.name}."):
            raise ValueError(
                f"cannot import '{module_name}': it needs the module '{error.name}', which is not installed here"
            ) from error
        raise ValueError(
            f"cannot import '{module_name}': there is no module '{error.name}'; expected module:function with a module "
            f"of the current folder or an installed one, or one of {', '.join(NAMES)}"
        ) from error
    except BaseException as error:
        raise ValueError(f"cannot import '{module_name}': it raised {raised(error)}; fix the module first") from error
    function = getattr(module, function_name, None)
    if function is None:
        raise ValueError(f"module '{module_name}' has no '{function_name}'; write module:function with one that it has")
    if not callable(function):
        raise ValueError(f"'{path}' is of type {type(function).__name__}; write a function that takes a job")
    return function


def _without_file(path: str) -> str:
    """What to write instead of `folder/file.py:function`."""
    folder, _, rest = path.rpartition("/")
    place = f"run it in the folder {folder} and " if folder not in ("", ".") else ""
    return f"{place}write {rest.replace('.py:', ':')}"
