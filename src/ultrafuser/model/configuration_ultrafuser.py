"""The manifest of a fused checkpoint: its specialists and their sources, the gate, and how outputs are mixed."""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .errors import CheckpointError
from .manifest import SpecialistEntry, check_entry

MIXINGS = ("logits", "probabilities")
GATES = ("mlp", "static")


def specialist_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A specialist's configuration, rebuilt from its dictionary. It has no behaviour where only remote code knows the model."""
    fields = dict(fields)
    model_type = fields.pop("model_type")
    return AutoConfig.for_model(model_type, **fields) if model_type in CONFIG_MAPPING else PreTrainedConfig(**fields)


def _text_config(specialist: SpecialistEntry) -> PreTrainedConfig:
    return specialist_config(specialist["config"]).get_text_config()


def table_rows(specialist: SpecialistEntry) -> int:
    """Rows of a specialist's embedding table."""
    return specialist.get("table_rows") or _text_config(specialist).vocab_size


class UltraFuserConfig(PreTrainedConfig):
    """The manifest of a fused model.

    Args:
        specialists: one plain dictionary each, with the keys of `SpecialistEntry`.
        gate_type: `mlp`, the paper's gate, or `static`, the same weights at every token.
        gate_hidden_size: width of the gate's hidden layer (512 in the paper).
        mixing: `logits` (Eq. 1 of the paper) or `probabilities`.
        share_base: whether adapters on one base share its weights.
        vocab_size: tokens of the common tokenizer. Further rows of embedding tables are padding.

    Raises:
        CheckpointError: a repeated or unfit name, an unknown mixing or gate, a temperature that is not a positive number, or a
            vocab_size or a token that an embedding table does not reach. A field of another type.

    Source: section 3.1 and appendix B of arXiv 2403.08281.
    """

    model_type = "ultrafuser"
    has_no_defaults_at_init = True

    def __init__(
        self,
        specialists: Sequence[SpecialistEntry] | None = None,
        gate_type: str = "mlp",
        gate_hidden_size: int = 512,
        mixing: str = "probabilities",
        share_base: bool = True,
        vocab_size: int | None = None,
        end_token_id: int | None = None,
        masked_token_ids: Sequence[int] = (),
        date: str | None = None,
        **kwargs: Any,
    ) -> None:
        # a list of config objects would break save_pretrained, so the sub-configurations stay plain dictionaries
        self.specialists: list[SpecialistEntry] = copy.deepcopy(list(specialists or []))
        self.gate_type = gate_type
        self.gate_hidden_size = gate_hidden_size
        self.mixing = mixing
        self.share_base = share_base
        self.end_token_id = end_token_id
        self.masked_token_ids = list(masked_token_ids)
        self.date = date
        self.check()
        tables = [table_rows(specialist) for specialist in self.specialists]
        self.vocab_size = vocab_size if vocab_size is not None else min(tables, default=0)
        if any(rows < self.vocab_size for rows in tables):
            rows = min(tables)
            raise CheckpointError(f"vocab_size is {self.vocab_size}, but an embedding table has {rows} rows only")
        self._check_tokens(tables)
        kwargs.setdefault("tie_word_embeddings", False)  # the specialists tie their own
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raises CheckpointError: an unknown mixing or gate, names repeated or unfit for folders, a field of another type."""
        if self.mixing not in MIXINGS:
            raise CheckpointError(f"mixing is {self.mixing!r}, expected one of {', '.join(MIXINGS)}")
        if self.gate_type not in GATES:
            raise CheckpointError(f"gate_type is {self.gate_type!r}, expected one of {', '.join(GATES)}")
        if invalid := [name for name in self.names if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)]:
            raise CheckpointError(
                f"specialist name {invalid[0]!r}: expected letters, digits, '_' or '-', because it names a folder of the checkpoint"
            )
        if repeated := {name for name in self.names if self.names.count(name) > 1}:
            raise CheckpointError(f"specialists must have different names. Repeated: {', '.join(sorted(repeated))}")
        for name, temperature in zip(self.names, self.temperatures, strict=True):
            if not (type(temperature) in (int, float) and 0 < temperature < float("inf")):
                raise CheckpointError(f"specialist {name}: temperature is {temperature!r}, expected a number above 0")

        for specialist in self.specialists:
            check_entry(specialist)
        try:
            _ = self.date and datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"date is {self.date!r}, expected YYYY-MM-DD") from error

    def _check_tokens(self, tables: Sequence[int]) -> None:
        """Raises CheckpointError: a token that is no row of the tables."""
        tokens = [("end_token_id", self.end_token_id, self.vocab_size)]
        tokens += [("masked_token_ids", token, self.vocab_size) for token in self.masked_token_ids]
        for specialist, rows in zip(self.specialists, tables, strict=True):
            tokens.append((f"specialist {specialist['name']}: end_token_id", specialist.get("end_token_id"), rows))
        for key, token, rows in tokens:
            if token is not None and not (type(token) is int and 0 <= token < rows):
                raise CheckpointError(f"{key} has {token!r}, expected tokens from 0 to {rows - 1}")

    @property
    def names(self) -> list[str]:
        """The K names, in order."""
        return [specialist["name"] for specialist in self.specialists]

    @property
    def domains(self) -> list[str]:
        """The K domains, in order."""
        return [specialist.get("domain") or specialist["name"] for specialist in self.specialists]

    @property
    def chat_templates(self) -> list[str]:
        """The K chat templates, in order."""
        return [specialist["chat_template"] for specialist in self.specialists]

    @property
    def temperatures(self) -> list[float]:
        """The K temperatures, in order."""
        return [specialist.get("temperature", 1.0) for specialist in self.specialists]

    def set_temperatures(self, temperatures: Sequence[float]) -> None:
        """Raises CheckpointError: a temperature that is not a positive number."""
        for specialist, temperature in zip(self.specialists, temperatures, strict=True):
            specialist["temperature"] = temperature
        self.check()

    @property
    def ends(self) -> list[tuple[int, int] | None]:
        """For each specialist (the end of an answer for all, its own end token), or None where they are the same."""
        tokens = [specialist.get("end_token_id") for specialist in self.specialists]
        shared = self.end_token_id
        return [None if shared is None or token in (None, shared) else (shared, token) for token in tokens]

    @property
    def contexts(self) -> dict[str, int]:
        """The context in tokens of each specialist that has a limit."""
        configs = [config.get_text_config() for config in self.specialist_configs()]
        limits = [getattr(config, "max_position_embeddings", None) for config in configs]
        return {name: limit for name, limit in zip(self.names, limits, strict=True) if limit}

    @property
    def max_position_embeddings(self) -> int:
        """The smallest context of the specialists, in tokens."""
        return min(self.contexts.values(), default=2**31 - 1)

    # vLLM plans its memory and its parallelism by these. The layers of each specialist check their own again.
    @property
    def hidden_size(self) -> int:
        """Widths of the K last hidden states together, as vLLM passes them from the specialists to the gate."""
        return sum(_text_config(spec).hidden_size for spec in self.specialists)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the deepest specialist."""
        return max((_text_config(spec).num_hidden_layers for spec in self.specialists), default=0)

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of the first specialist."""
        return next((_text_config(spec).num_attention_heads for spec in self.specialists), 0)

    @property
    def num_key_value_heads(self) -> int:
        """Key-value heads of the first specialist."""
        first = next((_text_config(spec) for spec in self.specialists), None)
        return getattr(first, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of an attention head of the first specialist."""
        first = next((_text_config(spec) for spec in self.specialists), None)
        if first is None:
            return 0
        return getattr(first, "head_dim", None) or first.hidden_size // first.num_attention_heads

    def specialist_configs(self) -> list[PreTrainedConfig]:
        """K configuration objects, rebuilt from their dictionaries."""
        return [specialist_config(specialist["config"]) for specialist in self.specialists]

    def groups(self) -> list[list[int]]:
        """The indices of specialists that run as rows of one batch: adapters on the same base, loaded in the same way."""
        groups: dict[str, list[int]] = {}
        for k, specialist in enumerate(self.specialists):
            source = specialist["source"]
            shared = self.share_base and source.get("adapter") and not specialist.get("separate")
            key: list[Any] = [source["model"], source.get("revision"), source.get("gguf_file")]
            key += [specialist.get(field) for field in ("dtype", "device_map", "quantization")]
            groups.setdefault(repr(key) if shared else f"alone-{k}", []).append(k)
        return list(groups.values())

    def check_share(self, processes: int) -> None:
        """Check that each of the processes that share the specialists of one model has one to load.

        Raises:
            CheckpointError: there are fewer separate models than processes.
        """
        if processes > (count := len(self.groups())):
            raise CheckpointError(
                f"{processes} processes cannot share {count} separate model{'s' if count > 1 else ''} (adapters on one base count as "
                "one). Lower parallel.specialist, or set share_base=false"
            )
