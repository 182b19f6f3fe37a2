"""Optional rewording by an OpenAI-compatible chat endpoint. Off by default; on an error the text stays as it is."""

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from serve.settings import SmoothingArgs

MAX_REPLY_BYTES = 1 << 20
INSTRUCTION = (
    "You are given a passage and a rough draft of its next sentence. Rewrite the draft so that it reads well after "
    "the passage. Keep its meaning and length. Answer with the rewritten sentence alone."
)


class SmoothingError(Exception):
    """The endpoint gave no usable answer."""


class Smoother:
    """Client of one endpoint."""

    def __init__(self, args: SmoothingArgs) -> None:
        self._args = args
        self._key = os.environ.get(args.api_key_env, "")

    @property
    def configured(self) -> bool:
        """Whether an endpoint is set."""
        return bool(self._args.url)

    async def smooth(self, context: Sequence[str], text: str, timeout_s: float) -> str:
        """The text, reworded to follow its context. Raises SmoothingError, which describes the endpoint's failure."""
        wait_s = max(0.05, min(timeout_s, self._args.timeout_s))
        return await asyncio.to_thread(self._ask, list(context), text, wait_s)

    def _ask(self, context: list[str], text: str, timeout_s: float) -> str:
        body = {
            "model": self._args.model,
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": f"Passage: {' '.join(context)}\n\nDraft: {text}"},
            ],
            "temperature": 0,
            "max_tokens": 128,
        }
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = self._args.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                answer: Any = json.loads(reply.read(MAX_REPLY_BYTES))
            content = answer["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as err:
            raise SmoothingError(f"{url} answered {err.code}") from err
        except (OSError, ValueError) as err:
            raise SmoothingError(f"{url}: {err}") from err
        except (KeyError, IndexError, TypeError) as err:
            raise SmoothingError(f"{url} gave no choices[0].message.content") from err
        if not isinstance(content, str) or not content.strip():
            raise SmoothingError(f"{url} gave an empty text")
        return " ".join(content.split())
