"""A fused model as an lm-eval model: every specialist reads the prompt in its own template. K = 1 is any model."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria

from ultrafuser.data.collate import collate_rows, pad_prompts
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import CheckpointError, DataError
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat
from ultrafuser.model.cache import UltraFuserCache
from ultrafuser.model.loss import select_responses
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM

MAX_NEW_TOKENS = 512  # where a task does not say
_STRIDE = 16  # tokens between two looks at which rows of a batch have ended


class FusionLM(LM):
    """An lm-eval model over `UltraFuserForCausalLM`.

    Chats arrive as `encode_chat` wrote them and are rendered once for each specialist. All specialists read any other
    text unchanged. Requests are sorted by length and answered in batches. Each finished one is reported to lm-eval's
    cache hook.

    Attributes:
        draws: sampled batches so far. Each has its own seed, so that equal requests get different answers. A resumed run
            counts on from the cached answers.
    """

    def __init__(self, model: UltraFuserForCausalLM, renderer: Renderer, *, batch_size: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.model, self.renderer, self.batch_size, self.seed = model, renderer, batch_size, seed
        self.tokenizer = renderer.tokenizer
        self.draws = 0

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return "\n".join(self.renderer.chat_templates)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return encode_chat(chat_history)

    # ---------------------------------------------------------------- log-likelihood

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each continuation, its log-probability in nats, and whether greedy decoding would give it.

        Raises:
            CheckpointError: a log-probability is NaN.
            DataError: a request that does not fit into the smallest context.
        """
        groups: dict[Any, list[int]] = {}  # options of one token share a prompt, and differ in the label alone
        rows = [self._row(*request.args) for request in requests]
        for i, row in enumerate(rows):
            self._check_fits(row.num_tokens, 0, requests[i])
            groups.setdefault((row.input_ids, row.response_index), []).append(i)
        order = sorted(groups.values(), key=lambda group: -rows[group[0]].num_tokens)
        answers: list[Any] = [None] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            firsts = [rows[group[0]] for group in batch]
            for group, log_probs in zip(batch, self._log_probs(firsts), strict=True):
                best = log_probs.argmax(-1)  # (R,)
                for i in group:
                    labels = torch.tensor(rows[i].labels, device=log_probs.device)
                    log_p = log_probs.gather(-1, labels[:, None]).sum().item()
                    if math.isnan(log_p):
                        raise CheckpointError(
                            f"the log-probability of {requests[i].args[1]!r} is NaN: the model computes NaN there. Load it "
                            "with --dtype float32. If that does not help, its weights are damaged"
                        )
                    answers[i] = (log_p, bool((best == labels).all()))
                    self.cache_hook.add_partial("loglikelihood", requests[i].args, answers[i])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not offered: a whole document has no prompt that templates could differ in."""
        raise DataError(
            "this task scores whole documents (loglikelihood_rolling), which fused models do not offer. Use "
            "`--suite quick` for the loss on answers"
        )

    def _log_probs(self, rows: Sequence[Rendered]) -> list[torch.Tensor]:
        """Log-probabilities at the response positions: one (R, V) tensor for each row."""
        inputs = {key: value.to(self.model.device) for key, value in collate_rows(rows).items()}
        states = self.model.specialist_states(inputs["specialist_input_ids"])  # K x (B, T, D_k)
        labelled = inputs["labels"] != -100
        flat = select_responses(states, inputs["response_index"], labelled)  # K x (N, D_k)
        mixed = self.model.mix(flat, self.model.gate(flat)).log_softmax(-1)  # (N, V)
        return list(mixed.split([len(row.labels) for row in rows]))

    def _row(self, context: str, continuation: str) -> Rendered:
        """Context and continuation as K token sequences with the continuation's tokens in common.

        All specialists read a text that is no chat unchanged. Blanks at its end belong to the continuation, as in lm-eval.
        """
        if (chat := decode_chat(context)) is not None:
            return self.renderer.continuation(chat, continuation)
        num_specialists = len(self.renderer.formats)
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        if text:
            prompts = self._encode_all(text)
            response = self._encode_all(text + continuation)[0][len(prompts[0]) :]
        else:  # something must predict the first token
            first = self.tokenizer.bos_token_id
            prompts = [[self.renderer.end_token_id if first is None else first]] * num_specialists
            response = self.tokenizer.encode(continuation, add_special_tokens=False)
        if not response:
            raise DataError(f"the continuation {continuation!r} has no tokens, so it has no log-likelihood")
        return Rendered(
            row_id="",
            domain="",
            input_ids=tuple((*ids, *response[:-1]) for ids in prompts),
            response_index=tuple(tuple(range(len(ids) - 1, len(ids) - 1 + len(response))) for ids in prompts),
            labels=tuple(response),
        )

    # ---------------------------------------------------------------- generation

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, up to its stop strings or the end of the answer.

        Raises:
            DataError: a prompt that does not fit into the smallest context together with the new tokens.
        """
        generations = [_Generation(self._prompts(r.args[0]), *self._options(r.args[1])) for r in requests]
        for generation, request in zip(generations, requests, strict=True):
            self._check_fits(generation.num_tokens, generation.options["max_new_tokens"], request)
        answers: list[Any] = [None] * len(requests)
        for batch in _batches(generations, self.batch_size):
            for i, text in zip(batch, self._generate([generations[i] for i in batch]), strict=True):
                answers[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return answers

    def _generate(self, batch: Sequence[_Generation]) -> list[str]:
        first = batch[0]
        inputs = pad_prompts([generation.prompts for generation in batch], self.renderer.pad_id, self.model.device)
        if first.options["do_sample"]:
            digest = hashlib.sha256(f"{self.seed} {self.draws}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            self.draws += 1
        is_greedy = set(first.options) == {"max_new_tokens", "do_sample"} and not first.options["do_sample"]
        cache = self.model.new_cache()
        if is_greedy and cache.can_join:
            answers = self._decode_greedily(inputs, cache, first)
        else:
            width = inputs["input_ids"].shape[1]
            answers = self._continue(inputs, first, width)[:, width:].tolist()
        texts = [self.renderer.answer_text(ids) for ids in answers]
        return [postprocess_generated_text(generation=text, stop=first.until, think_end_token=None) for text in texts]

    def _decode_greedily(
        self, inputs: dict[str, torch.Tensor], cache: UltraFuserCache, generation: _Generation
    ) -> list[list[int]]:
        """The tokens of each answer. Rows whose answers have ended leave the batch, so that nobody waits for the longest."""
        width, left = inputs["input_ids"].shape[1], generation.options["max_new_tokens"]
        rows = list(range(len(inputs["input_ids"])))
        answers: list[list[int]] = [[] for _ in rows]
        while rows:
            options = generation.options | {"max_new_tokens": min(left, _STRIDE), "past_key_values": cache}
            tokens = self._continue(inputs, replace(generation, options=options), width)
            left -= tokens.shape[1] - inputs["input_ids"].shape[1]
            for row, answer in zip(rows, tokens[:, width:].tolist(), strict=True):
                answers[row] = answer
            kept = [i for i, row in enumerate(rows) if left and not self._has_ended(answers[row], generation.until)]
            index = torch.tensor(kept, device=tokens.device, dtype=torch.long)
            rows = [rows[i] for i in kept]
            inputs = {key: tensor[index] for key, tensor in inputs.items()}
            inputs["input_ids"] = tokens[index]
            inputs["attention_mask"] = torch.nn.functional.pad(
                inputs["attention_mask"], (0, tokens.shape[1] - inputs["attention_mask"].shape[1]), value=1
            )
            if rows and len(rows) < len(tokens):
                cache.batch_select_indices(index)
        return answers

    def _continue(self, inputs: dict[str, torch.Tensor], generation: _Generation, width: int) -> torch.Tensor:
        """The rows with their next tokens, up to a stop string after the first `width` tokens in all rows: (B, T)."""
        stops = stop_sequences_criteria(self.tokenizer, generation.until, width, len(inputs["input_ids"]))
        return self.model.generate(
            **inputs, **generation.options, stopping_criteria=stops, pad_token_id=self.renderer.pad_id
        )

    def _has_ended(self, answer: list[int], until: Sequence[str]) -> bool:
        if not self.model.end_token_ids.isdisjoint(answer):
            return True
        text = self.tokenizer.decode(answer) if until else ""
        return any(stop in text for stop in until)

    def _options(self, arguments: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """lm-eval's generation arguments as stop strings and arguments of `generate`."""
        options = normalize_gen_kwargs(dict(arguments), MAX_NEW_TOKENS)
        until = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.eos_token)
        options["max_new_tokens"] = options.pop("max_gen_toks")
        if not options.get("do_sample"):
            options = {key: value for key, value in options.items() if key not in ("temperature", "top_p", "top_k")}
            options["do_sample"] = False
        return until, options

    # ---------------------------------------------------------------- prompts

    def _prompts(self, context: str) -> list[list[int]]:
        chat = decode_chat(context)
        if chat is not None:
            return self.renderer.prompt(chat)
        return [ids or [self.renderer.pad_id] for ids in self._encode_all(context)]

    def _encode_all(self, text: str) -> list[list[int]]:
        """The tokens of a text for each of the K specialists, with the special tokens that its tokenizer adds."""
        return [chat_format.tokenizer.encode(text) for chat_format in self.renderer.formats]

    def _check_fits(self, prompt: int, new: int, request: Instance) -> None:
        context = self.model.config.max_position_embeddings
        if prompt + new > context:
            source = f"task {request.task_name!r}, document {request.doc_id}" if request.task_name else "a request"
            raise DataError(
                f"{source}: {prompt} prompt tokens and {new} new ones do not fit into the context of {context}. Lower "
                "--max-new-tokens, or leave the task out"
            )


@dataclass(frozen=True)
class _Generation:
    """One request for text: K prompts, stop strings, arguments of `generate`."""

    prompts: list[list[int]]
    until: list[str]
    options: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return max(map(len, self.prompts))


def _batches(generations: Sequence[_Generation], size: int) -> list[list[int]]:
    """Indices of at most `size` requests with the same options and stop strings, the longest prompts first."""

    def settings(i: int) -> tuple[str, str]:
        return repr(generations[i].options), repr(generations[i].until)

    order = sorted(range(len(generations)), key=lambda i: (*settings(i), -generations[i].num_tokens))
    groups = [list(group) for _, group in itertools.groupby(order, settings)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]
