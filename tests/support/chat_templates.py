"""Chat templates in the style of well-known models', and conversations for them."""

from __future__ import annotations

from typing import Any

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# A system message that is there unless one is given, and macros.
CHATML_DEFAULT_SYSTEM = """{%- macro turn(role, text) -%}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{%- if messages[0].role != 'system' %}{{ turn('system', 'You are a helpful assistant.') }}{% endif %}
{%- for message in messages %}{{ turn(message.role, message.content) }}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}
{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

INSTRUCTIONS = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}
"""

TAGS = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Namespaces, loop controls, JSON, dictionaries, tests and filters that templates of newer models use.
MACHINERY = """{%- set ns = namespace(last=-1, names=[]) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
  {{ message | tojson }} {{ dict(a=1, **{'b': message.content})['b'] | length }}
  {{ message.content.split('e') | join('<&>') }}
  {%- if message.content is string and 'stop' in message.content -%}{%- break -%}{%- endif -%}
  {{ ' last' if loop.index0 == ns.last else '' }}{{ message.get('name', 'nobody') | upper }}
  {%- for key, value in message | items %}{{ ' %s=%r' | format(key, value) }}{% endfor %}
{% endfor -%}
{{ messages | map(attribute='role') | list | tojson(indent=2) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{%- if add_generation_prompt %} go{% endif %}{{ undefined_name }}"""

TEMPLATES = {
    "ChatML": CHATML,
    "ChatML with a system message": CHATML_DEFAULT_SYSTEM,
    "headers": HEADERS,
    "turns": TURNS,
    "instructions": INSTRUCTIONS,
    "tags": TAGS,
    "machinery": MACHINERY,
}


def said(*turns: str) -> list[dict[str, Any]]:
    """Messages of "role: content"."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return [{"role": role, "content": content} for role, content in pairs]


CONVERSATIONS = {
    "a question": said("user: Where is <b>é</b> & 'it'?"),
    "with a system": said("system:  Be kind. ", "user: \n Hello \n"),
    "several turns": said(
        "user: a", "assistant: bé 早", "user: stop here", "assistant: d", "user: <|im_end|>"
    ),
    "out of turn": said("user: a", "user: b"),
    "the assistant last": said("user: a", "assistant: b"),
    "with a name": [{"role": "user", "content": "x" * 3000, "name": "Ann"}],
}
