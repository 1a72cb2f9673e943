"""Chat templates: rendered as transformers renders them, and never more than a text or one line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from blt_edge.runtime import chat_render, chat_template
from blt_edge.runtime.chat_render import render
from blt_edge.runtime.chat_spec import ChatSpec
from blt_edge.runtime.chat_template import (
    MOST_TEMPLATE_BYTES,
    ChatTemplate,
    MessagesRefusedError,
    TemplateError,
    load_chat_template,
)
from blt_edge.runtime.errors import BltError, BundleError, OptionError
from blt_edge.runtime.manifest import load_manifest, write_manifest
from blt_edge.runtime.names import CHAT_TEMPLATE_NAME
from blt_edge.runtime.worker import Worker
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import write_bundle
from support.chat_bundles import add_template
from support.chat_templates import CHATML, CONVERSATIONS, TEMPLATES, said
from support.torch_only import transformers_or_skip

pytest.importorskip("jinja2", reason="needs jinja2: pip install 'blt-edge[serve]'")

QUESTION = said("user: Hello")


def rendered(text: str, messages: Any = QUESTION, eos: str | None = "</s>") -> str:
    return ChatTemplate(text, ChatSpec(eos)).render(messages).decode()


# 1. As transformers.


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_it_is_what_transformers_renders(template: str, conversation: str) -> None:
    transformers_or_skip()
    from transformers.utils.chat_template_utils import render_jinja_template

    text, messages = TEMPLATES[template], CONVERSATIONS[conversation]
    names = {"bos_token": "", "eos_token": "</s>"}
    told = ""
    try:
        ((expected,), _) = render_jinja_template(
            [messages], chat_template=text, add_generation_prompt=True, **names
        )
    except Exception as error:  # the template's own
        told = str(error).rstrip(".")
    if told:
        with pytest.raises(MessagesRefusedError, match=f"refuses these messages: {re.escape(told)}$"):
            rendered(text, messages)
    else:
        assert rendered(text, messages) == expected


def test_what_the_templates_make_here_is_not_all_refused() -> None:
    """By hand, so that the comparison has something to compare."""
    assert rendered(CHATML) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    turns = rendered(TEMPLATES["turns"], said("user: a", "assistant: b", "user: c"))
    assert "<start_of_turn>user\na<end_of_turn>\n\n<start_of_turn>model\nb<end_of_turn>" in turns
    assert rendered(TEMPLATES["instructions"], said("user: a", "assistant: b", "user: c")).endswith(
        " [INST] a [/INST] b</s> [INST] c [/INST]"
    )
    assert rendered(TEMPLATES["instructions"], said("user: a", "assistant: b"), eos=None).endswith(" b")
    assert str(datetime.now().year) in rendered("{{ strftime_now('%Y') }}")


def test_a_developer_is_a_system_where_the_template_knows_none() -> None:
    messages = said("developer: Be kind.", "user: a")
    assert rendered(CHATML, messages) == rendered(CHATML, said("system: Be kind.", "user: a"))
    knows = "{% for m in messages %}{{ m.role if m.role != 'developer' else 'boss' }} {% endfor %}"
    assert rendered(knows, messages) == "boss user "


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=9)),
        min_size=1,
        max_size=5,
    )
)
def test_whatever_is_said_comes_through(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    answer = render({"template": CHATML, "messages": messages, "eos_token": ""})
    if any("\ud800" <= letter <= "\udfff" for letter in expected):
        assert "UnicodeEncodeError" in answer["failed"]
    else:
        assert answer == {"text": f"{expected}<|im_start|>assistant\n"}


# 2. Whatever it is, a text or one line.

SLOW = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "many words": "{{ lipsum(n=99999) }}",
    "a power at compile time": "{{ 9 ** (9 ** 9) }}",
}
WORDS = (
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "for",
    "in",
    "if",
    "set",
    "endfor",
    "macro",
    "messages",
    *"()[]._x|~'9",
)
HOSTILE = {
    "a long text": ("{{ 'x' * 10 ** 9 }}", "memory"),
    "a text that doubles": (
        "{% set n = namespace(a='x' * 999) %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "memory",
    ),
    "a wide number": ("{{ '%99999999999d' | format(3) }}", "memory"),
    "wide centring": ("{{ 'x' | center(10 ** 10) }}", "memory"),
    "much output": ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 4194304 characters"),
    "a macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep brackets": ("{{ " + "(" * 9999, "RecursionError"),
    "deep loops": ("{% for i in a %}" * 40 + "{% endfor %}" * 40, "Error"),
    "a long range": ("{{ range(10 ** 7) | list }}", "OverflowError"),
    "the class of a text": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "subclasses": ("{{ ().__class__.__base__.__subclasses__() }}", "SecurityError"),
    "globals of a function": ("{{ raise_exception.__globals__.x }}", "SecurityError"),
    "globals of the sandbox": ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    "a frame": ("{% set g = (x for x in a) %}", "TemplateSyntaxError"),
    "attributes by filter": ("{{ ('' | attr('__class__')).x }}", "Error"),
    "attributes by map": ("{{ ([''] | map(attribute='__class__') | first).x }}", "SecurityError"),
    "a format that looks inside": ("{{ '{0.__class__.x}'.format('').y.z }}", "Error"),
    "a namespace of Python's": ("{{ namespace(__class__=1) }}", "SecurityError"),
    "one by assignment": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "SecurityError"),
    "messages changed": ("{{ messages.append(1) }}", "SecurityError"),
    "a file": ("{% include '/etc/passwd' %}", "Error"),
    "an import": ("{% import 'os' as os %}", "Error"),
    "a missing message": ("{{ messages[5].content }}", "UndefinedError"),
    "half a character": ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    "no template": ("{% if %}", "TemplateSyntaxError in line 1"),
    "a filter that is none": ("{{ 'x' | system }}", "No filter named 'system'"),
    "a number by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_does_harm_is_one_line(what: str) -> None:
    text, words = HOSTILE[what]
    with pytest.raises(MessagesRefusedError, match=words) as refused:
        rendered(text)
    told = str(refused.value)
    assert told.startswith("the chat template fails on these messages: ")
    assert told.isprintable()
    assert len(told) < 400
    assert rendered(CHATML).startswith("<|im_start|>user")  # and the next one is served


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker of its own that has little time."""
    worker = Worker("blt_edge.runtime.chat_render:render", memory=chat_template.MEMORY)
    monkeypatch.setattr(chat_template, "_worker", lambda: worker)
    worker.ask({"template": CHATML, "messages": QUESTION, "eos_token": ""}, 60)
    monkeypatch.setattr(chat_template, "PATIENCE", 0.3)
    yield
    worker.close()


@pytest.mark.parametrize("what", SLOW)
def test_what_takes_too_long_is_ended(what: str, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TemplateError, match=r"^the chat template takes more than 0.3 s"):
        rendered(SLOW[what])
    monkeypatch.setattr(chat_template, "PATIENCE", 60)
    assert rendered(CHATML).startswith("<|im_start|>user")


def test_what_it_says_itself_is_one_printable_line_of_some_length() -> None:
    for said_by_it, told in (
        ("no system\\n\\x1b[2J please", "no system ?[2J please"),
        ("x" * 5000, "x" * 300),
        ("", "?"),
    ):
        with pytest.raises(MessagesRefusedError) as refused:
            rendered("{{ raise_exception('" + said_by_it + "') }}")
        assert str(refused.value) == f"the chat template refuses these messages: {told}"


@given(st.lists(st.sampled_from(WORDS)))
def test_any_template_is_a_text_or_a_line(words: list[str]) -> None:
    answer = render({"template": " ".join(words), "messages": QUESTION, "eos_token": ""})
    ((kind, told),) = answer.items()
    assert kind == "text" or (told.isprintable() and 0 < len(told) <= 300)


def test_a_version_with_a_hole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("3.1.5", "2.11", None):
        monkeypatch.setattr(chat_render, "JINJA", found)
        with pytest.raises(OptionError, match=rf"jinja2 3.1.6 or newer, here is {found or 'none'}: pip inst"):
            render({"template": "", "messages": [], "eos_token": ""})
    for found in ("3.1.6", "3.2.0rc1", "4"):
        monkeypatch.setattr(chat_render, "JINJA", found)
        render({"template": "", "messages": [], "eos_token": ""})


def test_this_process_never_imports_it() -> None:
    code = (
        "import sys\n"
        "from blt_edge.runtime.chat_template import ChatTemplate\n"
        "from blt_edge.runtime.chat_spec import ChatSpec\n"
        "assert ChatTemplate('{{ messages[0].role }}', ChatSpec()).render([{'role': 'x'}]) == b'x'\n"
        "assert 'jinja2' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# 3. In a bundle.


def bundle_with(directory: Path, template: bytes, eos: str | None = "<end>") -> Path:
    write_bundle(directory)
    return add_template(directory, template, eos)


def test_a_bundle_s_template(tmp_path: Path) -> None:
    directory = bundle_with(tmp_path / "bundle", CHATML.encode())
    template = load_chat_template(directory, load_manifest(directory))
    assert template is not None
    assert (template.text, template.stop) == (CHATML, (b"<end>",))
    assert ChatTemplate(CHATML, ChatSpec()).stop == ()
    write_bundle(tmp_path / "old")
    assert load_chat_template(tmp_path / "old", load_manifest(tmp_path / "old")) is None


def test_it_changes_nothing_that_is_computed(tmp_path: Path) -> None:
    prints = [
        load_manifest(bundle_with(tmp_path / name, name.encode(), name)).fingerprint for name in ("a", "b")
    ]
    write_bundle(tmp_path / "old")
    assert {*prints, load_manifest(tmp_path / "old").fingerprint} == {prints[0]}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (b"\xff", "UTF-8, this one is not at byte 0"),
        (b"x" * (MOST_TEMPLATE_BYTES + 1), "at most 262144 bytes"),
        (b"{% if %}", "renders no simple conversation: TemplateSyntaxError in line 1"),
        (b"{{ raise_exception('never') }}", "renders no simple conversation: never"),
        (b"", "leaves out what a user says"),
    ],
)
def test_a_bundle_with_another_file_there(tmp_path: Path, template: bytes, words: str) -> None:
    directory = bundle_with(tmp_path / "bundle", template)
    with pytest.raises(
        BundleError, match=rf"^{CHAT_TEMPLATE_NAME}: .*{words}.*; export the checkpoint again"
    ):
        load_chat_template(directory, load_manifest(directory))


def test_a_template_that_is_listed_nowhere(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "bundle")
    with pytest.raises(BltError, match=f"chat: got '{CHAT_TEMPLATE_NAME}', a file of the list"):
        write_manifest(tmp_path / "bundle", replace(manifest, chat=ChatSpec()))
