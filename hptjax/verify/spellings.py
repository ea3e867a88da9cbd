# ruff: noqa: RUF001  (signs that look like others are what this table is for)
"""Signs, commands and words that mean the same, each in the spelling that `scan` gives them."""

from __future__ import annotations

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min".split()
)
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar".split()
)
SEPARATORS = frozenset({"and", "or", ",", ";", "and/or", ", and", ", or", ",and", ",or"})
PLAIN_COMMANDS = {"sqrt": "sqrt", "pi": "pi", "infinity": "infty", "inf": "infty", "oo": "infty", "theta": "theta"}

UNICODE = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ",
    "≈": r"\approx ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "π": r"\pi ", "√": r"\sqrt ",
    "°": r"^\circ ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "ℝ": r"\mathbb{R}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda ", "φ": r"\varphi ",
    "²": "^2", "³": "^3", "⁴": "^4", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "（": "(", "）": ")", "，": ",", "、": ",", "；": ";",
    "：": ":", "％": "%",
    "＝": "=", "。": ".", "｛": r"\{", "｝": r"\}", "［": "[", "］": "]", "\u00a0": " ", "\u2009": " ",
    "\u202f": " ", "′": "'", "’": "'",
}  # fmt: skip
COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leq": "le",
    "leqslant": "le", "geq": "ge", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "ast": "*",
    "cdot": "*", "times": "*", "div": "/",
    "land": "and", "lor": "or", "varnothing": "emptyset", "to": "to", "rightarrow": "to", "lbrace": "{", "rbrace": "}",
    "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|", "colon": ":", "imath": "i", "degree": "circ",
    "arccot": "arccot", "tg": "tan", "ctg": "cot", "arctg": "arctan", "infin": "infty", "approxeq": "approx",
}  # fmt: skip
