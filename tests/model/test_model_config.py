"""UltraFuserConfig: round trips, defaults, and what it refuses."""

from __future__ import annotations

import json

import pytest

from tiny_models import VOCAB, tiny
from ultrafuser.errors import CheckpointError
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM


def spec(name, kind="llama", **changes):
    return {"name": name, "source": {"model": f"org/{name}"}, "config": tiny(kind, **changes).config.to_dict()}


def test_defaults():
    config = UltraFuserConfig([spec("a"), spec("b") | {"domain": "maths"}])
    assert (config.gate_hidden_size, config.mixing, config.share_base) == (512, "probabilities", True)
    assert config.names == ["a", "b"] and config.domains == ["a", "maths"]
    assert config.vocab_size == VOCAB and config.tie_word_embeddings is False


def test_survives_json_and_a_folder(tmp_path):
    config = UltraFuserConfig([spec("a"), spec("b", "gemma2")], mixing="logits", gate_hidden_size=7)
    config.save_pretrained(tmp_path)
    reloaded = UltraFuserConfig.from_pretrained(tmp_path)
    assert reloaded.names == config.names and (reloaded.mixing, reloaded.gate_hidden_size) == ("logits", 7)
    for loaded, saved in zip(reloaded.specialist_configs(), config.specialist_configs(), strict=True):
        assert loaded.to_dict() == saved.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "ultrafuser"
    assert [loaded.model_type for loaded in reloaded.specialist_configs()] == ["llama", "gemma2"]
    assert reloaded.specialist_configs()[1].final_logit_softcapping == 5.0


def test_its_dictionaries_are_its_own():
    entry_a = spec("a")
    config = UltraFuserConfig([entry_a])
    config.specialists[0]["name"] = config.specialists[0]["config"]["vocab_size"] = "changed"
    assert entry_a["name"] == "a" and entry_a["config"]["vocab_size"] == VOCAB


def test_vocabulary_is_the_smallest_table():
    config = UltraFuserConfig([spec("a"), spec("b", vocab_size=VOCAB + 8)])
    assert config.vocab_size == VOCAB
    assert UltraFuserConfig([spec("a")], vocab_size=50).vocab_size == 50
    with pytest.raises(
        CheckpointError, match=f"vocab_size is {VOCAB + 1}, but an embedding table has {VOCAB} rows only"
    ):
        UltraFuserConfig([spec("a")], vocab_size=VOCAB + 1)


def test_context_is_the_smallest():
    assert UltraFuserConfig([spec("a"), spec("b", "gpt2", n_positions=20)]).max_position_embeddings == 20
    assert UltraFuserConfig([spec("a", "bloom", hidden_size=32, n_head=4, n_layer=1)]).max_position_embeddings >= 64


def test_no_specialist():
    with pytest.raises(CheckpointError, match=r"at least one specialist, got none \(K = 0\)"):
        UltraFuserForCausalLM(UltraFuserConfig([]))


def test_repeated_names():
    with pytest.raises(CheckpointError, match="different names. Repeated: a, b"):
        UltraFuserConfig([spec("a"), spec("b"), spec("a"), spec("b"), spec("c")])


def test_unknown_mixing():
    with pytest.raises(CheckpointError, match="mixing is 'average', expected one of logits, probabilities"):
        UltraFuserConfig([spec("a")], mixing="average")


@pytest.mark.parametrize("name", ["", "../up", "a/b", "with space", ".hidden"])
def test_names_must_serve_as_folders(name):
    """A specialist's name becomes specialists/<name> in the checkpoint."""
    with pytest.raises(CheckpointError, match="name"):
        UltraFuserConfig([spec("a") | {"name": name}])
