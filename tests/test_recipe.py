"""Recipes: error messages, coercion by type, precedence, round trip, shipped files, the generated page."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from ultrafuser.errors import RecipeError
from ultrafuser.recipe import Recipe, dump_recipe, load_node, load_recipe
from ultrafuser.typed_yaml import DiscriminatedBy, Node

ROOT = Path(__file__).parents[1]
# comparison and synthesis recipes have tests of their own; recipes/zoo/ is read by scripts/train_specialist.py
OTHER_RECIPES = {"synth-served.yaml", "synth-tiny.yaml", "ultrachat2.yaml"}
SHIPPED = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.name not in OTHER_RECIPES)
TWO = """
specialists:
  - {name: text, model: some/text}
  - {name: math, model: some/math}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(source, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text
    return text


# --- Defaults, coercion, precedence.


def test_defaults(write):
    recipe = load_recipe(write(TWO))
    gate, joint = recipe.stages
    assert (gate.name, gate.steps, gate.samples_per_domain, gate.lr) == ("gate", 400, 64, 1e-3)
    assert (joint.name, joint.steps, joint.samples_per_domain, joint.lr) == ("joint", 1000, 32, 2e-4)
    assert (joint.specialists, joint.specialist_lr, joint.lora.target_modules) == ("lora", None, "all-linear")
    full = load_recipe(write(TWO), ["stages=[{name: joint, specialists: full}]"])
    assert full.stages[0].lr == 2e-5 and load_recipe(full.model_dump()) == full
    assert load_recipe(write(TWO), ["stages=[{name: joint, specialists: full, lr: 3e-6}]"]).stages[0].lr == 3e-6
    assert [specialist.domain for specialist in recipe.specialists] == ["text", "math"]
    assert (recipe.mixing, recipe.cache_features, recipe.balanced) == ("probabilities", "auto", True)


def test_yaml_scalars_take_the_type_of_their_field(write):
    recipe = load_recipe(
        write(
            """
            specialists:
              - {name: text, model: some/text, revision: no, gguf_file: 1e5, chat_template: null}
              - {name: on, model: 123, revision: 0010, domain: 2024-01-01, dtype: float16, device_map: auto}
            balanced: off
            cache_features: no
            report_to: [wandb, on]
            stages: [{name: gate, lr: 2e-5, steps: '7', weight_decay: 1}, joint]
            """
        )
    )
    text, on = recipe.specialists
    assert (text.revision, text.gguf_file, text.chat_template) == ("no", "1e5", None)
    assert (on.name, on.model, on.revision, on.domain) == ("on", "123", "0010", "2024-01-01")
    assert (on.dtype, on.device_map) == ("float16", "auto")
    assert (recipe.balanced, recipe.cache_features, recipe.report_to) == (False, False, ["wandb", "on"])
    assert (recipe.stages[0].lr, recipe.stages[0].steps, recipe.stages[0].weight_decay) == (2e-5, 7, 1.0)
    assert type(text.revision) is str


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), ("'auto'", "auto"), ("true", True), ("false", False), ("off", False)],
)
def test_cache_features(write, text, expected):
    assert load_recipe(write(TWO + f"cache_features: {text}")).cache_features is expected
    assert load_recipe(write(TWO), [f"cache_features={text}"]).cache_features is expected


def test_free_form_fields_keep_the_types_of_yaml(write):
    text = """
    specialists:
      - name: text
        model: some/text
        device_map: {model.embed: 0, lm_head: cpu}
        quantization: {bits: 4, double: true, scale: 2e-5, kind: nf4, skip: [no, '4', null], deep: {x: 1.5}}
    """
    specialist = load_recipe(write(text)).specialists[0]
    assert specialist.device_map == {"model.embed": 0, "lm_head": "cpu"}
    assert specialist.quantization == {
        "bits": 4,
        "double": True,
        "scale": 2e-5,
        "kind": "nf4",
        "skip": ["no", "4", None],
        "deep": {"x": 1.5},
    }


def test_a_mapping_keeps_its_own_types():
    quantization = {"bits": 4, "text": "2e-5", "flag": "no"}
    recipe = load_recipe({"specialists": [{"name": "a", "model": "b", "quantization": quantization}]})
    assert recipe.specialists[0].quantization == quantization


def test_bare_strings(write):
    recipe = load_recipe(write(TWO + "data: {train: [a.jsonl, {path: b, limit: 3}]}\nstages: [joint]"))
    assert [(source.path, source.limit, source.split) for source in recipe.data.train] == [
        ("a.jsonl", None, "train"),
        ("b", 3, "train"),
    ]
    assert [(stage.name, stage.steps) for stage in recipe.stages] == [("joint", 1000)]


def test_precedence(write):
    path = write(TWO + "seed: 1\nstages: [{name: gate, lr: 0.5, steps: 3}]")
    assert load_recipe(path).seed == 1
    recipe = load_recipe(path, ["seed=2", "seed=3", "stages.0.lr=2e-5"])
    assert (recipe.seed, recipe.stages[0].lr, recipe.stages[0].steps) == (3, 2e-5, 3)
    assert recipe.stages[0].samples_per_domain == 64


def test_overrides(write):
    recipe = load_recipe(
        write(TWO + "data: {train: [a.jsonl]}"),
        [
            "stages.gate.steps=10",
            "stages.joint.lora.r=4",
            "stages.1.lora.target_modules=[q_proj, v_proj]",
            "specialists.math.adapter=some/adapter",
            "specialists.math.revision=no",
            "specialists.text.quantization.load_in_4bit=true",
            "specialists.text.quantization.deep.scale=2e-5",
            "data.train.0.limit=10",
            "data.max_length=64",
            "gate.hidden_size=8",
            "output=a=b",
            "early_stop_patience=2",
        ],
    )
    assert (recipe.stages[0].steps, recipe.stages[1].lora.r) == (10, 4)
    assert recipe.stages[1].lora.target_modules == ["q_proj", "v_proj"]
    assert (recipe.specialists[1].adapter, recipe.specialists[1].revision) == ("some/adapter", "no")
    assert recipe.specialists[0].quantization == {"load_in_4bit": True, "deep": {"scale": 2e-5}}
    assert (recipe.data.train[0].path, recipe.data.train[0].limit) == ("a.jsonl", 10)
    assert (recipe.data.max_length, recipe.gate.hidden_size, recipe.output) == (64, 8, "a=b")
    assert recipe.early_stop_patience == 2


def test_overrides_replace_whole_values_and_reset_to_null(write):
    recipe = load_recipe(
        write(TWO + "save_every: 5"),
        ["save_every=null", "stages=[joint]", "stages.joint.steps=2", "data.train=[x, y]"],
    )
    assert recipe.save_every is None
    assert [(stage.name, stage.steps) for stage in recipe.stages] == [("joint", 2)]
    assert [source.path for source in recipe.data.train] == ["x", "y"]


def test_overrides_leave_the_given_mapping_alone():
    source = {"specialists": [{"name": "a", "model": "b"}], "stages": ["gate"]}
    load_recipe(source, ["stages.gate.steps=3", "specialists.a.revision=x"])
    assert source == {"specialists": [{"name": "a", "model": "b"}], "stages": ["gate"]}


def test_paths_beside_the_recipe(write, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").touch()
    (tmp_path / "my.jinja").touch()
    (tmp_path / "plain").mkdir()
    path = write(
        """
        specialists:
          - {name: a, model: rows, chat_template: my.jinja}
          - {name: b, model: hub/id, chat_template: plain, adapter: 'package:some/file'}
          - {name: c, model: hub/c, chat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'}
        data: {train: [rows/a.jsonl, 'rows/*.jsonl', 'none/*.jsonl', hub/data]}
        output: rows
        """
    )
    recipe = load_recipe(path, ["data.validation=[rows/a.jsonl]"])
    a, b, c = recipe.specialists
    assert (a.model, a.chat_template) == (str(tmp_path / "rows"), str(tmp_path / "my.jinja"))
    assert (b.model, b.chat_template, b.adapter) == ("hub/id", "plain", "package:some/file")
    assert c.chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert [source.path for source in recipe.data.train] == [
        str(tmp_path / "rows" / "a.jsonl"),
        str(tmp_path / "rows" / "*.jsonl"),
        "none/*.jsonl",
        "hub/data",
    ]
    assert recipe.data.validation[0].path == "rows/a.jsonl"  # an override is seen from the working folder
    assert recipe.output == "rows"


# --- Writing.


def test_round_trip(write):
    recipe = load_recipe(
        write(TWO),
        [
            "specialists.text.quantization={a: '2e-5', b: 'no', c: 2e-5, d: 1e+16, e: [null, '~'], f: 010}",
            "specialists.text.chat_template='{{ é }}\n  [x]\t'",
            "specialists.math.revision='null'",
            "specialists.math.gguf_file=1_000",
            "data.train=[{path: a, domain: 'true', limit: 3}]",
            "stages.joint.specialists=full",
            "stages.joint.specialist_lr=1e-6",
            "cache_features=true",
        ],
    )
    text = dump_recipe(recipe)
    assert load_recipe(write(text)) == recipe
    assert dump_recipe(load_recipe(write(text))) == text
    assert recipe.specialists[0].quantization["a"] == "2e-5"
    assert recipe.specialists[1].revision == "null"


def test_round_trip_of_a_fused_start(write):
    recipe = load_recipe({"fused": "runs/x/fused", "stages": ["gate"]})
    assert load_recipe(write(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes(path, write):
    recipe = load_recipe(path)
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_the_papers_values():
    recipe = load_recipe(ROOT / "recipes" / "paper.yaml")
    gate, joint = recipe.stages
    assert (gate.steps, gate.samples_per_domain, gate.lr, gate.schedule) == (400, 64, 2e-5, "cosine")
    assert (joint.steps, joint.samples_per_domain, joint.lr, joint.schedule) == (5000, 32, 2e-5, "cosine")
    assert (joint.specialists, recipe.mixing, recipe.balanced) == ("full", "logits", True)


def test_overrides_in_comments_of_shipped_recipes():
    text = (ROOT / "recipes" / "paper.yaml").read_text()
    overrides = re.findall(r'^#\s+(?:"([\w.]+=.+)"|([\w.]+=\S+))', text, re.MULTILINE)
    assert len(overrides) == 4
    for quoted, bare in overrides:
        load_recipe(ROOT / "recipes" / "paper.yaml", [quoted or bare])


# --- Errors.


def test_file_errors(tmp_path, write):
    assert "none.yaml: no such file" in message(tmp_path / "none.yaml")
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"seed: \xff")
    assert "byte 6 is not UTF-8" in message(tmp_path / "binary.yaml")
    assert "expected a mapping at the top" in message(write("[1, 2]"))
    assert "no specialists" in message(write(""))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "seed: 1\ngate: [1",
            "line 2, column 9: not valid YAML: while parsing a flow sequence, expected ',' or ']'",
        ),
        ("seed: 1\n\tgate: 1", "line 2, column 1: not valid YAML"),
        ("seed: 1\nseed: 2", "line 2, column 1: not valid YAML: the key 'seed' is given twice"),
        (
            "gate: {hidden_size: 1, hidden_size: 2}",
            "column 24: not valid YAML: the key 'hidden_size' is given twice",
        ),
        ("? [1]\n: 2", "a key must be text"),
        (
            "seed: !!python/object:os.system 1",
            "tag 'tag:yaml.org,2002:python/object:os.system' is not supported",
        ),
        ("seed: !!int x", "'x' is not a number"),
        ("data: &a {train: [*a]}", "alias inside its own anchor"),
        ("seed: *a", "undefined alias"),
        ("seed: 1\n---\nseed: 2", "expected a single document"),
        ("seed: \x00", "not valid YAML: "),
    ],
)
def test_yaml_errors(write, text, words):
    error = message(write(text))
    assert "recipe.yaml: " in error and words in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "stages: [{name: gate, learning_rate: 1}]",
            "stages.0.learning_rate: unknown key. Did you mean 'lr'? Known: name",
        ),
        (
            "mixin: logits",
            "recipe.yaml: mixin: unknown key. Did you mean 'mixing'? Known: specialists, fused, ",
        ),
        ("data: {train: [{path: x, limt: 1}]}", "data.train.0.limt: unknown key. Did you mean 'limit'?"),
        ("stages: [{name: gate, num_steps: 1}]", "stages.0.num_steps: unknown key. Did you mean 'steps'?"),
        ("qqq: 1", "recipe.yaml: qqq: unknown key. Known: specialists"),
        ("seed: x\nqqq: 1", "qqq: unknown key"),
        ("seed: x", "recipe.yaml: seed: got 'x', expected whole number >= 0"),
        ("seed: 1.5", "seed: got 1.5, expected whole number"),
        ("seed: -1", "seed: got -1, expected whole number >= 0"),
        ("seed: null", "seed: got null, expected whole number"),
        ("stages: [{name: gate, lr: fast}]", "stages.0.lr: got 'fast', expected number > 0"),
        ("stages: [{name: gate, lr: nan}]", "stages.0.lr: got 'nan', expected number > 0"),
        ("stages: [{name: gate, lr: 0}]", "stages.0.lr: got 0, expected number > 0"),
        ("stages: [{name: gate, steps: 0}]", "stages.0.steps: got 0, expected whole number > 0"),
        ("stages: [{name: gate, warmup_ratio: 2}]", "warmup_ratio: got 2, expected number >= 0 and <= 1"),
        (
            "stages: [{name: joint, lora: {target_modules: 3}}]",
            "target_modules: got 3, expected all-linear or list of text",
        ),
        ("stages: [gates]", "stages.0.name: got 'gates', expected gate or joint"),
        ("stages: [{lr: 1}]", "stages.0.name: missing, expected gate or joint"),
        ("stages: joint", "stages: got 'joint', expected list"),
        ("mixing: logit", "mixing: got 'logit', expected logits or probabilities"),
        ("dtype: half", "dtype: got 'half', expected auto or float32 or bfloat16 or float16"),
        ("cache_features: maybe", "cache_features: got 'maybe', expected auto or true or false"),
        ("balanced: [" + "x, " * 40 + "]", "..., expected true or false"),
        ("gate: 512", "gate: got 512, expected mapping"),
        ("report_to: wandb", "report_to: got 'wandb', expected list of text"),
        ("stages: []", "'stages' is empty, expected at least one of gate and joint"),
        ("stages: [gate, joint, gate]", "'stages' has two items named 'gate'"),
        (
            "stages: [{name: gate, specialist_lr: 1}]",
            "stages.0.specialist_lr: unknown key for name 'gate'. 'joint' would take it. Known: name, steps, ",
        ),
        (
            "stages: [{name: gate, specialists: full}]",
            "stages.0.specialists: unknown key for name 'gate'. 'joint' would take it. Known: name, steps, ",
        ),
        ("fused: some/folder", "got both 'specialists' and 'fused'"),
    ],
)
def test_wrong_values(write, text, words):
    assert words in message(write(TWO + text))


@pytest.mark.parametrize(
    ("specialists", "words"),
    [
        ("[]", "no specialists. List at least one under 'specialists' or give a 'fused' folder"),
        ("[{name: a, model: x}, {name: a, model: y}]", "'specialists' has two items named 'a'"),
        ("[{name: 1a, model: x}]", "specialists.0.name: got '1a', expected a letter followed by"),
        ("[{name: a.b, model: x}]", "specialists.0.name: got 'a.b', expected a letter followed by"),
        ("[{name: a}]", "specialists.0.model: missing, expected text"),
        (
            "[{name: a, model: x, device_map: [1]}]",
            "specialists.0.device_map: got [1], expected text or mapping or null",
        ),
        (
            "[{name: a, model: x, quantization: 4bit}]",
            "specialists.0.quantization: got '4bit', expected mapping or null",
        ),
        ("{a: x}", "specialists: got {'a': 'x'}, expected list"),
        ("[a]", "specialists.0: got 'a', expected mapping"),
    ],
)
def test_wrong_specialists(write, specialists, words):
    assert words in message(write(f"specialists: {specialists}"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.lr", "expected KEY=VALUE, e.g. stages.0.lr=2e-5"),
        ("=3", "expected KEY=VALUE"),
        ("stages..lr=3", "expected KEY=VALUE"),
        ("stages.0.lrr=3", "stages.0.lrr: unknown key. Did you mean 'lr'? Known: name, steps"),
        ("mixin=logits", "mixin: unknown key. Did you mean 'mixing'?"),
        ("stages.2.lr=3", "stages: index 2 is out of range, the last index is 1"),
        ("data.train.0.limit=3", "data.train: index 0 is out of range, the list is empty"),
        ("stages.gat.lr=3", "stages: no item named 'gat'. Did you mean 'gate'? Known: gate, joint"),
        ("specialists.code.model=x", "specialists: no item named 'code'. Known: text, math"),
        ("seed.x=3", "seed: expected whole number >= 0, so nothing inside it can be set"),
        (
            "specialists.0.model.x=3",
            "specialists.0.model: expected text (here 'some/text'), so nothing inside",
        ),
        ("seed=[1", "override 'seed=[1': line 1, column 3: not valid YAML"),
        (
            "specialists.0.chat_template={{ x }}",
            "a key must be text. Put quotes around text that holds braces",
        ),
        ("seed=x", "override 'seed=x': seed: got 'x', expected whole number >= 0"),
        ("stages.joint.lr=-1", "override 'stages.joint.lr=-1': stages.1.lr: got -1, expected number > 0"),
        ("stages=[gates]", "override 'stages=[gates]': stages.0.name: got 'gates'"),
        ("output=", "output: got null, expected text"),
        ("fused=x", "recipe.yaml with fused=x: got both 'specialists' and 'fused'"),
        (
            "stages.gate.specialists=full",
            "'stages.gate.specialists=full': stages.0.specialists: unknown key for name 'gate'. 'joint' would take it.",
        ),
    ],
)
def test_wrong_overrides(write, override, words):
    assert words in message(write(TWO), override)


def test_an_override_is_not_blamed_for_the_file(write):
    assert "recipe.yaml: seed: got 'x'" in message(write(TWO + "seed: x"), "mixing=logits")


def test_wrong_mappings():
    assert "recipe: 1: " not in message({1: 2, "fused": "x"})
    assert "recipe: specialists.0.revision: got 3, expected text or null" in message(
        {"specialists": [{"name": "a", "model": "b", "revision": 3}]}
    )


# --- Unions of nodes.


class Local(Node):
    endpoint: Literal["local"] = Field(description="Run in this process.")
    model: str = Field(description="A folder.")
    limit: int = Field(default=1, description="A limit.")


class Address(Node):
    shorthand: ClassVar[str | None] = "url"

    url: str = Field(description="An address.")
    port: int = Field(default=80, description="A port.")


class Served(Node):
    endpoint: Address = Field(description="An address.")
    limit: int = Field(default=2, description="A limit.")


class Models(Node):
    models: list[Annotated[Local | Served, DiscriminatedBy("endpoint")]] = Field(description="The models.")


def test_one_node_of_a_union_takes_all_other_values():
    tree = load_node(Models, {"models": [{"endpoint": "local", "model": "x"}, {"endpoint": "http://host"}]})
    assert [type(model) for model in tree.models] == [Local, Served]
    assert load_node(Models, tree.model_dump()) == tree
    override = load_node(Models, {"models": [{"endpoint": "http://host"}]}, ["models.0.endpoint.port=8000"])
    assert override.models[0].endpoint.port == 8000


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (
            [{"endpoint": "http://host", "model": "x"}],
            "models.0.model: unknown key for endpoint 'others'. 'local' would",
        ),
        (
            [{"endpoint": "local", "modl": "x"}],
            "models.0.modl: unknown key. Did you mean 'model'? Known: endpoint, mod",
        ),
        ([{"limit": 3}], "models.0.endpoint: missing, expected local or mapping"),
        (["local"], "models.0: got 'local', expected mapping"),
    ],
)
def test_wrong_values_in_a_union(models, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        load_node(Models, {"models": models})


def test_a_union_is_described_field_by_field(recipe_docs):
    fields = {field.path: field for field in recipe_docs.describe(Models)}
    assert list(fields) == [
        "models",
        "models[].endpoint",
        "models[].endpoint.url",
        "models[].endpoint.port",
        "models[].model",
        "models[].limit",
    ]
    assert fields["models"].kind == "list"
    assert fields["models[].endpoint"].kind == "local or mapping"
    assert fields["models[].endpoint"].description == "`local`: Run in this process. `others`: An address."
    assert fields["models[].model"].description == "`local`: A folder."
    assert (fields["models[].limit"].default, fields["models[].limit"].description) == (
        "local: 1, others: 2",
        "A limit.",
    )


# --- The package and its pages.


def test_every_field_is_described(recipe_docs):
    fields = list(recipe_docs.describe(Recipe))
    assert len({path for path, *_ in fields}) == len(fields) > 50
    for path, kind, default, description in fields:
        assert kind and default and "|" not in kind, path
        assert description[-1] == "." and len(description) > 10, path
    table = {path: (kind, default) for path, kind, default, _ in fields}
    assert table["stages[].lr"] == ("number > 0", "gate: 0.001, joint: 0.0002, outcome: 0.0003")
    assert table["specialists[].domain"] == ("text", "its name")
    assert table["specialists[].model"] == ("text", "required")
    assert table["cache_features"] == ("auto or true or false", "auto")
    assert table["stages"] == ("list", "[gate, joint]")


@pytest.fixture
def recipe_docs():
    spec = importlib.util.spec_from_file_location("recipe_docs", ROOT / "scripts" / "recipe_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(recipe_docs):
    for path, root in recipe_docs.PAGES.items():
        page = path.read_text(encoding="utf-8")
        assert recipe_docs.render(page, root, path) == page, "run: python scripts/recipe_docs.py"


def test_the_page_is_checked_and_written(recipe_docs, tmp_path, monkeypatch):
    page = tmp_path / "recipes.md"
    recipe_docs.PAGES = {page: Recipe}
    page.write_text(f"a\n{recipe_docs.START}\nold\n{recipe_docs.END}\nb\n")
    monkeypatch.setattr(sys, "argv", ["recipe_docs.py", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        recipe_docs.main()
    monkeypatch.setattr(sys, "argv", ["recipe_docs.py"])
    recipe_docs.main()
    assert "| `seed` | whole number >= 0 | 0 |" in page.read_text() and "\nold\n" not in page.read_text()
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="expected the markers"):
        recipe_docs.main()


def test_examples_on_the_page(write):
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for example in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        assert isinstance(load_recipe(write(example)), Recipe)
    recipe, *overrides = re.search(r"ultrafuser train (.*)", page)[1].split()
    load_recipe(ROOT / recipe, overrides)
    ablations = re.findall(r"^\| `(\S+=\S+)` \|", page, re.MULTILINE)
    assert len(ablations) == 4
    for override in ablations:
        load_recipe(ROOT / recipe, [override])


def test_recipes_import_no_torch():
    code = "import sys, ultrafuser.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
