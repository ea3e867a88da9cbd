# %% [markdown]
# # HPT in a notebook
# The same functions as on the command line: a config, `build.train`, a run folder. Open this file in VS Code or by
# `jupytext`, cell by cell, or run it as a script: `python launch/notebook.py`.

# %%
import os
import pathlib
import shlex
import sys

import hptjax
from hptjax import build
from hptjax.build.summary import summary_table
from hptjax.config_load import load_config

os.chdir(pathlib.Path(hptjax.__file__).parent.parent)  # the paths in configs/ start at the repository

# %% [markdown]
# ## What to run
# Every field of the config can be set, as on the command line. A run folder belongs to one config: give a changed one
# another name.

# %%
overrides = ["--name", "notebook", "--train.steps", "10", "--train.eval_every", "5"]
overrides += shlex.split(os.environ.get("HPTJAX_OVERRIDES", ""))
config = load_config("configs/quickstart.toml", overrides)

# %% [markdown]
# ## Train
# Interrupt the kernel to stop: the run saves, and this cell continues it.

# %%
summary = build.train(config, quiet=True)
print(summary_table(summary))

# %% [markdown]
# ## Look

# %%
for line in build.sample(config, None, count=4):
    print(line)

# %%
plot = pathlib.Path(summary["folder"]) / "plot.png"
print(plot.resolve())
if "ipykernel" in sys.modules:
    from IPython.display import Image, display

    display(Image(filename=str(plot)))
