"""POST /v1/chat/completions, where the bundle has a chat template: what that makes of messages is completed.

What it does not know: how templates are rendered; how a completion is answered.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio

from ...runtime import OptionError
from ...runtime.chat_template import ChatTemplate, MessagesRefusedError, TemplateError
from ...runtime.worker import WorkerBusyError
from .answers import AnswerDocument
from .chat_answers import ChatCompletion
from .chat_requests import ChatRequest, parse_chat
from .refusals import ApiError, invalid, retry_after
from .requests import CompletionRequest
from .service import Service

_NOT_AGAIN = {"x-should-retry": "false"}
"""OpenAI's client would ask again, to no other end."""


async def begin_chat(document: dict[str, Any], service: Service) -> tuple[CompletionRequest, AnswerDocument]:
    """A chat; its messages are rendered in another thread, where a template may take its time."""
    assert service.chat is not None
    asked = parse_chat(document, service.facts)
    render = partial(_prompt, service.chat, asked)
    prompt = await anyio.to_thread.run_sync(render, abandon_on_cancel=True)
    request = asked.with_prompt(prompt, service.facts)
    return request, ChatCompletion(request, service.facts.name)


def _prompt(template: ChatTemplate, asked: ChatRequest) -> bytes:
    try:
        return template.render(asked.messages)
    except MessagesRefusedError as error:
        raise invalid(str(error), "messages") from None
    except WorkerBusyError as error:
        told = f"the chat template {error}"
        raise ApiError(503, told, "template_busy", headers=retry_after(5)) from None
    except (TemplateError, OptionError) as error:
        raise ApiError(500, str(error), "model_error", headers=_NOT_AGAIN) from None
