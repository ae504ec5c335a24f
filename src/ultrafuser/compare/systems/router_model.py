"""A trained router: from the specialists' first states to the one specialist that answers the whole sample."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from safetensors.torch import load_file, save_file
from torch import nn

from ultrafuser.data.collate import length_batches, prompt_inputs, token_budget
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import CheckpointError, DataError, UltraFuserError
from ultrafuser.evaluate.lm.chat import decode_chat, encode_chat
from ultrafuser.evaluate.losses import RowLoss, specialist_losses
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import atomic_directory
from ultrafuser.train.features import FeatureStore

WEIGHTS_FILE, FACTS_FILE = "router.safetensors", "router.json"
NUM_FOLDS = 5
MAX_STEPS, STEPS_PER_SCORE = 60, 5  # of L-BFGS

REQUESTS_PER_CALL = 32  # an evaluation that is killed repeats at most this many requests

Chat = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Candidate:
    """One way to train the classifier. Cross-validation chooses among them.

    Attributes:
        hidden_size: units of its hidden layer. 0: linear.
        target: `best`, the specialist with the fewest nats on the row. `soft`, softmax of minus the nats of the whole
            row. `regret`, the expected nats above the best, which is what is measured.
        l2: penalty on the squares of the weights, beside a mean loss over standardised states.
    """

    hidden_size: int
    target: Literal["best", "soft", "regret"]
    l2: float


CANDIDATES = [Candidate(*fields) for fields in product((0, 64), ("best", "soft", "regret"), (1e-3, 1e-2, 1e-1))]  # type: ignore[arg-type]


class _Score(NamedTuple):
    """The losses on held-out rows after a number of steps. The smallest is the best."""

    nll: float  # nats per response token of the chosen specialists, mean over the domains
    expected: float  # the same for a specialist drawn by the softmax of the router's scores, to break ties
    steps: int


@dataclass(frozen=True)
class _Rows:
    """Training rows: states (N, D), nats and response tokens. Every domain has the same weight."""

    states: torch.Tensor
    nats: torch.Tensor  # (N, K), summed over the row
    tokens: torch.Tensor  # (N,)
    domains: list[str]

    def __getitem__(self, keep: Sequence[int]) -> _Rows:
        index = torch.as_tensor(keep)
        return _Rows(self.states[index], self.nats[index], self.tokens[index], [self.domains[i] for i in keep])

    def weights(self, by: torch.Tensor) -> torch.Tensor:
        """(N,): each row's share of `by` in its domain, divided by the number of domains."""
        names = sorted(set(self.domains))
        index = torch.tensor([names.index(domain) for domain in self.domains])
        totals = torch.zeros(len(names), dtype=by.dtype).index_add_(0, index, by)
        return by / totals[index] / len(names)


class Router:
    """A small classifier over the states that predict the first response token, concatenated and standardised.

    Attributes:
        widths: D_k of the K specialists.
        report: every candidate with its cross-validated loss, and the chosen one.
    """

    def __init__(self, widths: Sequence[int], hidden_size: int = 0, report: Mapping[str, Any] | None = None) -> None:
        self.widths, self.hidden_size, self.report = list(widths), hidden_size, dict(report or {})
        self.net = _Classifier(sum(widths), hidden_size, len(widths))

    @classmethod
    def train(cls, store: FeatureStore, seed: int = 0, candidates: Sequence[Candidate] = CANDIDATES) -> Router:
        """Train on the rows of a feature store.

        The candidate and the number of steps have the lowest cross-validated loss of the chosen specialists (nats per
        response token, mean over the domains). The router is then trained on all rows.

        Args:
            store: training rows only.
            seed: of the folds and of the hidden layer's first weights.

        Raises:
            DataError: fewer than two rows.
        """
        rows = _read(store)
        folds = _folds(rows.domains, seed)
        scores = [min(_validate(rows, folds, candidate, seed)) for candidate in candidates]
        score, candidate = min(zip(scores, candidates, strict=True), key=lambda pair: pair[0])
        report = {
            "chosen": asdict(candidate) | score._asdict(),
            "candidates": [asdict(c) | s._asdict() for c, s in zip(candidates, scores, strict=True)],
            "rows": len(rows.tokens),
            "folds": len(folds),
            "seed": seed,
        }
        router = cls([states.shape[1] for states in store.states], candidate.hidden_size, report)
        router.net = _start(rows, candidate, seed)
        for _ in _fit(router.net, rows, candidate, score.steps):
            pass
        return router

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    @torch.no_grad()
    def choose(self, first_states: Sequence[torch.Tensor]) -> int:
        """The specialist for one sample, from K states (D_k) at the position that predicts the first response token."""
        return int(self.net(_concatenate(first_states)[None]).argmax())

    def save(self, folder: Path) -> None:
        """Write the router, all or nothing."""
        with atomic_directory(folder) as draft:
            save_file({key: value.contiguous() for key, value in self.net.state_dict().items()}, draft / WEIGHTS_FILE)
            facts = {"widths": self.widths, "hidden_size": self.hidden_size, "report": self.report}
            (draft / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Read a router.

        Raises:
            CheckpointError: there is none in the folder.
        """
        if not (folder / FACTS_FILE).is_file():
            raise CheckpointError(f"{folder}: no {FACTS_FILE}, so there is no router. Train one and save it there")
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        router = cls(facts["widths"], facts["hidden_size"], facts["report"])
        router.net.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return router


class _Classifier(nn.Module):
    """Standardisation, then a linear layer, or two with a ReLU between them. Its first scores are all 0."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, width: int, hidden_size: int, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.hidden = nn.Linear(width, hidden_size) if hidden_size else None
        self.score = nn.Linear(hidden_size or width, size)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Concatenated states (N, D_1 + ... + D_K) -> scores (N, K)."""
        x = (states - self.mean) / self.std
        return self.score(x if self.hidden is None else torch.relu(self.hidden(x)))


def _concatenate(first_states: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([state.detach().float().cpu() for state in first_states], dim=-1)


def _read(store: FeatureStore) -> _Rows:
    """First states, nats, tokens and domains of all rows."""
    if len(store) < 2:
        raise DataError(f"a router needs at least two training rows, got {len(store)}. Add training data")
    items = [store[i] for i in range(len(store))]
    return _Rows(
        states=torch.stack([_concatenate([states[0] for states in item.states]) for item in items]),
        nats=torch.stack([-item.log_probs.sum(0) for item in items]).float(),
        tokens=torch.tensor([float(len(item.row.labels)) for item in items]),
        domains=[item.row.domain for item in items],
    )


def _folds(domains: Sequence[str], seed: int) -> list[list[int]]:
    """Rows in folds, each domain spread evenly over them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(domains), generator=generator).tolist()
    order.sort(key=lambda i: domains[i])  # stable: random within a domain
    size = min(NUM_FOLDS, len(domains))
    return [order[fold::size] for fold in range(size)]


def _start(rows: _Rows, candidate: Candidate, seed: int) -> _Classifier:
    """An untrained classifier with the standardisation of these rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _Classifier(rows.states.shape[1], candidate.hidden_size, rows.nats.shape[1])
    weights = rows.weights(torch.ones_like(rows.tokens))[:, None]
    mean = (weights * rows.states).sum(0)
    net.mean.copy_(mean)
    net.std.copy_((weights * (rows.states - mean).square()).sum(0).sqrt().clamp(min=1e-6))
    return net


def _fit(net: _Classifier, rows: _Rows, candidate: Candidate, steps: int) -> Iterator[None]:
    """L-BFGS on all rows. Yields after every STEPS_PER_SCORE steps.

    AdamW's first steps move all weights alike, signal or noise. On 50 synthetic rows with one informative number of ten,
    100 steps at 3e-3 got 10 to 14 of 40 new choices wrong, and L-BFGS none.
    """
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=STEPS_PER_SCORE, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = torch.stack([weight.square().sum() for weight in net.parameters() if weight.dim() == 2]).sum() / 2
        loss = _loss(net(rows.states), rows, candidate.target) + candidate.l2 * penalty
        loss.backward()
        return loss

    for _ in range(steps // STEPS_PER_SCORE):
        optimizer.step(closure)
        yield


def _loss(scores: torch.Tensor, rows: _Rows, target: str) -> torch.Tensor:
    """Every domain weighs the same."""
    log_p = scores.log_softmax(-1)  # (N, K)
    mean_nats = rows.nats / rows.tokens[:, None]
    if target == "regret":  # the measured quantity: nats per response token
        regret = (log_p.exp() * (mean_nats - mean_nats.amin(1, keepdim=True))).sum(1)
        return (rows.weights(rows.tokens) * regret).sum()
    if target == "soft":
        goal = (-rows.nats).softmax(-1)
    else:
        goal = nn.functional.one_hot(rows.nats.argmin(1), rows.nats.shape[1]).to(log_p)
    return -(rows.weights(torch.ones_like(rows.tokens)) * (goal * log_p).sum(1)).sum()


def _validate(rows: _Rows, folds: Sequence[Sequence[int]], candidate: Candidate, seed: int) -> list[_Score]:
    """The losses of the choices for held-out rows, after every STEPS_PER_SCORE steps."""
    nats = torch.zeros(2, MAX_STEPS // STEPS_PER_SCORE, len(rows.tokens))  # of the choice, and expected
    for fold in folds:
        held = set(fold)
        train, test = rows[[i for i in range(len(rows.tokens)) if i not in held]], rows[fold]
        net = _start(train, candidate, seed)
        for i, _ in enumerate(_fit(net, train, candidate, MAX_STEPS)):
            with torch.no_grad():
                scores = net(test.states)
            nats[0, i, fold] = test.nats.gather(1, scores.argmax(-1, keepdim=True))[:, 0]
            nats[1, i, fold] = (test.nats * scores.softmax(-1)).sum(1)
    means = (nats / rows.tokens * rows.weights(rows.tokens)).sum(-1)  # (2, number of scores)
    return [_Score(nll, expected, STEPS_PER_SCORE * (i + 1)) for i, (nll, expected) in enumerate(means.T.tolist())]


def router_choices(router: Router, store: FeatureStore) -> list[int]:
    """The specialist that the router chooses for each row."""
    return [router.choose([states[0] for states in store[i].states]) for i in range(len(store))]


def router_losses(router: Router, store: FeatureStore) -> list[RowLoss]:
    """The loss of each row under the specialist that the router chooses for it. No model runs."""
    losses = list(specialist_losses(store, [str(k) for k in range(len(router.widths))]).values())
    return [losses[k][i] for i, k in enumerate(router_choices(router, store))]


@torch.no_grad()
def first_states(model: UltraFuserForCausalLM, renderer: Renderer, chats: Sequence[Chat]) -> list[list[torch.Tensor]]:
    """For each conversation, K states (D_k) at the position that predicts the first token of the next answer."""
    # up to the last question: the beginning of an answer does not change the choice
    prompts = [chat[:-1] if chat and chat[-1]["role"] == "assistant" else chat for chat in chats]
    lengths = [max(map(len, renderer.prompt(prompt))) for prompt in prompts]
    out: list[list[torch.Tensor]] = [[] for _ in chats]
    for batch in length_batches(lengths, token_budget(model.device)):
        inputs = prompt_inputs(renderer, [prompts[i] for i in batch], model.device)
        mask = inputs["specialist_attention_mask"]
        states = model.specialist_states(inputs["specialist_input_ids"], mask)  # K x (B, T, D_k), padded on the left
        for b, i in enumerate(batch):
            out[i] = [specialist_states[b, -1].float().cpu() for specialist_states in states]
    return out


def route_by(router: Router, model: UltraFuserForCausalLM, renderer: Renderer) -> Callable[[Chat | str], str]:
    """The `choose` of `RoutedLM`: from a conversation, or text as one question, to a specialist's name."""

    def choose(prompt: Chat | str) -> str:
        chat: Chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return model.config.names[router.choose(first_states(model, renderer, [chat])[0])]

    return choose


# ---------------------------------------------------------------- behind lm-eval's interface


class SpecialistsLM(LM):
    """Several language models behind one interface. Each renders a conversation with its own template."""

    def __init__(self, lms: Mapping[str, LM]) -> None:
        super().__init__()
        self.lms = dict(lms)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval caches requests."""
        return "ultrafuser-chat"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as one string, which `ask` decodes."""
        return encode_chat(chat_history)


class RoutedLM(SpecialistsLM):
    """Sends each request to the language model that `choose` names for its messages, or for its text.

    `choose` is called once for each prompt. Without `remember` it is called for every request, as a server would, for
    timing.
    """

    def __init__(self, lms: Mapping[str, LM], choose: Callable[[Chat | str], str], *, remember: bool = True) -> None:
        super().__init__(lms)
        self.choose, self.remember = choose, remember
        self._names: dict[str, str] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers, each by the chosen specialist."""
        return self._ask("generate_until", requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods, each under the chosen specialist."""
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not possible: a whole text has no prompt by which to choose."""
        raise UltraFuserError("a router chooses by the prompt, and rolling log-likelihood has none. Use another task")

    def _ask(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        groups: dict[str, list[int]] = {}  # the requests of each specialist
        for i, request in enumerate(requests):
            context = request.args[0]
            if context not in self._names or not self.remember:
                messages = decode_chat(context)
                name = self.choose(context if messages is None else messages)
                if name not in self.lms:
                    raise UltraFuserError(f"the router chose {name!r}. There are: {', '.join(self.lms)}")
                self._names[context] = name
            groups.setdefault(self._names[context], []).append(i)
        out: list[Any] = [None] * len(requests)
        for name, rows in groups.items():
            for j, result in ask(self.lms[name], kind, [requests[i] for i in rows]):
                out[rows[j]] = result
                self.cache_hook.add_partial(kind, requests[rows[j]].args, result)
        return out


def ask(lm: LM, kind: str, requests: Sequence[Instance]) -> Iterator[tuple[int, Any]]:
    """Send requests to one language model, a few of similar length at a time. Yields (index, result) in any order."""
    order = sorted(range(len(requests)), key=lambda i: -len(str(requests[i].args[0])))
    for start in range(0, len(order), REQUESTS_PER_CALL):
        batch = order[start : start + REQUESTS_PER_CALL]
        yield from zip(batch, getattr(lm, kind)([_rendered(requests[i], lm) for i in batch]), strict=True)


def _rendered(request: Instance, lm: LM) -> Instance:
    """The request with its conversation as `lm` renders it. The beginning of an answer is continued."""
    context, *rest = request.args
    messages = decode_chat(context)
    if messages is None:
        return request
    out = copy.copy(request)
    has_answer = messages[-1]["role"] == "assistant"
    out.arguments = (lm.apply_chat_template(messages, add_generation_prompt=not has_answer), *rest)
    return out
