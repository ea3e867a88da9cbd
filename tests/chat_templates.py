"""Chat templates of ours, each with constructs of the published families, and a byte-level tokenizer for them.

The published template strings are not here; what they do is: a default system line, a date, tools, a generation
prompt, think tags that are stripped from history or opened by the prompt. The ways to be wrong stand below them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import transformers

SPECIALS = ("[pad]", "[start]", "[eos]", "[turn]", "[end]")
CORPUS = ("What is two and three? It is five.", "user assistant system tool Think step by step. <think> </think>")

# a default system line, tools, think tags stripped from answers before the last question
CHAT = """\
{%- set place = namespace(question=0) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set place.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages[0].role == 'system' or not tools -%}
[turn]system
{{ messages[0].content if messages[0].role == 'system' else 'You are careful.' -}}
{%- if tools %}

Tools:
{%- for tool in tools -%}{{ '\\n' ~ tool | tojson }}{%- endfor -%}
{%- endif %}[end]
{% else -%}
[turn]system
Tools:
{%- for tool in tools -%}{{ '\\n' ~ tool | tojson }}{%- endfor %}[end]
{% endif -%}
{%- for message in messages if message.role != 'system' -%}
[turn]{{ 'user' if message.role == 'tool' else message.role }}
{% set content = message.content if message.content is string else '' -%}
{%- if message.role == 'tool' -%}<reply>{{ content }}</reply>
{%- elif message.role == 'assistant' -%}
{%- if loop.index0 + (1 if messages[0].role == 'system' else 0) < place.question and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- generation -%}{{ content }}
{%- for call in message.tool_calls or [] %}<call>{{ call | tojson }}</call>{%- endfor -%}[end]{%- endgeneration %}
{% else -%}{{ content -}}
{%- endif -%}
{%- if message.role != 'assistant' -%}[end]
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}[turn]assistant
{% endif -%}
"""

# a start token, a date in the system header by variable or by the clock, texts trimmed
DATED = """\
{{- bos_token -}}
{%- if date_string is not defined -%}
{%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "no date" -%}
{%- endif -%}
[turn]system
Today is {{ date_string }}.
{%- if messages[0].role == 'system' %} {{ messages[0].content | trim }}{%- endif -%}[end]
{%- for message in messages if message.role != 'system' -%}
[turn]{{ message.role }}
{% if message.role == 'assistant' -%}
{%- generation -%}{{ message.content | trim }}[end]{%- endgeneration -%}
{%- else -%}{{ message.content | trim }}[end]
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}[turn]assistant
{% endif -%}
"""

# the clock alone, no variable
CLOCK = DATED.replace("{%- if date_string is not defined -%}", "").replace("{%- endif -%}\n[turn]", "[turn]", 1)

# the prompt opens the reasoning; answers of the last turn are kept whole
OPENED = """\
{%- for message in messages -%}
[turn]{{ message.role }}
{{ message.content }}[end]
{% endfor -%}
{%- if add_generation_prompt -%}[turn]assistant
<think>
{% endif -%}
"""

# no header before an answer: nothing is missing although there is no generation prompt
INSTRUCT = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}[turn] {{ message.content }} [end]{%- else %} {{ message.content }}{{ eos_token }}
{%- endif -%}
{%- endfor -%}
"""

GOOD = {"chat": CHAT, "dated": DATED, "clock": CLOCK, "opened": OPENED, "instruct": INSTRUCT}

PLAIN = """\
{%- for message in messages -%}[turn]{{ message.role }}
{{ message.content }}[end]
{% endfor -%}
"""
GENERATES = "{%- if add_generation_prompt -%}[turn]assistant\n{% endif -%}"

BAD = {  # name -> (template, words of the refusal)
    "no generation prompt": (PLAIN, ["a generation prompt", "an answer begins with '[turn]assistant"]),
    "no prefix property": (
        "{{ messages | length }} turns\n" + PLAIN + GENERATES,
        ["as a continuation of its beginning", "got '2 turns", "where the shorter has '1 turns"],
    ),
    "reasoning and answer dropped": (PLAIN.replace("message.content", "message.content[:9]") + GENERATES, ["as it is"]),
    "random": ("{{ range(100000) | random }}" + PLAIN + GENERATES, ["renders the same each time"]),
    "raises": ("{{ raise_exception('only for adults') }}", ["only for adults"]),
    "syntax": ("{% for %}", ["TemplateSyntaxError"]),
    "reaches out": ("{{ messages.__class__.__mro__ }}", ["SecurityError"]),
    "makes its date format": ("{{ strftime_now('%d' ~ ' %b') }}" + PLAIN + GENERATES, ["cannot be pinned"]),
    "ends without a stop token": (PLAIN.replace("[end]", "") + GENERATES, ["a token that stops sampling"]),
    "ends with another token": (PLAIN.replace("[end]", "[start]") + GENERATES, ["add 1 to rollout.stop_ids"]),
}


def byte_tokenizer(folder: Path, template: str | None, *, bos: str | None = "[start]") -> Any:
    """A folder with a byte-level BPE tokenizer of some merges, special tokens of ours and a chat template.

    `<think>` and `</think>` are added tokens that are not special, as in some families.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["<think>", "</think>"])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[pad]",
        bos_token=bos,
        eos_token="[eos]",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    folder.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(str(folder))
    return made
