"""What clients get: the objects of the OpenAI API, with the extension for fused models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What is wrong with a request, or with the server.

    Attributes:
        param: the field at fault, such as `messages.0.content`.
        code: for programs, such as `context_length_exceeded`.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every response that is no success."""

    error: ErrorDetail


class TokenTop(BaseModel):
    """One of a specialist's most likely tokens, and its log-probability in nats."""

    token: str
    logprob: float


class GateWeights(BaseModel):
    """The gate's weights at each token.

    Attributes:
        specialists: K names.
        tokens: T texts. Joined, they are the text of the answer.
        weights: T lists of K weights that sum to 1, rounded to 4 decimals.
        top: T lists of K lists of the specialists' most likely tokens, with `specialist_logprobs`.
    """

    specialists: list[str]
    tokens: list[str]
    weights: list[list[float]]
    top: list[list[list[TokenTop]]] | None = None


class Usage(BaseModel):
    """Token counts.

    Attributes:
        prompt_tokens: of the longest of the specialists' prompts, which is what the context has to hold.
        completion_tokens: of all choices, end tokens included.
        specialist_shares: the mean gate weight of each specialist over these tokens.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    specialist_shares: dict[str, float]


class Answer(BaseModel):
    """The fields that all answers share.

    Attributes:
        created: seconds since 1970.
    """

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None = None


# ---------------------------------------------------------------- chats


class Logprob(BaseModel):
    """One token and its log-probability in nats, before temperature and filters.

    Attributes:
        bytes: of its text in UTF-8. A token may be a part of a character.
    """

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(Logprob):
    """A token of an answer, and the most likely tokens in its place."""

    top_logprobs: list[Logprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of an answer."""

    content: list[TokenLogprobs]
    refusal: None = None


class ChatMessage(BaseModel):
    """The answer to a conversation."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    gate_weights: GateWeights | None = None


class ChatAnswer(Answer):
    """The answers to a conversation."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatDelta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    gate_weights: GateWeights | None = None


class ChatChunk(Answer):
    """One event of a streamed answer to a conversation."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


# ---------------------------------------------------------------- completions


class CompletionLogprobs(BaseModel):
    """The log-probabilities of an answer, token by token.

    Attributes:
        text_offset: where each token begins in the joined tokens, in characters.
        top_logprobs: by the text of the token. The drawn token is always one of them.
    """

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class CompletionChoice(BaseModel):
    """One answer, or what a chunk adds to it.

    Attributes:
        index: choice i is answer `i % n` to prompt `i // n`.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    gate_weights: GateWeights | None = None


class CompletionAnswer(Answer):
    """The answers to prompts, or one event of a streamed answer."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


# ---------------------------------------------------------------- models


class ModelCard(BaseModel):
    """The served model.

    Attributes:
        specialists: K names.
        max_model_len: the largest number of tokens of a prompt and its answer together.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ultrafuser"] = "ultrafuser"
    specialists: list[str]
    max_model_len: int


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the server takes requests."""

    status: Literal["ok"]
