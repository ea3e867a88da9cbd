"""The reference for our decoder: transformers' own Llama, Qwen2 and Qwen3, at tiny sizes, with torch.

`models.py` makes folders with transformers' classes, `reference.py` asks such a model for numbers, and
`python -m tests.oracles.golden` keeps both in `golden/`. `tests/test_oracle_golden.py` compares without torch,
`tests/test_oracle_live.py` with it (`make test-oracle`).
"""
