"""Stage 1b: the gate learns from which answers are right. The specialists stay frozen.

Every step samples several answers to each of some questions from the fused model, checks them, and raises the probability
of those that are better than the others of the same question. The states of the specialists are kept while they sample,
so an update runs the gate alone.

Source: a token gate trained from the correctness of responses is DLLG's idea (arXiv 2606.04378). The baseline of an answer
is the mean of the others (leave-one-out, arXiv 2402.14740), and updates are clipped as in PPO (arXiv 1707.06347).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import get_scheduler

from ultrafuser.data.collate import pad_prompts
from ultrafuser.data.files import atomic_file
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import TrainingError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.progress import Progress
from ultrafuser.recipe import OutcomeStage
from ultrafuser.train.metrics import append_metrics, truncate_metrics

Check = Callable[[str], float]  # the reward of an answer, from 0 (wrong) to 1 (right)
Questions = Mapping[str, Iterator[tuple[str, Check]]]  # by domain: prompts without end, each with its check
_TOKENS_PER_PASS = 4096  # through the output layers at once
_DROPPED_SHARE = 8  # rows leave the batch once one eighth of them has ended


@dataclass(frozen=True)
class SampledAnswers:
    """Answers of one step, as the gate needs them: N tokens of all A answers, one after the other.

    Attributes:
        tokens: by answer, its tokens, the end token included.
        states: K tensors (N, D_k), the last hidden states that predict the tokens.
        log_probs: (N, K), log-probability of each token under each specialist, in nats.
        sampled: (N), log-probability of each token under the fused model that sampled it, in nats.
    """

    tokens: list[list[int]]
    states: list[torch.Tensor]
    log_probs: torch.Tensor
    sampled: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        """The tokens of all answers: (N)."""
        return torch.tensor([token for answer in self.tokens for token in answer])

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """A value of each answer at each of its tokens: (A) -> (N)."""
        return values.repeat_interleave(torch.tensor([len(answer) for answer in self.tokens]))


def load_questions(reference: str, seed: int) -> Questions:
    """Call the function that gives the questions.

    Args:
        reference: `MODULE:FUNCTION`. The function takes a seed and returns an iterator of each domain, by its name.

    Raises:
        TrainingError: there is no such function, or it returns something else.
    """
    module, _, name = reference.partition(":")
    try:
        source = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f"questions: {reference!r} cannot be used: {error}. Name a function as MODULE:FUNCTION that takes a seed"
        ) from error
    questions = source(seed)
    if not isinstance(questions, Mapping) or not questions:
        raise TrainingError(
            f"questions: {reference!r} returned {type(questions).__name__} {questions!r:.40}, expected an iterator of prompts "
            "and checks for each domain, by its name"
        )
    return questions


def train_outcome(
    model: UltraFuserForCausalLM,
    renderer: Renderer,
    stage: OutcomeStage,
    *,
    seed: int,
    checkpoint: Path,
    metrics_file: Path,
    progress: Progress,
) -> None:
    """Train the gate in place.

    Args:
        checkpoint: file of the last finished step. A run that finds it goes on from there.
        metrics_file: gets a row for each step: the mean reward, also by domain, the share of questions whose answers differ
            in reward, and the KL divergence of the updates in nats per token.

    Raises:
        TrainingError: several processes, a source of questions that is missing or ends, or a reward or loss that is not finite.
    """
    if (processes := PartialState().num_processes) > 1:
        raise TrainingError(f"the stage 'outcome' runs in one process, got {processes}. Start it without a launcher")
    questions = load_questions(stage.questions, seed)
    optimizer = torch.optim.AdamW(model.gate.parameters(), lr=stage.lr, weight_decay=stage.weight_decay)
    kind = {"constant": "constant_with_warmup"}.get(stage.schedule, stage.schedule)
    num_updates = stage.steps * stage.updates
    schedule = get_scheduler(kind, optimizer, round(stage.warmup_ratio * num_updates), num_updates)
    finished = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=model.device, weights_only=True)
        for name, target in (("gate", model.gate), ("optimizer", optimizer), ("schedule", schedule)):
            target.load_state_dict(state[name])
        finished = state["step"]
        _draw(questions, finished * stage.samples_per_domain, stage.questions)  # those of the finished steps
    truncate_metrics(metrics_file, finished, stage.name)
    progress.start("outcome", stage.steps - finished)
    for step in range(finished + 1, stage.steps + 1):
        start = time.monotonic()
        batch = _draw(questions, stage.samples_per_domain, stage.questions)
        torch.manual_seed(seed * 1_000_003 + step)
        answers = sample_answers(model, renderer, [prompt for prompt, _ in batch], stage)
        checks = [check for _, check in batch for _ in range(stage.answers)]
        texts = [renderer.answer_text(tokens) for tokens in answers.tokens]
        rewards = torch.tensor([float(check(text)) for check, text in zip(checks, texts, strict=True)])
        if not rewards.isfinite().all():
            raise TrainingError(f"questions: a check of {stage.questions!r} returned NaN or infinity, expected 0 to 1")
        rewards = rewards.view(len(batch), stage.answers)
        for _ in range(stage.updates):
            divergence = _update(model, answers, advantages(rewards), stage, optimizer)
            schedule.step()
        by_domain = zip(questions, rewards.view(len(questions), -1).mean(-1).tolist(), strict=True)
        row = {
            "stage": stage.name,
            "step": step,
            "reward": rewards.mean().item(),
            **{f"reward/{domain}": reward for domain, reward in by_domain},
            "differing": (rewards.amax(-1) > rewards.amin(-1)).float().mean().item(),
            "kl": divergence,
            "answer_tokens": len(answers.sampled),
            "seconds": round(time.monotonic() - start, 1),
        }
        append_metrics(metrics_file, row)
        state = {"step": step, "gate": model.gate.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_file(checkpoint, force=True) as draft:
            torch.save(state | {"schedule": schedule.state_dict()}, draft)
        progress.advance(note=f"reward {row['reward']:.3f}")
    progress.finish()


def _draw(questions: Questions, count: int, reference: str) -> list[tuple[str, Check]]:
    """The next questions of every domain, one domain after the other."""
    batch = []
    for domain, source in questions.items():
        drawn = list(islice(source, count))
        if len(drawn) < count:
            raise TrainingError(
                f"questions: {reference!r} ended after {len(drawn)} of {count} questions of domain {domain!r}. Let it give "
                "them without end, or lower stages.outcome.steps"
            )
        batch += drawn
    return batch


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Each answer's reward minus the mean of the other answers of its question: (Q, G) -> (Q, G)."""
    size = rewards.shape[1]
    return (rewards - rewards.mean(-1, keepdim=True)) * size / (size - 1)


def _update(
    model: UltraFuserForCausalLM,
    answers: SampledAnswers,
    advantage: torch.Tensor,
    stage: OutcomeStage,
    optimizer: torch.optim.Optimizer,
) -> float:
    """One clipped step on all tokens. Returns the estimated KL divergence from the model that sampled, in nats a token."""
    device = next(model.gate.parameters()).device
    states, labels = [state.to(device) for state in answers.states], answers.labels.to(device)
    log_p = model.label_log_probs(states, labels, model.gate(states), answers.log_probs)
    log_ratio = log_p - answers.sampled.to(log_p)
    ratio, weight = log_ratio.exp(), answers.per_token(advantage.flatten()).to(log_p)
    loss = -torch.minimum(ratio * weight, ratio.clamp(1 - stage.clip, 1 + stage.clip) * weight).mean()
    if not torch.isfinite(loss):
        raise TrainingError(
            "the loss of the outcome stage is not finite. Lower stages.outcome.lr, or use dtype=float32"
        )
    optimizer.zero_grad()
    loss.backward()
    if stage.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(model.gate.parameters(), stage.max_grad_norm)
    optimizer.step()
    return (ratio.detach() - 1 - log_ratio.detach()).mean().item()


@torch.no_grad()
def sample_answers(
    model: UltraFuserForCausalLM, renderer: Renderer, prompts: Sequence[str], stage: OutcomeStage
) -> SampledAnswers:
    """Sample `stage.answers` answers to each prompt at temperature 1, and keep the states behind their tokens.

    Each prompt is read once. Answers of one prompt stand together.
    """
    model.eval()
    inputs = pad_prompts(
        [renderer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts], renderer.pad_id, model.device
    )
    cache = model.new_cache()
    states = model.specialist_states(inputs["specialist_input_ids"], inputs["specialist_attention_mask"], cache)
    cache.batch_repeat_interleave(stage.answers)
    states = [state[:, -1].repeat_interleave(stage.answers, dim=0) for state in states]  # K x (B, D_k)
    ends = torch.tensor(sorted(model.end_token_ids), device=model.device)
    rows = list(range(len(prompts) * stage.answers))
    tokens: list[list[int]] = [[] for _ in rows]
    kept: list[list[list[torch.Tensor]]] = [[[] for _ in rows] for _ in states]  # by specialist and answer
    running = torch.ones(len(rows), dtype=torch.bool, device=model.device)
    for _ in range(stage.max_new_tokens):
        probabilities = model.mix(states, model.gate(states)).float().softmax(-1)  # (B, V)
        drawn = torch.multinomial(probabilities, 1)[:, 0]
        for i, (row, token, runs) in enumerate(zip(rows, drawn.tolist(), running.tolist(), strict=True)):
            if runs:
                tokens[row].append(token)
                for k, state in enumerate(states):
                    kept[k][row].append(state[i].cpu())
        running &= ~torch.isin(drawn, ends)
        if not running.any():
            break
        if cache.can_join and (~running).sum() * _DROPPED_SHARE >= len(rows):
            index = running.nonzero()[:, 0]
            cache.batch_select_indices(index)
            rows = [rows[i] for i in index.tolist()]
            drawn, running = drawn[index], running[index]
        states = [state[:, -1] for state in model.specialist_states(drawn[:, None], None, cache)]
    flat = [torch.stack([state for answer in answers for state in answer]) for answers in kept]  # K x (N, D_k)
    return SampledAnswers(tokens, flat, *_log_probs(model, flat, [token for answer in tokens for token in answer]))


def _log_probs(
    model: UltraFuserForCausalLM, states: Sequence[torch.Tensor], labels: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the labels under each specialist, (N, K), and under the fused model, (N)."""
    by_specialist, fused = [], []
    for start in range(0, len(labels), _TOKENS_PER_PASS):
        span = slice(start, start + _TOKENS_PER_PASS)
        selected = [state[span].to(model.device) for state in states]
        targets = torch.tensor(labels[span], device=model.device)
        log_weights, log_probs = model.gate(selected), model.specialist_log_probs(selected, targets)
        by_specialist.append(log_probs.cpu())
        fused.append(model.label_log_probs(selected, targets, log_weights, log_probs).cpu())
    return torch.cat(by_specialist), torch.cat(fused)
