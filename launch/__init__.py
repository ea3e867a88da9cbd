"""How a run is started: laptop, GPU node, Slurm, TPU pod, GKE. `python -m launch` lists the commands."""
