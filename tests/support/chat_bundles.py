"""Bundles with a chat template."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from blt_edge.runtime.chat_spec import ChatSpec
from blt_edge.runtime.integrity import file_record
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.names import CHAT_TEMPLATE_NAME

__all__ = ["EOS_TEXT", "TEMPLATE", "add_template", "chat_bundle", "chat_text"]

EOS_TEXT = "<end>"
TEMPLATE = """{% for message in messages -%}
{% if message.content == 'no' %}{{ raise_exception('I take no no.') }}{% endif -%}
{% if message.content == 'wrong' %}{{ message.content.wrong.wrong }}{% endif -%}
{% if message.content == 'long' %}{{ 'x' * 1000 }}{% endif -%}
{{ bos_token }}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def chat_text(*turns: str) -> str:
    """What `TEMPLATE` makes of turns "role: content"."""
    return "".join(f"{turn}{EOS_TEXT}\n" for turn in turns) + "assistant: "


def chat_bundle(bundle: Path, copy: Path, template: str = TEMPLATE, eos: str | None = EOS_TEXT) -> Path:
    """A copy of a bundle, with a chat template."""
    return add_template(Path(shutil.copytree(bundle, copy)), template.encode(), eos)


def add_template(bundle: Path, template: bytes, eos: str | None = EOS_TEXT) -> Path:
    """A bundle that gets a chat template, whatever is in it."""
    (bundle / CHAT_TEMPLATE_NAME).write_bytes(template)
    manifest = load_manifest(bundle)
    files = {**manifest.files, CHAT_TEMPLATE_NAME: file_record(bundle / CHAT_TEMPLATE_NAME)}
    write_manifest(bundle, replace(manifest, files=files, chat=ChatSpec(eos)))
    return bundle
