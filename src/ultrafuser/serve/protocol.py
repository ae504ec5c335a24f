"""What clients may send: the fields of requests to the OpenAI API, with the extension for fused models.

Every field is declared. A field of the OpenAI API that the server does not support may only have the value that changes
nothing, so that no field is ever ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128  # answers to one request, as in the OpenAI API
MAX_STOP = 16  # stop texts
MAX_SPECIALIST_LOGPROBS = 5
_INT64 = 2**63

# Accepted and without effect: fields that clients send for their own records or for OpenAI's billing and caching.
HARMLESS_FIELDS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that may only have the value that changes nothing, and what to do instead.
UNSUPPORTED_FIELDS = {
    "audio": "this server answers with text",
    "best_of": "draw several answers with n, and choose among them",
    "echo": "the prompt is not repeated and has no log-probabilities",
    "function_call": "this server calls no functions",
    "functions": "this server calls no functions",
    "modalities": "this server answers with text",
    "parallel_tool_calls": "this server calls no tools",
    "prediction": "this server predicts no outputs",
    "reasoning_effort": "the specialists' chat templates decide whether they reason",
    "response_format": "answers are plain text. Ask for JSON in the prompt and check the answer",
    "suffix": "this server inserts no text",
    "tool_choice": "this server calls no tools",
    "tools": "this server calls no tools",
    "verbosity": "set max_tokens, or ask for a short answer in the prompt",
    "web_search_options": "this server does not search the web",
}


class RequestModel(BaseModel):
    """Types are exact, numbers are finite, and unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _refuse_other_parts(content: Any) -> Any:
    """A clearer error than that of the union: parts of other types have other fields too."""
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise PydanticCustomError(
                "part_type", "has a part of type {kind}. This server reads text alone", {"kind": repr(kind[:40])}
            )
    return content


class TextPart(RequestModel):
    """A part of a message's content. The texts of the parts are joined with line breaks, as in vLLM."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One turn of the conversation. Answers of this server can be sent back as they are."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="`developer` counts as `system`.")
    content: Annotated[str | Annotated[list[TextPart], Field(min_length=1)], BeforeValidator(_refuse_other_parts)]
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(RequestModel):
    """What a streamed answer has besides the text."""

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk.")
    include_obfuscation: Literal[False] | None = None


class TextFormat(RequestModel):
    """The only format of answers."""

    type: Literal["text"]


StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=_INT64)]


class AnswerRequest(RequestModel):
    """The fields that chats and completions share."""

    model: str | None = Field(None, description="The served model. Default: the only one.")
    stream: bool | None = Field(None, description="Send each token when it is drawn, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="With `stream` only.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="Answers to each prompt.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0: always the most likely token. Default: 1."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Draw from the most likely tokens with this total probability."
    )
    top_k: Annotated[int, Field(ge=-1, lt=_INT64)] | None = Field(
        None, description="Draw from this many of the most likely tokens. 0 or -1: from all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Drop tokens below this share of the most likely one's probability."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Subtract this from the logits of tokens that the answer has."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Subtract this for each time that the answer has the token."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="Divide the logits of tokens in the prompt or the answer, as in vLLM. 1: no penalty."
    )
    logit_bias: (
        dict[Annotated[str, Field(pattern="^[0-9]{1,18}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, description="Add to the logits of tokens, by their ids.")
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = Field(
        None, description="The same request with the same seed draws the same tokens. Choice i has the seed + i."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP)] | None = Field(
        None, description=f"Up to {MAX_STOP} texts that end the answer. They are not part of it."
    )
    ignore_eos: bool | None = Field(None, description="Continue after an end token.")
    gate_weights: bool | None = Field(None, description="Return the gate's weights at every token.")
    specialists: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="The specialists that take part. The gate's weights are renormalised over them."
    )
    specialist_logprobs: Annotated[int, Field(ge=0, le=MAX_SPECIALIST_LOGPROBS)] | None = Field(
        None, description="Return each specialist's most likely tokens, with `gate_weights` only."
    )
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the most likely tokens to return. None: no log-probabilities."""
        raise NotImplementedError

    def token_limit(self) -> tuple[str, int | None]:
        """The largest number of tokens of an answer, behind the name of its field."""
        raise NotImplementedError

    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(AnswerRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)] = Field(
        description="The conversation. If the last message is an assistant's, the answer continues it."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = Field(
        None, description="The largest number of tokens of an answer. Default: what the context leaves."
    )
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = Field(
        None, description="The old name of `max_completion_tokens`."
    )
    logprobs: bool | None = Field(None, description="Return the log-probability of every token.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Return this many of the most likely tokens too, with `logprobs` only."
    )
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Literal[True, False] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class CompletionRequest(AnswerRequest):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="A text or token ids, the same for all specialists, or a list of prompts.")
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = Field(
        None, description="The largest number of tokens of an answer. Default: 16, as in the OpenAI API."
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Return the log-probability of every token, and this many of the most likely tokens."
    )
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def token_limit(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each of which gives n choices."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
